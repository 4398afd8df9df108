"""Which change would make a step fit: changes made for real, compiled, the first that fits named."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

from distillspec_jax.planning import request as requests
from distillspec_jax.planning.compiled import StepFigures
from distillspec_jax.planning.request import Request
from distillspec_jax.types import ConfigError

log = logging.getLogger(__name__)

_MOST_ROWS = 8  # micro-batches tried


@dataclasses.dataclass(frozen=True)
class Change:
  """One or more settings other than the run's, as they are written in gin, and the run with them."""

  settings: tuple[str, ...]
  request: Request

  def __str__(self) -> str:
    return ", ".join(self.settings)


@dataclasses.dataclass(frozen=True)
class Trial:
  """A change that was tried: its figures, None where `resident` bytes alone do not fit; whether it fits."""

  change: Change
  resident: int
  figures: StepFigures | None
  fits: bool

  def to_dict(self) -> dict[str, Any]:
    """Give it in JSON's terms."""
    total = None if self.figures is None else self.figures.bytes["total"]
    return {"settings": list(self.change.settings), "resident": self.resident, "total": total, "fits": self.fits}


def changes(request: Request, devices: int, resident_first: bool = True) -> Iterator[Change]:
  """List what might help: single changes, those first that cost least time, then more and more of them together.

  Args:
    request: the run that does not fit.
    devices: of the topology.
    resident_first: whether to begin with those that make parameters smaller, instead of what is there for a while.

  Yields:
    Changes that `request.check` passes.
  """
  makers = (*_RESIDENT, *_TEMPORARY, *_MESH) if resident_first else (*_TEMPORARY, *_MESH, *_RESIDENT)
  single = [change for make in makers if (change := _checked(make(request, devices), devices))]
  yield from single
  together = Change((), request)
  for make in (*makers, *makers):  # the second time a further step in the same direction
    more = _checked(make(together.request, devices), devices)
    if more:
      together = Change(_merged(together.settings, more.settings), more.request)
      if len(together.settings) > 1 or together.settings not in [change.settings for change in single]:
        yield together


def first_that_fits(
    request: Request,
    devices: int,
    memory: int,
    resident_of: Callable[[Request], int],
    compile_it: Callable[[Request], StepFigures],
    most: int,
) -> tuple[list[Trial], bool]:
  """Try changes until one fits.

  Args:
    request: the run that does not fit.
    devices: of the topology.
    memory: bytes of one.
    resident_of: counts what lies on a device from step to step, without compiling.
    compile_it: compiles a step.
    most: compilations at most; 0: nothing is tried.

  Returns:
    What was tried, the last one fits, if any does; and whether `most` ended the search.
  """
  tried: list[Trial] = []
  if not most:
    return tried, True
  for change in changes(request, devices, resident_first=2 * resident_of(request) > memory):
    resident = resident_of(change.request)
    if resident >= memory:
      tried.append(Trial(change, resident, None, fits=False))
      continue
    if sum(trial.figures is not None for trial in tried) >= most:
      return tried, True
    log.info("trying %s ...", change)
    figures = compile_it(change.request)
    tried.append(Trial(change, resident, figures, figures.fits(memory)))
    if tried[-1].fits:
      break
  return tried, False


def _checked(change: Change | None, devices: int) -> Change | None:
  if change is None:
    return None
  try:
    requests.check(change.request, devices)
  except ConfigError:
    return None
  return change


def _merged(settings: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
  """Put settings together; of two of one key the later."""
  by_key = {text.partition(" = ")[0]: text for text in (*settings, *more)}
  return tuple(by_key.values())


def _bfloat16_target(request: Request, devices: int) -> Change | None:
  del devices
  teacher = request.teacher
  if teacher is None or "bfloat16" in (request.teacher_dtype, teacher.config.param_dtype):
    return None
  return Change(("train.target_dtype = 'bfloat16'",), dataclasses.replace(request, teacher_dtype="bfloat16"))


def _remat(request: Request, devices: int) -> Change | None:
  del devices
  if request.step_config.remat or not hasattr(request.student.config, "remat"):
    return None
  return Change(("StepConfig.remat = True",), request.with_step(remat=True))


def _chunk(request: Request, devices: int) -> Change | None:
  del devices
  smaller = request.step_config.chunk // 4
  return Change((f"StepConfig.chunk = {smaller}",), request.with_step(chunk=smaller)) if smaller else None


def _accumulate(request: Request, devices: int) -> Change | None:
  del devices
  number = 2 * request.step_config.accumulate
  if number > _MOST_ROWS:
    return None
  return Change((f"StepConfig.accumulate = {number}",), request.with_step(accumulate=number))


def _sharded_draft(request: Request, devices: int) -> Change | None:
  _, fsdp, model = request.mesh_config.shape(devices)
  if request.mesh_config.draft_partitioning == "sharded" or fsdp * model == 1:
    return None
  settings = ("MeshConfig.draft_partitioning = 'sharded'",)
  return Change(settings, request.with_mesh(draft_partitioning="sharded"))


def _more(axis: str) -> Callable[[Request, int], Change | None]:
  """Double an axis at the cost of `data`, or where there is none left of the other one."""

  def make(request: Request, devices: int) -> Change | None:
    shape = dict(zip(("data", "fsdp", "model"), request.mesh_config.shape(devices), strict=True))
    giver = next((name for name in ("data", "fsdp", "model") if name != axis and not shape[name] % 2), None)
    if giver is None or (giver != "data" and axis == "fsdp"):
      return None
    shape |= {axis: 2 * shape[axis], giver: shape[giver] // 2}
    settings = tuple(f"MeshConfig.{name} = {size}" for name, size in shape.items())
    return Change(settings, request.with_mesh(**shape, dcn=None))

  return make


_RESIDENT = (_bfloat16_target, _sharded_draft)
_TEMPORARY = (_remat, _accumulate, _chunk)
_MESH = (_more("model"), _more("fsdp"))
