"""A step's loss and gradient against float64 numpy on the step's own sequences, by the papers' formulas.

Nothing of the package is called but the step itself: the sequences are an output of the very program that takes the
loss, both T5s are `numpy_t5`'s, and mask, divergence and means are written out here. The gradient is held against the
difference quotient of that loss while the sequences stay as they are: nothing can have come through sampling.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from references import numpy_t5
from references.random_models import random_params, random_prompts

from distillspec_jax.distillation import methods, step
from distillspec_jax.models import T5, T5Config

B, S, T, V = 6, 5, 7, 13
SHAPE = dict(
  vocab_size=V, num_heads=2, head_dim=4, num_encoder_layers=1, num_decoder_layers=1, relative_attention_num_buckets=8,
  relative_attention_max_distance=9,
)  # fmt: skip
# The draft's embedding embeds and unembeds; its target is wider and of the other kind.
DRAFT = T5(T5Config(emb_dim=12, mlp_dim=10, mlp_activations=("relu",), logits_via_embedding=True, **SHAPE))
TARGET = T5(T5Config(emb_dim=16, mlp_dim=12, **SHAPE))
DATA, FROM_DRAFT, FROM_TARGET = 0, 1, 2
DIVERGENCES = ("fkl", "rkl", "jsd", "jsd_0.1", "tvd", "lk_alpha", "lk_lambda", "tvd_pp")
# The methods as they are named; of V = 13 ids SKD's top 25 are all.
CASES = {**methods.METHODS, "skd": methods.named("skd", interleave_block=2, interleave_top_k=4)}
# Each divergence over each source, drawn by one program; sampled and scored at other temperatures than 1.
SOURCES = dict(fixed_data_fraction=0.34, draft_data_fraction=0.5, rollout_temperature=1.2, loss_temperature=1.7)
CASES |= {f"all sources, {name}": methods.named("distillspec", divergence=name, **SOURCES) for name in DIVERGENCES}
# Mistakes that the reference is made to make: each must show.
MISTAKES = ("padding counted", "after EOS", "no EOS", "no start", "token mean", "temperature")
LOPSIDED = ("fkl", "rkl", "jsd_0.1", "lk_lambda")  # what changes if P and Q are swapped


@functools.cache
def pair():
  rng = np.random.default_rng(4)
  return random_params(DRAFT, rng, 1.0), random_params(TARGET, rng, 2.0)


def data():
  """References of all lengths: nothing but EOS, ended early, ended at the last place, cut at T."""
  rng = np.random.default_rng(5)
  targets = rng.integers(2, V, (B, T)).astype(np.int32)
  for row, length in enumerate((1, 3, T, 2, 5)):
    targets[row, length - 1], targets[row, length:] = 1, 0
  return {
    "encoder_input_tokens": random_prompts(rng, B, S, V),
    "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    "decoder_target_tokens": targets,
    "decoder_loss_weights": (targets > 0).astype(np.int32),
  }


# The reference.


def counted(y):
  """Up to and with the first EOS, all of a row without one: [B, T] bool."""
  mask = np.zeros(y.shape, bool)
  for row, tokens in enumerate(y.tolist()):
    mask[row, : tokens.index(1) + 1 if 1 in tokens else T] = True
  return mask


def decoder_inputs(y):
  return np.concatenate([np.zeros((len(y), 1), int), y[:, :-1]], axis=1)


def kl(a, b):
  return np.sum(a * np.log(a / b), axis=-1)


def batch_mean(divergence, p, q, mask):
  """What LK's λ and TVD++'s scale are made of: the mean over the batch's tokens, which has no gradient."""
  if divergence == "lk_lambda":
    return np.mean(np.minimum(p, q).sum(-1)[mask])
  if divergence == "tvd_pp":
    return np.mean((q * (p > q)).sum(-1)[mask])
  return None


def values(divergence, p, q, y, mean):
  """The papers' formulas: P, Q [B, T, V] and y [B, T] -> [B, T]."""
  name, _, beta = divergence.partition("_")
  tvd = 0.5 * np.abs(p - q).sum(-1)
  if divergence == "cross_entropy":
    return -np.log(np.take_along_axis(q, y[..., None], -1)[..., 0])
  if name == "jsd":
    beta = float(beta or 0.5)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)
  if divergence == "lk_alpha":
    return -np.log(np.minimum(p, q).sum(-1))
  if divergence == "lk_lambda":
    share = np.exp(-3 * mean)
    return share * kl(p, q) + (1 - share) * tvd
  return {"fkl": kl(p, q), "rkl": kl(q, p), "tvd": tvd, "tvd_pp": tvd}[divergence]


class Reference:
  """Eq. 2 on given sequences, in float64; `mistake` names one to make."""

  def __init__(self, method, prompt, y, mistake=None):
    self.method, self.prompt, self.y, self.mistake = method, prompt, y, mistake
    self.mask = counted(y)
    lengths = np.full(B, T) if mistake == "padding counted" else self.mask.sum(-1)
    summed = {
      "after EOS": np.ones(y.shape, bool),
      "no EOS": self.mask & (y != 1),
      "no start": self.mask & (decoder_inputs(y) != 0),  # the start's id is the padding's
    }.get(mistake, self.mask)
    self.weights = summed / lengths[:, None] / B
    if mistake == "token mean":
      self.weights = self.mask / self.mask.sum()
    self.p = self.law(TARGET, pair()[1])
    self.mean = batch_mean(method.divergence, self.p, self.law(DRAFT, pair()[0]), self.mask)

  def law(self, model, params):
    temperature = self.method.loss_temperature * (1.1 if self.mistake == "temperature" else 1.0)
    logits = numpy_t5.score(params, model.config, self.prompt, decoder_inputs(self.y))
    return numpy_t5.softmax(logits / temperature)

  def loss(self, params):
    p, q = self.p, self.law(DRAFT, params)
    if self.mistake == "swapped":
      p, q = q, p
    return np.sum(self.weights * values(self.method.divergence, p, q, self.y, self.mean))

  def slope(self, params, direction, small=1e-5):
    """The derivative along a direction, the sequences and the batch's mean held fixed."""
    up, down = (self.loss(moved(params, direction, by)) for by in (small, -small))
    scale = 1 / np.sqrt(self.mean * (1 - self.mean)) if self.method.divergence == "tvd_pp" else 1.0
    return scale * (up - down) / (2 * small)


def moved(params, direction, by):
  return jax.tree.map(lambda x, d: np.asarray(x, np.float64) + by * d, params, direction)


def dot(a, b):
  return sum(np.sum(np.asarray(x, np.float64) * y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def unit(direction):
  size = np.sqrt(dot(direction, direction))
  return jax.tree.map(lambda x: np.asarray(x, np.float64) / size, direction)


# The step.


@functools.cache
def compiled(method, tx):
  """The step, with what it took its loss on as a further output; chunks that do not divide T."""
  config = step.StepConfig(method, T, chunk=3)
  plain = step.make_train_step(DRAFT, TARGET if method.needs_target else None, tx, config)

  def with_sequences(params, target_params, batch, key):
    seen, rollout = [], step.rollouts.rollout

    def watched(*args, **kw):
      out = rollout(*args, **kw)
      seen.append(out)
      return out

    step.rollouts.rollout = watched
    try:
      state = step.TrainState(np.int32(0), params, tx.init(params))
      state, metrics = plain(state, target_params, batch, key)
    finally:
      step.rollouts.rollout = rollout
    ((rolled, origin),) = seen
    return metrics, state.opt_state, rolled["decoder_target_tokens"], origin.source

  return jax.jit(with_sequences)


def exercised(y, source):
  """Only EOS, ended early, full, and of sampled rows one that begins with token 0."""
  lengths = counted(y).sum(-1)
  zero_first = source == DATA or (y[:, 0] == 0).any()
  return (lengths == 1).any() and ((lengths > 1) & (lengths < T)).any() and (lengths == T).any() and zero_first


@functools.cache
def steps(method, tx):
  """One step for each source: source -> (Reference, metrics, gradient), by the first keys with rows of every kind."""
  program, batch, found = compiled(method, tx), data(), {}
  target_params = pair()[1] if method.needs_target else None
  wanted = {DATA: method.needs_data, FROM_DRAFT: method.needs_draft_rollouts, FROM_TARGET: method.needs_target_rollouts}
  for seed in range(500):
    metrics, gradient, y, source = jax.device_get(program(pair()[0], target_params, batch, jax.random.key(seed)))
    if int(source) not in found and exercised(y, int(source)):
      found[int(source)] = Reference(method, batch["encoder_input_tokens"], y), metrics, gradient
    if len(found) == sum(wanted.values()):
      break
  assert set(found) == {source for source, possible in wanted.items() if possible}
  return found


@pytest.fixture(params=CASES)
def taken(request, keep_gradients):
  """The method and what `steps` gives; its name is in no number, so that methods alike but for it share a program."""
  method = dataclasses.replace(CASES[request.param], name="distillspec")
  return method, steps(method, keep_gradients)


def off(value, expected):
  return abs(value / expected - 1)


def test_the_loss_is_the_float64_one(taken):
  method, by_source = taken
  for source, (reference, metrics, _) in by_source.items():
    total, count = metrics["loss"]
    expected = reference.loss(pair()[0])
    assert expected > 0.01 and off(total / count, expected) <= 1e-5
    assert (count, metrics["tokens"]) == (B, reference.mask.sum()) and metrics["source"] == source
    if source == DATA:
      np.testing.assert_array_equal(reference.y, data()["decoder_target_tokens"])
    for mistake in (*MISTAKES, *["swapped"] * (method.divergence in LOPSIDED)):
      mistaken = Reference(method, reference.prompt, reference.y, mistake).loss(pair()[0])
      assert off(total / count, mistaken) > 1e-3, (mistake, source)
    if method.divergence != "cross_entropy":
      overlap = np.minimum(reference.p, reference.law(DRAFT, pair()[0])).sum(-1)[reference.mask].sum()
      assert off(metrics["alpha"][0], overlap) <= 1e-5


def test_the_gradient_is_the_loss_with_the_sequences_held_fixed(taken):
  """Along the gradient and along a random direction; on other sequences it is another one."""
  method, by_source = taken
  rng = np.random.default_rng(6)
  for reference, metrics, gradient in by_source.values():
    norm, own = float(metrics["gradient_norm"]), unit(gradient)
    assert norm > 1e-3 and off(norm, reference.slope(pair()[0], own)) <= 1e-5
    drawn = unit(jax.tree.map(lambda x: rng.standard_normal(x.shape), gradient))
    assert abs(dot(gradient, drawn) - reference.slope(pair()[0], drawn)) <= 1e-5 * norm
    other = Reference(method, reference.prompt, reference.y[::-1])
    assert off(norm, other.slope(pair()[0], own)) > 1e-3


def test_interleaved_sequences_hold_tokens_of_both(keep_gradients):
  method = dataclasses.replace(CASES["skd"], name="distillspec")
  ((_, metrics, _),) = steps(method, keep_gradients).values()
  kept, proposed = metrics["rollout_kept"]
  assert 0 < kept < proposed
