"""What a run is judged by while it goes on, on held-out prompts.

The loss on the references, α on the target's own outputs, and what α is for: the block efficiency of speculative
decoding with the student as draft.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax import tokens as token_ids
from distillspec_jax.analysis import acceptance
from distillspec_jax.decoding import autoregressive, speculative
from distillspec_jax.distillation import divergences, losses
from distillspec_jax.models.language_model import LanguageModel
from distillspec_jax.parallel import multihost, partitioning
from distillspec_jax.types import Batch, ConfigError, Params

TEMPERATURES = {"alpha_t0": 0.0, "alpha_t1": 1.0}
BLOCK_EFFICIENCY = {"block_efficiency_t0": 0.0, "block_efficiency_t1": 1.0}
LOSS = "validation_loss"
_CHUNK = 16  # positions whose logits exist at a time


class Validation:
  """Held-out prompts with their references, and the target's outputs on them, decoded once.

  The outputs at T=1 are drawn with keys that depend on the seed and the prompt's number alone, so a resumed run
  measures exactly what the first one did.
  """

  def __init__(
      self,
      student: LanguageModel,
      examples: Mapping[str, np.ndarray],
      *,
      batch_size: int = 32,
      target: LanguageModel | None = None,
      target_params: Params | None = None,
      gamma: int = 0,
      gamma_examples: int | None = None,
      seed: int = 0,
      mesh: jax.sharding.Mesh | None = None,
  ):
    """Cut the prompts into batches; nothing is decoded before `measure`.

    Args:
      student: the model that is judged.
      examples: `encoder_input_tokens` [N, S] and `decoder_target_tokens` [N, T], the same on every host.
      batch_size: prompts at a time, over all hosts; rounded up to what the mesh divides.
      target: the model whose drafts the student is to make; None measures the loss alone.
      target_params: its parameters.
      gamma: tokens drafted a block when block efficiency is measured; 0 does not measure it.
      gamma_examples: prompts, from the first on, that it is measured on; None = all.
      seed: of the target's outputs at T=1, and of speculative decoding.
      mesh: the devices' mesh, or None.

    Raises:
      ConfigError: no examples, no target tokens, vocabularies of different sizes, or with γ models of two kinds.
    """
    self.student, self.target, self._target_params = student, target, target_params
    self._mesh, self._seed = mesh, seed
    self._prompts, self._references = (
        np.asarray(examples[name], np.int32) for name in ("encoder_input_tokens", "decoder_target_tokens")
    )
    if not len(self._prompts) or not self._references.shape[1]:
      raise ConfigError("validation needs at least one prompt and one target token: is the split empty?")
    if target is not None and target.vocab_size != student.vocab_size:
      raise ConfigError(
          f"the target's vocabulary has {target.vocab_size} entries, the draft's {student.vocab_size}: they must agree"
      )
    if target is not None and gamma:
      speculative.check_gamma(gamma)
      speculative.check_pair(target, student)
    self._gamma, self._gamma_examples = gamma, gamma_examples
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    self._batch_size = -(-min(batch_size, len(self._prompts)) // ways) * ways
    self._outputs: dict[str, list[Batch]] = {}

  @property
  def ready(self) -> bool:
    """Whether nothing is left to decode."""
    return self.target is None or bool(self._outputs)

  def prepare(self) -> None:
    """Decode the target's outputs on every prompt at each temperature, once; they stay on the devices."""
    if self.ready:
      return
    with self._on_mesh():
      for name, temperature in TEMPERATURES.items():
        self._outputs[name] = [self._decode(batch, temperature) for batch in self._batches()]

  def measure(self, params: Params) -> dict[str, float]:
    """Measure the student on all prompts.

    Args:
      params: its parameters.

    Returns:
      `validation_loss` (nats a token); with a target `alpha_t0` and `alpha_t1` (by teacher forcing); with γ too
      `block_efficiency_t0` and `block_efficiency_t1` (tokens a pass of the target, measured).
    """
    self.prepare()
    with self._on_mesh():
      settled = multihost.settled
      sums = {LOSS: [settled(_loss(self.student, params, batch)) for batch in map(_scored, self._batches())]}
      for name, batches in self._outputs.items():
        pair = (self.target, self._target_params, self.student, params)
        sums[name] = [
            settled(_totals(*acceptance.acceptance_rate(*pair, batch, temperature=TEMPERATURES[name])))
            for batch in batches
        ]
      if self.target is not None and self._gamma:
        for name, temperature in BLOCK_EFFICIENCY.items():
          sums[name] = [self._speculate(params, batch, temperature) for batch in self._batches(self._gamma_examples)]
    fetched = jax.device_get(sums)
    return {name: _ratio(pairs) for name, pairs in fetched.items()}

  def _decode(self, batch: Batch, temperature: float) -> Batch:
    generation = autoregressive.generate(
        self.target,
        self._target_params,
        batch["encoder_input_tokens"],
        max_new_tokens=self._references.shape[1],
        temperature=temperature,
        seed=self._seed,
        row_ids=batch["row_ids"],
        active=batch["active"],
    )
    generation = multihost.settled(generation)
    scored = acceptance.teacher_forced_batch(batch["encoder_input_tokens"], generation.tokens, generation.lengths)
    return {**scored, "decoder_loss_weights": scored["decoder_loss_weights"] * batch["active"][:, None]}

  def _speculate(self, params: Params, batch: Batch, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Decode with the student as draft: (tokens, passes of the target)."""
    generation = speculative.speculative_generate(
        self.target,
        self._target_params,
        self.student,
        params,
        batch["encoder_input_tokens"],
        gamma=self._gamma,
        max_new_tokens=self._references.shape[1],
        temperature=temperature,
        seed=self._seed,
        row_ids=batch["row_ids"],
        active=batch["active"],
    )
    return multihost.settled(_totals(generation.lengths, generation.blocks))

  def _batches(self, most: int | None = None) -> Iterator[Batch]:
    """Yield this host's rows of each batch, on the mesh; the last one is filled up with rows that do not count."""
    count = min(most or len(self._prompts), len(self._prompts))
    own = multihost.share_of(self._mesh, self._batch_size).rows
    for first in range(0, count, self._batch_size):
      ids = np.arange(first, first + self._batch_size, dtype=np.int32)[own]
      rows = np.minimum(ids, count - 1)
      batch = {
          "encoder_input_tokens": self._prompts[rows],
          "decoder_target_tokens": self._references[rows],
          "row_ids": ids,
          "active": ids < count,
      }
      yield partitioning.put_batch(batch, self._mesh)

  def _on_mesh(self):
    return contextlib.nullcontext() if self._mesh is None else partitioning.use_mesh(self._mesh)


@jax.jit
def _scored(batch: Batch) -> Batch:
  """Make the teacher-forced features of the references."""
  targets = batch["decoder_target_tokens"]
  counted = token_ids.valid_mask(targets) & _before_padding(targets) & batch["active"][:, None]
  return {
      "encoder_input_tokens": batch["encoder_input_tokens"],
      "decoder_input_tokens": token_ids.shift_right(targets),
      "decoder_target_tokens": targets,
      "decoder_loss_weights": counted.astype(jnp.float32),
  }


def _before_padding(targets: jax.Array) -> jax.Array:
  """Mark what comes before the trailing padding: references of a task without EOS end there."""
  real = (targets != token_ids.PAD_ID).astype(jnp.int32)
  return jnp.flip(jnp.cumsum(jnp.flip(real, axis=1), axis=1), axis=1) > 0


@functools.partial(jax.jit, static_argnums=0)
def _loss(student: LanguageModel, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Sum the cross-entropy with the references, and count the tokens."""
  sums = losses.chunked_loss(
      divergences.CROSS_ENTROPY,
      (functools.partial(student.unembed, params), student.hidden(params, batch)),
      batch["decoder_loss_weights"],
      targets=batch["decoder_target_tokens"],
      chunk=_CHUNK,
      reduction="token",
  )
  return sums.total, sums.count


@jax.jit
def _totals(sums: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.sum(sums), jnp.sum(counts)


def _ratio(pairs) -> float:
  total, count = (float(sum(column)) for column in zip(*pairs, strict=True))
  return total / max(count, 1.0)
