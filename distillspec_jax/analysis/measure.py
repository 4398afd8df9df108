"""Measure a pair of models on prompts: decode both ways, score, time, predict. Token arrays in, plain dicts out.

No vocabulary and no task is needed here, so this runs on a bare accelerator machine; `evaluate.py` adds the texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from distillspec_jax.analysis import acceptance, cost_model, latency
from distillspec_jax.analysis.bootstrap import bootstrap, bootstrap_ci
from distillspec_jax.analysis.costs import MAX_GAMMA, Costs, Pair, measure_costs
from distillspec_jax.analysis.decoding_summary import DecodingSummary
from distillspec_jax.decoding import autoregressive, requests, speculative, verification
from distillspec_jax.decoding.sampling import SamplingConfig
from distillspec_jax.parallel import multihost
from distillspec_jax.types import ConfigError

Track = Callable[[Iterable, str], Iterable]  # wraps an iterable to show its progress under a label


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
  """What is measured.

  Attributes:
    max_new_tokens: T, the length limit of an output.
    gamma: drafted tokens a block.
    temperature, top_k, top_p, min_length, valid_ids, forbidden_ids, rule, lenience: as in `speculative_generate`,
      which checks them.
    batch_size: prompts decoded together where time is taken.
    decode_batch_size: prompts decoded together where only texts and counts are taken (0: `batch_size`). A row's
      text does not depend on its batch, so a larger one only saves time.
    timing_prompts: prompts that are timed, in whole batches (0: all of them).
    timing_repeats: timed runs of each batch, plain and speculative in turns.
    seed: of sampling and of the bootstrap.
  """

  max_new_tokens: int
  gamma: int = 5
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_length: int = 0
  valid_ids: int = 0
  forbidden_ids: tuple[int, ...] = ()
  rule: str = "token"
  lenience: float | None = None
  batch_size: int = 1
  decode_batch_size: int = 0
  timing_prompts: int = 32
  timing_repeats: int = 3
  seed: int = 0

  def __post_init__(self):
    for name, least in _LEAST.items():
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}: give a whole number >= {least}")
    if self.seed >= 2**31:
      raise ConfigError(f"seed is {self.seed}: give a whole number below 2**31")
    # What decoding would refuse is refused now, in decoding's own words.
    requests.check_min_length(SamplingConfig(**self.sampling), self.max_new_tokens)
    speculative.check_gamma(self.gamma)
    verification.rule_named(self.rule, self.lenience)

  @property
  def sampling(self) -> dict[str, Any]:
    """The settings that plain and speculative decoding share."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingConfig)}

  @property
  def speculation(self) -> dict[str, Any]:
    """The settings of speculative decoding alone."""
    return dict(gamma=self.gamma, rule=self.rule, lenience=self.lenience)


_LEAST = {
    "max_new_tokens": 1,
    "batch_size": 1,
    "decode_batch_size": 0,
    "timing_prompts": 0,
    "timing_repeats": 1,
    "seed": 0,
}


@dataclasses.dataclass(frozen=True)
class Rows:
  """Outputs of N prompts, on the host.

  Attributes:
    tokens: [N, T] int32, 0 after EOS.
    lengths: [N] int32, EOS counted.
    origins: [N, T] int8, 1 where the token was a proposal of the draft; None in plain decoding.
    blocks, accepted: [N] int32, as in Generation.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  origins: np.ndarray | None
  blocks: np.ndarray
  accepted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The metrics (JSON-able) and what they were taken from.

  Attributes:
    metrics: under metrics.json's names.
    plain, speculative: the outputs.
    acceptance: [N, 2] float32, each prompt's Σ_t Σ_v min(p, q) over the target's own output, and its tokens.
  """

  metrics: dict[str, Any]
  plain: Rows
  speculative: Rows
  acceptance: np.ndarray


def measure(
    pair: Pair,
    prompts: np.ndarray,
    config: MeasureConfig,
    *,
    costs: Costs | None = None,
    track: Track = lambda items, label: items,
) -> Measurement:
  """Measure everything that tokens can say about a pair.

  Args:
    pair: the models.
    prompts: [N, S] int32, N ≥ 1, padded on the right with 0.
    config: the settings.
    costs: times of single passes of an earlier measurement with models of the same shapes; None takes them.
    track: wraps the loops over batches to show their progress.

  Returns:
    The measurement; its metrics have metrics.json's names, each mean with a 95% interval over prompts.

  Raises:
    ConfigError: no prompts, or settings that decoding refuses.
  """
  prompts = np.asarray(prompts, np.int32)
  if prompts.ndim != 2 or not len(prompts):
    raise ConfigError(f"there are no prompts to measure on (their shape is {prompts.shape})")
  plain = decode_plain(pair, prompts, config, track)
  speculative_rows, summary = decode_speculatively(pair, prompts, config, track)
  accepted = acceptance_by_prompt(pair, prompts, plain, config, track)
  mean, low, high = bootstrap_ci(*accepted.T, seed=config.seed)
  metrics = {"alpha": mean, "alpha_ci": [low, high]}
  metrics |= summary.to_dict(seed=config.seed)
  if config.temperature == 0:
    metrics["greedy_identical"] = greedy_identical(plain, speculative_rows)
  metrics |= timing_metrics(pair, prompts, config, track)
  if costs is None:
    costs = measure_costs(pair, next(_batches(prompts, config.batch_size)).values, config.max_new_tokens, config.gamma)
  metrics |= prediction_metrics(metrics, costs, config)
  return Measurement(metrics, plain, speculative_rows, accepted)


def decode_plain(pair: Pair, prompts: np.ndarray, config: MeasureConfig, track: Track) -> Rows:
  """Decode every prompt with the target alone."""
  parts = []
  for batch in track(list(_batches(prompts, config.decode_batch_size or config.batch_size)), "plain decoding"):
    parts.append(_rows(_generate(pair, batch, config), batch))
  return _concatenate(parts)


def decode_speculatively(pair: Pair, prompts, config: MeasureConfig, track: Track) -> tuple[Rows, DecodingSummary]:
  """Decode every prompt with both models, and sum up the blocks."""
  parts, summary = [], None
  for batch in track(list(_batches(prompts, config.decode_batch_size or config.batch_size)), "speculative decoding"):
    generation = multihost.fetch(_speculate(pair, batch, config))
    parts.append(_rows(generation, batch))
    of_batch = DecodingSummary.from_generation(generation, batch.active)
    summary = of_batch if summary is None else summary.merge(of_batch)
  return _concatenate(parts), summary


def acceptance_by_prompt(pair: Pair, prompts, plain: Rows, config: MeasureConfig, track: Track) -> np.ndarray:
  """Score the target's own outputs with both models: each prompt's sum of acceptance and its tokens, [N, 2]."""
  parts = []
  size = config.decode_batch_size or config.batch_size
  pieces = zip(_batches(prompts, size), _batches(plain.tokens, size), _batches(plain.lengths, size))
  for prompt, tokens, lengths in track(list(pieces), "acceptance"):
    batch = acceptance.teacher_forced_batch(prompt.values, tokens.values, lengths.values)
    models = (pair.target, pair.target_params, pair.draft, pair.draft_params)
    columns = acceptance.acceptance_rate(*models, batch, **config.sampling)
    parts.append(np.stack(multihost.fetch(columns), axis=1)[prompt.active])
  return np.concatenate(parts)


def log_likelihoods(pair: Pair, prompts: np.ndarray, targets: np.ndarray, batch_size: int) -> np.ndarray:
  """Score references with both models, teacher forced: each prompt's Σ log p and Σ log q, [N, 2] float64.

  Args:
    pair: the models.
    prompts: [N, S] int32.
    targets: [N, T] int32, scored up to and with the EOS.
    batch_size: prompts scored together.
  """
  parts = []
  for prompt, tokens in zip(_batches(prompts, batch_size), _batches(targets, batch_size)):
    batch = acceptance.teacher_forced_batch(prompt.values, tokens.values)
    models = ((pair.target, pair.target_params), (pair.draft, pair.draft_params))
    columns = [acceptance.log_likelihood(model, params, batch) for model, params in models]
    parts.append(np.stack(multihost.fetch(columns), axis=1)[prompt.active])
  return np.concatenate(parts).astype(np.float64)


def timing_metrics(pair: Pair, prompts: np.ndarray, config: MeasureConfig, track: Track) -> dict[str, Any]:
  """Time plain against speculative decoding in turns, batch by batch, the prompt's encoding included."""
  limit = min(config.timing_prompts or len(prompts), len(prompts))
  # Whole batches only, but for a set that is smaller than one.
  limit = max(limit // config.batch_size, 1) * config.batch_size
  columns = []
  for index, batch in enumerate(track(list(_batches(prompts[:limit], config.batch_size)), "timing")):
    ways = {"plain": _generate, "speculative": _speculate}
    calls = {name: functools.partial(way, pair, batch, config) for name, way in ways.items()}
    timings = latency.interleaved(calls, config.timing_repeats, warm_ups=1 if index == 0 else 0)
    row = []
    for name in calls:
      tokens = int(multihost.fetch(timings[name].result.lengths)[batch.active].sum())
      row += [timings[name].median_ms * batch.active.sum(), tokens]
    columns.append(row)
  each = lambda sums: np.stack(
      [
          sums[..., 0] / sums[..., 1],
          sums[..., 2] / sums[..., 3],
          (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3]),
      ],
      axis=-1,
  )
  values, lows, highs = bootstrap(np.array(columns), each, seed=config.seed)
  metrics = {"timed_prompts": int(min(limit, len(prompts)))}
  for name, value, low, high in zip(
      ("autoregressive_ms_per_token", "speculative_ms_per_token", "speedup"), values, lows, highs
  ):
    metrics[name], metrics[f"{name}_ci"] = float(value), [float(low), float(high)]
  return metrics


def prediction_metrics(metrics: dict[str, Any], costs: Costs, config: MeasureConfig) -> dict[str, Any]:
  """Predict the speed-up from α and the times of single passes; `metrics` has alpha and block_efficiency."""
  gamma, alpha, cost_ratio = config.gamma, metrics["alpha"], costs.cost_ratio
  verify_cost = costs.verify_cost(gamma)
  break_even = cost_model.break_even_alpha(gamma, cost_ratio, verify_cost)
  gammas = range(1, max(MAX_GAMMA, gamma) + 1)
  best = costs.best_gamma(alpha, gammas[-1])
  return {
      "cost_ratio": cost_ratio,
      "verify_cost": verify_cost,
      "predicted_speedup": costs.speedup(alpha, gamma),
      "predicted_speedup_ci": [costs.speedup(end, gamma) for end in metrics["alpha_ci"]],
      "predicted_speedup_paper": cost_model.speedup(alpha, gamma, cost_ratio),
      # With the τ that was measured: what differs from the speed-up now is time, not the i.i.d. assumption.
      "predicted_speedup_from_blocks": metrics["block_efficiency"] / (cost_ratio * gamma + verify_cost),
      "predicted_speedup_by_gamma": {str(g): costs.speedup(alpha, g) for g in gammas},
      "break_even_alpha": break_even if math.isfinite(break_even) else None,
      "best_gamma": best,
      "pass_times": costs.to_dict(),
  }


def profile(pair: Pair, prompts: np.ndarray, config: MeasureConfig, directory: str) -> None:
  """Write a JAX trace of decoding the first batch both ways, compiled before, to a folder that TensorBoard reads."""
  batch = next(_batches(np.asarray(prompts, np.int32), config.batch_size))
  for way in (_generate, _speculate):
    jax.block_until_ready(way(pair, batch, config))
  with jax.profiler.trace(directory) if multihost.is_first() else contextlib.nullcontext():
    for name, way in (("plain", _generate), ("speculative", _speculate)):
      with jax.profiler.TraceAnnotation(name):
        jax.block_until_ready(way(pair, batch, config))


def greedy_identical(plain: Rows, speculative_rows: Rows) -> list[int]:
  """Count the prompts whose greedy texts are token for token the same: [same, all]."""
  same = np.all(plain.tokens == speculative_rows.tokens, axis=1)
  return [int(same.sum()), len(same)]


@dataclasses.dataclass(frozen=True)
class _Batch:
  """Some rows of an [N, ...] array, padded to the batch's size with copies of the first.

  Attributes:
    values: [B, ...]; row_ids: [B] int32, places in the whole array; active: [B] bool, False at padding.
  """

  values: np.ndarray
  row_ids: np.ndarray
  active: np.ndarray


def _batches(values: np.ndarray, size: int) -> Iterator[_Batch]:
  for begin in range(0, len(values), size):
    row_ids = np.arange(begin, begin + size, dtype=np.int32)
    active = row_ids < len(values)
    # A copied prompt, not an empty one, stands in: it costs nothing and no network meets a row of padding alone.
    yield _Batch(values[np.where(active, row_ids, begin)], row_ids, active)


def _generate(pair: Pair, batch: _Batch, config: MeasureConfig):
  return autoregressive.generate(
      pair.target,
      pair.target_params,
      batch.values,
      max_new_tokens=config.max_new_tokens,
      seed=config.seed,
      row_ids=batch.row_ids,
      active=batch.active,
      **config.sampling,
  )


def _speculate(pair: Pair, batch: _Batch, config: MeasureConfig):
  return speculative.speculative_generate(
      pair.target,
      pair.target_params,
      pair.draft,
      pair.draft_params,
      batch.values,
      max_new_tokens=config.max_new_tokens,
      seed=config.seed,
      row_ids=batch.row_ids,
      active=batch.active,
      **config.sampling,
      **config.speculation,
  )


def _rows(generation, batch: _Batch) -> Rows:
  generation = multihost.fetch(generation)
  take = lambda name: np.asarray(getattr(generation, name))[batch.active]
  origins = None if getattr(generation, "origins", None) is None else take("origins").astype(np.int8)
  return Rows(take("tokens"), take("lengths"), origins, take("blocks"), take("accepted"))


def _concatenate(parts: list[Rows]) -> Rows:
  joined = {}
  for field in dataclasses.fields(Rows):
    pieces = [getattr(part, field.name) for part in parts]
    joined[field.name] = None if any(piece is None for piece in pieces) else np.concatenate(pieces)
  return Rows(**joined)
