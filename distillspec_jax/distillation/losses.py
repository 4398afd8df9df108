"""The loss over a whole batch, unembedded in chunks of T (and of V): full-vocabulary logits [B, T, V] never exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from distillspec_jax.distillation import divergences
from distillspec_jax.distillation.vocabulary_chunks import VocabularyChunks
from distillspec_jax.models.language_model import Unembedding
from distillspec_jax.parallel import partitioning
from distillspec_jax.types import ConfigError

REDUCTIONS = ("sequence", "token")

Unembed = Callable[[jax.Array], jax.Array]  # hidden [B, C, E] -> logits [B, C, V]


@flax.struct.dataclass
class LossSums:
  """A batch's sums, all scalar float32. The loss is total / count; α on the batch is accepted / tokens.

  Attributes:
    total: the weighted divergences; carries the gradient.
    count: sequences with a counted token ("sequence") or tokens ("token").
    accepted: Σ weight·Σ_v min(P, Q), without gradient; 0 for cross-entropy, which has no P.
    tokens: Σ weight.
    broken: counted tokens where the teacher's logits give no distribution: a NaN or infinity among them, or nothing
      but minus infinity.
  """

  total: jax.Array
  count: jax.Array
  accepted: jax.Array
  tokens: jax.Array
  broken: jax.Array

  @classmethod
  def zero(cls) -> LossSums:
    """Give the sums of no tokens."""
    return cls(*[jnp.zeros((), jnp.float32)] * 5)

  @property
  def loss(self) -> jax.Array:
    """The scalar to differentiate; 0 for a batch without a counted token."""
    return self.total / jnp.maximum(self.count, 1.0)


def chunked_loss(
    divergence: str,
    student: tuple[Unembed, jax.Array],
    weights: jax.Array,
    *,
    teacher: tuple[Unembed, jax.Array] | None = None,
    targets: jax.Array | None = None,
    temperature: float = 1.0,
    chunk: int = 16,
    vocab_chunk: int | None = None,
    reduction: str = "sequence",
    segments: jax.Array | None = None,
) -> LossSums:
  """Reduce a divergence over the counted tokens of a batch, `chunk` positions at a time.

  Each chunk's logits are made, used for the value AND the gradient, and dropped. The loss is linear in the
  tokens' divergences, so the gradient is known up to one factor before the last chunk is seen; that spares the
  second unembedding of both models that rematerialisation would cost (measured: 1.5× faster than
  `jax.checkpoint`, same memory). Memory does not grow with T beyond the hidden states and their gradient.
  A `BatchDivergence` weighs the tokens by a mean over the batch, which a pass without gradients takes first.

  Positions of weight 0 are cut off before the unembedding: whatever stands there, NaNs included, reaches neither
  the value nor the gradient.

  Args:
    divergence: a name that `divergences.by_name` knows.
    student: its unembedding (gradients reach what it closes over) and its hidden states [B, T, E].
    weights: [B, T] float or int; 0 = not counted.
    teacher: the same of the teacher, which gets no gradient; needed unless the divergence is cross-entropy.
    targets: [B, T] int32, needed by cross-entropy.
    temperature: divides the logits of both.
    chunk: C, positions of T a chunk; T is padded up to a multiple.
    vocab_chunk: v, tokens whose logits [B, C, v] exist at a time, 1 or more; the unembeddings must then be
      `Unembedding`s. They run three times instead of once (without a gradient: twice). None, or V and more: all tokens.
      Where the mesh splits the vocabulary a chunk is rounded up to equally many tokens of each part.
    reduction: "sequence": the mean over a sequence's tokens, then over sequences (DistillSpec, Eq. 2); sequences
      without a counted token do not count. "token": the mean over all tokens of the batch.
    segments: [B, T] int32, 0 ... T, of packed rows: each id of a row is a sequence. None: each row is one.

  Raises:
    ConfigError: an unknown divergence or reduction; `vocab_chunk` without unembeddings that can be cut.
  """
  scored = divergence != divergences.CROSS_ENTROPY
  weights = weights.astype(jnp.float32)
  scale, count = _scale_and_count(weights, reduction, segments)
  reference = jax.lax.stop_gradient(teacher[1]) if scored else targets
  pieces = tuple(_split(array, chunk) for array in (student[1], reference, weights, weights * scale))
  unembeddings = (student[0], teacher[0]) if scored else (student[0],)
  if _is_cut(unembeddings, vocab_chunk):
    student_leaves, *teacher_leaves = [unembedding.weights for unembedding in unembeddings]
    make = lambda value_of: _in_vocabulary_chunks(value_of, unembeddings, temperature, vocab_chunk)
  else:
    # What the unembeddings close over becomes explicit, because a custom gradient cannot reach into a closure.
    closed = [jax.closure_convert(f, p[0]) for f, p in zip(unembeddings, pieces, strict=False)]
    functions, (student_leaves, *teacher_leaves) = zip(*closed, strict=True)
    make = lambda value_of: _in_whole_vocabularies(value_of, functions, temperature)
  value_of, mean = divergences.by_name(divergence), ()
  if isinstance(value_of, divergences.BatchDivergence):
    blind = jax.lax.stop_gradient((student_leaves, pieces[0], (teacher_leaves, ()), (*pieces[1:3], pieces[2])))
    mean = (_sum_chunks(make(value_of.statistic)[0], *blind)[0] / jnp.maximum(jnp.sum(weights), 1.0),)
    value_of = value_of.value
  sum_chunks = _with_gradient(*make(value_of))
  total, *rest = sum_chunks(student_leaves, pieces[0], (teacher_leaves, mean), pieces[1:])
  accepted, broken = jax.lax.stop_gradient(rest)
  return LossSums(total, count, accepted, jnp.sum(weights), broken)


def count_sequences(weights: jax.Array, segments: jax.Array | None = None) -> jax.Array:
  """Count the sequences with a counted token, of packed rows by segment: weights, segments [B, T] -> [] float32."""
  return _scale_and_count(weights.astype(jnp.float32), "sequence", segments)[1]


def _scale_and_count(weights: jax.Array, reduction: str, segments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Give factors [B, 1] or [B, T] and the count, so that Σ weight·factor·divergence / count is the loss."""
  if reduction == "token":
    return jnp.ones((weights.shape[0], 1), jnp.float32), jnp.sum(weights)
  if reduction == "sequence":
    if segments is None:
      sums = jnp.sum(weights, axis=-1, keepdims=True)
    else:  # [B, T + 1]: a row has at most T segments, and padding
      sums = jax.vmap(lambda w, ids: jax.ops.segment_sum(w, ids, weights.shape[1] + 1))(weights, segments)
    scale = jnp.where(sums > 0, 1.0 / jnp.where(sums > 0, sums, 1.0), 0.0)
    if segments is not None:
      scale = jnp.take_along_axis(scale, segments, axis=1)
    return scale, jnp.sum(sums > 0, dtype=jnp.float32)
  raise ConfigError(f"unknown reduction {reduction!r}; there are {', '.join(REDUCTIONS)}")


def _is_cut(unembeddings: tuple[Unembed, ...], vocab_chunk: int | None) -> bool:
  """Whether the vocabulary is worked on in chunks."""
  if vocab_chunk is None:
    return False
  for unembedding in unembeddings:
    if not isinstance(unembedding, Unembedding):
      raise ConfigError(
          f"vocab_chunk is {vocab_chunk}, but an unembedding is a {type(unembedding).__name__}, whose vocabulary cannot"
          " be cut: give what LanguageModel.unembedding gives, or set vocab_chunk to None"
      )
  return vocab_chunk < unembeddings[0].vocab_size


# Of one chunk: (student's leaves, its hidden states [B, C, E], (teacher's leaves, what the divergence takes beside
# logits), (teacher's hidden states [B, C, E] or targets [B, C], weights [B, C], weights·factor [B, C])) -> scalars
# (Σ weight·factor·value, Σ weight·acceptance, broken ones).
_ChunkSums = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
# Takes sums of the leaves' gradients first, then the same; gives these scalars, the sums of gradients with the chunk's
# added, and the gradient to its hidden states.
_ChunkGradients = Callable[..., tuple[Any, Any, jax.Array]]


def _in_whole_vocabularies(value_of, functions, temperature: float) -> tuple[_ChunkSums, _ChunkGradients]:
  """Make the functions of one chunk of T whose logits [B, C, V] exist."""
  unembed, *teacher_unembed = functions

  def chunk_sums(student_leaves, hidden, fixed, rest):
    teacher_leaves, mean = fixed
    reference, weights, scaled = rest
    counted = weights > 0
    logits = unembed(_blank(hidden, counted), *student_leaves) / temperature
    if not teacher_unembed:
      return _weighted(value_of(reference, logits), scaled), *_zeros()[1:]
    teacher_logits = teacher_unembed[0](_blank(reference, counted), *teacher_leaves[0]) / temperature
    accepted = divergences.acceptance(teacher_logits, jax.lax.stop_gradient(logits))
    # The log-probabilities are those that the divergence takes: compiled once.
    broken = jnp.isnan(jax.nn.log_softmax(teacher_logits.astype(jnp.float32), axis=-1)[..., 0])
    total = _weighted(value_of(teacher_logits, logits, *mean), scaled)
    return total, _weighted(accepted, weights), jnp.sum(broken & counted, dtype=jnp.float32)

  def chunk_gradients(leaf_gradients, student_leaves, hidden, fixed, rest):
    def of_student(leaves, h):
      total, *others = chunk_sums(leaves, h, fixed, rest)
      return total, others

    total, pull_back, others = jax.vjp(of_student, student_leaves, hidden, has_aux=True)
    more_leaf_gradients, hidden_gradient = pull_back(jnp.ones_like(total))
    return (total, *others), jax.tree.map(_add, leaf_gradients, more_leaf_gradients), hidden_gradient

  return chunk_sums, chunk_gradients


def _in_vocabulary_chunks(value_of, unembeddings, temperature: float, size: int) -> tuple[_ChunkSums, _ChunkGradients]:
  """Make the functions of one chunk of T that is unembedded in chunks of V."""
  student, *teacher = unembeddings
  if not teacher:
    value_of = divergences.forward_kl
  parts = partitioning.ways("activation_vocab", student.vocab_size)
  chunks = VocabularyChunks(value_of, student, teacher[0] if teacher else None, temperature, -(-size // parts), parts)

  def blanked(student_leaves, hidden, fixed, rest):
    teacher_leaves, mean = fixed
    reference, counted = rest[0], rest[1] > 0
    if teacher:
      reference, teacher_leaves = _blank(reference, counted), teacher_leaves[0]
    return student_leaves, _blank(hidden, counted), teacher_leaves, reference, mean

  def sums(values, rest):
    (value, accepted, broken), (_, weights, scaled) = values, rest
    broken = jnp.sum(broken & (weights > 0), dtype=jnp.float32)
    return _weighted(value, scaled), _weighted(accepted, weights), broken

  def chunk_sums(student_leaves, hidden, fixed, rest):
    return sums(chunks.values(*blanked(student_leaves, hidden, fixed, rest)), rest)

  def chunk_gradients(leaf_gradients, student_leaves, hidden, fixed, rest):
    arguments = blanked(student_leaves, hidden, fixed, rest)
    values, leaf_gradients, hidden_gradient = chunks.values_and_gradients(leaf_gradients, rest[2], *arguments)
    return sums(values, rest), leaf_gradients, _blank(hidden_gradient, rest[1] > 0)

  return chunk_sums, chunk_gradients


def _sum_chunks(chunk_sums, student_leaves, hidden, fixed, rest):
  """Sum a function of chunks over all of them."""

  def body(sums, pieces):
    return jax.tree.map(jnp.add, sums, chunk_sums(student_leaves, pieces[0], fixed, pieces[1])), None

  return jax.lax.scan(body, _zeros(), (hidden, rest))[0]


def _with_gradient(chunk_sums: _ChunkSums, chunk_gradients: _ChunkGradients):
  """Make `_sum_chunks` of the functions, its gradient to the student taken in the same pass."""
  scan = jax.custom_vjp(functools.partial(_sum_chunks, chunk_sums))

  def forward(student_leaves, hidden, fixed, rest):
    def body(carry, pieces):
      sums, leaf_gradients = carry
      more, leaf_gradients, hidden_gradient = chunk_gradients(
          leaf_gradients, student_leaves, pieces[0], fixed, pieces[1]
      )
      return (jax.tree.map(jnp.add, sums, more), leaf_gradients), hidden_gradient

    # float32 sums, also of bf16 parameters.
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), student_leaves)
    (sums, leaf_gradients), hidden_gradients = jax.lax.scan(body, (_zeros(), empty), (hidden, rest))
    leaf_gradients = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), leaf_gradients, student_leaves)
    return sums, (leaf_gradients, hidden_gradients)

  def backward(gradients, cotangents):
    scale = cotangents[0]  # the others carry no gradient
    leaf_gradients, hidden_gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
    return leaf_gradients, hidden_gradients, None, None

  scan.defvjp(forward, backward)
  return scan


def _zeros() -> tuple[Any, Any, Any]:
  return (jnp.zeros((), jnp.float32),) * 3


def _add(total: jax.Array, more: jax.Array) -> jax.Array:
  return total + more.astype(total.dtype)


def _blank(hidden: jax.Array, counted: jax.Array) -> jax.Array:
  return jnp.where(counted[..., None], hidden, jnp.zeros((), hidden.dtype))


def _weighted(values: jax.Array, weights: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(weights > 0, values * weights, 0.0))


def _split(array: jax.Array, chunk: int) -> jax.Array:
  """Cut T into chunks, padded with zeros: [B, T, ...] -> [T/C, B, C, ...]."""
  rows, length, *rest = array.shape
  chunk = min(chunk, length)
  pieces = -(-length // chunk)
  padding = [(0, 0), (0, pieces * chunk - length)] + [(0, 0)] * len(rest)
  return jnp.moveaxis(jnp.pad(array, padding).reshape(rows, pieces, chunk, *rest), 1, 0)
