"""Every shipped gin file parses, and every value in it reaches a configuration that accepts it."""

import itertools
import pathlib
import re

import gin
import pytest

from distillspec_jax import gin_binding, train
from distillspec_jax.distillation import methods
from distillspec_jax.models import DecoderLMConfig, T5Config

ROOT = pathlib.Path(__file__).resolve().parent.parent / "gin_configs"
RUNS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("runs/**/*.gin") if path.name != "train.gin")
MODELS = sorted(path.stem for path in ROOT.glob("models/*.gin"))
METHODS = sorted(path.stem for path in ROOT.glob("methods/*.gin"))
TRAINING = [name for name in RUNS if not re.search("study|plan", name)]


@pytest.fixture(autouse=True)
def fresh_gin():
  yield
  gin.clear_config()


def bound(files, bindings=("MODEL_DIR = 'out'",)):
  gin_binding.parse(files, bindings)
  return train._arguments()


def test_there_are_files_and_no_strangers():
  assert {"runs/finetune.gin", "runs/distill.gin"} <= set(RUNS)
  assert len(MODELS) >= 10 and len(METHODS) >= 7
  assert {path.parent.name for path in ROOT.rglob("*") if path.is_file()} <= {
    "models", "tasks", "methods", "runs", "quickstart"
  }  # fmt: skip
  assert all(path.suffix == ".gin" for path in ROOT.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", TRAINING)
def test_every_run_binds_complete_arguments(name):
  arguments = bound([name])
  assert arguments["model_dir"] == "out"
  assert {"data", "step_config", "optimizer", "loop_config", "mesh_config"} <= set(arguments)
  arguments["optimizer"].build(arguments["loop_config"].steps)
  assert arguments["step_config"].target_length == arguments["data"].target_length


@pytest.mark.parametrize("name", TRAINING)
def test_model_dir_is_required(name):
  with pytest.raises(gin_binding.ConfigError, match="MODEL_DIR has no value: give --gin.MODEL_DIR="):
    gin_binding.parse([name])


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_named_sizes(name):
  config = bound(["runs/finetune.gin", f"models/{name}.gin"])["model"]
  kind = DecoderLMConfig if name.startswith("decoder_lm") else T5Config
  named = kind.named(name, dtype=config.dtype)
  if "mini" in name:  # their vocabulary is the task's
    named = kind.named(name, vocab_size=config.vocab_size)
  assert config == named


def test_every_large_size_has_a_file():
  sizes = {**T5Config.sizes, **DecoderLMConfig.sizes}
  assert {name for name in sizes if not name.endswith("_tiny")} == set(MODELS)


@pytest.mark.parametrize("name", METHODS)
def test_methods_can_be_swapped_in(name):
  base = "runs/finetune.gin" if name == "sft" else "runs/distill.gin"
  assert bound([base, f"methods/{name}.gin"])["step_config"].method.name == name


def test_distillspecs_grid_is_two_macros():
  for divergence, source in itertools.product(methods.DIVERGENCES, methods.SOURCES):
    macros = ["MODEL_DIR = 'out'", f"DIVERGENCE = '{divergence}'", f"SOURCE = '{source}'"]
    method = bound(["runs/distill.gin"], macros)["step_config"].method
    gin.clear_config()
    assert method == methods.grid(divergence, source)
  assert bound(["runs/distill.gin"])["step_config"].method == methods.named("distillspec")
  gin.clear_config()
  with pytest.raises(gin_binding.ConfigError, match="unknown source 'student' of sequences; there are data, draft"):
    bound(["runs/distill.gin"], ["MODEL_DIR = 'out'", "SOURCE = 'student'"])


@pytest.mark.parametrize(
  "files, binding, message",
  [
    (["methods/on_policy_gkd.gin"], "DIVERGENCE = 'rkl'", "--gin.DIVERGENCE changes nothing: Method.divergence is set"),
    (["methods/imitkd.gin"], "SOURCE = 'data'", "fixed_data_fraction.source and draft_data_fraction.source is set"),
    (["methods/skd.gin"], "TRAIN_STEPS = 3\nDIVERGENCE = 'rkl'", "--gin.DIVERGENCE changes nothing"),
    ([], "mine/Method.loss_temperature = 0.5", "--gin.mine/Method.loss_temperature changes nothing: nothing in these"),
    ([], "T5Config.dtype = 'bfloat16'", "--gin.T5Config.dtype changes nothing: nothing in these gin files uses @T5Config"),
  ],
)
def test_a_binding_that_the_run_would_not_read_is_an_error(files, binding, message):
  with pytest.raises(gin_binding.ConfigError) as caught:
    train.arguments_from_gin(["runs/distill.gin", *files], ["MODEL_DIR = 'out'", binding])
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_run_reads_is_no_error(tmp_path):
  """Macros that methods of another file do not read may stand in files: they are defaults."""
  read = ["MODEL_DIR = 'out'", "import json", "DIVERGENCE = 'rkl'", "# c\ndistillspec_jax.TrainConfig.steps = 3"]
  arguments = train.arguments_from_gin(["runs/distill.gin"], [*read, "fixed_data_fraction.source = 'data'"])
  assert arguments["step_config"].method.divergence == "rkl" and arguments["loop_config"].steps == 3
  assert arguments["step_config"].method.fixed_data_fraction == 1.0
  other = train.arguments_from_gin(["runs/distill.gin", "methods/skd.gin"], ["MODEL_DIR = 'out'"])
  assert other["step_config"].method.interleave


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.gin")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_value_is_bound_twice_in_one_file(path):
  keys = re.findall(r"^([\w./]+) *=", path.read_text(), flags=re.MULTILINE)
  assert len(keys) == len(set(keys))
  assert path.read_text().startswith("# "), "a file begins with what it is for"


def test_what_is_bound_is_what_the_files_say():
  arguments = bound(
    ["runs/distill.gin"], ["MODEL_DIR = 'out'", "TARGET = 'a'", "DRAFT = 'b'", "TRAIN_STEPS = 77", "Method.divergence = 'tvd'"]
  )
  assert (arguments["target"], arguments["initial_checkpoint"]) == ("a", "b")
  assert arguments["loop_config"].steps == 77
  assert arguments["step_config"].method.divergence == "tvd"
