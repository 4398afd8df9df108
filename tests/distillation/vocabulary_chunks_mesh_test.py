"""The loss in chunks of a vocabulary that a mesh has split: one device's numbers, and no output layer on its way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.distillation import losses
from distillspec_jax.models import T5, T5Config
from distillspec_jax.parallel import partitioning
from distillspec_jax.parallel.collectives import collectives
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")

B, T, V = 8, 5, 1000
CHUNKS = [8, 96, 600, 999]  # of the 125 tokens of an eighth: 1, 12, 75 and all of them; the last begin early
STUDENT = T5(T5Config.named("t5_tiny", vocab_size=V, logits_via_embedding=True))
TEACHER = T5(T5Config.named("t5_tiny", vocab_size=V, emb_dim=48))


def arrays():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return {
    "student": {"token_embedder": {"embedding": normal(V, 32)}},
    "teacher": {"decoder": {"logits_dense": {"kernel": normal(48, V) / 4}}},
    "hidden": normal(B, T, 32) * 2,
    "teacher_hidden": normal(B, T, 48) * 2,
    "targets": rng.integers(0, V, (B, T)).astype(np.int32),
  }


def loss(name, vocab_chunk):
  def of(params, hidden, others):
    sums = losses.chunked_loss(
      name,
      (STUDENT.unembedding(params), hidden),
      jnp.asarray((np.arange(T)[None, :] < 1 + np.arange(B)[:, None] % T).astype(np.float32)),
      teacher=None if name == "cross_entropy" else (TEACHER.unembedding(others["teacher"]), others["teacher_hidden"]),
      targets=others["targets"],
      temperature=1.3,
      chunk=2,
      vocab_chunk=vocab_chunk,
    )
    return sums.loss, sums

  return jax.jit(jax.grad(of, argnums=(0, 1), has_aux=True))


def place(found, mesh):
  """Put output layers, hidden states and targets where a step has them."""
  place_as = lambda x, *names: jax.device_put(x, jax.NamedSharding(mesh, partitioning._spec(x.shape, names, mesh)))
  return {
    "student": jax.tree.map(lambda x: place_as(x, "vocab", "embed"), found["student"]),
    "teacher": jax.tree.map(lambda x: place_as(x, "embed", "vocab"), found["teacher"]),
    **{name: place_as(found[name], "batch", None, None) for name in ("hidden", "teacher_hidden")},
    "targets": place_as(found["targets"], "batch", None),
  }


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("name", ["jsd_0.1", "cross_entropy", "lk_lambda"])
def test_values_and_gradients_are_those_of_one_device(name, sizes):
  """One device's are float64's: see vocabulary_chunks_test."""
  given = arrays()
  (by_params, by_hidden), want = jax.device_get(loss(name, None)(given["student"], given["hidden"], given))
  mesh = make_mesh(MeshConfig(*sizes))
  for size in CHUNKS if (name, sizes[2]) == ("jsd_0.1", 8) else CHUNKS[1:2]:
    with partitioning.use_mesh(mesh):
      placed = place(given, mesh)
      gradients, sums = jax.device_get(loss(name, size)(placed["student"], placed["hidden"], placed))
    np.testing.assert_allclose(sums.loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(sums.accepted, want.accepted, rtol=1e-5)
    assert (sums.broken, sums.count, sums.tokens) == (want.broken, want.count, want.tokens)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves((by_params, by_hidden)), strict=True):
      assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
  assert want.loss > 0.01 and (name == "cross_entropy" or want.accepted > 0.1)


@pytest.mark.parametrize("name", ["jsd_0.1", "cross_entropy"])
def test_no_output_layer_is_sent(name, monkeypatch):
  """Nothing as large as a device's part of one, in value and gradient; without parts each chunk would gather."""
  mesh, part = make_mesh(MeshConfig(1, 1, 8)), V // 8 * 32

  def sent():
    with partitioning.use_mesh(mesh):
      placed = place(arrays(), mesh)
      lowered = loss(name, 96).lower(placed["student"], placed["hidden"], placed)
    return [message for message in collectives(lowered.compile().as_text()) if message.elements >= part]

  assert sent() == []
  monkeypatch.setattr(partitioning, "ways", lambda *_: 1)
  assert sent()
