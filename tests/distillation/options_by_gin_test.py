"""Every option of a training step, bound by gin as a user would, in one run of the training door."""

import json

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("seqio", reason="training from tasks needs seqio and TensorFlow")

import tiny_task  # noqa: E402, F401

from distillspec_jax import train, weights  # noqa: E402
from distillspec_jax.distillation import precision  # noqa: E402
from distillspec_jax.types import ConfigError  # noqa: E402

SMALL = [
  "import tiny_task", "TASK = 'tiny'", "INPUT_LENGTH = 8", "TARGET_LENGTH = 4", "BATCH_SIZE = 16",
  "OptimizerConfig.warmup_steps = 1", "TrainConfig.log_every = 2", "TrainConfig.eval_every = 2",
  "TrainConfig.eval_examples = 6", "TrainConfig.checkpoint_every = 2", "TRAIN_STEPS = 4",
]  # fmt: skip
SHAPE = {"vocab_size": 384, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}
SHAPE |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
OPTIONS = [
  "StepConfig.accumulate = 2", "StepConfig.remat = True", "StepConfig.speculative_rollouts = 2",
  "OptimizerConfig.ema_decay = 0.9", "TrainConfig.eval_gamma = 2", "TrainConfig.stop_after = 50",
  "train.dtype = 'bfloat16'", "train.target_dtype = 'bfloat16'",
]  # fmt: skip


def macro(name, value):
  return f"{name} = {str(value)!r}"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
  directory = tmp_path_factory.mktemp("pair") / "target"
  bindings = [f"T5Config.{name} = {value}" for name, value in SHAPE.items()] + ["TrainConfig.eval_every = 0"]
  train.run_from_gin(["runs/finetune.gin"], [macro("MODEL_DIR", directory), *SMALL, *bindings])
  return directory


def distill(directory, target, *more):
  bindings = [macro("MODEL_DIR", directory), macro("TARGET", target), macro("DRAFT", target), *SMALL, *more]
  return train.run_from_gin(["runs/distill.gin", "methods/f_distill.gin"], bindings)


def test_all_of_them_in_one_run_that_goes_on(target, tmp_path):
  assert distill(tmp_path, target, *OPTIONS)["step"] == 4
  assert distill(tmp_path, target, *OPTIONS, "TRAIN_STEPS = 8")["step"] == 8
  log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
  flops = [line["cost/target_flops"] for line in log if "cost/target_flops" in line]
  assert flops == sorted(flops) and len(set(flops)) == 4
  validated = [line for line in log if "alpha_t1" in line]
  assert {line["step"] for line in validated} == {0, 2, 4, 6, 8}
  assert all(1.0 <= line[name] <= 3.0 for line in validated for name in ("block_efficiency_t0", "block_efficiency_t1"))
  assert sum(line.get("sequences/target", 0) + line.get("sequences/draft", 0) for line in log) == 8 * 16
  model, params = weights.load_model(tmp_path)
  assert not model.config.remat and model.config.dtype == "bfloat16"
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_a_draft_that_was_saved_in_bfloat16_is_trained_in_float32_and_gone_on_with(target, tmp_path):
  model, params = weights.load_model(target)
  half = precision.of_dtype(model, "bfloat16")
  saved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  weights.save_model(tmp_path / "half", half, saved, weights.vocabulary_dir(target))
  given = macro("DRAFT", tmp_path / "half"), "Method.draft_data_fraction = 1.0"
  for steps in (2, 4):
    assert distill(tmp_path / "out", target, *given, f"TRAIN_STEPS = {steps}")["step"] == steps
  model, params = weights.load_model(tmp_path / "out")
  assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "float32")
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ("binding", "message"),
  [
    ("StepConfig.accumulate = 3", "batch_size is 16: StepConfig.accumulate = 3 times data x fsdp = 8 devices must"),
    ("train.target_dtype = 'int8'", "train.target_dtype is 'int8'; there are float32, bfloat16"),
    ("train.dtype = 'int8'", "train.dtype is 'int8'; there are float32, bfloat16"),
    ("OptimizerConfig.ema_decay = 2.0", r"ema_decay is 2.0; it must be in \(0, 1\)"),
    ("TrainConfig.stop_after = -1", "stop_after is -1; it must be at least 0"),
  ],
)
def test_what_cannot_work_is_one_line(target, tmp_path, binding, message):
  with pytest.raises(ConfigError, match=message):
    distill(tmp_path, target, binding)
