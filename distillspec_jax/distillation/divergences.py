"""Divergences between a teacher's and a student's next-token distributions, as pure functions of logits.

P is the teacher, Q the student. Every function takes logits of any float dtype, works in float32 and gives one
float32 value a position; the gradient flows to the student alone. A masked token (logit -inf) has probability
exactly zero, and 0·log 0 = 0. Where the formula would divide by such a zero (the forward KL of a token that the
student masks, the reverse KL of one that the teacher masks), the log of the zero counts as `ZERO_LOG_PROB`
instead of -inf: training then sees a large finite value and a finite gradient away from that token, not a NaN.

Two of them (`BatchDivergence`) weigh each position by a number that the whole batch gives; the rest look at one
position alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distillspec_jax.types import ConfigError

# Takes teacher logits [..., T, V] (cross-entropy: target ids [..., T]) and student logits; gives [..., T].
Divergence = Callable[[jax.Array, jax.Array], jax.Array]

ZERO_LOG_PROB = -100.0  # below the log of float32's smallest positive number, about -103 with subnormals
CROSS_ENTROPY = "cross_entropy"
_LEAST_VARIANCE = 1e-6  # of TVD++'s reward: below it rounding would be what is scaled up


@dataclasses.dataclass(frozen=True)
class VocabularySum:
  """A value of each position that sums over the vocabulary make up, each of a term that looks at one token.

  Whoever works in pieces of the vocabulary adds the terms up himself. A token masked by both adds nothing.

  Attributes:
    terms: log P and log Q, float32 of one shape -> one array of that shape a sum.
    finish: the sums [...], one argument each, and, of a `BatchDivergence`'s value, the mean [] -> [...].
    in_logs: whether the terms are logarithms: a sum is then the log of Σ exp, and ZERO_LOG_PROB, without gradient,
      where nothing adds to it.
  """

  terms: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]
  finish: Callable[..., jax.Array] = lambda total: total
  in_logs: bool = False

  def __call__(self, teacher_logits: jax.Array, student_logits: jax.Array, *mean: jax.Array) -> jax.Array:
    """Compute the value: logits [..., T, V] twice -> [..., T] float32."""
    # The teacher is cut off from gradients.
    teacher = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
    log_p = jax.nn.log_softmax(teacher, axis=-1)
    log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32), axis=-1)
    add_up = _log_sum if self.in_logs else functools.partial(jnp.sum, axis=-1)
    return self.finish(*map(add_up, self.terms(log_p, log_q)), *mean)


@dataclasses.dataclass(frozen=True)
class BatchDivergence:
  """A divergence whose value at a position also depends on a mean over the whole batch, which gets no gradient.

  Whoever works in pieces takes the weighted mean of `statistic` over all counted tokens first and gives it to
  `value`. Called like any other divergence, it takes the positions that it is given as the batch, equally weighted.

  Attributes:
    statistic: teacher and student logits [..., T, V] -> [..., T] float32; what is averaged.
    value: teacher and student logits [..., T, V] and the mean [] float32 -> [..., T] float32.
  """

  statistic: VocabularySum
  value: VocabularySum

  def __call__(self, teacher_logits: jax.Array, student_logits: jax.Array) -> jax.Array:
    """Take the mean over the given positions: logits [..., T, V] twice -> [..., T] float32."""
    mean = jnp.mean(self.statistic(teacher_logits, student_logits))
    return self.value(teacher_logits, student_logits, mean)


def _forward_kl(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array]:
  return (jnp.exp(log_p) * (_finite(log_p) - _finite(log_q)),)


def _reverse_kl(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array]:
  return (jnp.exp(log_q) * (_finite(log_q) - _finite(log_p)),)


def _difference(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array]:
  return (jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)),)


def _jensen_shannon(log_p: jax.Array, log_q: jax.Array, *, beta: float) -> tuple[jax.Array]:
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  mixture = beta * p + (1.0 - beta) * q
  # Where the mixture is zero (masked by both, or underflown) both terms are zero: any finite log will do.
  log_m = jnp.log(jnp.where(mixture > 0, mixture, 1.0))
  return (beta * p * (_finite(log_p) - log_m) + (1.0 - beta) * q * (_finite(log_q) - log_m),)


def _log_overlap(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array]:
  # Not `minimum`: its gradient compares the result with what XLA may have computed a second time, rounded otherwise.
  return (jnp.where((log_q < log_p) | jnp.isnan(log_q), log_q, log_p),)


def _overlap(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array]:
  return (jnp.minimum(jnp.exp(log_p), jnp.exp(log_q)),)


def _reward(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array]:
  return (jnp.where(log_p > log_q, jnp.exp(log_q), 0.0),)


def _kl_and_difference(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
  return *_forward_kl(log_p, log_q), *_difference(log_p, log_q)


def _half(total: jax.Array) -> jax.Array:
  return 0.5 * total


def _lk_lambda(kl: jax.Array, difference: jax.Array, mean_acceptance: jax.Array) -> jax.Array:
  weight = jnp.exp(-3.0 * jax.lax.stop_gradient(mean_acceptance))
  return weight * kl + (1.0 - weight) * _half(difference)


def _tvd_pp(difference: jax.Array, mean_reward: jax.Array) -> jax.Array:
  variance = jax.lax.stop_gradient(mean_reward * (1.0 - mean_reward))
  # Without any reward (P = Q everywhere) there is nothing to scale but rounding.
  scale = jax.lax.rsqrt(jnp.where(variance > 0, jnp.maximum(variance, _LEAST_VARIANCE), 1.0))
  tvd = _half(difference)
  fixed = jax.lax.stop_gradient(tvd)
  return fixed + scale * (tvd - fixed)


# KL(P‖Q) = Σ_v P·(log P − log Q).
forward_kl = VocabularySum(_forward_kl)

# KL(Q‖P) = Σ_v Q·(log Q − log P).
reverse_kl = VocabularySum(_reverse_kl)

# ½·Σ_v |P − Q|, which is 1 − acceptance.
total_variation = VocabularySum(_difference, _half)

# Σ_v min(P, Q), the chance that a draft token is accepted.
acceptance = VocabularySum(_overlap)

# L_α = −log Σ_v min(P, Q) (LK losses, 2602.23881). Its gradient is the total variation's divided by the acceptance. It
# is computed from logs, so that it keeps its size and direction where the overlap itself underflows. An overlap that
# masks leave empty counts as exp(ZERO_LOG_PROB), and has no gradient: no logit can change it.
lk_alpha = VocabularySum(_log_overlap, lambda log_acceptance: -log_acceptance, in_logs=True)

# L_λ = λ·KL(P‖Q) + (1−λ)·TVD with λ = exp(−3·α), α the batch's mean acceptance (LK losses, 2602.23881): the forward KL
# while the student is far, the total variation when it is near.
lk_lambda = BatchDivergence(acceptance, VocabularySum(_kl_and_difference, _lk_lambda))

# TVD++ (2403.00858). The total variation's gradient is −E_{v~Q}[r(v)·∇log Q(v)] with the reward r = 1{P > Q}; TVD++
# centres and scales r over the batch's draws. Under the expectation over the full vocabulary, taken here, the centre
# drops out, and r is 0 or 1: its variance is μ(1−μ), μ the batch's mean of Σ_v Q·1{P > Q}. So the value is the total
# variation, and the gradient the total variation's over the reward's standard deviation.
tvd_pp = BatchDivergence(VocabularySum(_reward), VocabularySum(_difference, _tvd_pp))


def jensen_shannon(beta: float = 0.5) -> VocabularySum:
  """Make JSD[β] = β·KL(P‖M) + (1−β)·KL(Q‖M) with M = β·P + (1−β)·Q (DistillSpec, section 3).

  The formula vanishes at both ends; divided by β (by 1−β) it tends to the forward (reverse) KL, so these stand
  for β = 0 (β = 1).

  Raises:
    ConfigError: β lies outside [0, 1].
  """
  if not 0.0 <= beta <= 1.0:
    raise ConfigError(f"JSD's beta is {beta}; it must lie in [0, 1] (0 = forward KL, 1 = reverse KL)")
  if beta == 0.0:
    return forward_kl
  if beta == 1.0:
    return reverse_kl
  return VocabularySum(functools.partial(_jensen_shannon, beta=beta))


def cross_entropy(targets: jax.Array, student_logits: jax.Array) -> jax.Array:
  """−log Q(target), the forward KL from the law that is sure of it: ids [..., T] and logits [..., T, V] -> [..., T]."""
  logits = student_logits.astype(jnp.float32)
  # Compare-and-sum instead of a gather: a vocabulary split over the mesh then needs no all-gather.
  is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
  picked = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  return -_finite(picked - jax.nn.logsumexp(logits, axis=-1))


_NAMED: dict[str, Divergence] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon(0.5),
    "tvd": total_variation,
    CROSS_ENTROPY: cross_entropy,
    "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
    "tvd_pp": tvd_pp,
}


def by_name(name: str) -> Divergence:
  """Look a divergence up: 'fkl', 'rkl', 'jsd' (β = ½), 'jsd_0.1' (any β), 'tvd', 'cross_entropy', 'lk_alpha'.

  'lk_lambda' and 'tvd_pp' are `BatchDivergence`s: a loss that works in pieces must take their mean first.

  Raises:
    ConfigError: no such name (lists what exists), or β outside [0, 1].
  """
  if name in _NAMED:
    return _NAMED[name]
  prefix, _, beta = str(name).partition("_")
  if prefix == "jsd":
    try:
      value = float(beta)
    except ValueError:
      pass
    else:
      return jensen_shannon(value)
  raise ConfigError(f"unknown divergence {name!r}; there are {', '.join(_NAMED)}, and jsd_BETA such as jsd_0.1")


def _log_sum(terms: jax.Array) -> jax.Array:
  """Give log Σ_v exp(term): [..., V] -> [...]; ZERO_LOG_PROB, without gradient, where all terms are -inf."""
  empty = jnp.all(terms == -jnp.inf, axis=-1)
  return jnp.where(empty, ZERO_LOG_PROB, jax.nn.logsumexp(jnp.where(empty[..., None], 0.0, terms), axis=-1))


def _finite(log_probs: jax.Array) -> jax.Array:
  """Put `ZERO_LOG_PROB` for the log of an exact zero; NaNs and finite values stay."""
  return jnp.where(log_probs == -jnp.inf, ZERO_LOG_PROB, log_probs)
