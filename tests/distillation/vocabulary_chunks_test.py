"""The loss in chunks of V against float64 numpy and against whole vocabularies; its memory; who can have it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from divergences_test import far_from_the_kinks, reference, reference_gradient, softmax64

from distillspec_jax.distillation import divergences, losses, methods, step
from distillspec_jax.models import T5, DecoderLM, DecoderLMConfig, T5Config
from distillspec_jax.models.language_model import Unembedding
from distillspec_jax.types import ConfigError

NAMES = ("fkl", "rkl", "jsd", "jsd_0.1", "tvd", "cross_entropy", "lk_alpha", "lk_lambda", "tvd_pp")
B, T, E, V = 3, 5, 6, 23
TEMPERATURE = 1.7
WEIGHTS = (np.arange(T)[None, :] < np.array([[5], [3], [0]])).astype(np.float32)
BOTH, TEACHER_ALONE, STUDENT_ALONE = [2, 3, 4, 5, 21], [7, 22], [11]  # masked tokens


def unembedding(layer):
  """Two leaves, whose vocabularies lie along different axes."""
  logits = lambda piece, h: h @ piece["kernel"] + jnp.broadcast_to(piece["bias"], (*h.shape[:-1], len(piece["bias"])))
  return Unembedding(layer, {"kernel": 1, "bias": 0}, logits)


def make_arrays(name="tvd", masks=True):
  """Make layers and hidden states; the masks leave the divergence finite."""
  rng = np.random.default_rng(11)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  layer = lambda width: {"kernel": normal(width, V), "bias": normal(V)}
  student, teacher, targets = layer(E), layer(E + 2), rng.integers(12, 21, size=(B, T)).astype(np.int32)
  if masks:
    student["bias"][BOTH] = teacher["bias"][BOTH] = -np.inf
    if name != "rkl":
      teacher["bias"][TEACHER_ALONE] = -np.inf
    if name not in ("fkl", "lk_lambda"):
      student["bias"][STUDENT_ALONE] = -np.inf
  return dict(
      student=student, hidden=normal(B, T, E), teacher=teacher, teacher_hidden=normal(B, T, E + 2), targets=targets
  )


def sums_of(name, arrays, vocab_chunk, weights=WEIGHTS, chunk=2, reduction="token"):
  return losses.chunked_loss(
      name,
      (unembedding(arrays["student"]), arrays["hidden"]),
      jnp.asarray(weights),
      teacher=None if name == "cross_entropy" else (unembedding(arrays["teacher"]), arrays["teacher_hidden"]),
      targets=arrays["targets"],
      temperature=TEMPERATURE,
      chunk=chunk,
      vocab_chunk=vocab_chunk,
      reduction=reduction,
  )


def results(name, arrays, vocab_chunk, **fields):
  """Give (LossSums, gradients of the loss to the student's layer and to its hidden states)."""

  @jax.jit
  def run(arrays):
    def loss(layer, hidden):
      sums = sums_of(name, {**arrays, "student": layer, "hidden": hidden}, vocab_chunk, **fields)
      return sums.loss, sums

    gradients, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(arrays["student"], arrays["hidden"])
    return sums, gradients

  return jax.device_get(run(jax.tree.map(jnp.asarray, arrays)))


def by_float64(name, arrays):
  """Compute the loss, the mean acceptance and the gradients from the definitions, over whole logits."""
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
  counted = WEIGHTS > 0
  logits = lambda layer, hidden: (hidden @ layer["kernel"] + layer["bias"])[counted] / TEMPERATURE  # [N, V]
  q_logits, p_logits = logits(wide["student"], wide["hidden"]), logits(wide["teacher"], wide["teacher_hidden"])
  p, q = softmax64(p_logits), softmax64(q_logits)
  if name == "cross_entropy":
    one_hot = np.eye(V)[arrays["targets"][counted]]
    values, by_logits, accepted = -np.log(np.sum(one_hot * q, -1)), q - one_hot, 0.0
  else:
    assert far_from_the_kinks(name, p_logits, q_logits)
    values, by_logits = reference(name, p_logits, q_logits), reference_gradient(name, p_logits, q_logits)
    accepted = np.minimum(p, q).sum()
  by_logits = by_logits / TEMPERATURE / counted.sum()
  by_hidden = np.zeros((B, T, E))
  by_hidden[counted] = by_logits @ wide["student"]["kernel"].T
  by_layer = {"kernel": wide["hidden"][counted].T @ by_logits, "bias": by_logits.sum(0)}
  return values.mean(), accepted, (by_layer, by_hidden)


def assert_close(found, expected, rtol=2e-5, atol=2e-7):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_float64s(name):
  """23 tokens in chunks of 5: the last one begins early. Some tokens are masked, the first chunk almost whole."""
  arrays = make_arrays(name)
  value, accepted, gradients = by_float64(name, arrays)
  sums, found = results(name, arrays, 5)
  np.testing.assert_allclose(sums.loss, value, rtol=2e-5)
  np.testing.assert_allclose(sums.accepted, accepted, rtol=2e-5)
  assert (sums.broken, sums.tokens, sums.count) == (0, 8, 8)
  assert_close(found, gradients, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["jsd_0.1", "cross_entropy", "lk_alpha"])
@pytest.mark.parametrize("size", [1, 4, 22])
def test_any_chunk_gives_the_same(name, size):
  """With chunks of 1 and 4 some chunks have nothing but masked tokens. Any chunk of T and reduction, as well."""
  arrays = make_arrays(name)
  found, expected = (results(name, arrays, v, chunk=c, reduction="sequence") for v, c in ((size, 3), (None, 5)))
  assert_close(found, expected)


def test_a_chunk_of_the_whole_vocabulary_or_more_is_the_whole():
  arrays = make_arrays("fkl")
  text = lambda v: jax.jit(lambda a: sums_of("fkl", a, v).loss).lower(arrays).as_text()
  whole = text(None)
  assert text(V) == whole and text(100 * V) == whole
  assert text(V - 1) != whole


@pytest.mark.parametrize("name", ["fkl", "rkl", "lk_alpha", "lk_lambda"])
def test_zeros_that_the_other_law_does_not_share(name):
  """What would be infinite counts as ZERO_LOG_PROB, as over whole vocabularies; laws may have nothing in common."""
  arrays = make_arrays("tvd")  # masks on either side

  def compare():
    found, expected = (results(name, arrays, v) for v in (5, None))
    assert_close(found, expected, atol=2e-5)  # values near 100 cancel in the gradient
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    return found

  compare()
  arrays["teacher"]["bias"][:12], arrays["student"]["bias"][12:] = -np.inf, -np.inf
  sums, gradients = compare()
  assert sums.accepted == 0
  if name == "lk_alpha":
    np.testing.assert_allclose(sums.loss, -divergences.ZERO_LOG_PROB, rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("size", [1, 2])
def test_lk_alpha_keeps_its_size_where_the_overlap_underflows(size):
  """By hand: three parts of e^-300 each, zeros in float32; two of them have q < p."""
  row = lambda *logits: unembedding({"kernel": jnp.array([logits]), "bias": jnp.zeros(3)})
  ones = jnp.ones((1, 1, 1))

  @jax.value_and_grad
  def loss(logits):
    teacher = row(0.0, -300.0, -200.0), ones
    student = row(*logits), ones
    return losses.chunked_loss("lk_alpha", student, ones[..., 0], teacher=teacher, vocab_chunk=size).loss

  value, gradient = jax.jit(loss)(jnp.array([-300.0, 0.0, -300.0]))
  np.testing.assert_allclose(value, 300 - np.log(3), rtol=1e-6)
  np.testing.assert_allclose(gradient, [-1 / 3, 2 / 3, -1 / 3], rtol=1e-5)


@pytest.mark.parametrize("name", ["fkl", "lk_alpha", "tvd_pp"])
def test_broken_laws_are_counted_and_not_hidden(name):
  """Logits of the teacher that are NaN, infinite, or nothing but minus infinity. Where nothing counts: none."""
  arrays = make_arrays(name, masks=False)
  arrays["teacher"]["kernel"][-1] = 1.0
  clean = results(name, arrays, 5)
  hidden = arrays["teacher_hidden"] = arrays["teacher_hidden"].copy()
  arrays["hidden"] = np.where(WEIGHTS[..., None] > 0, arrays["hidden"], np.nan)
  hidden[1, 3:, -1], hidden[2, :, -1] = [np.nan, np.inf], -np.inf
  jax.tree.map(np.testing.assert_array_equal, results(name, arrays, 5), clean)
  for at, poison in (((0, 0), np.nan), ((0, 4), np.inf), ((1, 2), -np.inf)):
    hidden[(*at, -1)] = poison
  sums, _ = results(name, arrays, 5)
  assert sums.broken == 3 and np.isnan(sums.loss)
  assert results(name, arrays, None)[0].broken == 3
  hidden[0, 0], hidden[0, 4], hidden[1, 2] = 0.0, 0.0, 0.0
  arrays["hidden"][0, 1, 0] = np.nan
  sums, _ = results(name, arrays, 5)
  assert sums.broken == 0 and np.isnan(sums.loss)  # the student's


def test_bfloat16_parameters_collect_their_gradient_in_float32():
  """1024 chunks of T, each adding little, and tokens 1 and 2 in two chunks of V: sums in bfloat16 would stall."""
  hidden = jnp.ones((1, 1024, 2), jnp.bfloat16)

  @jax.jit
  @jax.grad
  def gradient(params):
    layer = Unembedding(params, 1, lambda piece, h: h @ piece)
    targets = jnp.zeros((1, 1024), jnp.int32)
    return losses.chunked_loss(
        "cross_entropy", (layer, hidden), jnp.ones((1, 1024)), targets=targets, chunk=1, vocab_chunk=3
    ).total

  found = gradient(jnp.zeros((2, 4), jnp.bfloat16))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32)[0], [-0.75, 0.25, 0.25, 0.25], rtol=4e-3)


def _t5(**fields):
  return T5(T5Config.named("t5_tiny", num_encoder_layers=1, num_decoder_layers=1, **fields))


def _lm(**fields):
  shape = dict(vocab_size=128, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_layers=1, max_positions=32)
  return DecoderLM(DecoderLMConfig(**shape, **fields))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [_t5, _lm])
def test_pieces_of_the_networks_output_layers(make, tied):
  params = make(logits_via_embedding=tied).init(jax.random.key(0))
  for dtype in ("float32", "bfloat16"):
    model = make(logits_via_embedding=tied, dtype=dtype)
    hidden = jax.random.normal(jax.random.key(1), (2, 3, model.config.emb_dim), dtype)
    layer, whole = model.unembedding(params), model.unembed(params, hidden)
    pieces = [layer.logits(layer.cut(layer.weights, start, size), hidden) for start, size in ((0, 50), (50, 78))]
    assert layer.vocab_size == 128 and whole.dtype == jnp.float32 and whole.shape == (2, 3, 128)
    np.testing.assert_allclose(np.concatenate(pieces, -1), whole, rtol=1e-5, atol=1e-5)
  added = layer.add(jnp.zeros_like(layer.weights), layer.cut(layer.weights, 50, 78), 50)
  cut = jnp.moveaxis(added, layer.axes, 0)
  np.testing.assert_array_equal(cut[:50], 0.0)
  np.testing.assert_array_equal(cut[50:], jnp.moveaxis(layer.weights, layer.axes, 0)[50:])


@pytest.mark.parametrize(
    ("student", "teacher", "method", "fields"),
    [
        (_t5(logits_via_embedding=True), _t5(emb_dim=48), dict(divergence="tvd", loss_temperature=1.5), {}),
        (_lm(positions="learned"), _lm(logits_via_embedding=True), dict(divergence="lk_lambda"), {"accumulate": 2}),
        (_lm(logits_via_embedding=True), None, None, {}),
    ],
    ids=["t5", "decoder_lm", "sft"],
)
def test_a_step_of_the_networks_is_the_same(student, teacher, method, fields, keep_gradients):
  rng = np.random.default_rng(0)
  targets = rng.integers(2, 128, size=(4, 6)).astype(np.int32)
  batch = {
      "encoder_input_tokens": rng.integers(2, 128, size=(4, 5)).astype(np.int32),
      "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
      "decoder_target_tokens": targets,
      "decoder_loss_weights": (np.arange(6)[None, :] < np.array([[6], [4], [2], [5]])).astype(np.int32),
  }
  method = methods.named("sft") if method is None else methods.named("supervised_kd", **method)

  def run(vocab_chunk):
    config = step.StepConfig(method, target_length=6, chunk=4, vocab_chunk=vocab_chunk, **fields)
    state = step.init_state(student, keep_gradients, rng=jax.random.key(0))
    target_params = teacher and teacher.init(jax.random.key(1))
    state, metrics = step.compile_train_step(student, teacher, keep_gradients, config)(
        state, target_params, batch, jax.random.key(2)
    )
    return jax.device_get((metrics, state.opt_state))

  (metrics, gradients), (wanted_metrics, wanted) = run(50), run(None)
  assert_close(metrics, wanted_metrics, rtol=1e-5, atol=1e-6)
  for (path, ours), expected in zip(
      jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
  ):
    error, size = np.linalg.norm(ours - expected), np.linalg.norm(expected)
    assert error <= 1e-5 * size, f"{jax.tree_util.keystr(path)}: relative error {error / size:.1e}"
  assert optax.global_norm(gradients) > 0.01


@pytest.mark.parametrize("name", ["fkl", "lk_lambda"])
def test_memory_holds_the_logits_of_one_chunk(name):
  """V = 32128, C = 64: no array of the size of [B, C, V], in value and gradient; the memory falls with the chunk."""
  rows, length, vocab, width = 2, 64, 32128, 8

  def compiled(size, gradient=True):
    def loss(params, hidden, teacher, teacher_hidden):
      layer = lambda matrix: Unembedding(matrix, 1, lambda piece, h: h @ piece)
      student, teacher = (layer(params), hidden), (layer(teacher), teacher_hidden)
      weights = jnp.ones((rows, length))
      return losses.chunked_loss(name, student, weights, teacher=teacher, chunk=64, vocab_chunk=size).loss

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    arguments = [shape(width, vocab), shape(rows, length, width)] * 2
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)) if gradient else loss).lower(*arguments).compile()
    arrays = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", program.as_text())
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in arrays]
    return program.memory_analysis().temp_size_in_bytes, max(sizes)

  logits, kept = rows * length * vocab, max(width * vocab, rows * length * 512)
  (whole, largest), (middle, _), (least, largest_of_least) = compiled(None), compiled(4096), compiled(512)
  assert largest >= logits and largest_of_least <= kept
  assert whole > 4 * logits > middle > 2 * least
  value, largest_of_value = compiled(512, gradient=False)
  assert value <= least and largest_of_value <= kept


def test_a_model_that_cannot_cut_its_vocabulary(tiny_model, batch):
  student, teacher, tx = tiny_model(), tiny_model(width=12), optax.sgd(0.1)
  make = lambda vocab_chunk: step.make_train_step(
      student, teacher, tx, step.StepConfig(methods.named("supervised_kd"), target_length=6, vocab_chunk=vocab_chunk)
  )
  assert jax.eval_shape(
      make(None), step.abstract_state(student, tx), teacher.abstract_params(), batch, jax.random.key(0)
  )
  with pytest.raises(ConfigError, match="TinyModel can only unembed its whole vocabulary: set StepConfig.vocab_chunk"):
    make(4)


def test_a_function_that_cannot_be_cut():
  hidden, targets = jnp.ones((1, 2, 3)), jnp.zeros((1, 2), jnp.int32)
  with pytest.raises(ConfigError, match="vocab_chunk is 2, but an unembedding is a function.*LanguageModel"):
    losses.chunked_loss("cross_entropy", (lambda h: h, hidden), jnp.ones((1, 2)), targets=targets, vocab_chunk=2)


@pytest.mark.parametrize("value", [0, -5])
def test_bad_values(value):
  with pytest.raises(ConfigError, match=f"StepConfig.vocab_chunk is {value}; it must be at least 1, or None"):
    step.StepConfig(methods.named("sft"), target_length=6, vocab_chunk=value)
