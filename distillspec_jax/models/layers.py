"""The layers that networks are made of, under T5X's parameter names, with logical axes on every parameter.

Matrices multiply in the configured dtype; sums, norms, softmax and logits are float32. Kernels are [in, out].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.parallel.partitioning import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": nn.gelu,  # the tanh approximation, as T5 v1.1
    "linear": lambda x: x,
    "relu": nn.relu,
    "silu": nn.silu,
}
_ROTARY_BASE = 10_000.0
MASKED = -1e10  # a finite "minus infinity": a row that sees nothing stays free of NaN


def precision_of(dtype) -> jax.lax.Precision | None:
  """Ask for true float32 products where float32 is configured: accelerators would round them to 10 bits."""
  return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


class Dense(nn.Module):
  """A matrix without bias; `axes` name the kernel's logical axes."""

  in_features: int
  features: int
  axes: tuple[str, str]
  dtype: str
  param_dtype: str
  scale: float = 1.0  # of the initial variance

  def setup(self):
    init = nn.initializers.variance_scaling(self.scale, "fan_in", "truncated_normal")
    shape = (self.in_features, self.features)
    self.kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape, jnp.dtype(self.param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.dot(x.astype(self.dtype), self.kernel.astype(self.dtype), precision=precision_of(self.dtype))


class RMSNorm(nn.Module):
  """T5's layer norm: no mean, no bias, float32 inside."""

  dtype: str
  param_dtype: str
  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.param_dtype))
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
    return (x.astype(self.dtype) * jnp.broadcast_to(scale.astype(self.dtype), x.shape)).astype(self.dtype)


class Embed(nn.Module):
  """The token table [V, E]."""

  vocab_size: int
  emb_dim: int
  dtype: str
  param_dtype: str

  def setup(self):
    init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
    self.embedding = self.param("embedding", init, (self.vocab_size, self.emb_dim), jnp.dtype(self.param_dtype))

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Look tokens [B, T] up: [B, T, E]."""
    # fsdp splits the table's rows and the tokens alike: the table is what is gathered.
    table = constrain(self.embedding, "vocab", None)
    return constrain(table[tokens].astype(self.dtype), "batch", "length", "activation_embed")


def logits(kernel: jax.Array, hidden: jax.Array, dtype: str) -> jax.Array:
  """Use a matrix [E, V] as output layer: hidden states [..., E] -> logits [..., V] float32."""
  return _unembed(kernel, hidden, dtype, "...e,ev->...v")


def tied_logits(table: jax.Array, hidden: jax.Array, dtype: str) -> jax.Array:
  """Use a token table [V, E] as output layer: hidden states [..., E] -> logits [..., V] float32."""
  scaled = hidden / jnp.sqrt(float(table.shape[1])).astype(hidden.dtype)
  return _unembed(table, scaled, dtype, "...e,ve->...v")


def _unembed(weights: jax.Array, hidden: jax.Array, dtype: str, equation: str) -> jax.Array:
  return jnp.einsum(
      equation,
      hidden.astype(dtype),
      weights.astype(dtype),
      preferred_element_type=jnp.float32,
      precision=precision_of(dtype),
  )


class Mlp(nn.Module):
  """Feed-forward block: one activation (kernel `wi`) or a gated product of several (`wi_0`, `wi_1`, ...)."""

  mlp_dim: int
  activations: Sequence[str]
  dtype: str
  param_dtype: str
  dropout_rate: float

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
    width = x.shape[-1]
    product = None
    for i, name in enumerate(self.activations):
      kernel_name = "wi" if len(self.activations) == 1 else f"wi_{i}"
      y = Dense(width, self.mlp_dim, ("embed", "mlp"), self.dtype, self.param_dtype, name=kernel_name)(x)
      y = ACTIVATIONS[name](y)
      product = y if product is None else product * y
    product = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(product, deterministic=deterministic)
    product = constrain(product, "batch", "length", "activation_mlp")
    return Dense(self.mlp_dim, width, ("mlp", "embed"), self.dtype, self.param_dtype, name="wo")(product)


def rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
  """Turn pairs of numbers by their position (Su et al. 2104.09864): x [B, Q, H, D], positions [B, Q] -> as x, float32.

  Number i of the first half of D is paired with number i of the second; the pair turns by position / 10000^(2i / D).
  """
  half = x.shape[-1] // 2
  rates = np.asarray(_ROTARY_BASE, np.float64) ** (-np.arange(half) / half)
  angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(rates, jnp.float32)[None, None, None, :]
  first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  cos, sin = jnp.broadcast_to(jnp.cos(angles), first.shape), jnp.broadcast_to(jnp.sin(angles), first.shape)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
  """T5's multi-head attention: no biases, no scaling of scores (the query's initial variance has it).

  With `rotary`, queries and keys turn by their positions, which must then be given.
  """

  num_heads: int
  head_dim: int
  emb_dim: int
  dtype: str
  param_dtype: str
  rotary: bool = False

  def setup(self):
    joined = self.num_heads * self.head_dim
    make = lambda **kw: Dense(self.emb_dim, joined, ("embed", "joined_kv"), self.dtype, self.param_dtype, **kw)
    self.query = make(scale=1.0 / self.head_dim)
    self.key = make()
    self.value = make()
    self.out = Dense(joined, self.emb_dim, ("joined_kv", "embed"), self.dtype, self.param_dtype)

  def _split(self, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)

  def _turned(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
    return rotated(x, positions).astype(x.dtype) if self.rotary else x

  def keys_values(self, x: jax.Array, positions: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Project [B, K, E], at positions [B, K], to keys and values [B, H, K, D], the cache's layout."""
    to_cache = lambda y: constrain(jnp.swapaxes(y, 1, 2), "batch", "heads", "cache", "head_dim")
    return to_cache(self._turned(self._split(self.key(x)), positions)), to_cache(self._split(self.value(x)))

  def __call__(
      self,
      x: jax.Array,
      keys: jax.Array,
      values: jax.Array,
      bias: jax.Array,
      positions: jax.Array | None = None,
      cached: bool = False,
  ) -> jax.Array:
    """Attend from x [B, Q, E] to keys and values [B, H, K, D]; bias broadcasts to [B, H, Q, K], float32.

    With `cached`, keys and values are far more than queries: it is then the small scores that get transposed.
    """
    query = constrain(self._turned(self._split(self.query(x)), positions), "batch", "length", "heads", "head_dim")
    precision = precision_of(self.dtype)
    score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
    if cached and self.dtype == "float32":  # bfloat16 x bfloat16 = float32 lacks this form on CPUs
      scores = jnp.swapaxes(score("bhkd,bqhd->bhkq", keys, query), 2, 3)
    else:
      scores = score("bqhd,bhkd->bhqk", query, keys)
    weights = jax.nn.softmax(scores + jnp.broadcast_to(bias, scores.shape), axis=-1)
    mixed = jnp.einsum("bhqk,bhkd->bqhd", weights.astype(self.dtype), values.astype(self.dtype), precision=precision)
    return self.out(mixed.reshape(*x.shape[:-1], self.num_heads * self.head_dim))


def relative_buckets(distance: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int) -> np.ndarray:
  """Sort relative positions into T5's buckets (Raffel et al. 2020, 2.1): half exact, half logarithmic.

  Args:
    distance: int array, key position minus query position.
    bidirectional: whether keys after the query have buckets of their own (the encoder) or share bucket 0.
    num_buckets: how many buckets in all.
    max_distance: everything from here on shares the last bucket.

  Returns:
    int32 array like `distance`.
  """
  offset = np.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    offset = (distance > 0).astype(np.int32) * num_buckets
    n = np.abs(distance)
  else:
    n = np.maximum(-distance, 0)
  exact = num_buckets // 2
  ratio = np.log(n.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
  large = np.minimum(exact + (ratio * (num_buckets - exact)).astype(np.int32), num_buckets - 1)
  return (offset + np.where(n < exact, n, large)).astype(np.int32)


class RelativeBias(nn.Module):
  """T5's relative position bias: one learned number for each (head, bucket)."""

  num_heads: int
  num_buckets: int
  max_distance: int
  param_dtype: str

  def setup(self):
    init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("heads", "relpos_buckets"))
    self.rel_embedding = self.param(
        "rel_embedding", init, (self.num_heads, self.num_buckets), jnp.dtype(self.param_dtype)
    )

  def _look_up(self, distance: np.ndarray, bidirectional: bool) -> jax.Array:
    buckets = relative_buckets(
        distance, bidirectional=bidirectional, num_buckets=self.num_buckets, max_distance=self.max_distance
    )
    return self.rel_embedding.astype(jnp.float32)[:, buckets]

  def square(self, length: int, bidirectional: bool) -> jax.Array:
    """Bias of a whole sequence over itself: [1, H, L, L] float32."""
    positions = np.arange(length)
    return self._look_up(positions[None, :] - positions[:, None], bidirectional)[None]

  def by_distance(self, slots: int) -> jax.Array:
    """Bias of a causal query by how far back the key lies: [H, K] float32, entry d for d tokens back."""
    return self._look_up(-np.arange(slots), bidirectional=False)


def segment_bias(queries: jax.Array, keys: jax.Array) -> jax.Array:
  """Keep the examples of a packed row apart: segment ids [B, Q] and [B, K] -> [B, 1, Q, K] float32, 0 or MASKED."""
  return jnp.where(queries[:, :, None] == keys[:, None, :], 0.0, MASKED)[:, None]


def cached_causal_bias(by_distance: jax.Array, positions: jax.Array) -> jax.Array:
  """Bias and mask of queries at per-row positions over all slots of a cache.

  Args:
    by_distance: [H, K] float32.
    positions: [B, Q] int32; -1 sees nothing.

  Returns:
    [B, H, Q, K] float32, MASKED where the slot lies after the query.
  """
  slots = by_distance.shape[1]
  distance = positions[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, :]  # [B, Q, K]
  bias = jnp.moveaxis(by_distance.T[jnp.clip(distance, 0, slots - 1)], -1, 1)  # [B, H, Q, K]
  return jnp.where(distance[:, None] >= 0, bias, MASKED)
