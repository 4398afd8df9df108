"""SKD's text (Xu et al., 2410.11325): the draft proposes, the target replaces what it finds unlikely; one XLA program.

A block, for each row on its own:
  1. The draft proposes G tokens, each drawn from its own distribution.
  2. The target scores them all in one pass.
  3. Proposals are kept up to the first that is not among the target's K most likely tokens. A draw from the target
     takes that one's place and the rest of the block is dropped. Where all are kept the target draws nothing: the
     next block follows (as in the authors' program).
  4. Both caches are rolled back to what was kept. Without a token of the target after a full block both always hold
     all tokens but the newest, so the block loop is simpler than that of speculative decoding.

Kept or replaced, a token's law depends on the text before it alone: Q(v)·1{v in top K} + P(v)·(Q's mass outside the
top K). K = V samples from the draft, K = 1 at temperature 0 is the target's greedy text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from distillspec_jax.decoding.speculative import check_pair
from distillspec_jax.decoding.verification import leading_true
from distillspec_jax.models.language_model import LanguageModel
from distillspec_jax.parallel import partitioning
from distillspec_jax.tokens import EOS_ID, PAD_ID
from distillspec_jax.types import ConfigError, Params


class Interleaved(NamedTuple):
  """What was sampled; a token of the text is one that the draft proposed and the target kept, or the target's own.

  Attributes:
    tokens: [B, T] int32, 0 after EOS.
    lengths: [B] int32, EOS counted. As many proposals were judged.
    kept: [B] int32, proposals in the text.
    proposed: [B] int32, proposals that could have come into the text, those dropped unseen among them.
  """

  tokens: jax.Array
  lengths: jax.Array
  kept: jax.Array
  proposed: jax.Array


@flax.struct.dataclass
class _Loop:
  """The loop's state.

  Attributes:
    draft, target: the models' states; both caches hold every token of the text but the newest.
    pending: [B] int32, the newest token.
    blocks: [B] int32, blocks so far; they index the random draws.
    done: [B] bool.
    out: the text so far.
  """

  draft: Any
  target: Any
  pending: jax.Array
  blocks: jax.Array
  done: jax.Array
  out: Interleaved


def interleave(
    draft: LanguageModel,
    draft_params: Params,
    target: LanguageModel,
    target_params: Params,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    block: int,
    top_k: int,
    key: jax.Array,
    row_ids: jax.Array | None = None,
) -> Interleaved:
  """Sample until every row has ended; pure, so that it can be traced inside another jit.

  Args:
    draft: the model that proposes, static.
    draft_params: its parameters.
    target: the model that replaces, static.
    target_params: its parameters.
    prompt: [B, S] int32, padded on the right with 0.
    max_new_tokens: T, where a row without EOS is cut, static.
    sampling: how both draw, static. It does not change which tokens are the target's K most likely.
    block: G ≥ 1, tokens proposed before the target looks, static. It changes no law, only the number of passes.
    top_k: K ≥ 1, static.
    key: a random key; a row's draws depend on (key, its row id, the row's own block) alone.
    row_ids: [B] int32, default 0 ... B-1.

  Returns:
    An Interleaved: (tokens [B, T], lengths [B], kept [B], proposed [B]), all int32.

  Raises:
    ConfigError: G or K below 1, or models that do not fit each other.
  """
  for name, value in (("block", block), ("top_k", top_k)):
    if value < 1:
      raise ConfigError(f"interleaved sampling with {name}={value}: must be a whole number of at least 1.")
  check_pair(target, draft)
  rows = prompt.shape[0]
  row_ids, _ = requests.rows(rows, row_ids, None)
  draft_params = partitioning.gathered(draft, draft_params)
  target_params = partitioning.gathered(target, target_params)
  keys = row_keys(key, partitioning.constrain_rows(row_ids))

  def step(loop: _Loop) -> _Loop:
    uniforms = None if sampling.greedy else uniforms_at(keys, loop.blocks, (block + 1,))  # G proposals, a replacement
    with partitioning.use_table(draft.partitioning):
      proposals, draft_state = _propose(draft, draft_params, loop, sampling, block, uniforms)
    fed = jnp.concatenate([loop.pending[:, None], proposals[:, :-1]], axis=1)
    logits, target_state = target.extend(target_params, loop.target, fed)
    with partitioning.use_table(target.partitioning):
      kept, replacement = _judge(proposals, logits, sampling, loop.out.lengths, top_k, uniforms)
    out, emitted, ended = _emit(loop.out, proposals, kept, replacement, ~loop.done)
    held = loop.target.cache.length + emitted
    last = jnp.where(kept < block, replacement, proposals[:, -1])
    return _Loop(
        draft=draft.rollback(draft_state, held),
        target=target.rollback(target_state, held),
        pending=jnp.where(loop.done, loop.pending, last),
        blocks=loop.blocks + ~loop.done,
        done=loop.done | ended,
        out=out,
    )

  slots = max_new_tokens + block - 1
  draft_state, pending = draft.start(draft_params, prompt, slots)
  target_state, _ = target.start(target_params, prompt, slots)
  none = jnp.zeros((rows,), jnp.int32)
  first = _Loop(
      draft=draft_state,
      target=target_state,
      pending=pending,
      blocks=none,
      done=jnp.zeros((rows,), bool),
      out=Interleaved(jnp.full((rows, max_new_tokens), PAD_ID, jnp.int32), none, none, none),
  )
  return jax.lax.while_loop(lambda loop: ~jnp.all(loop.done), step, first).out


def among_most_likely(tokens: jax.Array, logits: jax.Array, k: int) -> jax.Array:
  """Say whether each token is one of its k largest logits, the lower id first where they tie.

  Args:
    tokens: [...] int32.
    logits: [..., V].
    k: at least 1; from V on every token is.

  Returns:
    [...] bool.
  """
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
  before = (logits > own) | ((logits == own) & (ids < tokens[..., None]))
  return jnp.sum(before, axis=-1, dtype=jnp.int32) < k


def _propose(draft: LanguageModel, params: Params, loop: _Loop, sampling: SamplingConfig, block: int, uniforms):
  """Draw G tokens from the draft, one after another: [B, G] int32, and its state."""
  state, fed, tokens = loop.draft, loop.pending, []
  for i in range(block):
    logits, state = draft.extend(params, state, fed[:, None])
    fed = _draw(logits[:, 0], sampling, loop.out.lengths + i, None if uniforms is None else uniforms[:, i])
    tokens.append(fed)
  return jnp.stack(tokens, axis=1), state


def _judge(proposals, logits, sampling: SamplingConfig, lengths, top_k: int, uniforms) -> tuple[jax.Array, jax.Array]:
  """Count the proposals to keep, 0 ... G, and draw what replaces the one after them (rubbish after all G).

  Args:
    proposals: [B, G] int32.
    logits: [B, G, V], the target's for each of them.
    sampling: how the replacement is drawn.
    lengths: [B] int32, tokens before the block.
    top_k: K.
    uniforms: [B, G + 1] float32, the last one for the replacement; None when greedy.

  Returns:
    kept [B] int32 and replacement [B] int32.
  """
  block = proposals.shape[1]
  positions = lengths[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]
  kept = leading_true(among_most_likely(proposals, allowed(logits, sampling, positions), top_k))
  at = jnp.minimum(kept, block - 1)
  of_replaced = jnp.take_along_axis(logits, at[:, None, None], axis=1)[:, 0]
  return kept, _draw(of_replaced, sampling, lengths + at, None if uniforms is None else uniforms[:, -1])


def _draw(logits: jax.Array, sampling: SamplingConfig, position: jax.Array, uniforms: jax.Array | None) -> jax.Array:
  """Draw from logits [B, V] at places [B] in the text: [B] int32."""
  if sampling.greedy:
    return argmax(allowed(logits, sampling, position))
  return sample_from(jnp.exp(log_probs(logits, sampling, position)), uniforms)


def _emit(out: Interleaved, proposals, kept, replacement, live) -> tuple[Interleaved, jax.Array, jax.Array]:
  """Append one block to the rows that live, cut at EOS and at the length limit.

  Returns:
    The text, how many tokens each row has got [B] int32, and whether it has now ended [B] bool.
  """
  block, limit = proposals.shape[1], out.tokens.shape[1]
  room = limit - out.lengths
  slot = jnp.arange(block, dtype=jnp.int32)[None, :]
  tokens = jnp.where(slot < kept[:, None], proposals, replacement[:, None])
  full = jnp.minimum(kept + 1, block)
  before_eos = leading_true((tokens != EOS_ID) & (slot < full[:, None]))
  emitted = jnp.where(live, jnp.minimum(jnp.minimum(before_eos + 1, full), room), 0)
  proposed = jnp.minimum(jnp.minimum(leading_true(proposals != EOS_ID) + 1, block), room)
  positions = jnp.where(slot < emitted[:, None], out.lengths[:, None] + slot, limit)  # the limit: dropped
  lengths = out.lengths + emitted
  new = Interleaved(
      tokens=jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))(out.tokens, positions, tokens),
      lengths=lengths,
      kept=out.kept + jnp.minimum(kept, emitted),
      proposed=out.proposed + jnp.where(live, proposed, 0),
  )
  return new, emitted, (before_eos < emitted) | (lengths >= limit)
