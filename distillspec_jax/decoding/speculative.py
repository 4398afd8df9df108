"""Speculative decoding with a fixed gamma: draft G tokens, judge them in one target pass, as one XLA program.

A block, for each row on its own:
  1. The draft is fed [previous, pending] and then its own proposals, G passes in all. Its cache is always one token
     shorter than the target's: it never holds the newest token but one, which is fed again as `previous`. That
     costs one pass over two tokens, where caching the last proposal would cost one pass more.
  2. The target is fed [pending, draft_1 ... draft_G] in one `extend`.
  3. A rule keeps `a` drafts and gives the next token, which becomes pending.
  4. Both caches are rolled back to what was kept. Rows that have ended do not move.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.decoding import requests, verification
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
from distillspec_jax.types import ConfigError, Generation, Params


@flax.struct.dataclass
class _Loop:
  """The loop's state.

  Attributes:
    target: the target's state; its cache holds every emitted token but the pending one.
    draft: the draft's state; its cache holds one token less.
    pending: [B] int32, the newest token, in neither cache.
    previous: [B] int32, the token before it.
    done: [B] bool.
    out: what has been emitted and counted so far; its rows' `blocks` index the random draws.
  """

  target: Any
  draft: Any
  pending: jax.Array
  previous: jax.Array
  done: jax.Array
  out: Generation


def _empty(batch: int, max_new_tokens: int, gamma: int) -> Generation:
  zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
  return Generation(
      tokens=jnp.full((batch, max_new_tokens), PAD_ID, jnp.int32),
      lengths=zeros(batch),
      blocks=zeros(batch),
      drafted=zeros(batch),
      judged=zeros(batch),
      accepted=zeros(batch),
      accepted_lengths=zeros(gamma + 1),
      judged_lengths=zeros(gamma + 1),
      origins=jnp.zeros((batch, max_new_tokens), jnp.int8),
  )


def _propose(draft: LanguageModel, params: Params, loop: _Loop, gamma: int, sampling: SamplingConfig, uniforms):
  """Draft G tokens.

  Returns:
    tokens [B, G] int32, their log-probabilities [B, G, V] (None when greedy), and the draft's state.
  """
  state = loop.draft
  fed = jnp.stack([loop.previous, loop.pending], axis=1)
  tokens, q = [], []
  for i in range(gamma):
    logits, state = draft.extend(params, state, fed, last_only=True)
    logits, position = logits[:, 0], loop.out.lengths + i
    with partitioning.use_table(draft.partitioning):
      if sampling.greedy:
        token = argmax(allowed(logits, sampling, position))
      else:
        q.append(log_probs(logits, sampling, position))
        token = sample_from(jnp.exp(q[-1]), uniforms[:, i])
    tokens.append(token)
    fed = token[:, None]
  return jnp.stack(tokens, axis=1), (jnp.stack(q, axis=1) if q else None), state


def _first(flags: jax.Array) -> jax.Array:
  """Index of the first True, or the width when there is none: [B, N] bool -> [B] int32."""
  return verification.leading_true(~flags)


def _emit(out: Generation, drafts, accepted, next_token, live) -> tuple[Generation, jax.Array]:
  """Append one block to the rows that live, cut at EOS and at the length limit, and count.

  Args:
    out: the output so far.
    drafts: [B, G] int32.
    accepted: [B] int32, drafts kept by the rule.
    next_token: [B] int32.
    live: [B] bool.

  Returns:
    The output, and ended [B] bool: rows that have now met EOS or the limit.
  """
  batch, gamma = drafts.shape
  limit = out.tokens.shape[1]
  room = limit - out.lengths
  slot = jnp.arange(gamma + 1, dtype=jnp.int32)[None, :]
  kept = slot < accepted[:, None]
  block = jnp.where(kept, jnp.pad(drafts, ((0, 0), (0, 1))), next_token[:, None])
  proposals = jnp.minimum(jnp.minimum(_first(drafts == EOS_ID) + 1, gamma), room)
  judged = jnp.minimum(accepted + 1, proposals)
  accepted = jnp.minimum(accepted, proposals)
  eos_at = _first((block == EOS_ID) & (slot <= accepted[:, None]))  # gamma + 1 when there is none
  emitted = jnp.minimum(jnp.minimum(accepted + 1, eos_at + 1), room)
  emitted = jnp.where(live, emitted, 0)
  positions = jnp.where(slot < emitted[:, None], out.lengths[:, None] + slot, limit)  # the limit: dropped
  put = jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))
  count = lambda total, value: total + jnp.where(live, value, 0)
  histogram = lambda total, value: total.at[jnp.where(live, value, gamma + 1)].add(1, mode="drop")
  new = Generation(
      tokens=put(out.tokens, positions, block),
      lengths=out.lengths + emitted,
      blocks=count(out.blocks, jnp.ones_like(judged)),
      drafted=count(out.drafted, proposals),
      judged=count(out.judged, judged),
      accepted=count(out.accepted, accepted),
      accepted_lengths=histogram(out.accepted_lengths, accepted),
      judged_lengths=histogram(out.judged_lengths, judged),
      origins=put(out.origins, positions, kept.astype(jnp.int8)),
  )
  ended = (eos_at < emitted) | (new.lengths >= limit)
  return new, ended


def _block(
    loop: _Loop, *, target, target_params, draft, draft_params, gamma, sampling, rule, lenience, keys
) -> _Loop:
  """Run one block on every row."""
  live = ~loop.done
  held = loop.target.cache.length
  if sampling.greedy:
    u = jnp.zeros((3, 1, gamma))
  else:  # purposes: draft, accept, correct; the row's own block index, never the position
    u = jnp.moveaxis(uniforms_at(keys, loop.out.blocks, (3, gamma)), 1, 0)
  drafts, q, draft_state = _propose(draft, draft_params, loop, gamma, sampling, u[0])
  fed = jnp.concatenate([loop.pending[:, None], drafts], axis=1)
  logits, target_state = target.extend(target_params, loop.target, fed)
  positions = loop.out.lengths[:, None] + jnp.arange(gamma + 1, dtype=jnp.int32)[None, :]
  extra = (lenience,) if rule.lossy else ()
  with partitioning.use_table(partitioning.table_of(target, draft)):
    if sampling.greedy:
      accepted, next_token = rule.greedy(drafts, allowed(logits, sampling, positions), *extra)
    else:
      p = log_probs(logits, sampling, positions)
      q = partitioning.constrain_vocabulary(q)
      accepted, next_token = rule.sampled(drafts, q, p, u[1], u[2, :, 0], *extra)
  out, ended = _emit(loop.out, drafts, accepted, next_token, live)
  held = jnp.where(live, held + 1 + accepted, held)
  return _Loop(
      target=target.rollback(target_state, held),
      draft=draft.rollback(draft_state, held - 1),
      pending=jnp.where(live, next_token, loop.pending),
      previous=jnp.where(live, jnp.take_along_axis(fed, accepted[:, None], axis=1)[:, 0], loop.previous),
      done=loop.done | ended,
      out=out,
  )


@functools.partial(
    jax.jit, static_argnames=("target", "draft", "gamma", "max_new_tokens", "sampling", "rule")
)
def _speculate(
    target,
    target_params,
    draft,
    draft_params,
    prompt,
    seed,
    row_ids,
    active,
    lenience,
    *,
    gamma,
    max_new_tokens,
    sampling,
    rule,
) -> Generation:
  return speculate_tokens(
      target,
      target_params,
      draft,
      draft_params,
      prompt,
      gamma=gamma,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      rule=rule,
      key=jax.random.key(seed),
      row_ids=row_ids,
      active=active,
      lenience=lenience,
  )


def speculate_tokens(
    target: LanguageModel,
    target_params: Params,
    draft: LanguageModel,
    draft_params: Params,
    prompt: jax.Array,
    *,
    gamma: int,
    max_new_tokens: int,
    sampling: SamplingConfig,
    key: jax.Array,
    rule: verification.Rule = verification.RULES["token"],
    row_ids: jax.Array | None = None,
    active: jax.Array | None = None,
    lenience: jax.Array | None = None,
) -> Generation:
  """Decode speculatively until every row has ended; pure, so that it can be traced inside another jit.

  Args:
    target, draft: the models, static, of one vocabulary (`check_pair`).
    target_params, draft_params: their parameters.
    prompt: [B, S] int32.
    gamma: γ, static.
    max_new_tokens: T, static.
    sampling: static.
    key: a random key; a row's draws depend on (key, its row id, its blocks) alone.
    rule: of acceptance, static.
    row_ids: [B] int32, default 0 ... B-1.
    active: [B] bool; rows that are False produce nothing.
    lenience: of a lossy rule, a scalar.
  """
  row_ids, active = partitioning.constrain_rows(requests.rows(prompt.shape[0], row_ids, active))
  target_params = partitioning.gathered(target, target_params)
  draft_params = partitioning.gathered(draft, draft_params)
  slots = max_new_tokens + gamma
  target_state, pending = target.start(target_params, prompt, slots)
  draft_state, _ = draft.start(draft_params, prompt, slots)
  first = _Loop(
      target=target_state,
      draft=draft.rollback(draft_state, draft_state.cache.length - 1),
      pending=pending,
      previous=draft.previous(prompt),
      done=~active,
      out=_empty(prompt.shape[0], max_new_tokens, gamma),
  )
  block = functools.partial(
      _block,
      target=target,
      target_params=target_params,
      draft=draft,
      draft_params=draft_params,
      gamma=gamma,
      sampling=sampling,
      rule=rule,
      lenience=lenience,
      keys=row_keys(key, row_ids),
  )
  return jax.lax.while_loop(lambda loop: ~jnp.all(loop.done), block, first).out


def check_gamma(gamma: int) -> None:
  """Raise ConfigError unless at least one token is drafted a block."""
  if not isinstance(gamma, (int, np.integer)) or isinstance(gamma, bool) or gamma < 1:
    raise ConfigError(f"gamma={gamma}: must be a whole number of at least 1 (tokens drafted a block).")


def check_pair(target: LanguageModel, draft: LanguageModel) -> None:
  """Raise ConfigError unless the two speak about the same tokens in the same way."""
  if target.vocab_size != draft.vocab_size:
    raise ConfigError(
        f"the target has {target.vocab_size} token ids and the draft {draft.vocab_size}: "
        "speculative decoding and distillation need one vocabulary for both."
    )
  if type(target) is not type(draft):
    raise ConfigError(f"a {target.architecture} target cannot be served by a {draft.architecture} draft.")


def speculative_generate(
    target: LanguageModel,
    target_params: Params,
    draft: LanguageModel,
    draft_params: Params,
    prompt: jax.Array,
    *,
    gamma: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_length: int = 0,
    valid_ids: int = 0,
    forbidden_ids: Sequence[int] = (),
    rule: str = "token",
    lenience: float | None = None,
    seed: int = 0,
    row_ids: jax.Array | None = None,
    active: jax.Array | None = None,
) -> Generation:
  """Decode with the target's law, G drafted tokens a target pass, as one XLA program.

  With a lossless rule the tokens are the target's greedy tokens at temperature 0, and have the target's law above 0.

  Args:
    target: the model whose text is wanted.
    target_params: its parameters.
    draft: the model that proposes.
    draft_params: its parameters.
    prompt: [B, S] int32, padded on the right with 0.
    gamma: G, tokens drafted a block.
    max_new_tokens: T, where a row without EOS is cut, in tokens.
    temperature: 0 is greedy.
    top_k, top_p, min_length, valid_ids, forbidden_ids: see SamplingConfig.
    rule: the acceptance rule, of `verification.RULES`.
    lenience: ε in (0, 1] of the lossy rules, which need it.
    seed: of the random draws; unused when greedy.
    row_ids: [B] int32, name the rows for the draws, so that one row can be decoded again alone.
    active: [B] bool, False marks a padding row that produces nothing.

  Returns:
    A Generation.

  Raises:
    ConfigError: settings out of range, models that do not fit each other, a prompt of the wrong shape or with ids
      outside the vocabulary.
  """
  check_gamma(gamma)
  check_pair(target, draft)
  sampling = SamplingConfig(temperature, top_k, top_p, min_length, valid_ids, forbidden_ids)
  found = verification.rule_named(rule, lenience)
  prompt, row_ids, active = requests.checked(
      target,
      prompt,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      seed=seed,
      row_ids=row_ids,
      active=active,
      draft=draft,
  )
  return _speculate(
      target,
      target_params,
      draft,
      draft_params,
      prompt,
      seed,
      row_ids,
      active,
      jnp.float32(1.0 if lenience is None else lenience),
      gamma=int(gamma),
      max_new_tokens=int(max_new_tokens),
      sampling=sampling,
      rule=found,
  )
