"""What saves memory: layers computed again, a bfloat16 teacher; and what must stay float32 under bfloat16 matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distillspec_jax.distillation import methods, precision, step
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.models import T5, DecoderLM, DecoderLMConfig, T5Config
from distillspec_jax.types import ConfigError

SHAPE = dict(vocab_size=24, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32)
MODELS = {
    "t5": T5(T5Config(**SHAPE, num_encoder_layers=1, num_decoder_layers=3)),
    "decoder_lm": DecoderLM(DecoderLMConfig(**SHAPE, num_layers=3)),
    "t5_per_layer": T5(T5Config(**SHAPE, num_encoder_layers=1, num_decoder_layers=1, relative_bias="per_layer")),
}
LIGHT = DecoderLM(DecoderLMConfig(**SHAPE, num_layers=1))
B, S, T = 4, 20, 24
SFT = step.StepConfig(methods.named("sft"), T)
SUPERVISED = step.StepConfig(methods.named("supervised_kd"), T)


def batch():
  generator = np.random.default_rng(0)
  tokens = lambda length: generator.integers(2, 24, (B, length)).astype(np.int32)
  targets = tokens(T)
  return {
      "encoder_input_tokens": tokens(S),
      "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
      "decoder_target_tokens": targets,
      "decoder_loss_weights": np.ones((B, T), np.int32),
  }


def with_fields(model, **fields):
  return type(model)(dataclasses.replace(model.config, **fields))


def compiled(model, tx, config):
  """The step of a model that teaches itself, its first state and the teacher's parameters."""
  run = step.compile_train_step(model, model, tx, config)
  target_params = model.init(jax.random.key(1))
  arguments = step.init_state(model, tx, rng=jax.random.key(0)), target_params, batch(), jax.random.key(2)
  return run.lower(*arguments).compile(), arguments


@pytest.mark.parametrize("name", ["t5", "decoder_lm"])
def test_layers_computed_again_give_the_same_gradients_in_less_memory(name, keep_gradients):
  model, found = MODELS[name], []
  for remat in (False, True):
    program, arguments = compiled(model, keep_gradients, dataclasses.replace(SFT, remat=remat))
    state, metrics = program(*arguments)
    found.append((program.memory_analysis().temp_size_in_bytes, metrics["loss"][0], state.opt_state))
  (kept, loss, gradients), (less, again, others) = found
  assert less < 0.6 * kept
  np.testing.assert_allclose(again, loss, rtol=1e-6)
  for ours, theirs in zip(jax.tree.leaves(others), jax.tree.leaves(gradients), strict=True):
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_the_same_with_and_without(name):
  """Parameters and their names, the text that is decoded, and model.json."""
  model = MODELS[name]
  other = with_fields(model, remat=True)
  params, others = model.init(jax.random.key(0)), other.init(jax.random.key(0))
  assert jax.tree_util.tree_structure(params) == jax.tree_util.tree_structure(others)
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True))
  assert model.describe() == other.describe() and model.param_axes() == other.param_axes()
  outputs = []
  for network in (model, other):

    @jax.jit
    def decode(params, prompt, network=network):
      state, pending = network.start(params, prompt, 4)
      return network.extend(params, state, jnp.stack([pending, pending + 3], axis=1))[0]

    outputs.append(decode(params, batch()["encoder_input_tokens"]))
  np.testing.assert_array_equal(*outputs)


def test_dropout_is_the_same_when_layers_are_computed_again():
  model = with_fields(MODELS["t5_per_layer"], dropout_rate=0.5)
  params, given = model.init(jax.random.key(0)), batch()
  draw = jax.jit(lambda network, key: network.hidden(params, given, dropout_rng=key), static_argnums=0)
  hidden = lambda network, key: draw(network, jax.random.key(key))
  np.testing.assert_allclose(hidden(with_fields(model, remat=True), 3), hidden(model, 3), rtol=1e-5, atol=1e-6)
  assert not np.allclose(hidden(model, 3), hidden(model, 4))


def test_a_model_that_cannot_compute_again(tiny_model):
  config = dataclasses.replace(SUPERVISED, remat=True)
  with pytest.raises(ConfigError, match="remat is True, but a TinyModel cannot"):
    step.make_train_step(tiny_model(), tiny_model(), optax.sgd(0.1), config)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bfloat16_matrices_keep_float32_masters(keep_gradients, accumulate):
  """Parameters, gradients, moments and the average stay float32; the loss is near the float32 one, and not the same."""
  config = dataclasses.replace(SUPERVISED, accumulate=accumulate)
  losses, gradients = [], []
  for model in (LIGHT, with_fields(LIGHT, dtype="bfloat16")):
    program, arguments = compiled(model, keep_gradients, config)
    state, metrics = program(*arguments)
    losses.append(float(metrics["loss"][0]))
    gradients.append(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(state.opt_state)]))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))} == {jnp.dtype("float32")}
  assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-2)
  cosine = jnp.vdot(*gradients) / jnp.prod(jnp.stack([jnp.linalg.norm(g) for g in gradients]))
  assert cosine > 0.98


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_small_updates_are_not_lost_to_bfloat16(name):
  """A thousandth of bfloat16's spacing moves a float32 master, and would not move a bfloat16 one."""
  model = with_fields(LIGHT, dtype="bfloat16")
  tx, _ = OptimizerConfig(name=name, learning_rate=1e-5, ema_decay=0.5).build(10)
  abstract = step.abstract_state(model, tx)
  numbers = [leaf for leaf in jax.tree.leaves(abstract) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  assert {leaf.dtype for leaf in numbers} == {jnp.dtype("float32")}
  program, arguments = compiled(model, tx, SFT)
  before = jax.tree.map(np.array, arguments[0].params)
  state, _ = program(*arguments)
  moved = jax.tree.map(lambda old, new: np.mean(old != np.asarray(new)), before, state.params)
  rounded = jax.tree.map(
      lambda old, new: np.mean(old.astype(jnp.bfloat16) != np.asarray(new).astype(jnp.bfloat16)), before, state.params
  )
  assert max(jax.tree.leaves(moved)) > 0.9 and max(jax.tree.leaves(rounded)) < 0.2


def test_a_teacher_in_bfloat16_takes_half_the_memory():
  model = MODELS["t5_per_layer"]
  params = model.init(jax.random.key(0))
  before = jax.tree.map(np.array, params)
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  other, halved = precision.frozen(model, params, "bfloat16")
  assert other.config.dtype == other.config.param_dtype == "bfloat16"
  assert 2 * size(halved) == size(before) and all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  for ours, theirs in zip(jax.tree.leaves(halved), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(np.asarray(ours), theirs.astype(jnp.bfloat16))
  abstract = jax.tree.leaves(other.abstract_params())
  assert [leaf.dtype for leaf in jax.tree.leaves(halved)] == [leaf.dtype for leaf in abstract]
  score = jax.jit(lambda model, params: model.score(params, batch()), static_argnums=0)
  q, p = score(other, halved), score(model, before)
  assert 0 < np.max(np.abs(jax.nn.softmax(q) - jax.nn.softmax(p))) < 0.05


def test_a_teacher_as_it_was_saved():
  model = LIGHT
  params = model.init(jax.random.key(0))
  assert precision.frozen(model, params, None) == (model, params)
  same, kept = precision.frozen(model, params, "float32")
  assert same == model and not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))


def test_a_student_has_float32_master_weights_whatever_it_was_saved_in():
  saved = precision.of_dtype(LIGHT, "bfloat16")
  params = saved.init(jax.random.key(0))
  before = jax.tree.map(np.array, params)
  student, master = precision.trained(saved, params, None)
  assert (student.config.dtype, student.config.param_dtype) == ("bfloat16", "float32")
  assert precision.trained(student, master, "float32")[0].config.dtype == "float32"
  for ours, theirs in zip(jax.tree.leaves(master), jax.tree.leaves(before), strict=True):
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(ours), theirs.astype(np.float32))


def test_an_unknown_dtype():
  precision.check_dtype("train.dtype", None)
  with pytest.raises(ConfigError, match="train.dtype is 'float16'; there are float32, bfloat16"):
    precision.check_dtype("train.dtype", "float16")
