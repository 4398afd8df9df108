"""Sampling and verification with the vocabulary split over devices: against float64 numpy, and against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import numpy_sampling

from distillspec_jax.decoding import sampling, verification
from distillspec_jax.decoding.sampling import SamplingConfig
from distillspec_jax.distillation import interleaved
from distillspec_jax.parallel import partitioning
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")

B, V, GAMMA = 8, 1000, 3  # parts of 125, 250 and 500 tokens: none of them whole blocks of 128
MESHES = [(1, 1, 8), (1, 2, 4), (2, 2, 2)]
JUST_BELOW_1 = np.float32(1 - 2**-24)


@functools.cache
def mesh_of(sizes):
  return make_mesh(MeshConfig(*sizes))


def on_mesh(sizes, function, *arrays):
  """Run a function of arrays whose last axis, where it is V, is split."""
  mesh = mesh_of(sizes)

  def split(x):
    return partitioning.constrain_vocabulary(x) if x.shape[-1] == V else x

  with partitioning.use_mesh(mesh):
    assert partitioning.ways("activation_vocab", V) == sizes[2]
    return jax.device_get(jax.jit(lambda *xs: function(*map(split, xs)))(*arrays))


def _logits(*leading, seed=0):
  return (np.random.default_rng(seed).standard_normal((*leading, V)) * 3).astype(np.float32)


SETTINGS = [
  SamplingConfig(0.0, min_length=2, forbidden_ids=(3, 999)),
  SamplingConfig(0.7, top_k=7, valid_ids=900),
  SamplingConfig(3.0, top_p=0.9, min_length=1),
  SamplingConfig(1.0, top_k=300, top_p=0.8),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_laws_are_numpys(sizes):
  logits, position = _logits(B), np.arange(B, dtype=np.int32) // 4

  def laws(x):
    return [sampling.log_probs(x, config, position) for config in SETTINGS]

  for config, found in zip(SETTINGS, on_mesh(sizes, laws, logits), strict=True):
    want = np.stack([numpy_sampling.law(x, config, n) for x, n in zip(logits, position, strict=True)])
    np.testing.assert_array_equal(found > -np.inf, want > 0)
    np.testing.assert_allclose(np.exp(found), want, rtol=2e-5)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_tokens_that_tie_are_kept_wherever_they_lie(sizes):
  """Integers: dozens of equal values in every part. The k-th largest, and what ties with it, are numpy's."""
  logits = np.random.default_rng(1).integers(-4, 5, (B, V)).astype(np.float32)
  found = on_mesh(sizes, lambda x: (sampling._most_likely(x, 150), sampling.argmax(x)), logits)
  want = np.stack([numpy_sampling.most_likely(row, 150) for row in logits])
  np.testing.assert_array_equal(found[0], want)
  assert np.all(want.sum(-1) > 150)
  np.testing.assert_array_equal(found[1], np.argmax(logits, -1))


def _weights(rng, rows):
  """Weights of many sizes, a third of them zero; some rows have all of theirs in one part."""
  weights = rng.exponential(size=(rows, V)) ** 3 * (rng.random((rows, V)) < 0.67)
  weights[1, :875], weights[2, 125:], weights[3, :] = 0.0, 0.0, 0.0
  weights[3, 999] = 2.0
  return weights.astype(np.float32)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_draw_inverts_the_cumulative_sum(sizes):
  """Against float64: the token's interval holds the uniform, but for what float32's sums cannot tell."""
  rng = np.random.default_rng(2)
  weights = _weights(rng, 64)
  uniforms = rng.random((40, 64)).astype(np.float32)
  uniforms[0], uniforms[1] = 0.0, JUST_BELOW_1
  draw = lambda w, u: jax.lax.map(lambda row: sampling.sample_from(w, row), u)
  drawn = on_mesh(sizes, draw, weights, uniforms)
  wide = weights.astype(np.float64)
  shares = np.cumsum(wide, -1) / np.sum(wide, -1, keepdims=True)
  rows = np.arange(64)
  assert np.all(wide[rows, drawn] > 0)
  upper, lower = shares[rows, drawn], np.where(drawn > 0, shares[rows, np.maximum(drawn - 1, 0)], 0.0)
  assert np.all(upper > uniforms - 1e-5) and np.all(lower <= uniforms + 1e-5)
  assert set(drawn[:, 3]) == {999}
  one_device = np.stack([sampling.sample_from(jnp.asarray(weights), jnp.asarray(u)) for u in uniforms])
  assert np.mean(drawn != one_device) < 1e-2  # where a uniform lies at an interval's end
  # Negative control: ids counted as if the padding of the parts were tokens miss the intervals.
  padded = drawn + drawn // (V // sizes[2]) * (-(V // sizes[2]) % 128)
  assert np.mean(padded >= V) > 0.05


def _laws(rows, seed):
  """Two laws that agree in part, with zeros, and drafts drawn from the second."""
  rng = np.random.default_rng(seed)
  target = _logits(rows, GAMMA + 1, seed=seed)
  draft = target[:, :GAMMA] + rng.standard_normal((rows, GAMMA, V)).astype(np.float32)
  q = np.exp(draft - draft.max(-1, keepdims=True))
  drafts = np.stack([[rng.choice(V, p=x / x.sum()) for x in np.float64(row)] for row in q]).astype(np.int32)
  u, c = rng.random((rows, GAMMA)).astype(np.float32), rng.random(rows).astype(np.float32)
  return drafts, draft, target, u, c


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rules_judge_as_on_one_device(sizes):
  rows, config = 128, SamplingConfig(1.0, top_k=200, top_p=0.95)
  arrays = _laws(rows, 3)

  def judged(drafts, draft, target, u, c):
    log_q, log_p = sampling.log_probs(draft, config), sampling.log_probs(target, config)
    found = {}
    for name, rule in verification.RULES.items():
      extra = (jnp.float32(0.6),) if rule.lossy else ()
      found[name] = rule.sampled(drafts, log_q, log_p, u, c, *extra), rule.greedy(drafts, target, *extra)
    return found, interleaved.among_most_likely(drafts, target[:, :GAMMA], 9)

  want = jax.device_get(jax.jit(judged)(*arrays))
  found = on_mesh(sizes, judged, *arrays)
  jax.tree.map(np.testing.assert_array_equal, found, want)
  assert len(np.unique(want[0]["token"][0][0])) == GAMMA + 1 and 0.1 < want[1].mean() < 0.9


def test_a_replicated_models_law_is_drawn_from_as_on_one_device():
  """Its table asks for no placing, and the cache of traces tells the tables apart."""
  weights = _weights(np.random.default_rng(4), B)
  uniforms = np.linspace(0, 0.99, B, dtype=np.float32)
  traced = lambda: str(jax.make_jaxpr(sampling.sample_from)(weights, uniforms))
  with partitioning.use_mesh(mesh_of((1, 1, 8))):
    assert "sharding_constraint" in traced()
    with partitioning.use_table("replicated"):
      assert "sharding_constraint" not in traced()
    assert "sharding_constraint" in traced()
