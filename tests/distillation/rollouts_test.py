"""Sources are chosen as the paper's loop says; sampled sequences become decoder features with exact masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import decoding_cases

from distillspec_jax.decoding import autoregressive
from distillspec_jax.distillation import interleaved, methods, rollouts
from distillspec_jax.types import ConfigError


def a_method(fixed, draft, **fields):
  return methods.Method("distillspec:test", "fkl", fixed_data_fraction=fixed, draft_data_fraction=draft, **fields)


def draws(method, number):
  keys = jax.random.split(jax.random.key(7), number)
  return np.asarray(jax.jit(jax.vmap(lambda key: rollouts.choose_source(method, key)))(keys))


def test_sources_have_the_papers_probabilities():
  """λ1 = 0.3, λ2 = 0.4: data .3, draft .7·.4 = .28, target .42; each count within 4.5 standard deviations."""
  number = 20_000
  counts = np.bincount(draws(a_method(0.3, 0.4), number), minlength=3)
  for count, probability in zip(counts, (0.3, 0.28, 0.42), strict=True):
    assert abs(count - number * probability) < 4.5 * np.sqrt(number * probability * (1 - probability))


@pytest.mark.parametrize(
    ("fixed", "draft", "expected"),
    [
        (1.0, 0.0, (rollouts.DATA,)),
        (1.0, 1.0, (rollouts.DATA,)),
        (0.0, 1.0, (rollouts.DRAFT,)),
        (0.0, 0.0, (rollouts.TARGET,)),
        (0.5, 1.0, (rollouts.DATA, rollouts.DRAFT)),
        (0.5, 0.0, (rollouts.DATA, rollouts.TARGET)),
        (0.0, 0.5, (rollouts.DRAFT, rollouts.TARGET)),
        (0.2, 0.5, (rollouts.DATA, rollouts.DRAFT, rollouts.TARGET)),
    ],
)
def test_possible_sources_are_those_that_are_drawn(fixed, draft, expected):
  method = a_method(fixed, draft)
  assert rollouts.possible_sources(method) == expected
  assert set(draws(method, 500)) == set(expected)


class Untouchable:
  """Stands for a model that must not even be traced."""

  def __getattr__(self, name):
    raise AssertionError(f"a source of probability zero was compiled in ({name})")


def roll(method, batch, key=0, draft=None, draft_params=None, target=None, target_params=None, length=6):
  unused = Untouchable()
  return jax.jit(
      lambda batch, key: rollouts.rollout(
          method, draft or unused, draft_params, target or unused, target_params, batch, key, length=length
      )
  )(batch, jax.random.key(key))


def test_impossible_sources_are_not_compiled_in(tiny_model, batch):
  model = tiny_model()
  params = model.init(jax.random.key(0))
  assert roll(a_method(1.0, 0.0), batch)[1].source == rollouts.DATA
  assert roll(a_method(0.0, 1.0), batch, draft=model, draft_params=params)[1].source == rollouts.DRAFT
  assert roll(a_method(0.0, 0.0), batch, target=model, target_params=params)[1].source == rollouts.TARGET
  with pytest.raises(AssertionError, match="probability zero"):  # the negative control
    roll(a_method(0.5, 0.5), batch, draft=model, draft_params=params)


def test_data_passes_through_unchanged(batch):
  features, _ = roll(a_method(1.0, 0.0), batch)
  for name in batch:
    np.testing.assert_array_equal(features[name], batch[name])


def greedy_by_hand(model, params, prompt, length):
  """Argmax over the teacher-forced logits of everything so far, a token at a time; rows go on after EOS."""
  inputs = np.zeros((prompt.shape[0], length + 1), np.int32)
  for t in range(length):
    so_far = {"encoder_input_tokens": prompt, "decoder_input_tokens": jnp.asarray(inputs[:, :length])}
    logits = model.score(params, so_far)
    inputs[:, t + 1] = np.argmax(np.asarray(logits)[:, t], -1)
  return inputs[:, 1:]


def test_decoder_features_of_sampled_sequences(tiny_model, batch):
  """Greedy rollouts against a loop by hand: inputs shifted, the first token counted, nothing after EOS counted."""
  model = tiny_model()
  params = model.init(jax.random.key(14))
  # Raise EOS and 0, so that rows end early and zeros are sampled as tokens, the first one too.
  params["unembedding"] = params["unembedding"].at[:, 1].mul(2.0).at[:, 0].mul(2.5)
  prompt = jax.random.randint(jax.random.key(5), (32, 3), 2, 11)
  batch = {"encoder_input_tokens": prompt}
  features, _ = roll(a_method(0.0, 1.0, rollout_temperature=0.0), batch, draft=model, draft_params=params)
  by_hand = greedy_by_hand(model, params, prompt, 6)
  ended_early = zero_first = 0
  for row, expected in enumerate(by_hand):
    ends = np.flatnonzero(expected == 1)
    length = ends[0] + 1 if ends.size else 6
    target = np.where(np.arange(6) < length, expected, 0)
    np.testing.assert_array_equal(features["decoder_target_tokens"][row], target)
    np.testing.assert_array_equal(features["decoder_input_tokens"][row], np.concatenate([[0], target[:-1]]))
    np.testing.assert_array_equal(features["decoder_loss_weights"][row], np.arange(6) < length)
    ended_early += length < 6
    zero_first += target[0] == 0
  assert ended_early and zero_first  # the case was exercised


def test_samples_are_the_samplers(tiny_model, batch):
  """T > 0: the same tokens as `sample_tokens` gives for the key, other tokens for another key."""
  model = tiny_model()
  params = model.init(jax.random.key(0))
  method = a_method(0.0, 0.0, rollout_temperature=0.8)
  first, _ = roll(method, batch, key=3, target=model, target_params=params)
  again, _ = roll(method, batch, key=3, target=model, target_params=params)
  other, _ = roll(method, batch, key=4, target=model, target_params=params)
  expected, _ = autoregressive.sample_tokens(
      model,
      params,
      batch["encoder_input_tokens"],
      max_new_tokens=6,
      sampling=autoregressive.SamplingConfig(temperature=0.8),
      key=jax.random.split(jax.random.key(3))[1],
  )
  np.testing.assert_array_equal(first["decoder_target_tokens"], expected)
  np.testing.assert_array_equal(first["decoder_target_tokens"], again["decoder_target_tokens"])
  assert np.any(first["decoder_target_tokens"] != other["decoder_target_tokens"])


def test_each_source_samples_from_its_own_model_at_its_temperature(tiny_model):
  """First tokens of 4,000 equal prompts: near the chosen model's distribution, far from the other's."""
  model = tiny_model()
  draft, target = model.init(jax.random.key(0)), model.init(jax.random.key(1))
  batch = {"encoder_input_tokens": jnp.full((4000, 3), 5, jnp.int32)}

  def first_token_law(params):
    prompt = batch["encoder_input_tokens"][:1]
    one = {"encoder_input_tokens": prompt, "decoder_input_tokens": jnp.zeros((1, 1), jnp.int32)}
    return np.asarray(jax.nn.softmax(model.score(params, one)[0, 0] / 1.5))

  laws = {"draft": first_token_law(draft), "target": first_token_law(target)}
  for fraction, name, other in ((1.0, "draft", "target"), (0.0, "target", "draft")):
    method = a_method(0.0, fraction, rollout_temperature=1.5)
    features, _ = roll(method, batch, draft=model, draft_params=draft, target=model, target_params=target, length=1)
    law = np.bincount(np.asarray(features["decoder_target_tokens"][:, 0]), minlength=11) / 4000
    assert 0.5 * np.abs(law - laws[name]).sum() < 0.04
    assert 0.5 * np.abs(law - laws[other]).sum() > 0.1


def test_rows_that_do_not_count_stay_uncounted(tiny_model, batch):
  model = tiny_model()
  batch["decoder_loss_weights"] = batch["decoder_loss_weights"].at[2].set(0)
  features, origin = roll(a_method(0.0, 1.0), batch, draft=model, draft_params=model.init(jax.random.key(0)))
  np.testing.assert_array_equal(origin.rows, [rollouts.DRAFT, rollouts.DRAFT, rollouts.NOT_COUNTED, rollouts.DRAFT])
  assert origin.draft_tokens == np.sum(features["decoder_loss_weights"]) and origin.target_tokens == 0
  np.testing.assert_array_equal(features["decoder_loss_weights"][:, 0], [1, 1, 0, 1])
  assert not np.any(features["decoder_loss_weights"][2])


def test_data_of_another_length_than_the_rollouts(batch):
  with pytest.raises(ConfigError, match="have 6 tokens and target_length is 9"):
    roll(a_method(0.5, 1.0), batch, length=9)


def test_the_source_follows_the_schedule():
  """λ1 from 1 to 0 over 4 steps: data alone at first, half of the draws after 2, none from the fourth on."""
  method = a_method(1.0, 1.0, fixed_data_fraction_end=0.0, schedule_steps=4)
  keys = jax.random.split(jax.random.key(3), 4000)
  drawn = jax.jit(jax.vmap(lambda key, step: rollouts.choose_source(method, key, step), in_axes=(0, None)))
  shares = [np.mean(np.asarray(drawn(keys, step)) == rollouts.DATA) for step in (0, 2, 4, 100)]
  assert shares[0] == 1.0 and shares[2:] == [0.0, 0.0]
  assert abs(shares[1] - 0.5) < 5.5 * np.sqrt(0.25 / 4000)


def test_interleaved_rollouts_are_the_interleavers():
  target, draft, prompt = jax.tree.map(jnp.asarray, decoding_cases.cases(2)[1])
  method = a_method(0.0, 1.0, interleave=True, interleave_block=2, interleave_top_k=3, rollout_top_k=6)
  batch = {"encoder_input_tokens": prompt}
  models = dict(draft=decoding_cases.MODEL, draft_params=draft, target=decoding_cases.MODEL, target_params=target)
  features, origin = roll(method, batch, key=3, **models)
  expected = interleaved.interleave(
      decoding_cases.MODEL, draft, decoding_cases.MODEL, target, prompt,
      max_new_tokens=6, sampling=method.sampling, block=2, top_k=3, key=jax.random.split(jax.random.key(3))[1],
  )  # fmt: skip
  assert origin.source == rollouts.DRAFT
  assert (origin.kept, origin.proposed) == (np.sum(expected.kept), np.sum(expected.proposed))
  assert origin.draft_tokens == origin.target_tokens == origin.proposed
  np.testing.assert_array_equal(features["decoder_target_tokens"], expected.tokens)
  plain, _ = roll(a_method(0.0, 1.0, rollout_top_k=6), batch, key=3, **models)
  assert np.any(plain["decoder_target_tokens"] != expected.tokens)
