"""The steps' figures: left on the device as they come, fetched together, averaged once an interval."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from distillspec_jax.distillation.costs import Meter
from distillspec_jax.distillation.rollouts import SOURCES

_IN_FLIGHT = 4  # steps dispatched ahead; bounds the batches that wait on the devices
_MEANS = ("loss", "alpha", "rollout_kept", "rollout_block_efficiency")  # (sum, count) pairs


class NonFinite(ArithmeticError):
  """A loss, gradient or parameter is NaN or infinite; says which and at what step."""


class BrokenTarget(NonFinite):
  """The target's logits are NaN or infinite."""


class Figures:
  """Collects the metrics of `step.make_train_step` and times the steps between fetches."""

  def __init__(self, meter: Meter | None = None):
    """Begin an interval; what the steps cost is added to `meter`."""
    self._meter = meter
    self._waiting: list[tuple[int, dict[str, Any]]] = []
    self._begin()
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leave out the time that went into compiling, validation or saving."""
    self._clock = time.monotonic()

  def add(self, step: int, metrics: dict[str, Any], data_seconds: float) -> None:
    """Take a dispatched step's metrics without fetching them.

    Args:
      step: its number, from 1.
      metrics: device arrays, as the step returns them.
      data_seconds: how long the host waited for its batch.
    """
    self._waiting.append((step, metrics))
    self._data_seconds += data_seconds
    if len(self._waiting) > _IN_FLIGHT:  # waits until an older step is done; fetches nothing
      jax.block_until_ready(self._waiting[-1 - _IN_FLIGHT][1]["loss"])

  def fetch(self) -> None:
    """Fetch what waits and add it up.

    Raises:
      NonFinite: a loss or gradient among it is NaN or infinite; BrokenTarget where the target's logits are why.
    """
    fetched = jax.device_get(self._waiting)
    self._waiting = []
    spent = time.monotonic() - self._clock
    self._seconds += spent
    if self._meter is not None:
      self._meter.add_seconds(spent)
    self.restart_clock()
    for step, metrics in fetched:
      if metrics.get("target_broken", 0) > 0:
        broken, tokens = int(metrics["target_broken"]), int(metrics["tokens"])
        raise BrokenTarget(f"the target's logits are NaN or infinite at {broken} of {tokens} tokens of step {step}")
      for name, value in (("loss", metrics["loss"][0]), ("gradient norm", metrics["gradient_norm"])):
        if not math.isfinite(value):
          raise NonFinite(f"the {name} is {float(value)} at step {step}")
      self._add_up(metrics)

  def collect(self) -> dict[str, float]:
    """Fetch, average over the interval, begin a new one.

    Returns:
      loss (nats a token, as reduced), alpha (with a teacher), rollout_kept and rollout_block_efficiency (where the
      draft's proposals were judged in the interval), gradient_norm (mean), learning_rate (the last),
      tokens_per_second (counted target tokens), steps_per_second, data_wait_seconds (in the interval), of each source
      source/NAME (the share of steps that took their sequences from it) and sequences/NAME (counted ones from it), and
      with a meter the run's cost so far.
    """
    self.fetch()
    totals, steps, seconds = self._totals, max(1, self._steps), max(self._seconds, 1e-9)
    counts = {name: totals[f"{name} count"] for name in _MEANS if f"{name} count" in totals}
    # A loss over nothing is 0; proposals that nobody made have no mean.
    scalars = {name: totals[name] / max(n, 1.0) for name, n in counts.items() if n or not name.startswith("rollout")}
    scalars["gradient_norm"] = totals["gradient_norm"] / steps
    if self._learning_rate is not None:
      scalars["learning_rate"] = self._learning_rate
    scalars["tokens_per_second"] = totals["tokens"] / seconds
    scalars["steps_per_second"] = self._steps / seconds
    scalars["data_wait_seconds"] = self._data_seconds
    for number, name in enumerate(SOURCES):
      scalars[f"source/{name}"] = totals[f"source {number}"] / steps
      scalars[f"sequences/{name}"] = totals[f"sequences {number}"]
    if self._meter is not None:
      scalars |= self._meter.scalars()
    self._begin()
    return scalars

  def state(self) -> dict[str, Any]:
    """Give what was fetched of the interval that has begun, in JSON's terms."""
    return {
      "totals": dict(self._totals),
      "learning_rate": self._learning_rate,
      "steps": self._steps,
      "seconds": self._seconds,
      "data_seconds": self._data_seconds,
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Go on with the interval that `state` gave."""
    self._totals.update(state["totals"])
    self._learning_rate, self._steps = state["learning_rate"], state["steps"]
    self._seconds, self._data_seconds = state["seconds"], state["data_seconds"]

  def _begin(self) -> None:
    self._totals: dict[str, float] = collections.defaultdict(float)
    self._learning_rate: float | None = None
    self._seconds = self._data_seconds = 0.0
    self._steps = 0

  def _add_up(self, metrics: dict[str, Any]) -> None:
    self._steps += 1
    for name in _MEANS:
      if name in metrics:
        self._totals[name] += float(metrics[name][0])
        self._totals[f"{name} count"] += float(metrics[name][1])
    for name in ("gradient_norm", "tokens"):
      self._totals[name] += float(metrics[name])
    self._totals[f"source {int(metrics['source'])}"] += 1
    for number, sequences in enumerate(metrics["sequences"]):
      self._totals[f"sequences {number}"] += int(sequences)
    if self._meter is not None:
      self._meter.add_step(metrics)
    if "learning_rate" in metrics:
      self._learning_rate = float(metrics["learning_rate"])
