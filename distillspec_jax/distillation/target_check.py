"""One look at the target before a run begins: is it finite, and is it the one that the run began with?"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distillspec_jax.models.language_model import LanguageModel
from distillspec_jax.parallel import partitioning
from distillspec_jax.tokens import EOS_ID, START_ID
from distillspec_jax.types import ConfigError, Params

_TOKENS = 8
_STRIDE = 37  # between the ids whose logits are remembered
# Of their spread: another order of sums moves a logit by less, weights that were trained on by more.
_SAME = {"float32": 0.01, "bfloat16": 0.1}


@jax.jit
def all_finite(params: Params) -> jax.Array:
  """Say whether no parameter is NaN or infinite: a scalar."""
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def require_finite(params: Params, name: str = "the target") -> None:
  """Look through a target's parameters.

  Raises:
    ConfigError: one of them is NaN or infinite.
  """
  if not bool(all_finite(params)):
    raise ConfigError(f"the target's parameters hold NaN or infinity: take another checkpoint of {name}")


def look(
  target: LanguageModel, params: Params, mesh: jax.sharding.Mesh | None = None, name: str = "the target"
) -> list[float]:
  """Score a short text of arbitrary tokens: finite parameters, too, may give logits that overflow.

  Args:
    target: the model.
    params: its parameters.
    mesh: the devices' mesh, or None.
    name: what errors call it: its directory.

  Returns:
    A logit of each of the text's tokens, by which `same` knows the weights again.

  Raises:
    ConfigError: a parameter or a logit is NaN or infinite.
  """
  require_finite(params, name)
  rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
  tokens = (EOS_ID + 1 + jnp.arange(_TOKENS, dtype=jnp.int32)) % target.vocab_size
  tokens = jnp.tile(tokens[None], (rows, 1))
  batch = {"encoder_input_tokens": tokens.at[:, -1].set(EOS_ID), "decoder_input_tokens": tokens.at[:, 0].set(START_ID)}

  def scored(params, batch):
    logits = target.score(params, batch)
    few = jnp.arange(_TOKENS)
    return jnp.all(jnp.isfinite(logits)), logits[0, few, (few * _STRIDE) % target.vocab_size]

  where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  with contextlib.nullcontext() if mesh is None else partitioning.use_mesh(mesh):
    finite, logits = jax.jit(scored, out_shardings=where)(params, batch)
  if not bool(finite):
    raise ConfigError(
      f"the target's logits are NaN or infinite already on a short text: look at the weights of {name}, take another"
      " checkpoint of it, or float32 where it computes in bfloat16 or float16"
    )
  return [float(logit) for logit in np.asarray(logits, np.float32)]


def same(one: Sequence[float], other: Sequence[float], dtype: str) -> bool:
  """Say whether two results of `look` are of the same weights, on whatever devices; `dtype` is what they computed in."""
  if len(one) != len(other):
    return False
  spread = max(float(np.std(one)), float(np.std(other)), 1e-6)
  return bool(np.max(np.abs(np.subtract(one, other))) <= _SAME[dtype] * spread)
