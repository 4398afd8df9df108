"""Bytes of a device, against shapes counted by hand; what is refused before anything is compiled."""

import dataclasses

import pytest

from distillspec_jax.distillation import methods
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.distillation.step import StepConfig
from distillspec_jax.models import T5, DecoderLM, DecoderLMConfig, T5Config
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh
from distillspec_jax.planning import request as requests
from distillspec_jax.planning.request import Request
from distillspec_jax.types import ConfigError

SHAPE = dict(
  vocab_size=128, emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64, num_encoder_layers=1, num_decoder_layers=1
)  # fmt: skip
B, S, T = 8, 16, 6
# Of one such T5, elements by what the table splits them over: (fsdp and model, fsdp, model).
_ATTENTION, _MLP = 4 * 32 * 32, 3 * 32 * 64
MATRICES = 2 * 128 * 32 + 3 * _ATTENTION + 2 * _MLP  # token table and output layer; attention; feed-forward
NORMS, BIASES = (2 + 1 + 3 + 1) * 32, 2 * 4 * 32


def request(**changes):
  model = T5(T5Config(**SHAPE))
  wanted = Request(
    student=model,
    teacher=model,
    step_config=StepConfig(methods.named("distillspec"), target_length=T),
    optimizer=OptimizerConfig("adamw"),
    steps=10,
    mesh_config=MeshConfig(2, 2, 2),
    batch_size=B,
    input_length=S,
  )
  return dataclasses.replace(wanted, **changes)


def bytes_of(wanted):
  return requests.resident_bytes(wanted, make_mesh(wanted.mesh_config))


def test_parameters_on_a_device():
  share = 4 * (MATRICES // 4 + NORMS // 2 + BIASES // 2)
  found = bytes_of(request())
  assert found["parameters"] == found["target"] == share
  assert 0 < found["optimizer"] - 2 * share <= 16  # two moments, and counters
  assert bytes_of(request(teacher_dtype="bfloat16"))["target"] == share // 2


def test_a_replicated_draft_and_other_meshes():
  whole = 4 * (MATRICES + NORMS + BIASES)
  found = bytes_of(request(mesh_config=MeshConfig(2, 2, 2, draft_partitioning="replicated")))
  assert found["parameters"] == whole and found["target"] < whole // 3
  assert bytes_of(request(mesh_config=MeshConfig(8, 1, 1)))["target"] == whole
  assert bytes_of(request(mesh_config=MeshConfig(1, 1, 8)))["target"] == 4 * (MATRICES // 8 + NORMS + BIASES)
  averaged = bytes_of(request(optimizer=OptimizerConfig("adamw", ema_decay=0.9), mesh_config=MeshConfig(8, 1, 1)))
  assert 0 < averaged["optimizer"] - 3 * whole <= 20


def test_a_method_without_a_target():
  wanted = request(step_config=StepConfig(methods.named("sft"), target_length=T))
  mesh = make_mesh(wanted.mesh_config)
  assert bytes_of(wanted)["target"] == requests.loading_bytes(wanted, mesh) == requests.rollout_bytes(wanted, mesh) == 0


def test_while_it_loads_the_target_is_as_it_was_saved():
  wanted = request(teacher_dtype="bfloat16")
  assert requests.loading_bytes(wanted, make_mesh(wanted.mesh_config)) == bytes_of(request())["target"]


def cache(rows, slots, heads=4, itemsize=4):
  """Keys and values of one layer, of the output and of the prompt; the prompt's mask and the lengths."""
  return 2 * rows * heads * 8 * (slots + S) * itemsize + rows * S * 4 + rows * 4


def test_caches_of_rollouts():
  mesh = make_mesh(MeshConfig(2, 2, 2))
  of = lambda **changes: requests.rollout_bytes(request(**changes), mesh)
  step = lambda method, **more: {"step_config": StepConfig(method, target_length=T, **more)}
  assert of() == cache(B // 4, T, heads=2)
  assert of(mesh_config=MeshConfig(2, 2, 2, draft_partitioning="replicated")) == cache(B // 4, T)
  target = methods.grid("fkl", "target")
  assert of(**step(target)) == cache(B // 4, T, heads=2)
  assert of(**step(target, speculative_rollouts=3)) == 2 * cache(B // 4, T + 3, heads=2)
  assert of(**step(methods.named("skd"))) == 2 * cache(B // 4, T + methods.named("skd").interleave_block - 1, heads=2)
  half = T5(T5Config(**SHAPE, dtype="bfloat16"))
  assert of(student=half) == cache(B // 4, T, heads=2, itemsize=2)


def test_a_row_that_does_not_split_lies_whole():
  model = T5(T5Config(**SHAPE))
  assert requests.cache_bytes(model, 1, S, T, make_mesh(MeshConfig(2, 2, 2))) == cache(1, T, heads=2)


def test_a_decoder_only_model():
  config = DecoderLMConfig(vocab_size=64, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_layers=3)
  model = DecoderLM(config)
  mesh = make_mesh(MeshConfig(4, 1, 2))
  whole = requests.parameter_bytes(model, make_mesh(MeshConfig(8, 1, 1)))
  assert whole // 2 <= requests.parameter_bytes(model, mesh) < whole
  state = requests.cache_bytes(model, B, S, T, mesh)
  assert state >= 3 * 2 * (B // 4) * 1 * (S + T) * 8 * 4


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mesh_config": MeshConfig(1, 1, 3)}, "does not divide 8 device"),
    ({"mesh_config": MeshConfig(4, 1, 2, dcn=(2, 1, 1))}, "dcn = .2, 1, 1. asks for 2 slices, and a topology is one"),
    ({"teacher_dtype": "float16"}, "train.target_dtype is 'float16'; there are float32, bfloat16"),
    ({"mesh_config": MeshConfig(1, 1, 16)}, "needs 16 devices and there are 8"),
    ({"mesh_config": MeshConfig(8, 1, 1), "batch_size": 12}, "batch_size is 12: data x fsdp = 8 of 8 devices must"),
    ({"step_config": StepConfig(methods.named("distillspec"), T, accumulate=4)}, "StepConfig.accumulate = 4 times"),
    ({"teacher": T5(T5Config(**SHAPE | {"vocab_size": 64}))}, "64 token ids and the draft 128"),
  ],
)
def test_what_cannot_be(changes, message):
  with pytest.raises(ConfigError, match=message):
    requests.check(request(**changes), 8)


def test_what_can_be():
  requests.check(request(), 8)
