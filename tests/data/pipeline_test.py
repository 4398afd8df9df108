"""Batches: every example once an epoch, whatever the hosts; exact resumption; fixed evaluation sets; errors."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from distillspec_jax.data import lookup, pipeline
from distillspec_jax.data.eval_set import eval_examples
from distillspec_jax.types import ConfigError

S, T = 12, 10
pytestmark = pytest.mark.usefixtures("numbers")


def config(task="numbers", batch_size=5, **changes):
  return pipeline.DataConfig(task, batch_size, S, T, **changes)


def names_of(batch):
  """The targets' texts: ids are byte + 3, 1 is EOS, 0 padding."""
  return ["".join(chr(i - 3) for i in row if i > 2) for row in batch["decoder_target_tokens"]]


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_features():
  batch = next(pipeline.train_batches(config(shuffle=False)))
  text = "numbers0"
  ids = [ord(c) + 3 for c in text] + [1]
  assert set(batch) == {"encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"}
  assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}
  assert batch["decoder_target_tokens"][0].tolist() == ids + [0]
  assert batch["decoder_input_tokens"][0].tolist() == [0] + ids
  assert batch["decoder_loss_weights"][0].tolist() == [1] * 9 + [0]
  assert batch["encoder_input_tokens"].shape == (5, S)


def test_cut_sequences_have_no_eos():
  batch = next(pipeline.train_batches(pipeline.DataConfig("numbers", 2, S, 4, shuffle=False)))
  assert names_of(batch) == ["numb", "numb"]
  assert (batch["decoder_loss_weights"] == 1).all() and (batch["decoder_target_tokens"] > 1).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_example_once(shuffle):
  seen = [n for batch in take(pipeline.train_batches(config(shuffle=shuffle)), 10) for n in names_of(batch)]
  epochs = [seen[:23], seen[23:46]]
  assert all(sorted(epoch) == sorted(f"numbers{i}" for i in range(23)) for epoch in epochs)
  assert (epochs[0] != epochs[1]) == shuffle


def test_the_order_is_of_the_seed():
  first = [take(pipeline.train_batches(config(seed=seed)), 2) for seed in (0, 0, 1)]
  assert all(map(same, first[0], first[1]))
  assert not all(map(same, first[0], first[2]))


@pytest.mark.parametrize(
  ("task", "batch_size", "places"),
  [
    ("numbers", 4, (0, 5, 6)),  # the sixth batch holds the end of the first epoch
    ("numbers", 31, (1,)),  # every batch is more than an epoch
    ("both", 5, (4,)),
  ],
)
def test_going_on_gives_exactly_the_next_batches(task, batch_size, places):
  whole = pipeline.train_batches(config(task, batch_size))
  batches, states = [], [whole.state()]
  for _ in range(max(places) + 2):
    batches.append(next(whole))
    states.append(json.loads(json.dumps(whole.state())))
  for at in places:
    resumed = pipeline.train_batches(config(task, batch_size), place=states[at])
    assert resumed.state() == states[at]
    assert all(map(same, take(resumed, len(batches) - at), batches[at:]))


@pytest.mark.parametrize("hosts", [1, 2, 3])
@pytest.mark.parametrize("task", ["numbers", "both"])
def test_hosts_together_have_the_batches_of_one(hosts, task):
  each = [take(pipeline.train_batches(config(task, 6), None, h, hosts), 5) for h in range(hosts)]
  for batch, *parts in zip(take(pipeline.train_batches(config(task, 6)), 5), *each, strict=True):
    assert same({name: np.concatenate([part[name] for part in parts]) for name in batch}, batch)


def test_rows_are_those_asked_for_and_a_place_serves_any_number_of_hosts():
  whole = pipeline.train_batches(config(batch_size=6))
  one = pipeline.train_batches(config(batch_size=6), None, 1, 2, rows=np.array([1, 4, 5]))
  for _ in range(5):  # past an epoch's end
    batch, own = next(whole), next(one)
    assert same({name: value[[1, 4, 5]] for name, value in batch.items()}, own)
  assert one.state() == whole.state()
  place = json.loads(json.dumps(one.state()))
  following = next(whole)
  for hosts in (1, 3):
    parts = [next(pipeline.train_batches(config(batch_size=6), None, h, hosts, place)) for h in range(hosts)]
    assert same({name: np.concatenate([part[name] for part in parts]) for name in following}, following)


def test_a_place_of_before_there_were_shards_is_taken():
  whole = pipeline.train_batches(config(batch_size=6))
  next(whole)
  place = {name: value for name, value in whole.state().items() if name != "host_shards"}
  assert same(next(pipeline.train_batches(config(batch_size=6), place=place)), next(whole))


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_shards_have_no_doubles_or_losses(hosts):
  sharded = config(batch_size=6, host_shards=True)
  each = [take(pipeline.train_batches(sharded, None, h, hosts), 5) for h in range(hosts)]
  assert all(len(batch["encoder_input_tokens"]) == 6 // hosts for host in each for batch in host)
  epochs = []
  for index, host in enumerate(each):
    size = len(range(index, 23, hosts))
    seen = [n for batch in host for n in names_of(batch)]
    assert len(seen) == 30 // hosts >= size
    epochs += seen[:size]
    assert set(seen[size:]) <= set(seen[:size])  # the next epoch of the same share
  assert sorted(epochs) == sorted(f"numbers{i}" for i in range(23))


def test_one_hosts_place_in_its_shard_serves_every_host():
  """A checkpoint written by host 0 alone: the hosts' epochs have different lengths (23 examples on 2 hosts)."""
  make = lambda host, place=None: pipeline.train_batches(config("numbers", 6, host_shards=True), None, host, 2, place)
  zero, one = make(0), make(1)
  take(zero, 8), take(one, 8)
  place = json.loads(json.dumps(zero.state()))
  assert all(map(same, take(make(1, place), 2), take(one, 2)))
  assert all(map(same, take(make(0, place), 2), take(zero, 2)))


def test_evaluation_sets():
  a = eval_examples("numbers", "test", 5, S, T, seed=3)
  b = eval_examples("numbers", "test", 5, S, T, seed=3)
  assert np.array_equal(a.encoder_input_tokens, b.encoder_input_tokens) and a.texts == b.texts
  assert a.encoder_input_tokens.shape == (5, S) and a.decoder_target_tokens.shape == (5, T) and len(a) == 5
  assert len({t["targets"] for t in a.texts}) == 5
  assert [t["targets"] for t in a.texts] == names_of({"decoder_target_tokens": a.decoder_target_tokens})
  assert a.texts[0]["inputs"].startswith("numbers in ")  # longer than S with its EOS, still whole
  assert len(eval_examples("numbers", "test", 100, S, T)) == 9
  mixed = eval_examples("both", "train", 9, S, T)
  assert Counter(mixed.task) == {"letters": 5, "numbers": 4}


def test_another_vocabulary_leaves_the_registry_alone(tmp_path):
  from distillspec_jax.data import vocabularies
  from distillspec_jax.data.host_tensorflow import seqio

  class Shouting(seqio.ByteVocabulary):
    def _encode_tf(self, s):
      from distillspec_jax.data.host_tensorflow import tf

      return super()._encode_tf(tf.strings.upper(s))

  loud = eval_examples("numbers", "test", 1, S, T, changes=lookup.Changes(vocabulary=Shouting()))
  assert names_of({"decoder_target_tokens": loud.decoder_target_tokens})[0].startswith("NUMBERS")
  quiet = eval_examples("numbers", "test", 1, S, T)
  assert names_of({"decoder_target_tokens": quiet.decoder_target_tokens})[0].startswith("numbers")
  vocabularies.save(seqio.ByteVocabulary(extra_ids=7), tmp_path)
  assert same(next(pipeline.train_batches(config(), tmp_path)), next(pipeline.train_batches(config())))


def test_tokens_on_disk(tmp_path):
  path = tmp_path / "tokens.npz"
  assert pipeline.write_tokens(path, "numbers", "test", S, T) == 9
  with np.load(path) as arrays:
    assert arrays["encoder_input_tokens"].shape == (9, S)
    assert names_of(arrays) == [f"numbers{i}" for i in range(9)]
  with pytest.raises(ConfigError, match="cannot write"):
    pipeline.write_tokens(tmp_path / "no" / "tokens.npz", "numbers", "test", S, T)


def test_shares_that_are_cut():
  task = lookup.find_tasks("numbers", "train")["numbers"][0]
  shares = pipeline.cut_shares(task, pipeline.DataConfig("numbers", 1, 13, 9))
  # "numbers in 10" and EOS are 14 tokens, "numbers10" and EOS 10: 13 of 23 examples have two digits.
  assert shares == {"inputs": pytest.approx(13 / 23), "targets": pytest.approx(13 / 23)}


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: config("nunbers"), "unknown task 'nunbers'; nearest: numbers"),
    (lambda: config(split="tset"), "no split 'tset'; it has nothing, test, train"),
    (lambda: config(split="nothing"), "'nothing' of 'numbers' is empty"),
  ],
)
def test_wrong_names(call, message):
  with pytest.raises(ConfigError, match=message):
    next(pipeline.train_batches(call()))


@pytest.mark.parametrize("name", ["batch_size", "input_length", "target_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_wrong_numbers(name, value):
  with pytest.raises(ConfigError, match=name):
    pipeline.DataConfig(**{"task": "numbers", "batch_size": 1, "input_length": 1, "target_length": 1, name: value})


def test_wrong_hosts_places_and_evaluation_sets():
  with pytest.raises(ConfigError, match="5 cannot be divided among 2 hosts"):
    pipeline.train_batches(config(), None, 0, 2)
  with pytest.raises(ConfigError, match="host 2 is not one of 2"):
    pipeline.train_batches(config(batch_size=4), None, 2, 2)
  place = pipeline.train_batches(config()).state()
  with pytest.raises(ConfigError, match="batch_size=5, this run has batch_size=6"):
    pipeline.train_batches(config(batch_size=6), place=place)
  with pytest.raises(ConfigError, match="is empty"):
    eval_examples("numbers", "nothing", 3, S, T)
  with pytest.raises(ConfigError, match="at least 1"):
    eval_examples("numbers", "test", 0, S, T)
