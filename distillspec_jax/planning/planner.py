"""Put a plan together: check, compile, add up, compare with the machine, and look for what would fit."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax

from distillspec_jax.analysis import cost_model
from distillspec_jax.distillation import precision
from distillspec_jax.planning import advice, compiled, request, topologies
from distillspec_jax.planning.request import Request
from distillspec_jax.planning.topologies import Topology

_ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)

log = logging.getLogger(__name__)


def plan(run: str, wanted: Request, topology: Topology, *, decoding: bool = True, tries: int = 6) -> dict[str, Any]:
  """Plan a run on a machine.

  Args:
    run: what to call it.
    wanted: the run.
    topology: the machine.
    decoding: whether to plan decoding too.
    tries: compilations at most in the search for what would fit; 0: no search.

  Returns:
    What plan.json holds; sizes in bytes of one device, times in seconds unless their name says ms.

  Raises:
    ConfigError: what `request.check` says, before anything is compiled.
  """
  request.check(wanted, topology.devices)
  stand = topologies.stand_for(topology)
  mesh = topologies.make_mesh(wanted.mesh_config, stand)
  by = "the TPU compiler" if stand.exact else "virtual CPU devices"
  log.info("compiling the step for %s with %s: this can take minutes ...", topology.name, by)
  figures = compiled.compile_step(wanted, topology, stand)
  log.info("compiled in %.0f s", figures.seconds)
  memory = topology.chip.memory
  found = {
      "run": run,
      "topology": {"name": topology.name, "devices": topology.devices, **dataclasses.asdict(topology.chip)},
      "mesh": dict(mesh.shape),
      "exact": stand.exact,
      "models": _models(wanted),
      "step": _step(figures, request.loading_bytes(wanted, mesh)),
      "fits": figures.fits(memory),
      "advice": {"tried": [], "fits_with": None, "limited": False},
  }
  if not found["fits"]:
    found["advice"] = _advice(wanted, topology, stand, tries)
  if decoding:
    found["decoding"] = _decoding(compiled.compile_passes(wanted, topology, stand), wanted.gamma)
  return found


def _advice(wanted: Request, topology: Topology, stand: topologies.Stand, tries: int) -> dict[str, Any]:
  resident = lambda changed: sum(
      request.resident_bytes(changed, topologies.make_mesh(changed.mesh_config, stand)).values()
  )
  trials, limited = advice.first_that_fits(
      wanted,
      topology.devices,
      topology.chip.memory,
      resident,
      lambda changed: compiled.compile_step(changed, topology, stand),
      tries,
  )
  fitting = [trial for trial in trials if trial.fits]
  return {
      "tried": [trial.to_dict() for trial in trials],
      "fits_with": list(fitting[0].change.settings) if fitting else None,
      "limited": limited,
  }


def _models(wanted: Request) -> dict[str, str]:
  teacher = wanted.teacher
  shown = {"draft": _described(wanted.student)}
  if teacher is not None:
    kept = precision.of_dtype(teacher, wanted.teacher_dtype) if wanted.teacher_dtype else teacher
    shown = {"target": _described(kept)} | shown
  shown["step"] = (
      f"{wanted.step_config.method.name}, batch {wanted.batch_size}, {wanted.input_length} tokens in,"
      f" {wanted.step_config.target_length} out, {wanted.optimizer.name}"
  )
  return shown


def _described(model) -> str:
  size = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params()))
  return f"{size:,} parameters in {model.config.param_dtype}, computing in {model.config.dtype}"


def _step(figures: compiled.StepFigures, loading: int) -> dict[str, Any]:
  work = figures.work
  return {
      "bytes": figures.bytes,
      "loading": loading,
      "work": None if work is None else _work(work) | {"messages": work.by_kind(), "unbounded": work.unbounded},
      "roofline": None if figures.bound is None else figures.bound.to_dict(),
      "compile_seconds": figures.seconds,
  }


def _work(work) -> dict[str, float]:
  return {"flops": work.flops, "bytes": work.bytes, "wire_bytes": work.wire_bytes}


def _decoding(passes: dict[str, compiled.PassFigures], gamma: int) -> dict[str, Any]:
  found: dict[str, Any] = {"passes": {name: _pass(figures) for name, figures in passes.items()}}
  if "target" not in passes:
    return found
  plain = passes["target"].seconds
  # Of a block: γ passes of the draft, one of the target.
  cost_ratio, verify_cost = passes["draft"].seconds / plain, passes["verify"].seconds / plain
  even = cost_model.break_even_alpha(gamma, cost_ratio, verify_cost)
  found["plain_ms_per_token"] = 1e3 * plain
  found["speculative"] = {
      "gamma": gamma,
      "cost_ratio": cost_ratio,
      "verify_cost": verify_cost,
      "block_ms": 1e3 * plain * (gamma * cost_ratio + verify_cost),
      "break_even_alpha": even if math.isfinite(even) else None,
      "at": [_at(alpha, gamma, cost_ratio, verify_cost, plain) for alpha in _ALPHAS],
  }
  return found


def _at(alpha: float, gamma: int, cost_ratio: float, verify_cost: float, plain: float) -> dict[str, float]:
  gain = cost_model.speedup(alpha, gamma, cost_ratio, verify_cost)
  return {"alpha": alpha, "speedup": gain, "ms_per_token": 1e3 * plain / gain}


def _pass(figures: compiled.PassFigures) -> dict[str, Any]:
  return {
      "queries": figures.queries,
      "parameters": figures.parameters,
      "cache": figures.cache,
      **_work(figures.work),
      "messages": sum(figures.work.messages.values()),
      "seconds": figures.seconds,
      "roofline": figures.bound.to_dict(),
  }
