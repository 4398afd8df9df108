"""One compiled step: its update against the same loss by hand, its metrics, its compilation, its donation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distillspec_jax.distillation import methods, rollouts, step
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.types import ConfigError

MIXED = methods.named("distillspec", fixed_data_fraction=0.34, draft_data_fraction=0.5)


@pytest.fixture
def student(tiny_model):
  return tiny_model(tied=True)


@pytest.fixture
def teacher(tiny_model):
  return tiny_model(width=12)


def config(method, **fields):
  return step.StepConfig(method=method, target_length=6, chunk=4, **fields)


def loss_by_hand(student, params, teacher_logits, batch, divergence):
  """Eq. 2 over whole logits."""
  q = jax.nn.softmax(student.score(params, batch))
  weights = batch["decoder_loss_weights"]
  if divergence == "cross_entropy":
    values = -jnp.log(jnp.take_along_axis(q, batch["decoder_target_tokens"][..., None], -1)[..., 0])
  else:
    p = jax.nn.softmax(teacher_logits)
    values = jnp.sum(p * jnp.log(p / q), -1)
  return jnp.mean(jnp.sum(values * weights, -1) / jnp.sum(weights, -1))


@pytest.mark.parametrize("name", ["sft", "supervised_kd", "on_policy_gkd", "seqkd"])
def test_one_update_is_the_gradient_by_hand(student, teacher, batch, name):
  """Plain gradient descent on fixed sequences: for rollouts this shows that nothing flows through sampling."""
  method, key = methods.named(name), jax.random.key(3)
  params, target_params = student.init(jax.random.key(0)), teacher.init(jax.random.key(1))
  if not method.needs_target:
    teacher = target_params = None
  tx = optax.sgd(0.5)
  state, metrics = step.compile_train_step(student, teacher, tx, config(method))(
      step.init_state(student, tx, params=params), target_params, batch, key
  )
  rolled, origin = rollouts.rollout(
      method, student, params, teacher, target_params, batch, jax.random.split(jax.random.fold_in(key, 0))[0], length=6
  )
  logits = teacher.score(target_params, rolled) if method.needs_teacher else None
  value, gradient = jax.value_and_grad(lambda p: loss_by_hand(student, p, logits, rolled, method.divergence))(params)
  np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], value, rtol=1e-5)
  np.testing.assert_allclose(metrics["gradient_norm"], optax.global_norm(gradient), rtol=1e-5)
  assert metrics["source"] == origin.source and metrics["loss"][1] == 4 and state.step == 1
  for leaf, old, g in zip(*map(jax.tree.leaves, (state.params, params, gradient)), strict=True):
    np.testing.assert_allclose(leaf, old - 0.5 * g, rtol=1e-5, atol=1e-6)


def loops(jaxpr):
  """List the `while` loops of a program and of those inside it: (values carried, equations of the body)."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "while":
      body = equation.params["body_jaxpr"].jaxpr
      found.append((len(body.outvars), len(body.eqns)))
    for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      inner = getattr(parameter, "jaxpr", parameter)
      found += loops(inner) if hasattr(inner, "eqns") else []
  return found


@pytest.mark.parametrize("name", ["on_policy_gkd", "seqkd"])
def test_the_derivative_holds_the_samplers_loop_once_and_without_tangents(student, teacher, batch, name):
  """The step's only loop is the sampler's own, carrying what it carries when nothing is differentiated."""
  method, tx, key = methods.named(name), optax.sgd(0.1), jax.random.key(0)
  params, target_params = student.init(jax.random.key(0)), teacher.init(jax.random.key(1))

  def weights(params, target_params):
    rolled, _ = rollouts.rollout(method, student, params, teacher, target_params, batch, key, length=6)
    return rolled["decoder_loss_weights"]

  alone = loops(jax.make_jaxpr(weights)(params, target_params).jaxpr)
  run = step.make_train_step(student, teacher, tx, config(method))
  state = step.init_state(student, tx, params=params)
  assert len(alone) == 1 and loops(jax.make_jaxpr(run)(state, target_params, batch, key).jaxpr) == alone
  # The control: sampling differentiated along with the rest carries tangents.
  both = (params, target_params)
  through = loops(jax.make_jaxpr(lambda given: jax.jvp(weights, given, given))(both).jaxpr)
  assert len(through) == 1 and through[0][0] > alone[0][0] and through[0][1] > alone[0][1]


def test_metrics(student, teacher, batch):
  tx, schedule = OptimizerConfig(learning_rate=0.1, warmup_steps=10, clip_norm=1e-3).build(100)
  run = step.compile_train_step(student, teacher, tx, config(methods.named("supervised_kd")), schedule=schedule)
  target_params = teacher.init(jax.random.key(1))
  state = step.init_state(student, tx, rng=jax.random.key(0))
  p = jax.nn.softmax(teacher.score(target_params, batch))
  q = jax.nn.softmax(student.score(state.params, batch))
  accepted = float(jnp.sum(jnp.sum(jnp.minimum(p, q), -1) * batch["decoder_loss_weights"]))
  _, metrics = run(state, target_params, batch, jax.random.key(0))
  assert set(metrics) == {
      "loss", "alpha", "tokens", "prompt_tokens", "gradient_norm", "learning_rate", "source", "sequences",
      "rollout_tokens", "target_broken",
  }  # fmt: skip
  assert metrics["target_broken"] == 0 and metrics["sequences"].tolist() == [4, 0, 0] and metrics["prompt_tokens"] == 11
  assert metrics["rollout_tokens"].tolist() == [0, 0]
  assert metrics["tokens"] == 15 and metrics["alpha"][1] == 15
  np.testing.assert_allclose(metrics["alpha"][0], accepted, rtol=1e-5)
  np.testing.assert_allclose(metrics["learning_rate"], 0.01, rtol=1e-6)
  assert metrics["gradient_norm"] > 1e-2  # before clipping


def test_token_reduction(student, teacher, batch):
  tx = optax.sgd(0.1)
  run = step.compile_train_step(student, teacher, tx, config(methods.named("supervised_kd"), reduction="token"))
  state, target_params = step.init_state(student, tx, rng=jax.random.key(0)), teacher.init(jax.random.key(1))
  _, metrics = run(state, target_params, batch, jax.random.key(0))
  assert metrics["loss"][1] == 15


def test_one_compilation_serves_all_sources(student, teacher, batch):
  traces = []

  class Counting(type(student)):
    def hidden(self, *args, **kw):
      traces.append(1)
      return super().hidden(*args, **kw)

  counting = Counting(tied=True)
  tx, _ = OptimizerConfig().build(100)
  run = step.compile_train_step(counting, teacher, tx, config(MIXED))
  state, target_params = step.init_state(counting, tx, rng=jax.random.key(0)), teacher.init(jax.random.key(1))
  seen = set()
  for i in range(20):
    state, metrics = run(state, target_params, batch, jax.random.fold_in(jax.random.key(5), i))
    seen.add(int(metrics["source"]))
  assert seen == {rollouts.DATA, rollouts.DRAFT, rollouts.TARGET}
  assert run._cache_size() == 1 and len(traces) == 1


def test_the_state_is_donated_and_the_teacher_is_not(student, teacher, batch):
  tx, _ = OptimizerConfig(name="adamw").build(100)
  run = step.compile_train_step(student, teacher, tx, config(MIXED))
  given = student.init(jax.random.key(0))
  state, target_params = step.init_state(student, tx, params=given), teacher.init(jax.random.key(1))
  new_state, _ = run(state, target_params, batch, jax.random.key(2))
  jax.block_until_ready(new_state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  kept = (target_params, batch, given)  # the parameters that the state was made from are the caller's
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))


def test_the_same_key_gives_the_same_step(student, teacher, batch):
  tx, _ = OptimizerConfig(learning_rate=0.1).build(100)
  run = step.compile_train_step(student, teacher, tx, config(methods.named("on_policy_gkd")))
  target_params = teacher.init(jax.random.key(1))
  begin = lambda: step.init_state(student, tx, rng=jax.random.key(0))
  ends = [run(begin(), target_params, batch, jax.random.key(k))[0] for k in (2, 2, 3)]
  same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
  assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_bfloat16_teacher(student, teacher, batch):
  tx = optax.sgd(0.1)
  run = step.compile_train_step(student, teacher, tx, config(methods.named("supervised_kd")))
  target_params = teacher.init(jax.random.key(1))
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), target_params)
  losses = []
  for params in (target_params, rounded):
    state, metrics = run(step.init_state(student, tx, rng=jax.random.key(0)), params, batch, jax.random.key(0))
    losses.append(float(metrics["loss"][0]))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
  np.testing.assert_allclose(losses[1], losses[0], rtol=5e-2)
  assert losses[0] != losses[1]


def test_dropout_gets_its_own_key_for_the_student_alone(student, teacher, batch):
  given = []

  def recording(model):
    class Recording(type(model)):
      def hidden(self, params, batch, dropout_rng=None):
        given.append(dropout_rng is not None)
        return super().hidden(params, batch)

    return Recording(tied=model.config.tied, width=model.config.width)

  student, teacher = recording(student), recording(teacher)
  tx = optax.sgd(0.1)
  run = step.compile_train_step(student, teacher, tx, config(methods.named("supervised_kd")))
  run(step.init_state(student, tx, rng=jax.random.key(0)), teacher.init(jax.random.key(1)), batch, jax.random.key(0))
  assert given == [False, True]  # the teacher is scored first


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "jsd", "tvd"])
def test_distillation_raises_acceptance(student, teacher, batch, divergence):
  tx, _ = OptimizerConfig(learning_rate=0.03).build(150)
  run = step.compile_train_step(student, teacher, tx, config(methods.named("distillspec", divergence=divergence)))
  state, target_params = step.init_state(student, tx, rng=jax.random.key(0)), teacher.init(jax.random.key(1))
  alphas = []
  for i in range(150):
    state, metrics = run(state, target_params, batch, jax.random.fold_in(jax.random.key(9), i))
    alphas.append(float(metrics["alpha"][0] / metrics["alpha"][1]))
  assert np.mean(alphas[-20:]) > np.mean(alphas[:20]) + 0.1


def test_init_state_takes_a_key_or_parameters(student):
  tx = optax.sgd(0.1)
  for arguments in ({}, {"rng": jax.random.key(0), "params": student.init(jax.random.key(0))}):
    with pytest.raises(ConfigError, match="exactly one"):
      step.init_state(student, tx, **arguments)


def test_a_missing_teacher(student):
  with pytest.raises(ConfigError, match="'seqkd' needs a target model"):
    step.make_train_step(student, None, optax.sgd(0.1), config(methods.named("seqkd")))


def test_vocabularies_that_differ(student, tiny_model):
  with pytest.raises(ConfigError, match="target's vocabulary has 13 entries and the draft's 11"):
    step.make_train_step(student, tiny_model(vocab_size=13), optax.sgd(0.1), config(MIXED))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_length": 0}, "target_length is 0; it must be at least 1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"reduction": "sum"}, "unknown reduction 'sum'"),
    ],
)
def test_bad_configuration(fields, message):
  with pytest.raises(ConfigError, match=message):
    step.StepConfig(**{"method": MIXED, "target_length": 6, **fields})
