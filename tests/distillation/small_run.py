"""A pair of tiny T5s and a run of the host loop over random batches, as the entry point would make it."""

import functools

import jax
import numpy as np

from distillspec_jax import models
from distillspec_jax.distillation import best, costs, loop, step, validation
from distillspec_jax.distillation.methods import METHODS
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.weights import checkpoints

SHAPE = dict(vocab_size=24, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)
STUDENT = models.T5(models.T5Config.named("t5_tiny", mlp_dim=16, **SHAPE))
TARGET = models.T5(models.T5Config.named("t5_tiny", mlp_dim=24, **SHAPE))
TARGET_PARAMS = TARGET.init(jax.random.key(7))
S, T, B = 6, 5, 4


def example(generator, rows, length):
  tokens = generator.integers(3, 24, (rows, length)).astype(np.int32)
  for row, end in enumerate(generator.integers(1, length, rows)):
    tokens[row, end:] = 0
    tokens[row, end] = 1
  return tokens


class Batches:
  """Random batches that depend on their number alone."""

  def __init__(self, place=None):
    self.number = (place or {"number": 0})["number"]

  def __next__(self):
    generator = np.random.default_rng(self.number)
    self.number += 1
    targets = example(generator, B, T)
    return {
      "encoder_input_tokens": example(generator, B, S),
      "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
      "decoder_target_tokens": targets,
      "decoder_loss_weights": (targets > 0).astype(np.int32),
    }

  def state(self):
    return {"number": self.number}


def held_out(rows=6):
  generator = np.random.default_rng(99)
  return {"encoder_input_tokens": example(generator, rows, S), "decoder_target_tokens": example(generator, rows, T)}


@functools.cache
def compiled(method, optimizer, **fields):
  """Share compiled steps between tests; `method` is a Method or the name of one, `fields` are a StepConfig's."""
  tx, schedule = optimizer.build(1)
  config = step.StepConfig(METHODS.get(method, method), T, **fields)
  return tx, step.compile_train_step(STUDENT, TARGET, tx, config, schedule=schedule)


@functools.cache
def held_out_outputs(gamma=0):
  return validation.Validation(
    STUDENT, held_out(), batch_size=4, target=TARGET, target_params=TARGET_PARAMS, gamma=gamma
  )


def run(directory, *, method="distillspec", optimizer=OptimizerConfig(learning_rate=0.05), batches=Batches,
        written=None, validated_by=held_out_outputs, target_params=TARGET_PARAMS, fields=(), forget=False,
        notice=None, saves=checkpoints.RunCheckpoints, **config):  # fmt: skip
  """Train (or go on) in a directory, as the entry point does; returns the final state."""
  config = loop.TrainConfig(**{"steps": 6, "checkpoint_every": 2, "eval_every": 3, "log_every": 2, **config})
  tx, compiled_step = compiled(method, optimizer, **dict(fields))
  run_checkpoints = saves(directory, keep=3)
  restored = run_checkpoints.restore_latest(step.abstract_state(STUDENT, tx))
  state, saved, _ = restored or (step.init_state(STUDENT, tx, rng=jax.random.key(config.seed)), None, 0)
  place, remembered = loop.split_place(saved)
  held = validated_by() if validated_by else None
  parts = loop.Parts(
    step=compiled_step,
    batches=batches(place),
    target_params=target_params,
    checkpoints=run_checkpoints,
    validation=held,
    best=best.Best(directory, STUDENT, config.best_by) if held else None,
    meter=costs.Meter(STUDENT, TARGET),
    remembered={} if forget else remembered,
    notice=notice,
  )
  kept = [] if written is None else written
  return loop.train(config, parts, state, lambda number, scalars: kept.append((number, dict(scalars))))


class Interrupted(Batches):
  """Killed when it is asked for the sixth batch."""

  at = 5

  def __next__(self):
    if self.number == self.at:
      raise KeyboardInterrupt
    return super().__next__()


def same(a, b):
  flat_a, flat_b = jax.tree.leaves(a), jax.tree.leaves(b)
  return len(flat_a) == len(flat_b) and all(np.array_equal(x, y) for x, y in zip(flat_a, flat_b, strict=True))
