"""Distillation methods by name: which divergence, and where the sequences come from (DistillSpec, Table 1; others)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.decoding.sampling import SamplingConfig
from distillspec_jax.distillation import divergences
from distillspec_jax.types import ConfigError

# DistillSpec's four sources of sequences: (λ1, λ2). "mixed" is the draft's and the target's samples, half and half.
SOURCES: dict[str, tuple[float, float]] = {
    "data": (1.0, 0.0),
    "draft": (0.0, 1.0),
    "target": (0.0, 0.0),
    "mixed": (0.0, 0.5),
}
DIVERGENCES = ("fkl", "rkl", "jsd", "tvd")  # DistillSpec's four
# The methods as their papers have them.
_TABLE: dict[str, dict[str, Any]] = {
    "sft": dict(divergence="cross_entropy", fixed_data_fraction=1.0, draft_data_fraction=0.0),
    "seqkd": dict(divergence="cross_entropy", fixed_data_fraction=0.0, draft_data_fraction=0.0),
    "supervised_kd": dict(divergence="fkl", fixed_data_fraction=1.0, draft_data_fraction=0.0),
    "imitkd": dict(divergence="fkl", fixed_data_fraction=0.5, draft_data_fraction=1.0),
    "f_distill": dict(divergence="tvd", fixed_data_fraction=0.0, draft_data_fraction=0.5),
    "on_policy_gkd": dict(divergence="fkl", fixed_data_fraction=0.0, draft_data_fraction=1.0),
    "distillspec": dict(divergence="fkl", fixed_data_fraction=0.0, draft_data_fraction=1.0),
    "skd": dict(divergence="fkl", fixed_data_fraction=0.0, draft_data_fraction=1.0, interleave=True),
    "lk_lambda": dict(divergence="lk_lambda", fixed_data_fraction=0.0, draft_data_fraction=1.0),
    "lk_alpha": dict(divergence="lk_alpha", fixed_data_fraction=0.0, draft_data_fraction=1.0),
}
NAMES = tuple(_TABLE)
_FRACTIONS = ("fixed_data_fraction", "draft_data_fraction")


@dataclasses.dataclass(frozen=True)
class Method:
  """One way to distil: a divergence and a mixture of sources for the sequences that it is taken on.

  Each step draws u1 and takes the data set's targets if u1 ≤ λ1; otherwise it draws u2 and samples from the
  draft if u2 ≤ λ2, else from the target. Both may move: each goes from its value to its `_end` in equal parts over
  `schedule_steps` steps and stays there.

  Attributes:
    name: what logs and reports call it: one of `NAMES`, with a colon and a word of your own after it where the other
      fields make another method of it ("imitkd:annealed").
    divergence: a name that `divergences.by_name` knows.
    fixed_data_fraction: λ1 in [0, 1].
    draft_data_fraction: λ2 in [0, 1], of the steps that do not use the data set.
    rollout_temperature: ≥ 0, at which sequences are sampled; 0 is greedy.
    loss_temperature: > 0, divides the logits of both models in the loss.
    rollout_top_k: keep the k most likely tokens when sampling; 0 keeps all.
    rollout_top_p: keep the smallest set of most likely tokens with at least this probability; 1 keeps all.
    fixed_data_fraction_end: λ1 from step `schedule_steps` on; None: λ1 does not move.
    draft_data_fraction_end: λ2 from step `schedule_steps` on; None: λ2 does not move.
    schedule_steps: steps until the ends are reached; 0 where neither moves.
    interleave: whether the target corrects the draft's samples while they are made (SKD; see `interleaved`).
    interleave_block: ≥ 1, tokens that the draft proposes before the target looks.
    interleave_top_k: ≥ 1, a proposal stays if it is among that many of the target's most likely tokens.

  Raises:
    ConfigError: an unknown name or divergence, a value outside its range, or a combination that teaches nothing.
  """

  name: str
  divergence: str
  fixed_data_fraction: float
  draft_data_fraction: float
  rollout_temperature: float = 1.0
  loss_temperature: float = 1.0
  rollout_top_k: int = 0
  rollout_top_p: float = 1.0
  fixed_data_fraction_end: float | None = None
  draft_data_fraction_end: float | None = None
  schedule_steps: int = 0
  interleave: bool = False
  interleave_block: int = 5
  interleave_top_k: int = 25

  def __post_init__(self):
    if self.name.partition(":")[0] not in NAMES:
      raise ConfigError(
        f"unknown method {self.name!r}; there are {', '.join(NAMES)} (one of your own has the name of that which it"
        " changes and a word after a colon, such as 'distillspec:mine')"
      )
    divergences.by_name(self.divergence)
    for field in (*_FRACTIONS, *(f"{name}_end" for name in _FRACTIONS)):
      value = getattr(self, field)
      if value is not None and not 0.0 <= value <= 1.0:
        raise ConfigError(f"Method.{field} is {value}; it must lie in [0, 1]")
    if not 0.0 < self.loss_temperature < math.inf:
      raise ConfigError(f"Method.loss_temperature is {self.loss_temperature}; it must be above 0 and finite")
    for field, least in (("schedule_steps", 0), ("interleave_block", 1), ("interleave_top_k", 1)):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"Method.{field} is {value}; it must be a whole number of at least {least}")
    try:
      self.sampling  # noqa: B018  (checks the settings)
    except ConfigError as error:
      raise ConfigError(f"Method.rollout_{error}") from None
    if self._moves != (self.schedule_steps > 0):
      raise ConfigError(
          f"Method.schedule_steps is {self.schedule_steps}: it must be above 0 where fixed_data_fraction_end or"
          " draft_data_fraction_end is given, and 0 where neither is"
      )
    if self.needs_draft_rollouts and not self.needs_teacher:
      raise ConfigError(
          f"method {self.name!r}: cross-entropy on the draft's own samples has no expected gradient; set"
          " draft_data_fraction to 0 or take another divergence"
      )
    if self.interleave and not self.needs_draft_rollouts:
      raise ConfigError(
          f"method {self.name!r}: Method.interleave corrects the draft's samples, and there are none; set"
          " draft_data_fraction above 0 (and fixed_data_fraction below 1)"
      )

  @property
  def sampling(self) -> SamplingConfig:
    """How sequences are sampled."""
    return SamplingConfig(self.rollout_temperature, self.rollout_top_k, self.rollout_top_p)

  def fractions(self, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Give λ1 and λ2 of a step, scalars float32; the step (the first is 0) may be traced."""
    step = jnp.asarray(step, jnp.float32)

    def at(start: float, end: float) -> jax.Array:
      # Exact at the end and where nothing moves: a source of probability 0 must never be drawn, it is not compiled in.
      if start == end:
        return jnp.float32(end)
      moved = start + (end - start) * (step / self.schedule_steps)
      return jnp.where(step < self.schedule_steps, moved, end).astype(jnp.float32)

    (fixed, fixed_end), (draft, draft_end) = self._ends()
    return at(fixed, fixed_end), at(draft, draft_end)

  @property
  def needs_teacher(self) -> bool:
    """Whether the loss needs the teacher's logits."""
    return self.divergence != divergences.CROSS_ENTROPY

  @property
  def needs_data(self) -> bool:
    """Whether any step can use the data set's targets."""
    return any(fixed > 0.0 for fixed, _ in self._met())

  @property
  def needs_draft_rollouts(self) -> bool:
    """Whether any step can sample from the draft, corrected by the target or not."""
    return any(fixed < 1.0 and draft > 0.0 for fixed, draft in self._met())

  @property
  def needs_target_rollouts(self) -> bool:
    """Whether any step can sample from the target alone."""
    return any(fixed < 1.0 and draft < 1.0 for fixed, draft in self._met())

  @property
  def needs_target(self) -> bool:
    """Whether the target's parameters are needed at all, for scoring or for sampling."""
    return self.needs_teacher or self.needs_target_rollouts

  @property
  def _moves(self) -> bool:
    return self.fixed_data_fraction_end is not None or self.draft_data_fraction_end is not None

  def _ends(self) -> list[tuple[float, float]]:
    """List (first, last) of λ1 and of λ2."""
    pairs = ((getattr(self, name), getattr(self, f"{name}_end")) for name in _FRACTIONS)
    return [(start, start if end is None else end) for start, end in pairs]

  def _met(self) -> list[tuple[float, float]]:
    """List pairs (λ1, λ2) of the schedule that stand for all: both ends, and what lies between where anything does.

    λ1 and λ2 are straight lines: where one meets 0 or 1 inside, it is 0 or 1 throughout.
    """
    fixed, draft = self._ends()
    met = list(zip(fixed, draft, strict=True))
    return [*met, (sum(fixed) / 2, sum(draft) / 2)] if self.schedule_steps > 1 else met


METHODS: dict[str, Method] = {name: Method(name, **fields) for name, fields in _TABLE.items()}


def named(name: str, **overrides) -> Method:
  """Look a method up and change some of its fields: `named("distillspec", divergence="rkl")`.

  Raises:
    ConfigError: no such method or field (lists what exists), or a value outside its range.
  """
  if name not in METHODS:
    raise ConfigError(f"unknown method {name!r}; there are {', '.join(NAMES)}")
  fields = [field.name for field in dataclasses.fields(Method)]
  unknown = sorted(set(overrides) - set(fields))
  if unknown:
    raise ConfigError(f"a method has no {', '.join(unknown)}; it has {', '.join(fields)}")
  return dataclasses.replace(METHODS[name], **overrides)


def grid(divergence: str, source: str, **overrides) -> Method:
  """Give one cell of DistillSpec's grid of four divergences by four sources: `grid("jsd", "mixed")`.

  Args:
    divergence: any that `divergences.by_name` knows; the paper's four are `DIVERGENCES`.
    source: of `SOURCES`.
    **overrides: fields of a Method.

  Raises:
    ConfigError: an unknown divergence, source or field.
  """
  fixed, draft = fixed_data_fraction(source), draft_data_fraction(source)
  mixture = {"fixed_data_fraction": fixed, "draft_data_fraction": draft}
  return named("distillspec", **{"divergence": divergence, **mixture, **overrides})


def fixed_data_fraction(source: str) -> float:
  """Give λ1 of a source of `SOURCES`, for configurations that name it.

  Raises:
    ConfigError: no such source.
  """
  return _fractions_of(source)[0]


def draft_data_fraction(source: str) -> float:
  """Give λ2 of a source of `SOURCES`, for configurations that name it.

  Raises:
    ConfigError: no such source.
  """
  return _fractions_of(source)[1]


def _fractions_of(source: str) -> tuple[float, float]:
  if source not in SOURCES:
    raise ConfigError(f"unknown source {source!r} of sequences; there are {', '.join(SOURCES)}")
  return SOURCES[source]
