"""One look at the target's logits before a run begins."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp

from distillspec_jax.models.language_model import LanguageModel
from distillspec_jax.parallel import partitioning
from distillspec_jax.tokens import EOS_ID, START_ID
from distillspec_jax.types import ConfigError, Params

_TOKENS = 8


def require_finite_logits(target: LanguageModel, params: Params, mesh: jax.sharding.Mesh | None = None) -> None:
  """Score a short text of arbitrary tokens: finite parameters, too, may give logits that overflow.

  Raises:
    ConfigError: a logit is NaN or infinite.
  """
  rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
  tokens = (EOS_ID + 1 + jnp.arange(_TOKENS, dtype=jnp.int32)) % target.vocab_size
  tokens = jnp.tile(tokens[None], (rows, 1))
  batch = {"encoder_input_tokens": tokens.at[:, -1].set(EOS_ID), "decoder_input_tokens": tokens.at[:, 0].set(START_ID)}
  with contextlib.nullcontext() if mesh is None else partitioning.use_mesh(mesh):
    finite = jax.jit(lambda params, batch: jnp.all(jnp.isfinite(target.score(params, batch))))(params, batch)
  if not bool(finite):
    raise ConfigError(
      "the target's logits are NaN or infinite already on a short text: look at its weights, take another checkpoint of"
      " it, or float32 where it computes in bfloat16 or float16"
    )
