"""A divergence on one chunk of T, unembedded in chunks of V: not even the logits [B, C, V] exist, of neither model.

The vocabulary is gone through twice for the value (both laws' normalisers; the sums of the divergence's terms) and
once more for the gradient, and each time a chunk's logits are made anew. With s_v the value's derivative by log Q(v),
the gradient by the logit of v is s_v − Q(v)·Σ_u s_u; the second pass adds the s_v up, the third needs their sum.

Where a mesh splits the vocabulary into parts, a chunk takes equally much of each: every device works on its own part
of the output layers, and none is sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.distillation import divergences
from distillspec_jax.models.language_model import Unembedding
from distillspec_jax.types import Params

# A running sum over the vocabulary, each part [B, C]: the largest term so far, Σ term (in logs: Σ exp(term − largest)),
# and, where a gradient is wanted, the same sum of the terms' slopes.
_Sum = tuple[jax.Array, ...]
_LogProbs = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # first token of a chunk -> log P, log Q [B, C, v]


@dataclasses.dataclass(frozen=True)
class VocabularyChunks:
  """How to compute a divergence in chunks of V.

  Attributes:
    divergence: its terms; for cross-entropy the forward KL's.
    student: the student's output layer.
    teacher: the teacher's; None for cross-entropy: the teacher is then sure of the target.
    temperature: divides the logits of both.
    size: tokens of a chunk in each part. The last one begins earlier where a part is no multiple, and leaves out again
      what was in the one before.
    parts: equal parts of the vocabulary.
  """

  divergence: divergences.VocabularySum
  student: Unembedding
  teacher: Unembedding | None
  temperature: float
  size: int
  parts: int = 1

  def values(
      self,
      student_weights: Params,
      hidden: jax.Array,
      teacher_weights: Params,
      reference: jax.Array,
      mean: tuple[jax.Array, ...],
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the divergence, the acceptance (0 without a teacher), and whether the teacher's law is broken: [B, C].

    Args:
      student_weights: those of its output layer.
      hidden: [B, C, E], the student's.
      teacher_weights: those of its output layer.
      reference: the teacher's hidden states [B, C, E], or the targets [B, C] int32.
      mean: what the divergence takes beside logits.
    """
    log_probs, _, broken = self._laws(student_weights, hidden, teacher_weights, reference)
    sums, accepted = self._add_up(log_probs, hidden.shape[:2], slopes=False)
    return self.divergence.finish(*(self._total(s) for s in sums), *mean), accepted, broken

  def values_and_gradients(
      self,
      weight_gradients: Params,
      cotangent: jax.Array,
      student_weights: Params,
      hidden: jax.Array,
      teacher_weights: Params,
      reference: jax.Array,
      mean: tuple[jax.Array, ...],
  ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Params, jax.Array]:
    """Compute what `values` does, and the gradient of Σ cotangent·divergence.

    Args:
      weight_gradients: float32 sums like the student's weights, to which this chunk's are added.
      cotangent: [B, C] float32.
      student_weights, hidden, teacher_weights, reference, mean: as `values` takes them.

    Returns:
      The values; the sums of gradients; the gradient to the hidden states, in their dtype.
    """
    log_probs, student_normaliser, broken = self._laws(student_weights, hidden, teacher_weights, reference)
    sums, accepted = self._add_up(log_probs, hidden.shape[:2], slopes=True)
    totals = tuple(self._total(s) for s in sums)
    value, pull_back = jax.vjp(lambda *t: self.divergence.finish(*t, *mean), *totals)
    factors = pull_back(cotangent)
    slope_sum = sum(factor * self._slope(s) for factor, s in zip(factors, sums, strict=True))

    def add_gradients(carry, first):
      start = self._start(first)
      piece = self.student.cut(student_weights, start, self.size, self.parts)
      logits = lambda weights, h: self._logits(self.student, weights, h, first)
      student_logits, pull_back = jax.vjp(logits, piece, hidden)
      log_p, log_q = log_probs(first, _log_softmax(student_logits, student_normaliser))
      terms, slopes = self._terms_and_slopes(log_p, log_q)
      if self.divergence.in_logs:
        slopes = [jnp.exp(t - total[..., None]) * s for t, total, s in zip(terms, totals, slopes, strict=True)]
      slope = sum(factor[..., None] * s for factor, s in zip(factors, slopes, strict=True))
      of_piece, of_hidden = pull_back(slope - jnp.exp(log_q) * slope_sum[..., None])
      return self.student.add(carry[0], of_piece, start, self.parts), carry[1] + of_hidden.astype(jnp.float32)

    carry = weight_gradients, jnp.zeros(hidden.shape, jnp.float32)
    weight_gradients, hidden_gradient = self._over_chunks(add_gradients, carry)
    return (value, accepted, broken), weight_gradients, hidden_gradient.astype(hidden.dtype)

  def _laws(self, student_weights, hidden, teacher_weights, reference):
    """Normalise both laws: (function from a chunk to both log-probabilities, student's normaliser, broken [B, C])."""

    def logits_of(unembedding, weights, h, first):
      return self._logits(unembedding, unembedding.cut(weights, self._start(first), self.size, self.parts), h, first)

    layers = [(self.student, student_weights, hidden)]
    if self.teacher is not None:
      layers.append((self.teacher, teacher_weights, reference))

    def normalise(sums, first):
      return [_add(s, logits_of(*layer, first), in_logs=True) for s, layer in zip(sums, layers, strict=True)]

    normalisers = self._over_chunks(normalise, [_empty(hidden.shape[:2])] * len(layers))

    def log_probs(first, log_q=None):
      if log_q is None:
        log_q = _log_softmax(logits_of(*layers[0], first), normalisers[0])
      if self.teacher is not None:
        return _log_softmax(logits_of(*layers[1], first), normalisers[1]), log_q
      is_target = self._fresh(first) & (self._ids(first) == reference[..., None])
      return jnp.where(is_target, 0.0, -jnp.inf), log_q

    if self.teacher is None:
      return log_probs, normalisers[0], jnp.zeros(hidden.shape[:2], bool)
    largest, total = normalisers[1]
    return log_probs, normalisers[0], ~jnp.isfinite(largest + jnp.log(total))

  def _add_up(self, log_probs: _LogProbs, shape: tuple[int, int], slopes: bool) -> tuple[list[_Sum], jax.Array]:
    """Add the divergence's terms up, and the acceptance's."""

    def add(carry, first):
      sums, accepted = carry
      log_p, log_q = log_probs(first)
      found = self._terms_and_slopes(log_p, log_q) if slopes else (self.divergence.terms(log_p, log_q),)
      sums = [_add(*s, in_logs=self.divergence.in_logs) for s in zip(sums, *found, strict=True)]
      if self.teacher is not None:
        accepted = accepted + jnp.sum(*divergences.acceptance.terms(log_p, log_q), axis=-1)
      return sums, accepted

    logs = jax.ShapeDtypeStruct(shape, jnp.float32)
    number = len(jax.eval_shape(self.divergence.terms, logs, logs))
    return self._over_chunks(add, ([_empty(shape, slopes)] * number, jnp.zeros(shape, jnp.float32)))

  def _terms_and_slopes(self, log_p: jax.Array, log_q: jax.Array):
    """Give the terms and their derivatives by log Q, token by token."""
    return jax.jvp(lambda q: self.divergence.terms(log_p, q), (log_q,), (jnp.ones_like(log_q),))

  def _total(self, found: _Sum) -> jax.Array:
    largest, total, *_ = found
    if not self.divergence.in_logs:
      return total
    return jnp.where(largest == -jnp.inf, divergences.ZERO_LOG_PROB, largest + jnp.log(total))

  def _slope(self, found: _Sum) -> jax.Array:
    """Give Σ_v of the derivative of `_total` by log Q(v)."""
    largest, total, slope = found
    return jnp.where(largest == -jnp.inf, 0.0, slope / total) if self.divergence.in_logs else slope

  def _over_chunks(self, body: Callable[[Any, jax.Array], Any], carry: Any) -> Any:
    firsts = jnp.arange(0, self._part, self.size, dtype=jnp.int32)
    return jax.lax.scan(lambda carry, first: (body(carry, first), None), carry, firsts)[0]

  @property
  def _part(self) -> int:
    """V / parts."""
    return self.student.vocab_size // self.parts

  def _start(self, first: jax.Array) -> jax.Array:
    """Give where in each part the chunk really begins: the last one must end with the part."""
    return jnp.minimum(first, self._part - self.size)

  def _places(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Give the part of each token of a chunk, and its place there: [1, 1, v] int32 each."""
    start, number = self._start(first), jax.lax.broadcasted_iota(jnp.int32, (1, 1, self.parts * self.size), 2)
    if self.parts == 1:
      return jnp.zeros_like(number), start + number
    return number // self.size, start + number % self.size

  def _ids(self, first: jax.Array) -> jax.Array:
    part, place = self._places(first)
    return place if self.parts == 1 else part * self._part + place

  def _fresh(self, first: jax.Array) -> jax.Array:
    """Mark the tokens that no chunk before had: [1, 1, v]."""
    return self._places(first)[1] >= first

  def _logits(self, unembedding: Unembedding, piece: Params, hidden: jax.Array, first: jax.Array) -> jax.Array:
    logits = unembedding.logits(piece, hidden).astype(jnp.float32) / self.temperature
    return jnp.where(self._fresh(first), logits, -jnp.inf)


def _empty(shape: tuple[int, int], slopes: bool = False) -> _Sum:
  zeros = jnp.zeros(shape, jnp.float32)
  return jnp.full(shape, -jnp.inf, jnp.float32), *[zeros] * (2 if slopes else 1)


def _add(found: _Sum, terms: jax.Array, *slopes: jax.Array, in_logs: bool) -> _Sum:
  """Add a chunk's terms, and their slopes where the sum has them, [B, C, v] to a sum."""
  largest, *sums = found
  if in_logs:
    before, largest = largest, jnp.maximum(largest, jnp.max(terms, axis=-1))
    base = jnp.where(largest == -jnp.inf, 0.0, largest)  # so that nothing but masks stays nothing
    kept, terms = jnp.exp(before - base), jnp.exp(terms - base[..., None])
    sums, slopes = [kept * old for old in sums], [terms * slope for slope in slopes]
  added = [jnp.sum(more, axis=-1) for more in (terms, *slopes)]
  return largest, *map(jnp.add, sums, added)


def _log_softmax(logits: jax.Array, normaliser: _Sum) -> jax.Array:
  """Normalise logits [B, C, v]; NaN where a law has nothing but masks, as jax.nn.log_softmax does."""
  largest, total = normaliser
  return (logits - largest[..., None]) - jnp.log(total)[..., None]
