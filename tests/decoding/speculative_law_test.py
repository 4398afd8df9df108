"""The law of the whole jitted path: chi-square against every text's exact probability, under every setting.

The target's law over all texts of up to T tokens comes from float64 numpy networks. One batched call draws ROWS rows by
row id. T tokens at G take at least three blocks. Faults in this path are planted in planted_faults_test.py.
"""

import dataclasses

import numpy as np
import pytest
from references.law import DECODER_LM_PAIR, FALSE_ALARM, PROMPT, T5_PAIR, chi_square, exact_law, speculate, tokens_for
from references.slow_decoding import Reader
from scipy import stats

from distillspec_jax.decoding import autoregressive
from distillspec_jax.decoding.sampling import SamplingConfig

pytestmark = pytest.mark.as_users  # so many rows take longer than their compilation
ROWS = 100_000
K2, P8, M2 = dict(top_k=2), dict(top_p=0.8), dict(min_length=2)
T5_CASES = [  # every value of every setting with both rules
    (1, "token", 1.0, {}),
    (1, "token", 0.7, K2),
    (1, "token", 1.0, P8),
    (1, "block", 0.7, {}),
    (1, "block", 1.0, K2 | M2),
    (1, "block", 1.0, P8),
    (3, "token", 1.0, M2),
    (3, "token", 0.7, P8),
    (3, "block", 1.0, {}),
    (3, "block", 0.7, M2),
    (3, "block", 1.0, P8 | K2 | M2),
    (5, "token", 0.7, M2 | P8),
    (5, "block", 1.0, {}),
    (5, "block", 0.7, K2),
]
DECODER_LM_CASES = [
    (1, "token", 0.7, M2 | P8),
    (1, "block", 1.0, K2),
    (3, "token", 1.0, {}),
    (3, "block", 0.7, M2),
    (5, "block", 1.0, P8),
]


def controls(pair, limit, sampling):
  """Laws of settings near these, one change each, as (setting, law): a test of these settings must reject them.

  Left out is what hardly changes the law: a top_p beside a top_k that has cut as much already.
  """
  law = exact_law(pair.reader, limit, sampling)
  near = {"temperature": sampling.temperature * 1.15}
  near |= {"top_k": 0} if sampling.top_k else {}
  near |= {"top_p": 0.9} if sampling.top_p < 1 else {}
  near |= {"min_length": 1} if sampling.min_length else {}
  for setting, value in near.items():
    other = exact_law(pair.reader, limit, dataclasses.replace(sampling, **{setting: value}))
    if sum(abs(law.get(text, 0) - other.get(text, 0)) for text in {*law, *other}) / 2 > 0.05:
      yield setting, other


@pytest.mark.parametrize(
    "pair,gamma,rule,temperature,settings",
    [(T5_PAIR, *case) for case in T5_CASES] + [(DECODER_LM_PAIR, *case) for case in DECODER_LM_CASES],
    ids=lambda x: x.model.architecture if x in (T5_PAIR, DECODER_LM_PAIR) else str(x),
)
def test_speculative_text_has_the_targets_law(pair, gamma, rule, temperature, settings):
  out = speculate(pair, ROWS, gamma, rule=rule, temperature=temperature, **settings)
  sampling = SamplingConfig(temperature, **settings)
  law = exact_law(pair.reader, tokens_for(gamma), sampling)
  assert abs(sum(law.values()) - 1) < 1e-9
  assert chi_square(out.tokens, law) > FALSE_ALARM
  for setting, other in controls(pair, tokens_for(gamma), sampling):
    assert chi_square(out.tokens, other) < FALSE_ALARM, setting
  blocks, rate = np.asarray(out.blocks), np.sum(out.accepted) / np.sum(out.judged)
  assert np.sum(blocks >= 3) > 1000 and 0.3 < rate < 0.97  # the law was tested where it is hard
  if rule == "token":
    _check_first_acceptance(pair, out, sampling)


def _check_first_acceptance(pair, out, sampling):
  """The first proposal of the first block is accepted with probability sum_v min(p, q)."""
  p, q = (Reader(pair.model, params, PROMPT, sampling).law([]) for params in (pair.target, pair.draft))
  first_kept = int(np.sum(np.asarray(out.origins)[:, 0]))
  assert stats.binomtest(first_kept, ROWS, np.sum(np.minimum(p, q))).pvalue > FALSE_ALARM


@pytest.mark.parametrize("pair", [T5_PAIR, DECODER_LM_PAIR], ids=lambda pair: pair.model.architecture)
def test_plain_text_has_the_models_law(pair):
  prompt = np.broadcast_to(PROMPT, (ROWS, len(PROMPT)))
  for temperature, settings in ((1.0, {}), (0.7, P8 | M2)):
    sampling = SamplingConfig(temperature, **settings)
    out = autoregressive.generate(
        pair.model, pair.target, prompt, max_new_tokens=5, temperature=temperature, **settings
    )
    assert chi_square(out.tokens, exact_law(pair.reader, 5, sampling)) > FALSE_ALARM
    for setting, other in controls(pair, 5, sampling):
      assert chi_square(out.tokens, other) < FALSE_ALARM, setting


@pytest.mark.parametrize(
    "pair,cases", [(T5_PAIR, T5_CASES), (DECODER_LM_PAIR, DECODER_LM_CASES)], ids=["t5", "decoder_lm"]
)
def test_every_setting_has_a_negative_control(pair, cases):
  rejected = set()
  for gamma, _, temperature, settings in cases:
    if gamma < 5:
      rejected |= {setting for setting, _ in controls(pair, tokens_for(gamma), SamplingConfig(temperature, **settings))}
  assert rejected == {"temperature", "top_k", "top_p", "min_length"}
