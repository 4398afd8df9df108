"""Generated data sets as seqio reads them, on records written by hand: ids, order, hosts, vocabularies, refusals."""

import json

import numpy as np
import pytest

from distillspec_jax.data import eval_set, generated, lookup, pipeline, task_info, vocabularies
from distillspec_jax.data.host_tensorflow import seqio, tf
from distillspec_jax.types import ConfigError

VOCABULARY = seqio.ByteVocabulary()
TARGETS = {f"made up {i}": [(7 * i + j) % 250 + 3 for j in range(1 + i % 5)] + [1] * (i % 3 > 0) for i in range(11)}
SIZES = (4, 4, 3)  # records of each shard


def record(number):
  text, ids = list(TARGETS.items())[number]
  inputs = [ord(letter) + 3 for letter in text] + [1]
  return generated.Record(text, "a reference", VOCABULARY.decode(ids), inputs, ids, ids[-1] == 1, number, 0)


def write(folder, *, finished=True, **settings):
  """A data set for the task `numbers`, by hand."""
  shards = generated.Shards(folder, "train", len(SIZES))
  for index, size in enumerate(SIZES):
    first = sum(SIZES[:index])
    shards.write(index, map(record, range(first, first + size)), dict.fromkeys(generated.COUNTS, size))
  vocabularies.save(VOCABULARY, folder / "vocabulary")
  settings = {
    "task": "numbers", "split": "train", "prompt": None, "input_length": 12, "target_length": 6,
    "vocabulary": generated.fingerprint(VOCABULARY), **settings,
  }  # fmt: skip
  manifest = {
    "settings": settings, "where": {"model": "the_model", "draft": None, "data_dir": None}, "examples": sum(SIZES),
    "prompts": "-", "shards": len(SIZES), "finished": finished, "totals": shards.finish(),
  }  # fmt: skip
  generated.write_manifest(folder, manifest)
  return f"generated:{folder}"


@pytest.fixture(scope="module")
def made(numbers, tmp_path_factory):
  return write(tmp_path_factory.mktemp("made"))


def ids_of(dataset):
  return [(tuple(one["inputs"]), tuple(one["targets"])) for one in dataset.as_numpy_iterator()]


EXPECTED = [(tuple(record(i).input_ids), tuple(record(i).target_ids)) for i in range(sum(SIZES))]


def test_the_ids_come_as_they_were_written(made):
  tasks = lookup.find_tasks(made, "train", lookup.Changes(VOCABULARY))
  ((task, rate),) = tasks.values()
  assert list(tasks) == ["generated_numbers"] and rate == 1.0
  assert ids_of(task.get_dataset(None, "train", shuffle=False)) == EXPECTED
  shuffled = [ids_of(task.get_dataset(None, "train", shuffle=True, seed=seed)) for seed in (0, 0, 1)]
  assert shuffled[0] == shuffled[1] != shuffled[2] and sorted(shuffled[0]) == sorted(shuffled[2]) == sorted(EXPECTED)
  assert task_info.of(made).input_length == 12 and task_info.of(made).target_length == 6


@pytest.mark.parametrize("hosts", [2, 5])
def test_hosts_share_files_or_examples(made, hosts):
  """Two hosts share three files; five hosts share the examples."""
  ((task, _),) = lookup.find_tasks(made, "train").values()
  shards = [seqio.ShardInfo(index, hosts) for index in range(hosts)]
  parts = [ids_of(task.get_dataset(None, "train", shuffle=False, shard_info=shard)) for shard in shards]
  assert all(parts) and sorted(sum(parts, [])) == sorted(EXPECTED)


def test_batches_count_what_was_written_and_an_eos_only_where_the_model_ended(made):
  config = pipeline.DataConfig(made, batch_size=11, input_length=12, target_length=4, shuffle=False)
  batch = next(pipeline.train_batches(config))
  for row, (inputs, targets) in enumerate(EXPECTED):
    np.testing.assert_array_equal(batch["encoder_input_tokens"][row], (list(inputs) + [0] * 12)[:12])
    np.testing.assert_array_equal(batch["decoder_target_tokens"][row], (list(targets) + [0] * 4)[:4])
    assert batch["decoder_loss_weights"][row].sum() == min(len(targets), 4)


def test_seqio_reads_the_folder_without_this_package(made):
  source = seqio.TfdsDataSource("generated:1.0.0", tfds_data_dir=made.removeprefix("generated:"), splits=["train"])
  found = list(source.get_dataset("train", shuffle=False).as_numpy_iterator())
  assert sorted(one["example"] for one in found) == list(range(11))
  for one in found:
    expected = record(int(one["example"]))
    assert one["inputs"].decode() == expected.inputs and one["reference"].decode() == expected.reference
    assert one["targets"].decode() == expected.targets and bool(one["ended"]) == expected.ended and one["sample"] == 0
    assert one["input_ids"].tolist() == expected.input_ids and one["target_ids"].dtype == np.int32


def test_other_splits_are_the_tasks_own(made):
  own = eval_set.eval_examples("numbers", "test", 5, 12, 6, 0)
  found = eval_set.eval_examples(made, "test", 5, 12, 6, 0, lookup.Changes(VOCABULARY))
  np.testing.assert_array_equal(found.encoder_input_tokens, own.encoder_input_tokens)
  np.testing.assert_array_equal(found.decoder_target_tokens, own.decoder_target_tokens)
  assert found.task == ("numbers",) * 5
  with pytest.raises(ConfigError, match="no split 'validation'"):
    lookup.find_tasks(made, "validation")


def test_a_name_of_its_own_for_mixtures(made):
  folder = made.removeprefix("generated:")
  try:
    generated.register("numbers_of_the_model", folder)
    seqio.MixtureRegistry.add("made_and_own", [("numbers_of_the_model", 2), ("numbers", 1)])
    tasks = lookup.find_tasks("made_and_own", "train", lookup.Changes(VOCABULARY))
    assert {name: rate for name, (_, rate) in tasks.items()} == {"numbers": 1.0, "numbers_of_the_model": 2.0}
    assert sorted(ids_of(tasks["numbers_of_the_model"][0].get_dataset(None, "train"))) == sorted(EXPECTED)
    other = lookup.find_tasks("numbers_of_the_model", "train", lookup.Changes(seqio.ByteVocabulary(extra_ids=7)))
    with pytest.raises(ConfigError, match="0 extra ids, the model's has .* and 7"):
      other["numbers_of_the_model"][0].get_dataset(None, "train")
  finally:
    seqio.MixtureRegistry.remove("made_and_own")
    seqio.TaskRegistry.remove("numbers_of_the_model")


def test_another_vocabulary_or_prompt_is_refused(made, tmp_path):
  with pytest.raises(ConfigError, match="0 extra ids, the model's has .* and 7"):
    lookup.find_tasks(made, "train", lookup.Changes(seqio.ByteVocabulary(extra_ids=7)))
  with pytest.raises(ConfigError, match="'sum: {inputs}' cannot be had"):
    lookup.find_tasks(made, "train", lookup.Changes(prompt="sum: {inputs}"))
  prompted = write(tmp_path, prompt="sum: {inputs}")
  assert lookup.find_tasks(prompted, "train", lookup.Changes(prompt="sum: {inputs}"))
  found = eval_set.eval_examples(prompted, "test", 2, 20, 6, 0)
  assert all(text["inputs"].startswith("sum: numbers in") for text in found.texts)


def test_evaluation_only_stays_so(numbers, tmp_path, monkeypatch):
  monkeypatch.setitem(task_info._KNOWN, "numbers", task_info.TaskInfo(evaluation_only=True))
  with pytest.raises(ConfigError, match="is for evaluation only"):
    lookup.refuse_training(write(tmp_path))


def test_what_is_not_there_or_not_whole_is_one_line(numbers, tmp_path):
  def refused(match, name):
    with pytest.raises(ConfigError, match=match) as caught:
      lookup.find_tasks(name, "train")
    assert "\n" not in str(caught.value)

  refused("no generated targets in .*nowhere", f"generated:{tmp_path / 'nowhere'}")
  refused("are not finished: run generate_targets again as before", write(tmp_path / "begun", finished=False))
  name = write(tmp_path / "cut")
  shards = generated.Shards(tmp_path / "cut", "train", len(SIZES))
  shards.path(1).write_bytes(shards.path(1).read_bytes()[:-1])
  refused("damaged, .*00001-of-00003 is not as it was written", name)
  shards.path(1).unlink()
  refused("damaged", name)
  (tmp_path / "cut" / "manifest.json").write_text('{"sett')
  refused("manifest.json is damaged", name)
  (tmp_path / "cut" / "manifest.json").write_text(json.dumps({"files": {}}))
  refused("is not of generated targets", name)


def test_the_same_record_has_the_same_bytes_and_damage_is_seen(tmp_path):
  assert record(3).serialize() == record(3).serialize() != record(4).serialize()
  parsed = tf.train.Example.FromString(record(3).serialize()).features.feature
  assert list(parsed["target_ids"].int64_list.value) == record(3).target_ids
  shards = generated.Shards(tmp_path, "train", 2)
  counts = dict.fromkeys(generated.COUNTS, 3)
  assert not shards.is_whole(0) and not shards.is_damaged(0)
  shards.write(0, map(record, range(3)), counts)
  assert shards.is_whole(0) and not shards.is_damaged(0) and not shards.is_whole(1)
  content = bytearray(shards.path(0).read_bytes())
  content[20] ^= 1
  shards.path(0).write_bytes(content)
  assert shards.is_damaged(0) and not shards.is_whole(0)
  with pytest.raises(RuntimeError):
    shards.write(1, (fail() if i else record(i) for i in range(3)), counts)
  assert not shards.path(1).exists() and not shards.is_damaged(1)


def fail():
  raise RuntimeError("killed")
