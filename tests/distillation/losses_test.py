"""Hold the chunked loss against the same loss written out over whole [B, T, V] logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.distillation import losses
from distillspec_jax.types import ConfigError

NAMES = ("fkl", "rkl", "jsd_0.3", "tvd", "cross_entropy", "lk_alpha", "lk_lambda", "tvd_pp")
B, T, E, V = 4, 7, 6, 23


def plain_values(name, p_logits, q_logits, targets, weights):
  """Each position's value by the plainest formula, [B, T]."""
  p, q = jax.nn.softmax(p_logits), jax.nn.softmax(q_logits)
  kl = lambda a, b: jnp.sum(a * jnp.log(a / b), -1)
  if name == "cross_entropy":
    return -jnp.log(jnp.take_along_axis(q, targets[..., None], -1)[..., 0])
  if name == "fkl":
    return kl(p, q)
  if name == "rkl":
    return kl(q, p)
  tvd, overlap = 0.5 * jnp.sum(jnp.abs(p - q), -1), jnp.sum(jnp.minimum(p, q), -1)
  if name == "tvd":
    return tvd
  if name == "lk_alpha":
    return -jnp.log(overlap)
  of_batch = lambda values: jax.lax.stop_gradient(jnp.sum(values * weights) / jnp.sum(weights))
  if name == "lk_lambda":
    share = jnp.exp(-3 * of_batch(overlap))
    return share * kl(p, q) + (1 - share) * tvd
  if name == "tvd_pp":
    mean = of_batch(jnp.sum(q * (p > q), -1))
    return jax.lax.stop_gradient(tvd) + (tvd - jax.lax.stop_gradient(tvd)) / jnp.sqrt(mean * (1 - mean))
  m = 0.3 * p + 0.7 * q
  return 0.3 * kl(p, m) + 0.7 * kl(q, m)


def plain_loss(name, params, teacher, hidden, teacher_hidden, targets, weights, temperature, reduction):
  values = plain_values(name, teacher_hidden @ teacher / temperature, hidden @ params / temperature, targets, weights)
  if reduction == "token":
    return jnp.sum(values * weights) / jnp.sum(weights)
  rows = [i for i in range(B) if float(jnp.sum(weights[i])) > 0]
  return sum(jnp.sum(values[i] * weights[i]) / jnp.sum(weights[i]) for i in rows) / len(rows)


def chunked(
    name, params, teacher, hidden, teacher_hidden, targets, weights, temperature=1.0, reduction="sequence", chunk=3
):
  return losses.chunked_loss(
      name,
      ((lambda h: h @ params), hidden),
      weights,
      teacher=((lambda h: h @ teacher), teacher_hidden),
      targets=targets,
      temperature=temperature,
      chunk=chunk,
      reduction=reduction,
  )


@pytest.fixture
def arrays():
  keys = jax.random.split(jax.random.key(0), 5)
  weights = (jnp.arange(T)[None, :] < jnp.array([[7], [4], [1], [0]])).astype(jnp.float32)
  weights = weights.at[0, 2].set(0.5)  # a fractional weight as well
  return dict(
      params=jax.random.normal(keys[0], (E, V)),
      teacher=jax.random.normal(keys[1], (E + 2, V)),
      hidden=jax.random.normal(keys[2], (B, T, E)),
      teacher_hidden=jax.random.normal(keys[3], (B, T, E + 2)),
      targets=jax.random.randint(keys[4], (B, T), 0, V),
      weights=weights,
  )


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_the_unchunked_ones(arrays, name, reduction):
  def gradients(loss):
    f = lambda p, h: loss(name, **{**arrays, "params": p, "hidden": h}, temperature=1.7, reduction=reduction)
    return jax.value_and_grad(f, argnums=(0, 1))(arrays["params"], arrays["hidden"])

  expected = gradients(plain_loss)
  ours = gradients(lambda *a, **k: chunked(*a, **k).loss)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, expected)


@pytest.mark.parametrize("name", ["jsd_0.3", "lk_lambda"])
@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 16])
def test_any_chunk_gives_the_same(arrays, chunk, name):
  def f(c):
    loss = lambda params: chunked(name, **{**arrays, "params": params}, chunk=c).loss
    return jax.value_and_grad(loss)(arrays["params"])

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), f(chunk), f(3))


def test_reductions_by_hand():
  """Two rows whose cross-entropies are known: V = 2, logits (0, z): −log σ(±z)."""
  hidden = jnp.array([[[1.0], [2.0], [9.0]], [[3.0], [9.0], [9.0]]])
  weights = jnp.array([[1, 1, 0], [1, 0, 0]])
  sums = lambda reduction: losses.chunked_loss(
      "cross_entropy",
      ((lambda h: jnp.concatenate([jnp.zeros_like(h), h], -1)), hidden),
      weights,
      targets=jnp.ones((2, 3), jnp.int32),
      reduction=reduction,
  )
  ce = np.log1p(np.exp(-np.array([1.0, 2.0, 3.0])))
  by_row, by_token = sums("sequence"), sums("token")
  np.testing.assert_allclose(by_row.loss, ((ce[0] + ce[1]) / 2 + ce[2]) / 2, rtol=1e-6)
  np.testing.assert_allclose(by_token.loss, ce.sum() / 3, rtol=1e-6)
  assert (by_row.count, by_token.count, by_row.tokens, by_row.accepted) == (2, 3, 3, 0)


def test_padding_does_not_dilute_the_loss(arrays):
  """Twice as many positions of padding: the same loss."""
  pad = lambda array: jnp.pad(array, [(0, 0), (0, T)] + [(0, 0)] * (array.ndim - 2))
  longer = {name: array if name in ("params", "teacher") else pad(array) for name, array in arrays.items()}
  np.testing.assert_allclose(chunked("fkl", **longer).loss, chunked("fkl", **arrays).loss, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaks_from_masked_positions(arrays, name):
  masked = arrays["weights"] == 0
  poison = {
      **arrays,
      "hidden": jnp.where(masked[..., None], jnp.nan, arrays["hidden"]),
      "teacher_hidden": jnp.where(masked[..., None], jnp.inf, arrays["teacher_hidden"]),
      "targets": jnp.where(masked, -7, arrays["targets"]),
  }

  def gradients(a):
    f = lambda p, h: chunked(name, **{**a, "params": p, "hidden": h}).loss
    return jax.value_and_grad(f, argnums=(0, 1))(a["params"], a["hidden"])

  (value, (by_params, by_hidden)), clean = gradients(poison), gradients(arrays)
  np.testing.assert_array_equal(value, clean[0])
  np.testing.assert_array_equal(by_params, clean[1][0])
  np.testing.assert_array_equal(by_hidden, clean[1][1])
  np.testing.assert_array_equal(by_hidden[masked], 0.0)


def test_a_nan_in_a_counted_position_is_not_hidden(arrays):
  arrays["teacher_hidden"] = arrays["teacher_hidden"].at[0, 0, 0].set(jnp.nan)
  assert np.isnan(chunked("fkl", **arrays).loss)


def test_a_batch_without_a_counted_token_is_zero(arrays):
  arrays["weights"] = jnp.zeros((B, T))
  value, gradient = jax.value_and_grad(lambda p: chunked("fkl", **{**arrays, "params": p}).loss)(arrays["params"])
  assert value == 0 and not np.any(gradient)


def test_acceptance_is_measured_and_carries_no_gradient(arrays):
  p = jax.nn.softmax(arrays["teacher_hidden"] @ arrays["teacher"])
  q = jax.nn.softmax(arrays["hidden"] @ arrays["params"])
  expected = jnp.sum(jnp.sum(jnp.minimum(p, q), -1) * arrays["weights"])
  sums = chunked("fkl", **arrays)
  np.testing.assert_allclose(sums.accepted, expected, rtol=1e-5)
  np.testing.assert_allclose(sums.tokens, jnp.sum(arrays["weights"]))
  gradient = jax.grad(lambda p: chunked("fkl", **{**arrays, "params": p}).accepted)(arrays["params"])
  np.testing.assert_array_equal(gradient, 0.0)


def test_the_teacher_gets_no_gradient(arrays):
  gradient = jax.grad(lambda t, h: chunked("tvd", **{**arrays, "teacher": t, "teacher_hidden": h}).loss, argnums=(0, 1))
  for leaf in gradient(arrays["teacher"], arrays["teacher_hidden"]):
    np.testing.assert_array_equal(leaf, 0.0)


def test_gradient_scales_with_what_follows_the_loss(arrays):
  gradient = lambda f: jax.grad(lambda p: f(chunked("rkl", **{**arrays, "params": p}).loss))(arrays["params"])
  np.testing.assert_allclose(gradient(lambda x: -3 * x), -3 * gradient(lambda x: x), rtol=1e-6)


def test_tied_embedding_gets_both_gradients(tiny_model, batch):
  """One matrix embeds and unembeds: its gradient is the sum of both uses."""
  model = tiny_model(tied=True)
  params, weights = model.init(jax.random.key(1)), batch["decoder_loss_weights"]
  teacher_logits = jax.random.normal(jax.random.key(2), (4, 6, 11))

  def ours(params):
    student = (lambda h: model.unembed(params, h)), model.hidden(params, batch)
    return losses.chunked_loss("fkl", student, weights, teacher=((lambda h: h), teacher_logits), chunk=4).loss

  def plain(params):
    p, log_q = jax.nn.softmax(teacher_logits), jax.nn.log_softmax(model.score(params, batch))
    values = jnp.sum(p * (jnp.log(p) - log_q), -1) * weights
    return jnp.mean(jnp.sum(values, -1) / jnp.sum(weights, -1))

  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(same, jax.grad(ours)(params), jax.grad(plain)(params))


def test_bfloat16_parameters_collect_their_gradient_in_float32(arrays):
  """1024 chunks, each adding little: sums in bfloat16 would stall."""
  hidden = jnp.ones((1, 1024, 2), jnp.bfloat16)
  params, targets = jnp.zeros((2, 4), jnp.bfloat16), jnp.zeros((1, 1024), jnp.int32)
  loss = lambda p: losses.chunked_loss(
      "cross_entropy", ((lambda h: h @ p), hidden), jnp.ones((1, 1024)), targets=targets, chunk=1
  ).total
  gradient = jax.grad(loss)(params)
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_allclose(gradient.astype(jnp.float32)[0], [-0.75, 0.25, 0.25, 0.25], rtol=4e-3)


def test_memory_does_not_hold_full_logits():
  """V = 32128, B = 8: from T = 64 to 128 temporary memory grows by under 10% of a [B, T, V] float32 tensor."""
  rows, vocab, width = 8, 32128, 16

  def temporary_bytes(length):
    def loss(params, hidden, teacher, teacher_hidden):
      student = (lambda h: h @ params), hidden
      return losses.chunked_loss(
          "fkl", student, jnp.ones((rows, length)), teacher=((lambda h: h @ teacher), teacher_hidden), chunk=8
      ).loss

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    arguments = [shape(width, vocab), shape(rows, length, width)] * 2
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  full = rows * 128 * vocab * 4
  short, long = temporary_bytes(64), temporary_bytes(128)
  assert long - short < 0.1 * full
  assert long < 0.5 * full


def test_unknown_reduction(arrays):
  with pytest.raises(ConfigError, match="unknown reduction 'mean'; there are sequence, token"):
    chunked("fkl", **arrays, reduction="mean")
