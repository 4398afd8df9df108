"""Take times that can be compared: alternating contestants, warmed up, waited for, medians.

Two runs of one program on one machine differ by more than what is to be shown, so contestants take turns within
one run. One pass of a model is timed inside a compiled loop, where the cost of dispatch has no part.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.models.language_model import LanguageModel
from distillspec_jax.parallel import multihost
from distillspec_jax.types import ConfigError, Params

_LOOP_MS = 60.0  # how long one timed loop should take: far above the clock's and the scheduler's noise


@dataclasses.dataclass(frozen=True)
class Timing:
  """Wall-clock samples of one contestant.

  Attributes:
    samples_ms: ms of each call, in order.
    result: what the last call returned, on the device or not.
  """

  samples_ms: tuple[float, ...]
  result: Any = None

  @property
  def median_ms(self) -> float:
    """The median of the samples, ms."""
    return statistics.median(self.samples_ms)


def interleaved(contestants: Mapping[str, Callable[[], Any]], repeats: int, warm_ups: int = 1) -> dict[str, Timing]:
  """Time callables in turns: a, b, a, b, ... and every other round in the opposite order.

  Args:
    contestants: name -> a callable without arguments; jax arrays in what it returns are waited for.
    repeats: timed calls of each.
    warm_ups: calls of each before, not timed: compilation happens there.

  Returns:
    name -> Timing.

  Raises:
    ValueError: no repeats.
  """
  if repeats < 1:
    raise ValueError(f"repeats is {repeats}: a median needs at least one sample")
  samples: dict[str, list[float]] = {name: [] for name in contestants}
  results = {}
  for _ in range(warm_ups):
    for call in contestants.values():
      jax.block_until_ready(call())
  for turn in range(repeats):
    order = list(contestants.items())
    for name, call in order if turn % 2 == 0 else reversed(order):
      begin = time.perf_counter()
      results[name] = jax.block_until_ready(call())
      samples[name].append((time.perf_counter() - begin) * 1e3)
  return {name: Timing(tuple(values), results[name]) for name, values in samples.items()}


def extend_times(
    model: LanguageModel,
    params: Params,
    prompt: jax.Array,
    query_lengths: Sequence[int],
    slots: int,
    repeats: int = 5,
) -> dict[int, float]:
  """Time one `extend` over Q tokens, for each Q.

  Args:
    model: the model.
    params: its parameters.
    prompt: [B, S] int32; B is the batch size that is timed.
    query_lengths: the Q to time, each from 1 to `slots`.
    slots: K, slots of the cache, as many as decoding will use.
    repeats: samples of each Q, in turns; the median is given.

  Returns:
    Q -> ms of one pass.

  Raises:
    ConfigError: a Q below 1 or above `slots`.
  """
  times = pass_times({"model": (model, params, tuple(query_lengths))}, prompt, slots, repeats)
  return times["model"]


def pass_times(
    contestants: Mapping[str, tuple[LanguageModel, Params, Sequence[int]]],
    prompt: jax.Array,
    slots: int,
    repeats: int = 5,
) -> dict[str, dict[int, float]]:
  """Time `extend` of several models at several Q, all in turns; arguments as in `extend_times`.

  Returns:
    name -> {Q: ms of one pass}.
  """
  calls, counts = pass_calls(contestants, prompt, slots)
  timings = interleaved(calls, repeats, warm_ups=0)
  result: dict[str, dict[int, float]] = {name: {} for name in contestants}
  for (name, queries), timing in timings.items():
    result[name][queries] = timing.median_ms / counts[name, queries]
  return result


def pass_calls(
    contestants: Mapping[str, tuple[LanguageModel, Params, Sequence[int]]], prompt: jax.Array, slots: int
) -> tuple[dict[tuple[str, int], Callable[[], Any]], dict[tuple[str, int], int]]:
  """Compile what `pass_times` times, so that it can take turns with other contestants.

  Returns:
    (name, Q) -> a call, and (name, Q) -> how many passes it runs.
  """
  calls, counts = {}, {}
  for name, (model, params, query_lengths) in contestants.items():
    for queries in sorted(set(query_lengths)):
      if not 1 <= queries <= slots:
        raise ConfigError(f"a pass over {queries} tokens cannot be timed with {slots} cache slots: give 1 to {slots}")
      loop = _extend_loop(model, params, jnp.asarray(prompt, jnp.int32), queries, slots)
      counts[name, queries] = _calibrate(loop)
      calls[name, queries] = lambda loop=loop, count=counts[name, queries]: loop(count)
  return calls, counts


def _extend_loop(model, params, prompt, queries: int, slots: int) -> Callable[[int], jax.Array]:
  """Compile a loop of passes over `queries` tokens; calling it with a count runs it."""
  state, _ = jax.jit(model.start, static_argnums=2)(params, prompt, slots)
  length = jnp.zeros((prompt.shape[0],), jnp.int32)
  tokens = jnp.full((prompt.shape[0], queries), 2, jnp.int32)

  @jax.jit
  def run(count, params, state, tokens):
    def one_pass(_, carry):
      state, tokens = carry
      logits, state = model.extend(params, state, tokens)
      # Each pass feeds on all logits of the last one, so that none can be left out or moved out of the loop.
      tokens = tokens ^ (jnp.max(logits, axis=-1) < -1e30).astype(tokens.dtype)
      return model.rollback(state, length), tokens

    return jax.lax.fori_loop(0, count, one_pass, (state, tokens))[1]

  return lambda count: run(count, params, state, tokens)


def _calibrate(loop: Callable[[int], jax.Array]) -> int:
  """Choose how many passes make a run of about _LOOP_MS; compiles and warms the loop up."""
  jax.block_until_ready(loop(1))
  count = 2
  while True:
    begin = time.perf_counter()
    jax.block_until_ready(loop(count))
    elapsed = (time.perf_counter() - begin) * 1e3
    elapsed = multihost.from_first("the time of a loop", lambda elapsed=elapsed: elapsed)  # all must count the same
    if elapsed >= _LOOP_MS / 4:
      return max(2, int(np.ceil(count * _LOOP_MS / elapsed)))
    count *= 4


def environment() -> dict[str, Any]:
  """Describe what the times were taken on: versions, devices, processors; JSON-able."""
  devices = jax.devices()
  return {
      "python": platform.python_version(),
      "jax": jax.__version__,
      "platform": platform.platform(),
      "machine": platform.machine(),
      "cpu_count": _usable_cpus(),
      "backend": jax.default_backend(),
      "devices": len(devices),
      "device_kind": devices[0].device_kind,
      "processes": jax.process_count(),
  }


def _usable_cpus() -> int:
  """Count the processors this process may run on; not every system can say."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:
    return os.cpu_count() or 1
