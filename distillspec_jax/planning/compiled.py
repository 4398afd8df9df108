"""The step and the decoding passes compiled ahead of time, and what their programs hold, do and send."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distillspec_jax.decoding.sampling import argmax
from distillspec_jax.distillation import precision, step
from distillspec_jax.models import LanguageModel
from distillspec_jax.parallel import partitioning
from distillspec_jax.planning import roofline
from distillspec_jax.planning.request import (
    Request,
    cache_bytes,
    constrained_state,
    decoding_state,
    parameter_bytes,
    resident_bytes,
    rollout_bytes,
)
from distillspec_jax.planning.topologies import Stand, Topology, make_mesh
from distillspec_jax.planning.work import Work, bytes_of_inputs, work_of

# Nothing of it is run, and LLVM's optimisation changes no buffer.
_ON_CPU = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Takes back what the step asks of the CPU's compiler where jax's default device is a CPU, as it is here.
_ON_TPU = {"xla_disable_hlo_passes": ""}
_OUT_OF_MEMORY = re.compile(r"\(?([\d.]+)([KMGT])i?B?\)? (?:exceeds available|of [\d.]+[KMGT] hbm)")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StepFigures:
  """What a compiled step takes on one device.

  Attributes:
    bytes: {"parameters", "optimizer", "target", "batch and rest", "temporaries", "program", "total"}; "rollout caches"
      are a part of the temporaries. None for what a compiler did not tell because the program does not fit.
    work: None then.
    bound: None then.
    seconds: that compiling took.
  """

  bytes: dict[str, int | None]
  work: Work | None
  bound: roofline.Bound | None
  seconds: float

  def fits(self, memory: int) -> bool:
    """Whether a device with so many bytes can run it."""
    return self.work is not None and self.bytes["total"] <= memory


@dataclasses.dataclass(frozen=True)
class PassFigures:
  """A decoder's pass over `queries` tokens of one row: its work on a device, and the time it takes at least."""

  model: str
  queries: int
  parameters: int
  cache: int
  work: Work
  bound: roofline.Bound

  @property
  def seconds(self) -> float:
    """Give the time where products overlap with reading and nothing with messages, which wait for one another."""
    return max(self.bound.compute, self.bound.memory) + self.bound.interconnect


def compile_step(request: Request, topology: Topology, stand: Stand) -> StepFigures:
  """Compile the training step for a topology.

  Args:
    request: what `request.check` has passed.
    topology: the machine.
    stand: devices in its place.
  """
  mesh = make_mesh(request.mesh_config, stand)
  student, teacher = request.placed(mesh)
  tx, schedule = request.optimizer.build(request.steps)
  found: dict[str, int | None] = {**resident_bytes(request, mesh), "rollout caches": rollout_bytes(request, mesh)}
  run = step.compile_train_step(student, teacher, tx, request.step_config, schedule=schedule, mesh=mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  target = teacher.abstract_params() if request.step_config.method.needs_target else None
  state = step.abstract_state(student, tx)
  started = time.monotonic()
  try:
    lowered = run.lower(state, target, request.batch(), key)
    compiled = _compile(lowered, stand)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return StepFigures(_without_program(found, str(error)), None, None, time.monotonic() - started)
  seconds = time.monotonic() - started
  memory = compiled.memory_analysis()
  arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  resident = sum(found[name] for name in ("parameters", "optimizer", "target"))
  found |= {
      "batch and rest": max(0, arguments - resident),
      "temporaries": memory.temp_size_in_bytes,
      "program": memory.generated_code_size_in_bytes,
      "total": arguments + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
  }
  work = work_of(compiled.as_text(), request.step_config.target_length)
  dtype = (teacher or student).config.dtype
  return StepFigures(found, work, roofline.bound(work, topology.chip, dtype), seconds)


def compile_passes(request: Request, topology: Topology, stand: Stand) -> dict[str, PassFigures]:
  """Compile what decoding a prompt at batch 1 consists of: passes of the target over 1 and γ+1 tokens, of the draft.

  Returns:
    {"target", "verify", "draft"}; without a teacher "draft" alone.
  """
  mesh = make_mesh(request.mesh_config, stand)
  student, teacher = request.placed(mesh)
  passes = {"draft": (student, 1)}
  if teacher is not None:
    passes = {"target": (teacher, 1), "verify": (teacher, request.gamma + 1)} | passes
  slots = request.step_config.target_length + request.gamma
  return {
      name: _compile_pass(name, model, queries, request.input_length, slots, mesh, topology, stand)
      for name, (model, queries) in passes.items()
  }


def _compile_pass(name, model, queries, inputs, slots, mesh: Mesh, topology: Topology, stand: Stand) -> PassFigures:
  # Decoders bring parameters to the matrices' dtype once, before their loop.
  model = precision.of_dtype(model, model.config.dtype)
  log.info("compiling the %s's pass over %d token(s) ...", "draft" if name == "draft" else "target", queries)
  params, state = model.abstract_params(), decoding_state(model, 1, inputs, slots)
  where = partitioning.param_shardings(model, mesh)
  tokens = jax.ShapeDtypeStruct((1, queries), jnp.int32)
  run = jax.jit(functools.partial(_extend, model, name == "draft"), in_shardings=(where, None, None), donate_argnums=1)
  with partitioning.use_mesh(mesh):
    compiled = _compile(run.lower(params, state, tokens), stand)
  text = compiled.as_text()
  work = work_of(text, 1)
  if not stand.exact:  # CPUs write every bfloat16 weight out as float32 and read it again
    work = dataclasses.replace(work, bytes=min(work.bytes, bytes_of_inputs(text)))
  bound = roofline.bound(work, topology.chip, model.config.dtype)
  cache = cache_bytes(model, 1, inputs, slots, mesh)
  return PassFigures(name, queries, parameter_bytes(model, mesh), cache, work, bound)


def _extend(model: LanguageModel, last_only: bool, params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any]:
  with partitioning.use_table(model.partitioning):
    state = constrained_state(state)
  logits, state = model.extend(params, state, tokens, last_only=last_only)
  with partitioning.use_table(model.partitioning):
    return argmax(logits), constrained_state(state)


def _compile(lowered, stand: Stand):
  return lowered.compile(compiler_options=dict(_ON_TPU if stand.exact else _ON_CPU))


def _without_program(found: dict[str, int | None], message: str) -> dict[str, int | None]:
  """Fill in what a compiler says that ran out of the device's memory."""
  match = _OUT_OF_MEMORY.search(message)
  needed = int(float(match[1]) * _UNITS[match[2]]) if match else None
  resident = sum(found[name] for name in ("parameters", "optimizer", "target"))
  total = None if needed is None else needed + resident
  return found | {"batch and rest": None, "temporaries": needed, "program": None, "total": total}
