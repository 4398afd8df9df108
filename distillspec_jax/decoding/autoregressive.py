"""Plain decoding, a token a step: what speculative decoding is held against, and how rollouts are drawn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from distillspec_jax.decoding import requests
from distillspec_jax.decoding.sampling import (
  SamplingConfig,
  allowed,
  argmax,
  log_probs,
  row_keys,
  sample_from,
  uniforms_at,
)
from distillspec_jax.models.language_model import LanguageModel
from distillspec_jax.parallel import partitioning
from distillspec_jax.tokens import EOS_ID, PAD_ID
from distillspec_jax.types import Generation, Params


@flax.struct.dataclass
class _Loop:
  """The loop's state: position [] int32; model state; pending [B]; tokens [B, T]; lengths [B]; done [B] bool."""

  position: jax.Array
  state: Any
  pending: jax.Array
  tokens: jax.Array
  lengths: jax.Array
  done: jax.Array


def next_token(logits: jax.Array, sampling: SamplingConfig, keys: jax.Array, index: jax.Array) -> jax.Array:
  """Draw from logits [B, V] with each row's key and its place in the text [B]: [B] int32."""
  if sampling.greedy:
    return argmax(allowed(logits, sampling, index))
  return sample_from(jnp.exp(log_probs(logits, sampling, index)), uniforms_at(keys, index))


def sample_tokens(
    model: LanguageModel,
    params: Params,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    key: jax.Array,
    row_ids: jax.Array | None = None,
    active: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Decode until every row has ended; pure, so that it can be traced inside another jit.

  Args:
    model: the model, static.
    params: its parameters.
    prompt: [B, S] int32.
    max_new_tokens: T, static.
    sampling: static.
    key: a random key; a row's draws depend on (key, its row id, the position) alone.
    row_ids: [B] int32, default 0 ... B-1.
    active: [B] bool; rows that are False produce nothing.

  Returns:
    tokens [B, T] int32 (0 after EOS) and lengths [B] int32 (EOS counted).
  """
  batch = prompt.shape[0]
  row_ids, active = partitioning.constrain_rows(requests.rows(batch, row_ids, active))
  keys = row_keys(key, row_ids)
  params = partitioning.gathered(model, params)
  state, pending = model.start(params, prompt, max_new_tokens)

  def step(loop: _Loop) -> _Loop:
    logits, state = model.extend(params, loop.state, loop.pending[:, None])
    with partitioning.use_table(model.partitioning):
      token = next_token(logits[:, 0], sampling, keys, jnp.broadcast_to(loop.position, (batch,)))
    token = jnp.where(loop.done, PAD_ID, token)
    return _Loop(
        position=loop.position + 1,
        state=state,
        pending=token,
        tokens=jax.lax.dynamic_update_slice_in_dim(loop.tokens, token[:, None], loop.position, axis=1),
        lengths=loop.lengths + ~loop.done,
        done=loop.done | (token == EOS_ID),
    )

  end = jax.lax.while_loop(
      lambda loop: (loop.position < max_new_tokens) & ~jnp.all(loop.done),
      step,
      _Loop(
          position=jnp.zeros((), jnp.int32),
          state=state,
          pending=pending,
          tokens=jnp.full((batch, max_new_tokens), PAD_ID, jnp.int32),
          lengths=jnp.zeros((batch,), jnp.int32),
          done=~active,
      ),
  )
  return end.tokens, end.lengths


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling"))
def _generate(model, params, prompt, seed, row_ids, active, *, max_new_tokens, sampling) -> Generation:
  tokens, lengths = sample_tokens(
      model,
      params,
      prompt,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      key=jax.random.key(seed),
      row_ids=row_ids,
      active=active,
  )
  none = jnp.zeros_like(lengths)
  blocks = jnp.sum(lengths, keepdims=True)
  return Generation(
      tokens=tokens,
      lengths=lengths,
      blocks=lengths,
      drafted=none,
      judged=none,
      accepted=none,
      accepted_lengths=blocks,
      judged_lengths=blocks,
      origins=jnp.zeros(tokens.shape, jnp.int8),
  )


def generate(
    model: LanguageModel,
    params: Params,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_length: int = 0,
    valid_ids: int = 0,
    forbidden_ids: Sequence[int] = (),
    seed: int = 0,
    row_ids: jax.Array | None = None,
    active: jax.Array | None = None,
) -> Generation:
  """Decode prompts token by token, as one XLA program.

  Args:
    model: the model.
    params: its parameters.
    prompt: [B, S] int32, padded on the right with 0.
    max_new_tokens: T, where a row without EOS is cut, in tokens.
    temperature: 0 is greedy.
    top_k, top_p, min_length, valid_ids, forbidden_ids: see SamplingConfig.
    seed: of the random draws; unused when greedy.
    row_ids: [B] int32, name the rows for the draws, so that one row can be decoded again alone.
    active: [B] bool, False marks a padding row that produces nothing.

  Returns:
    A Generation; a "block" is one token.

  Raises:
    ConfigError: settings out of range, or a prompt of the wrong shape or with ids outside the vocabulary.
  """
  sampling = SamplingConfig(temperature, top_k, top_p, min_length, valid_ids, forbidden_ids)
  prompt, row_ids, active = requests.checked(
      model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, row_ids=row_ids, active=active
  )
  return _generate(model, params, prompt, seed, row_ids, active, max_new_tokens=max_new_tokens, sampling=sampling)
