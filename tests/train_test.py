"""The training door, from the gin files to a directory that everything else can read."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("seqio", reason="training from tasks needs seqio and TensorFlow")

import tiny_task  # noqa: E402, F401
from processes import LESS_OPTIMISED  # noqa: E402

from distillspec_jax import gin_binding, models, train, weights  # noqa: E402
from distillspec_jax.types import ConfigError  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
SMALL = [
  "import tiny_task",
  "TASK = 'tiny'",
  "INPUT_LENGTH = 8",
  "TARGET_LENGTH = 4",
  "BATCH_SIZE = 8",
  "TRAIN_STEPS = 6",
  "OptimizerConfig.warmup_steps = 1",
  "TrainConfig.log_every = 2",
  "TrainConfig.eval_every = 3",
  "TrainConfig.eval_examples = 6",
  "TrainConfig.checkpoint_every = 2",
]


def mini(width=16):
  return [
    "T5Config.vocab_size = 384",
    f"T5Config.emb_dim = {width}",
    "T5Config.num_heads = 2",
    "T5Config.head_dim = 8",
    "T5Config.mlp_dim = 16",
    "T5Config.num_encoder_layers = 1",
    "T5Config.num_decoder_layers = 1",
  ]


def macro(name, value):
  return f"{name} = {str(value)!r}"


def finetune(directory, *more, width=16):
  return train.run_from_gin(["runs/finetune.gin"], [macro("MODEL_DIR", directory), *SMALL, *mini(width), *more])


def distill(directory, target, draft, *more):
  bindings = [macro("MODEL_DIR", directory), macro("TARGET", target), macro("DRAFT", draft), *SMALL, *more]
  return train.run_from_gin(["runs/distill.gin"], bindings)


def log_of(directory):
  return [json.loads(line) for line in (directory / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """A fine-tuned target and a fine-tuned draft whose α was measured against it."""
  folder = tmp_path_factory.mktemp("pair")
  finetune(folder / "target", width=24)
  finetune(folder / "draft", macro("EVALUATION_TARGET", folder / "target"))
  return folder


def test_fine_tuning_leaves_a_model_directory(pair):
  names = {path.name for path in (pair / "target").iterdir()}
  assert {"model.json", "vocabulary", "config.gin", "run.json", "checkpoints", "best", "train_log.jsonl"} <= names
  assert any(name.startswith("events.out.tfevents") for name in names)
  model, params = weights.load_model(pair / "target")
  assert isinstance(model, models.T5) and model.vocab_size == 384
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, model.abstract_params())
  best, _ = weights.load_model(pair / "target" / "best")
  assert best == model and weights.vocabulary_dir(pair / "target" / "best") is not None
  assert weights.vocabularies_match(pair / "target", pair / "draft")


def test_figures_are_logged_by_line_and_step(pair):
  target, draft = log_of(pair / "target"), log_of(pair / "draft")
  assert [line["step"] for line in target] == [0, 2, 3, 4, 6, 6]
  assert not any("alpha_t1" in line for line in target)
  assert [line["step"] for line in draft if "alpha_t1" in line] == [0, 3, 6]
  trained = next(line for line in draft if line["step"] == 4)
  assert {"loss", "gradient_norm", "learning_rate", "tokens_per_second", "data_wait_seconds"} <= set(trained)


def test_the_written_configuration_binds_the_same(pair, tmp_path):
  text = (pair / "draft" / "config.gin").read_text()
  (tmp_path / "again.gin").write_text(text)
  gin_binding.parse([str(tmp_path / "again.gin")])
  arguments = train._arguments()
  assert arguments["model_dir"] == str(pair / "draft") and arguments["loop_config"].steps == 6


def test_distillation_starts_from_the_draft_and_measures_alpha(pair, tmp_path):
  result = distill(tmp_path / "out", pair / "target", pair / "draft")
  assert result["step"] == 6 and result["best"]["criterion"] == "alpha_t1"
  log = log_of(tmp_path / "out")
  first = next(line for line in log if "alpha_t1" in line)
  last = [line for line in log_of(pair / "draft") if "alpha_t1" in line][-1]
  assert first["step"] == 0 and first["alpha_t1"] == pytest.approx(last["alpha_t1"], abs=1e-6)
  assert next(line for line in log if "source/draft" in line)["source/draft"] == 1.0


def test_the_same_call_again_does_nothing_more(pair, capfd):
  before = (pair / "draft" / "train_log.jsonl").read_text()
  result = finetune(pair / "draft", macro("EVALUATION_TARGET", pair / "target"))
  assert result["step"] == 6 and (pair / "draft" / "train_log.jsonl").read_text() == before
  assert "done already" in capfd.readouterr().err


def command(directory, pair, steps):
  bindings = [
    macro("MODEL_DIR", directory), macro("TARGET", pair / "target"), macro("DRAFT", pair / "draft"),
    *(line for line in SMALL if line[:6] not in ("import", "TRAIN_")), f"TRAIN_STEPS = {steps}",
  ]  # fmt: skip
  bindings = [f"--gin.{name}={value}" for name, value in (binding.split(" = ", 1) for binding in bindings)]
  task = directory.parent / "task.gin"
  task.write_text("import tiny_task\n")
  environment = {
    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": LESS_OPTIMISED, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
    "JAX_COMPILATION_CACHE_DIR": str(pair / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  }  # fmt: skip
  files = [f"--gin_file={task}", "--gin_file=runs/distill.gin", "--gin_file=methods/imitkd.gin"]
  return subprocess.Popen(
    [sys.executable, "-m", "distillspec_jax.train", *files, *bindings],
    env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


STEPS = 30


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
  """The directory of an uninterrupted run."""
  directory = tmp_path_factory.mktemp("uninterrupted") / "whole"
  process = command(directory, pair, STEPS)
  assert process.wait(600) == 0, process.stderr.read()
  return directory


def assert_same_run(found, whole):
  """The final parameters and figures are bit-identical."""
  for part in ("", "best"):
    one, other = (weights.load_model(folder / part)[1] for folder in (whole, found))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
  timeless = ("tokens_per_second", "steps_per_second", "data_wait_seconds", "cost/seconds")
  logs = [
    [{key: value for key, value in line.items() if key not in timeless} for line in log_of(folder)]
    for folder in (whole, found)
  ]
  assert logs[0] == logs[1]


def test_kill_9_and_the_same_command_again(pair, whole, tmp_path):
  process = command(tmp_path / "killed", pair, STEPS)
  saved = tmp_path / "killed" / "checkpoints"
  while not (saved.is_dir() and any(path.name.isdecimal() and int(path.name) >= 8 for path in saved.iterdir())):
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait(60)
  assert not (saved / str(STEPS)).exists(), "the run was over before it was killed"
  process = command(tmp_path / "killed", pair, STEPS)
  assert process.wait(600) == 0, process.stderr.read()
  assert_same_run(tmp_path / "killed", whole)


MOMENTS = ["step 8/", *(pytest.param(text, marks=pytest.mark.slow) for text in ("compiling", "decoding", "step 3: "))]


@pytest.mark.parametrize("said", MOMENTS)
def test_sigterm_saves_and_exits_0_and_the_same_command_goes_on(pair, whole, tmp_path, said):
  process = command(tmp_path / "told", pair, STEPS)
  heard = ""
  while said not in heard:
    line = process.stderr.readline()
    assert line, heard
    heard += line
  process.send_signal(signal.SIGTERM)
  _, rest = process.communicate(timeout=120)
  assert process.returncode == 0, heard + rest
  assert "told to stop" in rest and "Traceback" not in rest
  process = command(tmp_path / "told", pair, STEPS)
  assert process.wait(600) == 0, process.stderr.read()
  assert_same_run(tmp_path / "told", whole)


@pytest.fixture
def nothing_compiles(monkeypatch):
  def fail(*args, **kwargs):
    raise AssertionError("came as far as making a state or a step")

  monkeypatch.setattr(train.step, "init_state", fail)
  monkeypatch.setattr(train.loop, "train", fail)


BAD = {
  "unknown task": (["TASK = 'tinny'"], "unknown task 'tinny'"),
  "unknown split": (["DataConfig.split = 'tarin'"], "no split 'tarin'"),
  "empty split": (["DataConfig.split = 'empty'"], "empty"),
  "empty validation": (["train.evaluation_split = 'empty'"], "empty"),
  "target length 0": (["TARGET_LENGTH = 0"], "target_length"),
  "batch size 0": (["BATCH_SIZE = 0"], "batch_size"),
  "lengths that differ": (["StepConfig.target_length = 3"], "StepConfig.target_length 3"),
  "no name for the folder": (["MODEL_DIR = ''"], "the output folder has no name"),
  "seed": (["TrainConfig.seed = 4294967296"], "TrainConfig.seed is 4294967296"),
  "no steps": (["TRAIN_STEPS = 0"], "TrainConfig.steps is 0"),
  "wrong type": (["TRAIN_STEPS = 'many'"], "TrainConfig.steps = 'many': expected int"),
  "mesh": (["MeshConfig.model = 3"], "does not divide 8 device"),
  "batch on mesh": (["BATCH_SIZE = 12"], "DataConfig.batch_size is 12"),
  "vocabulary too large": (["T5Config.vocab_size = 200"], "vocab_size is 200"),
  "missing checkpoint": (["INITIAL_CHECKPOINT = '/nowhere'"], "/nowhere does not exist"),
  "method without target": (["Method.divergence = 'fkl'"], "needs a target to learn from"),
  "target without use": (["train.target = 'x'"], "learns from the data alone"),
  "no network": (["train.model = None"], "changes nothing: nothing in these gin files uses @T5Config"),
  "criterion": (["TrainConfig.best_by = 'bleu'"], "'bleu'"),
  "schedule": (["OptimizerConfig.warmup_steps = 99"], "the cosine starts at step 99 of 6"),
  "other vocabulary": (["TASK = 'tiny_other_vocabulary'", "EVALUATION_TARGET = 'TARGET'", "INITIAL_CHECKPOINT = 'OTHER'"],
                       "the vocabularies differ"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_compiles(case, pair, tmp_path, nothing_compiles):
  bindings, expected = BAD[case]
  other = tmp_path / "other"
  if case == "other vocabulary":
    shutil.copytree(pair / "draft", other)
    description = other / "vocabulary" / "vocabulary.json"
    description.write_text(description.read_text().replace('"extra_ids": 0', '"extra_ids": 5'))
  bindings = [line.replace("'OTHER'", repr(str(other))).replace("'TARGET'", repr(str(pair / "target"))) for line in bindings]
  with pytest.raises(ConfigError) as caught:
    finetune(tmp_path / "out", *bindings)
  text = str(caught.value)
  assert expected in text and "\n" not in text, text
  assert not any((tmp_path / "out" / name).exists() for name in ("run.json", "model.json"))
  assert not (tmp_path / "out" / "checkpoints").exists() or not any((tmp_path / "out" / "checkpoints").iterdir())


def test_nothing_to_train_is_refused(tmp_path, nothing_compiles):
  with pytest.raises(ConfigError, match="nothing to train: give train.model .* or train.initial_checkpoint"):
    train.run_from_gin(["runs/finetune.gin"], [macro("MODEL_DIR", tmp_path), *SMALL, "train.model = None"])


def test_a_failed_attempt_leaves_no_vocabulary_to_the_next(tmp_path, nothing_compiles):
  with pytest.raises(ConfigError, match="vocab_size is 200"):
    finetune(tmp_path, "T5Config.vocab_size = 200")
  with pytest.raises(AssertionError, match="came as far"):
    finetune(tmp_path, "TASK = 'tiny_other_vocabulary'")
  assert json.loads((tmp_path / "vocabulary" / "vocabulary.json").read_text())["extra_ids"] == 7


@pytest.mark.parametrize("name", ["run.json", "best/best.json"])
def test_damaged_records_are_one_line(pair, tmp_path, nothing_compiles, name):
  shutil.copytree(pair / "draft", tmp_path / "draft")
  (tmp_path / "draft" / name).write_text('{"meth')
  with pytest.raises(ConfigError, match=f"{name} .*JSON .*damaged"):
    finetune(tmp_path / "draft", macro("EVALUATION_TARGET", pair / "target"))


def test_an_output_folder_that_cannot_be_written(tmp_path, nothing_compiles):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(ConfigError, match="cannot write to the output folder"):
    finetune(tmp_path / "file" / "out")


def test_another_run_in_the_same_folder_is_refused(pair, nothing_compiles):
  with pytest.raises(ConfigError, match="holds another model"):
    finetune(pair / "draft", width=8)
  with pytest.raises(ConfigError, match=r"holds a run with method sft .*, this one has distillspec"):
    distill(pair / "draft", pair / "target", pair / "draft")


def test_a_nan_ends_the_run_in_one_line(tmp_path):
  with pytest.raises(ConfigError, match=r"at step \d+: training stopped and nothing of it was saved") as caught:
    finetune(tmp_path / "out", "OptimizerConfig.name = 'adamw'", "LEARNING_RATE = 1e38", "OptimizerConfig.clip_norm = None")
  assert "\n" not in str(caught.value)


def test_the_command_reports_one_line_and_exit_code_2(tmp_path):
  arguments = ["--gin_file=runs/finetune.gin", f"--gin.MODEL_DIR='{tmp_path}'", "--gin.TrainConfig.stepps=3"]
  done = subprocess.run([sys.executable, "-m", "distillspec_jax.train", *arguments], capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith("error: unknown gin key 'TrainConfig.stepps'") and done.stderr.count("\n") == 1
