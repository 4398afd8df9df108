"""Every method by its own gin file, through the training door, on the real `pydoc_summary` with smallest networks.

The task is the one that the gin files name: its data are prepared once (about a minute) and kept in the user's cache,
which tests/data shares. Bad input is tried the same way: one line, and no step is made.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("seqio", reason="training from tasks needs seqio and TensorFlow")

from references.random_models import random_params  # noqa: E402

from distillspec_jax import train, weights  # noqa: E402
from distillspec_jax.types import ConfigError  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(path.stem for path in (REPOSITORY / "gin_configs" / "methods").glob("*.gin"))
# Where each method's sequences come from, by its paper; a new file needs its line here.
ORIGINS = {
  "sft": {"data"},
  "supervised_kd": {"data"},
  "seqkd": {"target"},
  "imitkd": {"data", "draft"},
  "f_distill": {"target", "draft"},
  "on_policy_gkd": {"draft"},
  "distillspec": {"draft"},
  "skd": {"draft"},
  "lk_alpha": {"draft"},
  "lk_lambda": {"draft"},
}
BATCH = 8
SMALL = [
  "INPUT_LENGTH = 12", "TARGET_LENGTH = 6", f"BATCH_SIZE = {BATCH}", "OptimizerConfig.warmup_steps = 1",
  "TrainConfig.log_every = 1", "TrainConfig.eval_every = 0",
]  # fmt: skip
SHAPE = [
  "T5Config.emb_dim = 16", "T5Config.num_heads = 2", "T5Config.head_dim = 8", "T5Config.num_encoder_layers = 1",
  "T5Config.num_decoder_layers = 1", "T5Config.mlp_dim = 16",
]  # fmt: skip


def macro(name, value):
  return f"{name} = {str(value)!r}"


def finetune(directory, *more, steps=2):
  bindings = [macro("MODEL_DIR", directory), f"TRAIN_STEPS = {steps}", *SMALL, *more]
  return train.run_from_gin(["runs/finetune.gin", "methods/sft.gin"], bindings)


def distill(directory, pair, *more, method, steps=2):
  macros = [macro("MODEL_DIR", directory), macro("TARGET", pair / "target"), macro("DRAFT", pair / "draft")]
  files = ["runs/distill.gin", f"methods/{method}.gin"]
  return train.run_from_gin(files, [*macros, f"TRAIN_STEPS = {steps}", *SMALL, *more])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """A draft trained by methods/sft.gin, and a random target that is wider and has the draft's vocabulary."""
  folder = tmp_path_factory.mktemp("pair")
  finetune(folder / "draft", *SHAPE)
  draft, _ = weights.load_model(folder / "draft")
  target = type(draft)(dataclasses.replace(draft.config, mlp_dim=32))
  params = random_params(target, np.random.default_rng(0))
  weights.save_model(folder / "target", target, params, weights.vocabulary_dir(folder / "draft"))
  return folder


def steps_of(directory):
  lines = map(json.loads, (directory / "train_log.jsonl").read_text().splitlines())
  return [line for line in lines if "loss" in line]


def check(directory, origins, steps):
  """Every step has a finite loss and counts a whole batch, of those origins only, and of each of them."""
  log = steps_of(directory)
  assert [line["step"] for line in log] == list(range(1, steps + 1))
  assert all(math.isfinite(line["loss"]) and line["loss"] > 0 and line["gradient_norm"] > 0 for line in log)
  counts = {name: sum(line[f"sequences/{name}"] for line in log) for name in ("data", "draft", "target")}
  assert {name for name, count in counts.items() if count} == origins
  assert sum(counts.values()) == BATCH * steps
  return log


@pytest.mark.parametrize("name", FILES)
def test_each_file_trains_on_its_own_sequences(pair, tmp_path, name):
  assert name in ORIGINS, "a new method: say above where its sequences come from"
  if name == "sft":  # the draft's own training
    check(pair / "draft", ORIGINS[name], 2)
    return
  steps = 3 if len(ORIGINS[name]) == 1 else 10
  result = distill(tmp_path, pair, method=name, steps=steps)
  assert result == {"model_dir": str(tmp_path), "step": steps, "best": None}
  log = check(tmp_path, ORIGINS[name], steps)
  assert all(("alpha" in line) == (name != "seqkd") and ("rollout_kept" in line) == (name == "skd") for line in log)
  (_, before), (_, after) = weights.load_model(pair / "draft"), weights.load_model(tmp_path)
  assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_a_corner_of_the_grid_by_two_macros(pair, tmp_path):
  distill(tmp_path, pair, "DIVERGENCE = 'fkl'", "SOURCE = 'data'", method="distillspec")
  check(tmp_path, {"data"}, 2)


def test_the_opposite_corner_as_the_command_of_the_readme(pair, tmp_path):
  """Through a shell, with quotes and relative paths as they are printed."""
  (tmp_path / "runs").symlink_to(pair)
  bindings = (f"--gin.{line.replace(' ', '')}" for line in SMALL)
  command = f"""
    {sys.executable} -m distillspec_jax.train --gin_file=runs/distill.gin --gin_file=methods/distillspec.gin \\
      --gin.MODEL_DIR="'distilled'" --gin.TARGET="'runs/target'" --gin.DRAFT="'runs/draft'" \\
      --gin.DIVERGENCE="'tvd'" --gin.SOURCE="'mixed'" --gin.TRAIN_STEPS=10 \\
      {" ".join(bindings)}
  """
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
  environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
  done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-2000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result == {"model_dir": str(tmp_path / "distilled"), "step": 10, "best": None}
  check(tmp_path / "distilled", {"target", "draft"}, 10)


# Bad input.


def test_a_damaged_vocabulary_is_one_line_in_a_new_folder(pair, tmp_path):
  shutil.copytree(pair / "draft", tmp_path / "draft")
  (tmp_path / "draft" / "vocabulary" / "vocabulary.json").write_text('{"kind')
  with pytest.raises(ConfigError, match="vocabulary.json cannot be read as JSON"):
    finetune(tmp_path / "out", macro("INITIAL_CHECKPOINT", tmp_path / "draft"))
  assert not (tmp_path / "out" / "run.json").exists()


@pytest.fixture
def no_step(monkeypatch):
  def made(*args):
    raise AssertionError("came as far as the first step")

  monkeypatch.setattr(train.step, "compile_train_step", lambda *args, **kw: made)


@pytest.fixture(scope="module")
def bad(pair, tmp_path_factory):
  """A folder of targets that cannot teach the draft."""
  folder = tmp_path_factory.mktemp("bad")
  model, params = weights.load_model(pair / "target")
  vocabulary = weights.vocabulary_dir(pair / "target")
  larger = type(model)(dataclasses.replace(model.config, vocab_size=model.vocab_size + 128))
  weights.save_model(folder / "larger", larger, random_params(larger, np.random.default_rng(0)), vocabulary)
  params["decoder"]["logits_dense"]["kernel"] = params["decoder"]["logits_dense"]["kernel"].at[3, 5].set(np.nan)
  weights.save_model(folder / "nan", model, params, vocabulary)
  model, params = weights.load_model(pair / "target")
  params["decoder"]["logits_dense"]["kernel"] *= 1e38
  weights.save_model(folder / "overflow", model, params, vocabulary)
  shutil.copytree(pair / "target", folder / "other_vocabulary")
  description = folder / "other_vocabulary" / "vocabulary" / "vocabulary.json"
  description.write_text(description.read_text().replace('"extra_ids": 100', '"extra_ids": 99'))
  return folder


# What is tried: the method's file, a binding, what the line must say.
BAD = {
  "lambda above 1": ("imitkd", "Method.fixed_data_fraction = 1.5", "fixed_data_fraction is 1.5; it must lie in [0, 1]"),
  "lambda below 0": ("f_distill", "Method.draft_data_fraction = -0.5", "fraction is -0.5; it must lie in [0, 1]"),
  "last lambda": ("imitkd", "Method.fixed_data_fraction_end = 2.0", "fraction_end is 2.0; it must lie in [0, 1]"),
  "beta above 1": ("distillspec", "DIVERGENCE = 'jsd_1.5'", "JSD's beta is 1.5; it must lie in [0, 1]"),
  "beta below 0": ("distillspec", "DIVERGENCE = 'jsd_-0.1'", "JSD's beta is -0.1; it must lie in [0, 1]"),
  "beta that is no number": ("distillspec", "DIVERGENCE = 'jsd_x'", "unknown divergence 'jsd_x'; there are fkl, rkl"),
  "divergence": ("supervised_kd", "Method.divergence = 'kl'", "unknown divergence 'kl'; there are fkl, rkl, jsd, tvd"),
  "source": ("distillspec", "SOURCE = 'me'", "unknown source 'me' of sequences; there are data, draft, target, mixed"),
  "field": ("skd", "Method.interleave_topk = 3", "did you mean 'interleave_top_k'"),
  "no such target": ("seqkd", "TARGET = '/nowhere'", "model directory /nowhere does not exist"),
  "empty target": ("skd", "TARGET = 'BAD'", "is no model directory"),
  "no target": ("f_distill", "TARGET = None", "method 'f_distill' needs a target to learn from: set train.target"),
  "vocabulary of another size": ("lk_alpha", "TARGET = 'BAD/larger'", "must be the same: model 2560, target 2688, evaluation_target 2688; fine-tune"),
  "other vocabulary": ("supervised_kd", "TARGET = 'BAD/other_vocabulary'", "the vocabularies differ"),
  "target with NaN": ("on_policy_gkd", "TARGET = 'BAD/nan'", "parameters hold NaN or infinity: take another checkpoint of BAD"),
  "NaN that is only sampled": ("seqkd", "TARGET = 'BAD/nan'", "the target's parameters hold NaN or infinity"),
  "logits that overflow": ("seqkd", "TARGET = 'BAD/overflow'", "a short text: look at the weights of BAD/overflow"),
  "method": ("imitkd", "Method.name = 'gkdd'", "unknown method 'gkdd'; there are sft, seqkd, supervised_kd"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_the_first_step(case, pair, bad, tmp_path, no_step):
  method, binding, expected = BAD[case]
  with pytest.raises(ConfigError) as caught:
    distill(tmp_path / "out", pair, binding.replace("BAD", str(bad)), method=method)
  text = str(caught.value)
  assert expected.replace("BAD", str(bad)) in text and "\n" not in text, text
  assert not any((tmp_path / "out" / name).exists() for name in ("checkpoints", "run.json", "model.json"))


@pytest.mark.parametrize("binding, message", [
  ("TARGET = 'BAD/overflow'", "the target's logits are NaN"),
  ("OptimizerConfig.warmup_steps = 99", "the cosine starts at step 99 of 2"),
])  # fmt: skip
def test_a_refused_run_does_not_stand_in_the_corrected_ones_way(pair, bad, tmp_path, no_step, binding, message):
  with pytest.raises(ConfigError, match=message):
    distill(tmp_path, pair, binding.replace("BAD", str(bad)), method="skd")
  with pytest.raises(AssertionError, match="came as far as the first step"):
    distill(tmp_path, pair, method="imitkd")


def test_the_vocabulary_of_a_refused_run_is_set_aside(pair, bad, tmp_path, no_step):
  other, own = bad / "other_vocabulary", weights.vocabulary_dir(pair / "draft")
  with pytest.raises(ConfigError, match="needs a target"):
    finetune(tmp_path, macro("INITIAL_CHECKPOINT", other), "Method.divergence = 'fkl'")
  with pytest.raises(AssertionError, match="came as far as the first step"):
    finetune(tmp_path, macro("INITIAL_CHECKPOINT", pair / "draft"))
  weights.vocabularies_match(own, tmp_path / "vocabulary")
  weights.vocabularies_match(weights.vocabulary_dir(other), tmp_path / "vocabulary-2")
  with pytest.raises(ConfigError, match="the vocabularies differ"):  # it is the run's now
    finetune(tmp_path, macro("INITIAL_CHECKPOINT", other))


def test_a_target_of_the_same_shape_with_other_weights(pair, tmp_path, no_step):
  model, _ = weights.load_model(pair / "target")
  vocabulary = weights.vocabulary_dir(pair / "target")
  weights.save_model(tmp_path / "other", model, random_params(model, np.random.default_rng(1)), vocabulary)
  for _ in range(2):  # begun, and gone on with
    with pytest.raises(AssertionError, match="came as far as the first step"):
      distill(tmp_path / "out", pair, method="imitkd")
  with pytest.raises(ConfigError, match="holds a run whose target had other weights .* choose another MODEL_DIR"):
    distill(tmp_path / "out", pair, macro("TARGET", tmp_path / "other"), method="imitkd")
  with pytest.raises(AssertionError, match="came as far as the first step"):  # a name is no other method
    distill(tmp_path / "out", pair, "Method.name = 'imitkd:mine'", method="imitkd")
  record = json.loads((tmp_path / "out" / "run.json").read_text())
  (tmp_path / "out" / "run.json").write_text(json.dumps(record | {"target_logits": [None]}))
  with pytest.raises(ConfigError, match="its target_logits are no list of numbers, it is damaged"):
    distill(tmp_path / "out", pair, method="imitkd")


def test_a_network_beside_a_checkpoint_is_not_passed_over_in_silence(pair, tmp_path, no_step, capsys):
  start = [*SHAPE, macro("INITIAL_CHECKPOINT", pair / "draft")]
  for more, said in (([], False), (["T5Config.dtype = 'bfloat16'", "T5Config.mlp_dim = 20"], True)):
    with pytest.raises(AssertionError, match="came as far as the first step"):
      finetune(tmp_path / str(said), *start, *more)
    text = capsys.readouterr().out
    assert ("train.model is not looked at" in text) == said
    assert ("they differ in T5Config.mlp_dim, T5Config.dtype" in text) == said


def test_good_input_does_come_to_the_first_step(pair, tmp_path, no_step):
  with pytest.raises(AssertionError, match="came as far as the first step"):
    distill(tmp_path, pair, method="imitkd")


def test_an_unknown_method_lists_those_that_there_are(pair, tmp_path, no_step):
  with pytest.raises(ConfigError, match="no gin file 'methods/gkd.gin'") as caught:
    distill(tmp_path, pair, method="gkd")
  assert all(f"methods/{name}.gin" in str(caught.value) for name in FILES)
