"""Generating a data set: the texts, resumption to the byte, hosts, damage, refusals; training on it; the guide."""

import dataclasses
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_task

import distillspec_jax as ds
from distillspec_jax import target_generation, train, weights
from distillspec_jax.data import generated, vocabularies
from distillspec_jax.data.host_tensorflow import seqio, tf
from distillspec_jax.models import T5, T5Config
from distillspec_jax.types import ConfigError

HERE = pathlib.Path(__file__).resolve().parent
VOCABULARY = seqio.ByteVocabulary()
CONFIG = T5Config.named("t5_tiny", vocab_size=260)  # one id more than the vocabulary
LINES = tiny_task.LINES[:80]  # of the split train
S, T, SEED = 8, 10, 3


@pytest.fixture(name="saved", scope="module")
def _saved(tmp_path_factory):
  """Directories of a target, a draft, a target of another vocabulary."""
  folder = tmp_path_factory.mktemp("saved")
  for name, extra_ids in (("vocabulary", 0), ("other_vocabulary", 7)):
    vocabularies.save(seqio.ByteVocabulary(extra_ids=extra_ids), folder / name)
  target, draft = T5(CONFIG), T5(dataclasses.replace(CONFIG, num_decoder_layers=1))
  for name, model, seed, vocabulary in (
    ("target", target, 0, "vocabulary"), ("draft", draft, 1, "vocabulary"), ("stranger", draft, 1, "other_vocabulary"),
  ):  # fmt: skip
    weights.save_model(folder / name, model, jax.jit(model.init)(jax.random.key(seed)), folder / vocabulary)
  return folder


@pytest.fixture(name="run", scope="module")
def _run(saved):
  """Generate in this process."""

  def run(output_dir, host=None, **changes):
    given = dict(model=str(saved / "target"), task="tiny", output_dir=str(output_dir), batch_size=8, shard_size=24)
    given |= dict(input_length=S, target_length=T, seed=SEED)
    if changes.get("draft"):
      changes["draft"] = str(saved / changes["draft"])
    return target_generation.run(target_generation.Request(**(given | changes)), host)

  return run


@pytest.fixture(name="whole", scope="module")
def _whole(run, tmp_path_factory):
  """A data set that was made in one go: all 80 examples, in shards of 24, 24, 24 and 8."""
  folder = tmp_path_factory.mktemp("whole") / "targets"
  run(folder)
  return folder


def files(folder):
  """{name: bytes} of all that a data set is made of, but for where its models lay."""
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def records(folder):
  """The records in their order, by TensorFlow's own reader."""
  found = []
  for path in sorted((folder / "generated" / "1.0.0").glob("*.tfrecord*")):
    for raw in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
      feature = tf.train.Example.FromString(raw).features.feature
      one = {name: list(getattr(value, value.WhichOneof("kind")).value) for name, value in feature.items()}
      found.append({name: value if name.endswith("_ids") else value[0] for name, value in one.items()})
  return found


def prompt_of(line):
  """The ids of a line over bytes, as the task gives them."""
  return [ord(letter) + 3 for letter in line] + [1]


def decoded(saved, count, samples=1, **settings):
  """What `ds.generate` writes for the lines' prompts, each row named by its number: lists of ids."""
  rows = np.array([padded(prompt_of(line), S) for line in LINES[:count] for _ in range(samples)])
  settings |= dict(max_new_tokens=T, valid_ids=259, seed=SEED, row_ids=np.arange(len(rows)))
  out = ds.generate(*ds.load_model(saved / "target"), rows, **settings)
  return [row[:length] for row, length in zip(np.array(out.tokens).tolist(), np.array(out.lengths), strict=True)]


def padded(ids, width):
  return (ids + [0] * width)[:width]


def test_the_records_hold_the_prompts_and_the_models_own_ids(saved, whole):
  found, expected = records(whole), decoded(saved, 80, temperature=1.0)
  assert [one["target_ids"] for one in found] == expected
  assert any(ids[-1] == 1 for ids in expected) and any(ids[-1] != 1 for ids in expected), "choose another seed"
  assert [one["ended"] for one in found] == [int(ids[-1] == 1) for ids in expected]
  assert [one["input_ids"] for one in found] == [prompt_of(line) for line in LINES]
  assert [one["inputs"].decode() for one in found] == LINES
  assert [one["reference"].decode() for one in found] == [line[:2] for line in LINES]
  assert [one["targets"].decode() for one in found] == [VOCABULARY.decode(ids) for ids in expected]
  assert [one["example"] for one in found] == list(range(80)) and not any(one["sample"] for one in found)
  totals = generated.read_manifest(whole)["totals"]
  tokens = sum(map(len, expected))
  assert totals["records"] == 80 and totals["tokens"] == totals["blocks"] == tokens
  assert totals["ended"] == sum(ids[-1] == 1 for ids in expected)
  assert len(list((whole / "generated" / "1.0.0").glob("*-of-00004"))) == 4


@pytest.mark.parametrize("batch_size", [8, 5])
def test_killed_and_called_again_ends_with_the_same_bytes(run, whole, tmp_path, monkeypatch, batch_size):
  replace, shards = os.replace, []

  def killed(source, destination):
    if "tfrecord" in str(destination):
      shards.append(destination)
      if len(shards) == 3:
        raise KeyboardInterrupt
    return replace(source, destination)

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path / "out")
  assert len(list((tmp_path / "out" / "generated" / "1.0.0").glob("generated-*"))) == 2
  with pytest.raises(ConfigError, match="are not finished"):
    generated.task(tmp_path / "out")
  run(tmp_path / "out", batch_size=batch_size)
  assert files(tmp_path / "out") == files(whole)


def test_a_finished_run_says_so_and_loads_nothing(run, whole, monkeypatch, capsys):
  before = files(whole)
  monkeypatch.setattr(weights, "load_model", lambda *_: pytest.fail("loaded a model"))
  manifest = run(whole)
  assert "finished already: 80 texts of tiny, train, in 4 shards" in capsys.readouterr().out
  assert manifest["finished"] and files(whole) == before


def test_a_damaged_shard_is_made_again_loudly(run, whole, tmp_path, monkeypatch, capsys):
  run(tmp_path / "out")
  shards = generated.Shards(tmp_path / "out", "train", 4)
  content = bytearray(shards.path(1).read_bytes())
  content[100] ^= 4
  shards.path(1).write_bytes(content)
  written, write = [], generated.Shards.write
  noted = lambda self, index, *rest: (written.append(index), write(self, index, *rest))  # noqa: E731
  monkeypatch.setattr(generated.Shards, "write", noted)
  capsys.readouterr()
  run(tmp_path / "out")
  assert "WARNING" in (told := capsys.readouterr().err) and "00001-of-00004 is damaged: it is made again" in told
  assert written == [1] and files(tmp_path / "out") == files(whole)


def test_hosts_make_their_own_shards(run, whole, tmp_path, capsys):
  assert not run(tmp_path / "out", host=(1, 2))["finished"]
  assert "host 1 of 2 has made its shards" in capsys.readouterr().out
  there = sorted(path.name[-14:-9] for path in (tmp_path / "out" / "generated" / "1.0.0").glob("generated-*"))
  assert there == ["00001", "00003"]
  assert run(tmp_path / "out", host=(0, 2))["finished"]
  assert files(tmp_path / "out") == files(whole)


def test_a_draft_leaves_greedy_texts_and_needs_fewer_passes(run, saved, tmp_path, capsys):
  """A model that drafts for itself has every proposal accepted: γ + 1 tokens a pass, but for the ends."""
  plain = run(tmp_path / "plain", temperature=0.0, num_examples=16)
  for draft in ("draft", "target"):
    manifest = run(tmp_path / draft, temperature=0.0, num_examples=16, draft=draft, gamma=4)
    assert records(tmp_path / draft) == records(tmp_path / "plain")
    assert manifest["totals"]["tokens"] == plain["totals"]["tokens"]
  assert [one["target_ids"] for one in records(tmp_path / "plain")] == decoded(saved, 16)
  totals = manifest["totals"]
  blocks = sum(-(-len(one["target_ids"]) // 5) for one in records(tmp_path / "target"))
  assert totals["blocks"] == blocks < plain["totals"]["blocks"] == totals["tokens"]
  assert f"block efficiency {totals['tokens'] / blocks:.2f} tokens a target call" in capsys.readouterr().out


def test_several_samples_of_each_example(run, saved, tmp_path):
  """Batches of 8 hold two examples and two samples of a third."""
  manifest = run(tmp_path, num_examples=8, samples=3, shard_size=5)
  found = records(tmp_path)
  assert [(one["example"], one["sample"]) for one in found] == [(i, j) for i in range(8) for j in range(3)]
  assert [one["target_ids"] for one in found] == decoded(saved, 8, samples=3, temperature=1.0)
  assert found[0]["target_ids"] != found[1]["target_ids"] and found[0]["input_ids"] == found[1]["input_ids"]
  assert manifest["shards"] == 2 and manifest["totals"]["records"] == 24


def test_a_data_set_that_changed_or_has_no_order_is_refused(run, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(weights, "load_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path / "out")
  with monkeypatch.context() as patch:
    patch.setattr(tiny_task, "LINES", tiny_task.LINES[1:])
    with pytest.raises(ConfigError, match="are not those that .*out was begun with"):
      run(tmp_path / "out")
  monkeypatch.setattr(target_generation, "_digest", lambda examples, again=iter(range(99)): str(next(again)))
  with pytest.raises(ConfigError, match="in another order each time"):
    run(tmp_path / "unordered")


BAD = {
  "no model": (dict(model="no_such_model"), "model directory no_such_model does not exist"),
  "no draft": (dict(draft="no_such_draft"), "no_such_draft does not exist"),
  "vocabularies": (dict(draft="stranger"), "vocabularies differ"),
  "task": (dict(task="tinny"), "unknown task 'tinny'"),
  "split": (dict(split="tarin"), "no split 'tarin'"),
  "slice": (dict(split="train[:5]"), "is no plain name"),
  "empty": (dict(split="empty"), "the split 'empty' of 'tiny' is empty"),
  "mixture": (dict(task="two_tinies"), "'two_tinies' is a mixture: generate for each of tiny, tiny_other_vocabulary"),
  "temperature": (dict(temperature=-1.0), "temperature=-1.0"),
  "top_p": (dict(top_p=0.0), "top_p=0.0"),
  "gamma": (dict(gamma=0), "gamma=0"),
  "batch": (dict(batch_size=0), "batch_size is 0"),
  "shard": (dict(shard_size=-1), "shard_size is -1"),
  "samples": (dict(samples=2, temperature=0.0), "samples is 2 at temperature 0"),
  "too many": (dict(samples=2**30), "at most 2**31 - 1 texts"),
  "seed": (dict(seed=-1), "seed=-1"),
  "min_length": (dict(min_length=T + 1), "min_length=11 exceeds max_new_tokens=10"),
  "min_length of the usual": (dict(min_length=200, target_length=0), "min_length=200 exceeds max_new_tokens=128"),
  "prompt": (dict(prompt="no place"), "must contain {inputs} once"),
  "file in the way": (dict(output_dir="saved/target/model.json"), "cannot write to the output folder"),
  "another run": (dict(output_dir="saved/target"), "holds something else (checkpoints, model.json, vocabulary)"),
  "other settings": (dict(output_dir="whole", temperature=0.5), "generated with temperature 1.0, not 0.5"),
  "other model": (dict(output_dir="whole", model="draft"), "generated with another model"),
  "with a draft": (dict(output_dir="whole", draft="draft"), "generated without a draft"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line_before_any_model_is_loaded(case, run, saved, whole, tmp_path, monkeypatch):
  monkeypatch.setattr(weights, "load_model", lambda *_: pytest.fail("loaded a model"))
  given, message = BAD[case]
  folder = {"saved": saved, "whole": whole}
  changes = dict(given)
  first, *rest = pathlib.Path(changes.pop("output_dir", "")).parts or [""]
  if changes.get("model") == "draft":
    changes["model"] = str(saved / "draft")
  if case == "mixture":
    monkeypatch.setattr(seqio.MixtureRegistry, "_REGISTRY", dict(seqio.MixtureRegistry._REGISTRY))
    seqio.MixtureRegistry.add("two_tinies", [("tiny", 1), ("tiny_other_vocabulary", 1)])
  before = files(whole)
  with pytest.raises(ConfigError) as caught:
    run(folder[first].joinpath(*rest) if first else tmp_path / "out", **changes)
  assert message in str(caught.value) and "\n" not in str(caught.value)
  assert files(whole) == before


def test_one_step_of_training_has_the_loss_of_the_shards_by_hand(saved, whole, tmp_path):
  """A batch of all 80 examples: the mean of each text's mean cross-entropy, in float64 of the draft's own logits."""
  bindings = [
    f"MODEL_DIR = {str(tmp_path)!r}", f"TASK = 'generated:{whole}'", f"DRAFT = {str(saved / 'draft')!r}",
    "TARGET = None", f"INPUT_LENGTH = {S}", f"TARGET_LENGTH = {T}", "BATCH_SIZE = 80", "TRAIN_STEPS = 1",
    "TrainConfig.log_every = 1",
    "TrainConfig.eval_every = 0", "OptimizerConfig.schedule = 'constant'", "OptimizerConfig.warmup_steps = 0",
  ]  # fmt: skip
  assert train.run_from_gin(["runs/seqkd_offline.gin"], bindings)["step"] == 1
  (loss,) = re.findall(r'"loss": ([\d.e-]+)', (tmp_path / "train_log.jsonl").read_text())
  found = records(whole)
  inputs = np.array([padded(one["input_ids"], S) for one in found])
  targets = np.array([padded(one["target_ids"], T) for one in found])
  shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  model, params = ds.load_model(saved / "draft")
  batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": shifted}
  logits = np.asarray(model.score(params, batch), np.float64)
  logits -= logits.max(-1, keepdims=True)
  log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nats = -np.take_along_axis(log_q, targets[..., None], -1)[..., 0]
  weight = targets != 0
  assert float(loss) == pytest.approx(np.mean((nats * weight).sum(1) / weight.sum(1)), rel=2e-5)


def test_generated_targets_are_a_task_to_generate_for(run, whole, tmp_path):
  """The same prompts again, greedily: what a data set holds as targets is the reference of the next."""
  run(tmp_path, task=f"generated:{whole}", temperature=0.0, num_examples=8, input_length=0, target_length=0)
  assert [one["reference"] for one in records(tmp_path)] == [one["targets"] for one in records(whole)[:8]]
  assert [one["input_ids"] for one in records(tmp_path)] == [one["input_ids"] for one in records(whole)[:8]]


def test_the_door_answers_in_one_line(tmp_path):
  command = [sys.executable, "-m", "distillspec_jax.generate_targets", "--model=no_such_model", "--task=pydoc_summary"]
  done = subprocess.run([*command, f"--output_dir={tmp_path / 'out'}"], capture_output=True, text=True, check=False)
  assert done.returncode == 2 and done.stderr.startswith("error: model directory no_such_model does not exist")
  assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


SMALL = [
  "TRAIN_STEPS = 2", "BATCH_SIZE = 8", "OptimizerConfig.warmup_steps = 1", "TrainConfig.eval_examples = 8",
  "TrainConfig.eval_batch_size = 8",
]  # fmt: skip
SMALL_MODEL = [
  "T5Config.emb_dim = 16", "T5Config.num_heads = 2", "T5Config.head_dim = 8", "T5Config.mlp_dim = 16",
  "T5Config.num_decoder_layers = 1",
]  # fmt: skip


def test_the_guides_commands(tmp_path, monkeypatch):
  """docs/offline_targets.md from top to bottom, with small models and short runs; generate_targets in a process."""
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"^```bash\n(.*?)^```$", (HERE.parent / "docs" / "offline_targets.md").read_text(), re.M | re.S)
  commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
  doors = [words[2].removeprefix("distillspec_jax.") for words in commands]
  assert doors == ["train", "train", "generate_targets", "train", "train"]
  for _, _, door, *arguments in commands:
    if door.endswith("generate_targets"):
      environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
      more = ["--num_examples=40", "--shard_size=16", "--batch_size=8"]
      command = [sys.executable, "-m", door, *arguments, *more]
      done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
      assert done.returncode == 0, done.stderr
      assert "block efficiency" in done.stdout and "the task is generated:runs/targets" in done.stdout
      continue
    names = [argument.split("=", 1) for argument in arguments]
    gin_files = [value for name, value in names if name == "--gin_file"]
    bindings = [" = ".join([name.removeprefix("--gin."), value]) for name, value in names if name != "--gin_file"]
    small = [*SMALL, *(SMALL_MODEL if "runs/finetune.gin" in gin_files else ())]
    # Held-out prompts, of the split that was not generated, are looked at once: compiling it is most of the time.
    small.append(f"TrainConfig.eval_every = {2 * ('runs/seqkd_offline.gin' in gin_files)}")
    assert train.run_from_gin(gin_files, [*bindings, *small])["step"] == 2
  assert '"alpha_t1"' in (tmp_path / "runs" / "seqkd" / "train_log.jsonl").read_text()
  assert {path.name for path in (tmp_path / "runs").iterdir()} == {"target", "draft", "targets", "seqkd", "f_distill"}
