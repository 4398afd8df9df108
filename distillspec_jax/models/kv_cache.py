"""The self-attention cache of a decoder: explicit, per row, rolled back by lowering a number."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from distillspec_jax.parallel.partitioning import constrain


@flax.struct.dataclass
class KVCache:
  """Keys and values of the tokens so far, for all layers of one decoder.

  `length` is the truth: masks and relative positions derive from it, and a slot at or past it is stale, whatever
  finite numbers it holds (masks are added: a NaN would show). A stale slot is overwritten before any mask shows it:
  `extend` writes its Q tokens at slots length ... length + Q - 1 and a query at position p sees the slots 0 ... p
  only. So rolling back is lowering `length`, for each row by its own amount, and nothing else. `length` -1 is allowed:
  "the next token to be fed precedes the first one", and its write is dropped (speculative decoding's draft begins so).

  Layout [B, H, K, D], not [B, K, H, D]: the attention products then read contiguous memory.

  Attributes:
    keys: one [B, H, K, D] array a layer.
    values: one [B, H, K, D] array a layer.
    length: [B] int32, tokens held, each row its own.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  length: jax.Array

  @classmethod
  def empty(cls, num_layers: int, batch: int, num_heads: int, slots: int, head_dim: int, dtype) -> KVCache:
    """Make a cache of `slots` slots that holds nothing."""
    # Separate zeros for each array: one shared buffer could not be donated.
    shape = (batch, num_heads, slots, head_dim)
    make = lambda: constrain(jnp.zeros(shape, dtype), "batch", "heads", "cache", "head_dim")
    return cls(
        keys=tuple(make() for _ in range(num_layers)),
        values=tuple(make() for _ in range(num_layers)),
        length=jnp.zeros((batch,), jnp.int32),
    )

  @property
  def slots(self) -> int:
    """K, the number of slots."""
    return self.keys[0].shape[2]

  def positions(self, num_tokens: int) -> jax.Array:
    """Give the positions of the next `num_tokens` tokens: [B, Q] int32."""
    return self.length[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None, :]


def write(buffer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
  """SET each row's new entries at its own positions; positions outside the buffer are dropped.

  Args:
    buffer: [B, H, K, D].
    new: [B, H, Q, D].
    positions: [B, Q] int32; negative ones are dropped too (they do not count from the end).

  Returns:
    [B, H, K, D].
  """
  if positions.size == 1:
    # XLA turns a scatter of one slot into another operation, around which it copies the whole buffer on CPUs: write a
    # second one, which is dropped.
    new = jnp.pad(new, ((0, 0), (0, 0), (0, 1), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, 1)), constant_values=-1)
  positions = jnp.where(positions < 0, buffer.shape[2], positions)
  set_row = lambda row, values, slots: row.at[:, slots].set(values, mode="drop", unique_indices=False)
  return jax.vmap(set_row)(buffer, new.astype(buffer.dtype), positions)
