"""A whole plan inside this process: a decoder-only pair, and a compiler that runs out of memory."""

import json

import jax
import pytest

from distillspec_jax.distillation import methods
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.distillation.step import StepConfig
from distillspec_jax.models import DecoderLM, DecoderLMConfig
from distillspec_jax.parallel.mesh import MeshConfig
from distillspec_jax.planning import compiled, planner, topologies
from distillspec_jax.planning.request import Request

B, S, T, GAMMA = 4, 8, 4, 2


def decoder(width):
  return DecoderLM(DecoderLMConfig(vocab_size=64, emb_dim=width, num_heads=2, head_dim=8, mlp_dim=32, num_layers=1))


WANTED = Request(
  student=decoder(16),
  teacher=decoder(32),
  step_config=StepConfig(methods.named("distillspec"), target_length=T),
  optimizer=OptimizerConfig("adamw"),
  steps=10,
  mesh_config=MeshConfig(2, 1, 2, draft_partitioning="replicated"),
  batch_size=B,
  input_length=S,
  gamma=GAMMA,
)


def test_a_decoder_only_pair():
  found = planner.plan("a run", WANTED, topologies.named("4xa100-80g"))
  assert json.loads(json.dumps(found)) == found
  assert found["fits"] and found["mesh"] == {"data": 2, "fsdp": 1, "model": 2} and not found["exact"]
  passes = found["decoding"]["passes"]
  # Keys and values of one row, float32, of the target's half of the heads and of all of the draft's; and a length.
  slots = S + T + GAMMA
  assert passes["target"]["cache"] - 2 * 1 * slots * 8 * 4 in range(0, 4 * slots + 8)
  assert passes["draft"]["cache"] - 2 * 2 * slots * 8 * 4 in range(0, 4 * slots + 8)
  assert passes["draft"]["messages"] == 0 < passes["target"]["messages"]
  # A token meets every matrix once: attention, feed-forward and output layer, split over two devices.
  matrices = lambda width: 4 * width * 16 + 3 * width * 32 + width * 64
  scores = lambda heads: 2 * heads * slots * 8
  assert passes["target"]["flops"] == pytest.approx(2 * (matrices(32) // 2 + scores(1)), rel=0.35)
  assert passes["draft"]["flops"] == pytest.approx(2 * (matrices(16) + scores(2)), rel=0.35)
  # True float32 products have their own peak.
  assert found["step"]["roofline"]["compute"] == found["step"]["work"]["flops"] / found["topology"]["flops_float32"]


class _OutOfMemory:
  """A lowered step whose compiler refuses it."""

  def __init__(self, message):
    self.message = message

  def lower(self, *arguments):
    raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
  ("message", "temporaries"),
  [
    ("RESOURCE_EXHAUSTED: E1000: total memory required for HLO temporaries (286.10G) exceeds available HBM (15.75G).",
     int(286.10 * 2**30)),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 300.0M hbm.", int(512.5 * 2**20)),
    ("RESOURCE_EXHAUSTED: in other words", None),
  ],
)  # fmt: skip
def test_what_a_compiler_says_that_runs_out_of_memory(message, temporaries, monkeypatch):
  monkeypatch.setattr(compiled.step, "compile_train_step", lambda *_, **__: _OutOfMemory(message))
  found = planner.plan("a run", WANTED, topologies.named("cpu-4"), decoding=False, tries=2)
  sizes = found["step"]["bytes"]
  assert not found["fits"] and sizes["temporaries"] == temporaries and found["step"]["work"] is None
  resident = sum(sizes[name] for name in ("parameters", "optimizer", "target"))
  assert sizes["total"] == (None if temporaries is None else temporaries + resident)
  assert [trial["fits"] for trial in found["advice"]["tried"]] == [False, False]


def test_other_errors_of_a_compiler_are_not_hidden(monkeypatch):
  monkeypatch.setattr(compiled.step, "compile_train_step", lambda *_, **__: _OutOfMemory("INTERNAL: a bug"))
  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    planner.plan("a run", WANTED, topologies.named("cpu-4"))
