"""What `LanguageModel`s made of a Flax module have in common: its parameters, its axes, its output layer."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from distillspec_jax.models import layers
from distillspec_jax.models.language_model import LanguageModel, Unembedding
from distillspec_jax.parallel.partitioning import constrain_logits, use_table
from distillspec_jax.types import Params


class FlaxModel(LanguageModel):
  """A `LanguageModel` over a module with the method `everything(*token arrays)`.

  Its output layer is the token table, `token_embedder/embedding`, where `config.logits_via_embedding` says so, and else
  the matrix `decoder/logits_dense/kernel`.
  """

  token_inputs: int  # how many token arrays `everything` takes

  @property
  @abc.abstractmethod
  def module(self) -> nn.Module:
    """The network, unbound."""

  def apply(self, method: Callable, params: Params, *args, dropout_rng: jax.Array | None = None, **kw):
    """Call one of the module's methods, with dropout where a key is given."""
    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    with use_table(self.partitioning):
      return self.module.apply({"params": params}, *args, method=method, rngs=rngs, **kw)

  def init(self, rng: jax.Array) -> Params:
    return nn.unbox(self._boxed_init(rng))

  def param_axes(self) -> Params:
    boxed = jax.eval_shape(self._boxed_init, jax.random.key(0))
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)

  def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
    return self.unembedding(params)(hidden)

  def unembedding(self, params: Params) -> Unembedding:
    if self.config.logits_via_embedding:
      weights, axis, logits = params["token_embedder"]["embedding"], 0, layers.tied_logits
    else:
      weights, axis, logits = params["decoder"]["logits_dense"]["kernel"], 1, layers.logits
    return Unembedding(weights, axis, functools.partial(_placed_logits, logits, self.config.dtype, self.partitioning))

  def _boxed_init(self, rng):
    tokens = [jnp.zeros((1, 1), jnp.int32)] * self.token_inputs
    return self.module.init(rng, *tokens, method=type(self.module).everything)["params"]


def _placed_logits(
    logits: Callable[..., jax.Array], dtype: str, table: str, weights: jax.Array, hidden: jax.Array
) -> jax.Array:
  with use_table(table):
    return constrain_logits(logits(weights, hidden, dtype))
