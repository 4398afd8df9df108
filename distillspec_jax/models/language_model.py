"""`LanguageModel`: the only thing about a network that other rooms see."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.parallel import partitioning
from distillspec_jax.types import Batch, ConfigError, Params


@dataclasses.dataclass(frozen=True, eq=False)  # it holds arrays, which neither compare nor hash
class Unembedding:
  """An output layer whose vocabulary can be cut into pieces.

  Attributes:
    weights: a tree of arrays, each with an axis of V.
    axes: a tree like it, of int: which axis that is.
    logits: weights, or one piece of them, and hidden states [..., E] -> the logits [..., v] of that piece. What gets a
      gradient must be in the weights, not in what it closes over.
  """

  weights: Params
  axes: Any
  logits: Callable[[Params, jax.Array], jax.Array]

  @property
  def vocab_size(self) -> int:
    """V."""
    return jax.tree.leaves(jax.tree.map(lambda leaf, axis: leaf.shape[axis], self.weights, self.axes))[0]

  def __call__(self, hidden: jax.Array) -> jax.Array:
    """Turn hidden states [..., E] into all logits [..., V]."""
    return self.logits(self.weights, hidden)

  def cut(self, weights: Params, start: jax.Array, size: int, parts: int = 1) -> Params:
    """Cut the tokens start ... start + size - 1 of each of `parts` equal parts of V out of weights like these."""

    def take(leaf, axis):
      if parts == 1:
        return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis)
      return _joined(jax.lax.dynamic_slice_in_dim(_parted(leaf, axis, parts), start, size, axis + 1), axis)

    return jax.tree.map(take, weights, self.axes)

  def add(self, total: Params, piece: Params, start: jax.Array, parts: int = 1) -> Params:
    """Add a piece that `cut` gave, of any dtype, where it was cut, in a tree like the weights."""

    def put(whole, part, axis):
      if parts > 1:
        return _joined(add(_parted(whole, axis, parts), _parted(part, axis, parts), axis + 1), axis)
      return add(whole, part, axis)

    def add(whole, part, axis):
      old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis)
      return jax.lax.dynamic_update_slice_in_dim(whole, old + part.astype(whole.dtype), start, axis)

    return jax.tree.map(put, total, piece, self.axes)


def _parted(leaf: jax.Array, axis: int, parts: int) -> jax.Array:
  """Cut an axis into equal parts: [..., N, ...] -> [..., parts, N / parts, ...]."""
  return leaf.reshape(*leaf.shape[:axis], parts, leaf.shape[axis] // parts, *leaf.shape[axis + 1 :])


def _joined(leaf: jax.Array, axis: int) -> jax.Array:
  """Undo `_parted`."""
  return leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])


class LanguageModel(abc.ABC):
  """A network as pure functions of its parameters.

  A model holds its configuration and nothing else: two models with equal configurations are equal and hash alike,
  so a model can be a static argument of jit. B batch, S source, T target, Q query block, E width, V vocabulary.
  """

  architecture: str  # the name in model.json
  # What `hidden` can read several of in one row: "pairs" of prompt and output, "texts" without a prompt, None: nothing.
  packed_rows: str | None = None

  def __init__(self, config):
    self.config = config

  def __eq__(self, other) -> bool:
    return type(self) is type(other) and self.config == other.config

  def __hash__(self) -> int:
    return hash((type(self), self.config))

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.config})"

  @property
  def vocab_size(self) -> int:
    """V, the width of the logits."""
    return self.config.vocab_size

  @property
  def partitioning(self) -> str:
    """Name the table of `parallel.partitioning` that says where this model lies on a mesh."""
    return getattr(self.config, "partitioning", partitioning.SHARDED)

  @property
  def max_length(self) -> int | None:
    """The most tokens that a text may have, prompt and output; None where positions have no end."""
    return None

  @abc.abstractmethod
  def init(self, rng: jax.Array) -> Params:
    """Draw parameters."""

  @abc.abstractmethod
  def param_axes(self) -> Params:
    """Name the logical axes of each parameter: a tree like the parameters, of tuples of names."""

  def abstract_params(self) -> Params:
    """Give the parameters' shapes and dtypes without making them."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def describe(self) -> dict[str, Any]:
    """Describe the model in JSON's terms; `models.from_description` makes it again."""
    return {"architecture": self.architecture, "config": self.config.as_dict()}

  def score(self, params: Params, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
    """Compute teacher-forced logits [B, T, V] float32 from seqio's features."""
    return self.unembed(params, self.hidden(params, batch, dropout_rng))

  @abc.abstractmethod
  def hidden(self, params: Params, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
    """Compute the last hidden states [B, T, E], teacher forced, so that losses can unembed in chunks of T.

    Args:
      params: the parameters.
      batch: `encoder_input_tokens` [B, S] (where there is an encoder) and `decoder_input_tokens` [B, T], int32.
        Where it has `decoder_segment_ids` [B, T], its rows are packed: several examples one after the other, each of
        one id and 0 at padding. "pairs" need `encoder_segment_ids` [B, S], with the same ids, too; "texts" need
        `decoder_positions` [B, T], counted from 0 in each example.
      dropout_rng: draws the dropout masks; None means no dropout.

    Raises:
      ConfigError: packed rows that are not of this model's kind (`packed_rows`), as far as shapes can tell.
    """

  @abc.abstractmethod
  def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
    """Turn hidden states [..., E] into logits [..., V] float32."""

  def unembedding(self, params: Params) -> Unembedding:
    """Give what `unembed` does in a form that can be cut, for losses in chunks of V; a model need not have it.

    Raises:
      ConfigError: this model does not have it.
    """
    raise ConfigError(
        f"a {type(self).__name__} can only unembed its whole vocabulary: set StepConfig.vocab_chunk to None, or give it"
        " a method `unembedding`"
    )

  @abc.abstractmethod
  def start(self, params: Params, prompt: jax.Array, slots: int) -> tuple[Any, jax.Array]:
    """Encode or prefill a prompt, once.

    Args:
      params: the parameters.
      prompt: [B, S] int32, padded on the right with 0.
      slots: K, how many tokens the self-attention cache must hold.

    Returns:
      The decoding state, whose `cache` is a KVCache, and `pending` [B] int32: the token not yet in any cache.
    """

  @abc.abstractmethod
  def previous(self, prompt: jax.Array) -> jax.Array:
    """Give the token before `start`'s pending one, [B] int32; 0 where there is none (the cache is empty)."""

  @abc.abstractmethod
  def extend(
      self, params: Params, state: Any, tokens: jax.Array, *, last_only: bool = False
  ) -> tuple[jax.Array, Any]:
    """Feed Q tokens a row at the row's own position.

    Args:
      params: the parameters.
      state: of `start`, `extend` or `rollback`.
      tokens: [B, Q] int32, Q = 1 or more.
      last_only: whether logits are wanted after the last token alone; it saves their product with the others.

    Returns:
      Logits [B, Q, V] float32 of the token after each ([B, 1, V] with `last_only`), and the state with Q more tokens
      in its cache.
    """

  def rollback(self, state: Any, lengths: jax.Array) -> Any:
    """Keep the first `lengths` [B] int32 tokens of each row's cache: lowers the lengths, touches nothing else."""
    return state.replace(cache=state.cache.replace(length=jnp.asarray(lengths, jnp.int32)))
