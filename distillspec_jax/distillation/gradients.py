"""The loss's gradient over a batch: models, divergence and chunks put together."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from distillspec_jax.distillation import losses
from distillspec_jax.parallel import partitioning
from distillspec_jax.types import Batch, ConfigError, Params


def loss_gradients(models, params: Params, batch: Batch, dropout_key: jax.Array, config):
  """Take the loss's gradient by the student's parameters, in one piece or in micro-batches.

  Args:
    models: the student, the teacher (None where the method needs none) and the teacher's parameters.
    params: the student's.
    batch: seqio's features, [B, S] and [B, T].
    dropout_key: of the student's dropout.
    config: the StepConfig.

  Returns:
    The gradient, like the parameters, and the batch's LossSums.

  Raises:
    ConfigError: the rows do not split into `config.accumulate` micro-batches.
  """
  if config.accumulate == 1:
    sums_of = _make_sums(models, batch, dropout_key, config)
    return jax.grad(lambda p: ((sums := sums_of(p)).loss, sums), has_aux=True)(params)

  def body(carry, piece):
    batch, key = piece
    sums_of = _make_sums(models, partitioning.constrain_rows(batch), key, config)
    # Of the total, not of the loss: what it is divided by is known when all micro-batches have been counted.
    gradients, sums = jax.grad(lambda p: ((sums := sums_of(p)).total, sums), has_aux=True)(params)
    return jax.tree.map(lambda total, more: total + more.astype(jnp.float32), carry, (gradients, sums)), None

  pieces = {name: _micro_batches(x, config.accumulate) for name, x in batch.items()}
  keys = jax.random.split(dropout_key, config.accumulate)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
  (gradients, sums), _ = jax.lax.scan(body, (zeros, losses.LossSums.zero()), (pieces, keys))
  count = jnp.maximum(sums.count, 1.0)
  return jax.tree.map(lambda gradient, leaf: (gradient / count).astype(leaf.dtype), gradients, params), sums


def _micro_batches(array: jax.Array, number: int) -> jax.Array:
  """Cut rows [B, ...] into [number, B / number, ...]: every number-th row, so that each device gives of its own."""
  rows, *rest = array.shape
  if rows % number:
    raise ConfigError(f"a batch of {rows} rows does not split into StepConfig.accumulate = {number} equal parts")
  return jnp.moveaxis(array.reshape(rows // number, number, *rest), 1, 0)


def _make_sums(models, batch: Batch, dropout_key: jax.Array, config):
  """Make the function of the student's parameters that the step differentiates: -> LossSums."""
  student, teacher, target_params = models
  method, teaching = config.method, None
  if method.needs_teacher:
    fixed = jax.lax.stop_gradient(target_params)
    teaching = _unembedding(teacher, fixed, config), teacher.hidden(fixed, batch)

  def sums(params):
    hidden = student.hidden(params, batch, dropout_rng=dropout_key)
    return losses.chunked_loss(
        method.divergence,
        (_unembedding(student, params, config), hidden),
        batch["decoder_loss_weights"],
        teacher=teaching,
        targets=batch["decoder_target_tokens"],
        temperature=method.loss_temperature,
        chunk=config.chunk,
        vocab_chunk=config.vocab_chunk,
        reduction=config.reduction,
        segments=batch.get("decoder_segment_ids"),
    )

  return sums


def _unembedding(model, params: Params, config) -> losses.Unembed:
  return model.unembedding(params) if config.vocab_chunk else functools.partial(model.unembed, params)
