"""The training step on eight virtual devices gives what it gives on one: loss, gradients, sequences, placement."""

import dataclasses

import jax
import numpy as np
import pytest

from distillspec_jax.distillation import methods, rollouts, step
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.models import T5, T5Config
from distillspec_jax.parallel import partitioning
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh
from distillspec_jax.types import ConfigError

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")

MIXED = methods.named("distillspec", divergence="jsd", fixed_data_fraction=0.34, draft_data_fraction=0.5)
CONFIG = step.StepConfig(method=MIXED, target_length=6, chunk=4)
STUDENT = T5(T5Config.named("t5_tiny", num_encoder_layers=1, num_decoder_layers=1, logits_via_embedding=True))
TEACHER = T5(T5Config.named("t5_tiny", emb_dim=48, num_encoder_layers=1, num_decoder_layers=1))
MESHES = [((2, 2, 2), 1), ((8, 1, 1), 1), ((1, 1, 8), 1), ((2, 2, 2), 2)]  # shape, micro-batches


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 7, size=(8, 1))
  targets = np.where(np.arange(6) < lengths - 1, rng.integers(2, 128, size=(8, 6)), 0)
  np.put_along_axis(targets, lengths - 1, 1, axis=1)
  return {
      "encoder_input_tokens": rng.integers(2, 128, size=(8, 5)).astype(np.int32),
      "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))).astype(np.int32),
      "decoder_target_tokens": targets.astype(np.int32),
      "decoder_loss_weights": (np.arange(6) < lengths).astype(np.int32),
  }


def gradients_by_source(batch, mesh, tx, student=STUDENT, **fields):
  """Run steps, one compilation, until each source was drawn: {source: (loss, alpha, gradients)}."""
  config = dataclasses.replace(CONFIG, **fields)
  run = step.compile_train_step(student, TEACHER, tx, config, mesh=mesh)
  state = step.init_state(student, tx, rng=jax.random.key(0), mesh=mesh)
  target_params = TEACHER.init(jax.random.key(1))
  if mesh is not None:
    target_params = jax.device_put(target_params, partitioning.param_shardings(TEACHER, mesh))
  placed, found = partitioning.put_batch(batch, mesh), {}
  key = step.run_key(2, mesh)
  for _ in range(30):
    state, metrics = run(state, target_params, placed, key)
    metrics = jax.device_get(metrics)
    if int(metrics["source"]) not in found:
      found[int(metrics["source"])] = (metrics["loss"], metrics["alpha"], jax.device_get(state.opt_state))
    if len(found) == len(rollouts.SOURCES):
      return found
  raise AssertionError(f"thirty steps drew only the sources {sorted(found)}")


@pytest.fixture(scope="module")
def on_one_device(batch, keep_gradients):
  return gradients_by_source(batch, None, keep_gradients)


@pytest.mark.parametrize(("shape", "accumulate"), MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(batch, on_one_device, keep_gradients, shape, accumulate):
  found = gradients_by_source(batch, make_mesh(MeshConfig(*shape)), keep_gradients, accumulate=accumulate)
  assert_close(found, on_one_device)


def test_speculative_rollouts_and_layers_computed_again(batch, keep_gradients):
  fields = {"speculative_rollouts": 2, "remat": True}
  wanted, found = (
      gradients_by_source(batch, mesh, keep_gradients, **fields) for mesh in (None, make_mesh(MeshConfig(2, 2, 2)))
  )
  assert_close(found, wanted)


def test_a_replicated_student_and_chunks_of_a_split_vocabulary(batch, on_one_device, keep_gradients):
  """The student lies whole on every device, its teacher does not; of the 32 tokens of a part 11 are taken at a time."""
  mesh = make_mesh(MeshConfig(1, 2, 4))
  student, _ = partitioning.lay_out(STUDENT, None, mesh, "replicated")
  shardings = partitioning.state_shardings(step.abstract_state(student, keep_gradients), student, mesh)
  assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))
  found = gradients_by_source(batch, mesh, keep_gradients, student=student, vocab_chunk=41)
  assert_close(found, on_one_device)


def test_a_batch_that_does_not_split_is_refused_before_anything_is_compiled(batch, keep_gradients):
  run = step.compile_train_step(STUDENT, TEACHER, keep_gradients, CONFIG, mesh=make_mesh(MeshConfig(2, 2, 2)))
  six = {name: value[:6] for name, value in batch.items()}
  for call in (run, run.lower):
    with pytest.raises(ConfigError, match="a batch of 6 rows does not split over data x fsdp = 4 devices") as error:
      call(step.abstract_state(STUDENT, keep_gradients), TEACHER.abstract_params(), six, jax.random.key(0))
    assert "\n" not in str(error.value)


def assert_close(found, wanted):
  for source, (loss, alpha, gradients) in wanted.items():
    np.testing.assert_allclose(found[source][0], loss, rtol=1e-5)
    np.testing.assert_allclose(found[source][1], alpha, rtol=1e-5)
    for (path, ours), expected in zip(
        jax.tree_util.tree_leaves_with_path(found[source][2]), jax.tree.leaves(gradients), strict=True
    ):
      error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
      assert error < 1e-5, f"{rollouts.SOURCES[source]}, {jax.tree_util.keystr(path)}: relative error {error:.1e}"


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_the_state_stays_where_it_was_put(batch, name):
  """Two steps, one compilation, donation; parameters and moments lie as the table says."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  tx, _ = OptimizerConfig(name=name, learning_rate=0.01).build(10)
  state = step.init_state(STUDENT, tx, rng=jax.random.key(0), mesh=mesh)
  expected = partitioning.state_shardings(step.abstract_state(STUDENT, tx), STUDENT, mesh)
  split = [s for s in jax.tree.leaves(expected) if not s.is_fully_replicated]
  assert split, "nothing is split: the test would show nothing"
  target_params = jax.device_put(TEACHER.init(jax.random.key(1)), partitioning.param_shardings(TEACHER, mesh))
  config = step.StepConfig(method=methods.named("supervised_kd"), target_length=6)
  run = step.compile_train_step(STUDENT, TEACHER, tx, config, mesh=mesh)
  for i in range(2):
    old = state
    state, metrics = run(state, target_params, partitioning.put_batch(batch, mesh), jax.random.key(i))
    jax.block_until_ready(state)
    # Adafactor keeps placeholders of one element that nothing reads: those are not donated.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old) if leaf.size > 1)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  assert metrics["loss"][0].sharding.is_fully_replicated
