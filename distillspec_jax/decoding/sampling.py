"""From logits to the distribution that is drawn from, and the draw: the only place where settings act.

The draft, the target and verification all go through `log_probs`, so q is always the distribution that the
proposals were drawn from.

On a mesh that splits the vocabulary no device ever holds a row's whole law: what travels are sums over each device's
own tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.parallel.partitioning import constrain, constrain_rows, constrain_vocabulary, ways
from distillspec_jax.tokens import EOS_ID
from distillspec_jax.types import ConfigError

_BLOCK = 128  # indices that `sample_from` looks at together
_BITS = 32  # of a float32, and so of the search for a threshold
_DIGIT = 4  # bits that the search finds together where each step costs a round of messages
_LEAST = 1e-30  # of a temperature and of top_p: float32 takes what is much smaller for 0


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn; static under jit.

  They act in this order: ids that may not come are removed, the temperature divides, `top_k` cuts, `top_p` cuts what
  is left, and the rest is normalised. Tokens that tie with the last one kept are kept too.

  Attributes:
    temperature: 0 is greedy: the distribution is one-hot at the largest logit.
    top_k: keep the k most likely tokens; 0 keeps all. Without effect when greedy.
    top_p: keep the smallest set of most likely tokens with at least this much probability; 1 keeps all. Without
      effect when greedy.
    min_length: EOS may not come among a text's first min_length tokens, so that a text has more of them.
    valid_ids: ids from here on never come: networks have padded vocabularies (T5's 32,128 for 32,100). 0: all may.
    forbidden_ids: ids that never come.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_length: int = 0
  valid_ids: int = 0
  forbidden_ids: tuple[int, ...] = ()

  def __post_init__(self):
    finite = _is_real(self.temperature) and math.isfinite(self.temperature)
    if not (finite and (self.temperature == 0 or self.temperature >= _LEAST)):
      raise ConfigError(f"temperature={self.temperature}: must be 0 (greedy) or a number of at least {_LEAST}.")
    for name in ("top_k", "min_length", "valid_ids"):
      if not _is_count(getattr(self, name)):
        raise ConfigError(f"{name}={getattr(self, name)}: must be a whole number of at least 0.")
    if not (_is_real(self.top_p) and _LEAST <= self.top_p <= 1):
      raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1 (1 keeps all tokens).")
    try:
      ids = tuple(self.forbidden_ids)
    except TypeError:
      ids = (None,)
    if not all(_is_count(token) for token in ids):
      raise ConfigError(f"forbidden_ids={self.forbidden_ids}: must be a list of token ids.")
    object.__setattr__(self, "forbidden_ids", tuple(sorted({int(token) for token in ids})))

  @property
  def greedy(self) -> bool:
    """Whether the distribution is one-hot."""
    return self.temperature == 0

  @functools.lru_cache(maxsize=64)  # noqa: B019  (hashed by value; asked at every call)
  def check_vocabulary(self, vocab_size: int) -> None:
    """Raise ConfigError unless the ids named are the model's, and some are left to draw."""
    if self.valid_ids > vocab_size:
      raise ConfigError(f"valid_ids={self.valid_ids}: the model's vocabulary has {vocab_size} ids.")
    beyond = [token for token in self.forbidden_ids if token >= vocab_size]
    if beyond:
      raise ConfigError(f"forbidden_ids holds {beyond[0]}; the model's vocabulary has ids 0 ... {vocab_size - 1}.")
    left = np.flatnonzero(~self.forbidden(vocab_size))
    if not left.size or (self.min_length and left.tolist() == [EOS_ID]):
      raise ConfigError("valid_ids, forbidden_ids and min_length together leave no token to draw.")

  def forbidden(self, vocab_size: int) -> np.ndarray:
    """Mark the ids that never come: [V] bool."""
    ids = np.arange(vocab_size)
    return np.isin(ids, self.forbidden_ids) | (ids >= (self.valid_ids or vocab_size))


def allowed(logits: jax.Array, config: SamplingConfig, position: jax.Array | None = None) -> jax.Array:
  """Remove what may not come: logits [..., V] -> float32, minus infinity there.

  Args:
    logits: [..., V].
    config: the settings.
    position: [...] int32, or what broadcasts to it: the place in the text of the token to be drawn, the first is 0.
      Needed where min_length is set.

  Returns:
    [..., V] float32.
  """
  if config.min_length and position is None:
    raise ValueError("min_length acts by position: it must be given")
  # A replicated model's logits are then whole on every device, so that drawing from them sends nothing.
  logits = constrain_vocabulary(logits.astype(jnp.float32))
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  if config.valid_ids and config.valid_ids < logits.shape[-1]:
    logits = jnp.where(ids < config.valid_ids, logits, -jnp.inf)
  if config.forbidden_ids:
    mask = jnp.asarray(np.isin(np.arange(logits.shape[-1]), config.forbidden_ids))
    logits = jnp.where(jnp.broadcast_to(mask, logits.shape), -jnp.inf, logits)
  if config.min_length:
    early = jnp.broadcast_to(position < config.min_length, logits.shape[:-1])
    logits = jnp.where((ids == EOS_ID) & early[..., None], -jnp.inf, logits)
  return logits


def log_probs(logits: jax.Array, config: SamplingConfig, position: jax.Array | None = None) -> jax.Array:
  """Turn logits [..., V] into the log-probabilities [..., V] float32 that tokens are drawn from; see `allowed`."""
  logits = allowed(logits, config, position)
  if config.greedy:
    one_hot = jax.nn.one_hot(argmax(logits), logits.shape[-1], dtype=bool)
    return jnp.where(one_hot, 0.0, -jnp.inf)
  logits = logits / config.temperature
  if 0 < config.top_k < logits.shape[-1]:
    logits = jnp.where(_most_likely(logits, config.top_k), logits, -jnp.inf)
  if config.top_p < 1:
    logits = jnp.where(_nucleus(jax.nn.softmax(logits, axis=-1), config.top_p), logits, -jnp.inf)
  return constrain_vocabulary(jax.nn.log_softmax(logits, axis=-1))


def _most_likely(logits: jax.Array, k: int) -> jax.Array:
  """Mark the k largest of [..., V], and all that equal the k-th: [..., V] bool."""
  return _above_threshold(logits, lambda above: jnp.sum(above, axis=-1, dtype=jnp.int32) >= k)


def _nucleus(probabilities: jax.Array, top_p: float) -> jax.Array:
  """Mark the smallest set of largest probabilities [..., V] with mass top_p, and all that equal its smallest."""

  def enough(above):
    weights = probabilities if above.ndim == probabilities.ndim else probabilities[..., None, :]
    return jnp.sum(jnp.where(above, weights, 0.0), axis=-1) >= top_p

  return _above_threshold(probabilities, enough)


def _above_threshold(values: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Mark the fewest largest values that are enough, without sorting: [..., V] float32 -> [..., V] bool.

  A bisection over the 32 bits of the threshold, each a pass over the values: at V = 32k a sort costs several times as
  much on CPUs.

  Args:
    values: [..., V].
    enough: [..., V] bool (the values marked) -> [...] bool; True for all of them, and for more where it is for fewer.
      Where the vocabulary is split it is asked about several thresholds at a time: [..., N, V] -> [..., N].
  """
  bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)  # -0.0 ties with 0.0
  sign = jnp.uint32(1 << (_BITS - 1))
  ordered = jnp.where(bits & sign != 0, ~bits, bits | sign)  # unsigned integers in the order of the floats

  def set_bit(i, threshold):
    raised = threshold | (sign >> i.astype(jnp.uint32))
    return jnp.where(enough(ordered >= raised[..., None]), raised, threshold)

  def set_digit(i, threshold):
    shift = (_BITS - _DIGIT * (i + 1)).astype(jnp.uint32)
    digits = jnp.broadcast_to(jnp.arange(1, 1 << _DIGIT, dtype=jnp.uint32), (*threshold.shape, (1 << _DIGIT) - 1))
    raised = threshold[..., None] | (digits << shift)
    reached = jnp.sum(enough(ordered[..., None, :] >= raised[..., None]), axis=-1, dtype=jnp.uint32)
    return threshold | (reached << shift)

  split = ways("activation_vocab", values.shape[-1]) > 1
  steps, step = (_BITS // _DIGIT, set_digit) if split else (_BITS, set_bit)
  threshold = jax.lax.fori_loop(0, steps, step, jnp.zeros(values.shape[:-1], jnp.uint32))
  return ordered >= threshold[..., None]


def _is_real(value) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_count(value) -> bool:
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0


def argmax(values: jax.Array) -> jax.Array:
  """Find the first maximum: [..., V] -> [...] int32, as `jnp.argmax`.

  Written as two plain reductions: XLA compiles argmax's paired one to scalar code on CPUs (8× slower at V=32,128).
  """
  first = _first_true(values == jnp.max(values, axis=-1, keepdims=True))
  return jnp.minimum(first, values.shape[-1] - 1)  # NaN equals nothing: stay inside


def sample_from(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
  """Draw one index a row by inverting the cumulative sum: one uniform, not V Gumbel variables.

  First a block of `_BLOCK` indices, then one inside it: a cumulative sum over all V costs 4× as much on CPUs.

  Args:
    weights: [B, ..., V] float32, at least 0; they need not sum to 1. A weight of 0 is never drawn.
    uniforms: [B, ...] float32 in [0, 1).

  Returns:
    [B, ...] int32.
  """
  parts = ways("activation_vocab", weights.shape[-1])
  blocks = _in_blocks(weights, parts)
  sums = jnp.sum(blocks, axis=-1)
  if parts > 1:
    sums = constrain_rows(sums)  # of all blocks, everywhere: V / _BLOCK numbers a row
  reached = jnp.cumsum(sums, axis=-1)
  threshold = (uniforms * reached[..., -1])[..., None]
  block = _crossing(reached, sums, threshold)[..., None]
  before = jnp.where(block > 0, jnp.take_along_axis(reached, jnp.maximum(block - 1, 0), axis=-1), 0.0)
  inside = jnp.take_along_axis(blocks, block[..., None], axis=-2)[..., 0, :]
  place = block[..., 0] * _BLOCK + _crossing(before + jnp.cumsum(inside, axis=-1), inside, threshold)
  if parts == 1:
    return place
  number = blocks.shape[-2] // parts  # blocks of a part
  padding = number * _BLOCK - weights.shape[-1] // parts  # at its end
  return place - block[..., 0] // number * padding


def _in_blocks(weights: jax.Array, parts: int) -> jax.Array:
  """Cut [B, ..., V] into blocks [B, ..., N, _BLOCK], filled up with zeros; none lies across two of the parts of V."""
  *leading, size = weights.shape
  if parts > 1:
    weights = weights.reshape(*leading, parts, size // parts)
  padding = [(0, 0)] * (weights.ndim - 1) + [(0, -weights.shape[-1] % _BLOCK)]
  blocks = jnp.pad(weights, padding).reshape(*leading, -1, _BLOCK)
  return blocks if parts == 1 else constrain(blocks, "batch", *[None] * (len(leading) - 1), "activation_vocab", None)


def _crossing(cumulative: jax.Array, weights: jax.Array, threshold: jax.Array) -> jax.Array:
  """Find the first positive weight whose cumulative sum exceeds the threshold: [..., N], [..., 1] -> [...] int32."""
  # A parallel cumulative sum may rise at a zero by rounding: hence "and positive". Where rounding leaves no
  # candidate at the very end, the last positive weight is what the threshold all but reached.
  positive = weights > 0
  first = _first_true((cumulative > threshold) & positive)
  last = jnp.max(jnp.where(positive, _indices(weights), 0), axis=-1)
  return jnp.where(first < weights.shape[-1], first, last)


def _first_true(flags: jax.Array) -> jax.Array:
  """Find the first True, N where there is none: [..., N] -> [...] int32."""
  return jnp.min(jnp.where(flags, _indices(flags), flags.shape[-1]), axis=-1)


def _indices(values: jax.Array) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)


def row_keys(seed_key: jax.Array, row_ids: jax.Array) -> jax.Array:
  """Give each row its own key, by its id: [B] keys. A row's text then does not depend on its batch-mates."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(seed_key, row_ids)


def uniforms_at(keys: jax.Array, index: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
  """Draw uniforms [B, *shape] float32 in [0, 1) for each row's key and that row's own index [B]."""
  draw = lambda key, i: jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32)
  return jax.vmap(draw)(keys, index)
