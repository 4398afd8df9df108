"""The one compiled training step: choose a source, sample, score with both models, divergence, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from distillspec_jax.decoding.speculative import check_pair
from distillspec_jax.distillation import losses, rollouts
from distillspec_jax.distillation.gradients import loss_gradients
from distillspec_jax.distillation.methods import Method
from distillspec_jax.parallel import partitioning
from distillspec_jax.tokens import PAD_ID
from distillspec_jax.types import Batch, ConfigError, Params

# XLA takes the barriers between a layer and its second computation away on CPUs, finds the two alike and keeps one.
_KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}

Metrics = dict[str, Any]
TrainStep = Callable[..., tuple["TrainState", Metrics]]  # (state, target_params, batch, key) -> (state, metrics)


@flax.struct.dataclass
class TrainState:
  """What a training run carries from step to step.

  Attributes:
    step: scalar int32, updates made so far.
    params: the student's parameters.
    opt_state: optax's state.
  """

  step: jax.Array
  params: Params
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What one step does.

  Attributes:
    method: divergence and data mixture.
    target_length: T, tokens of a target or of a sampled sequence.
    chunk: C, positions of T whose logits exist at a time; the fastest is what a cache holds (docs/benchmarks.md).
    vocab_chunk: tokens of the vocabulary whose logits exist at a time: less memory for a second and third unembedding.
      None, or as many as there are: all of them. On a mesh with `model` over 1 each device takes its share of a chunk
      from its own part of the vocabulary.
    reduction: "sequence" (mean over a sequence's tokens, then over sequences, Eq. 2) or "token" (mean over all tokens).
    accumulate: micro-batches that a batch is cut into, one after the other, between sampling and the one update: less
      memory, the same loss and gradient. Only what a `BatchDivergence` (lk_lambda, tvd_pp) averages over the batch is
      averaged over the micro-batch then.
    speculative_rollouts: γ, tokens that the draft as it is now proposes a block where the target samples: the same
      law in fewer passes of the target. 0: the target samples alone.
    remat: whether the student's layers are computed again for the gradient instead of being kept: less memory, a
      third more work.

  Raises:
    ConfigError: a value outside its range.
  """

  method: Method
  target_length: int
  chunk: int = 8
  reduction: str = "sequence"
  accumulate: int = 1
  speculative_rollouts: int = 0
  remat: bool = False
  vocab_chunk: int | None = None

  def __post_init__(self):
    for field, least in (("target_length", 1), ("chunk", 1), ("accumulate", 1), ("speculative_rollouts", 0)):
      if getattr(self, field) < least:
        raise ConfigError(f"StepConfig.{field} is {getattr(self, field)}; it must be at least {least}")
    if self.vocab_chunk is not None and self.vocab_chunk < 1:
      raise ConfigError(
          f"StepConfig.vocab_chunk is {self.vocab_chunk}; it must be at least 1, or None for the whole vocabulary"
      )
    if self.reduction not in losses.REDUCTIONS:
      raise ConfigError(f"unknown reduction {self.reduction!r}; there are {', '.join(losses.REDUCTIONS)}")
    if self.speculative_rollouts and not self.method.needs_target_rollouts:
      raise ConfigError(
          f"StepConfig.speculative_rollouts is {self.speculative_rollouts}, but method {self.method.name!r} never"
          " samples from the target: set it to 0"
      )


def make_train_step(
    student,
    teacher,
    tx: optax.GradientTransformation,
    config: StepConfig,
    *,
    schedule: optax.Schedule | None = None,
) -> TrainStep:
  """Make the pure step `(state, target_params, batch, key) -> (state, metrics)`; `compile_train_step` jits it.

  The key is the run's: the step's number is folded into it here, so that steps send nothing but batches to a device.

  The metrics are device arrays. (sum, count) pairs, to be added over steps before dividing: `loss`; `alpha` (with a
  teacher: Σ_v min(P, Q) on the step's own sequences, at the loss temperature); `rollout_kept` (where the draft
  proposes and the target decides: proposals in the text of those possible); `rollout_block_efficiency` (with
  speculative rollouts: tokens a pass of the target). Scalars: `gradient_norm` (before clipping), `learning_rate` (with
  a schedule), `source` (0 data, 1 draft, 2 target), `tokens` and `prompt_tokens` (counted ones), `target_broken`
  (with a teacher: tokens where its logits are NaN or infinite). `sequences` [3]: counted ones by source.
  `rollout_tokens` [2]: positions that sampling fed to the draft and to the target.

  Args:
    student: the LanguageModel to train.
    teacher: the LanguageModel to learn from; None where the method needs none (`Method.needs_target`).
    tx: the optax transformation.
    config: what the step does.
    schedule: step -> learning rate, for the metric alone.

  Raises:
    ConfigError: the method needs a teacher and there is none, or their vocabularies differ; `vocab_chunk` is set and a
      model cannot unembed a part of its vocabulary (`LanguageModel.unembedding`); when traced with a
      packed batch, what `check_packing` says; when traced with a batch that does not split, what that says.
  """
  _check_teacher(student, teacher, config)
  if config.vocab_chunk is not None:
    for model in (student, teacher) if config.method.needs_teacher else (student,):
      jax.eval_shape(lambda params, model=model: model.unembedding(params).weights, model.abstract_params())
  learner = _rematerialised(student) if config.remat else student

  def step(state: TrainState, target_params: Params, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
    if "decoder_segment_ids" in batch:
      check_packing(config.method, student, teacher)
    rollout_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    batch, origin = rollouts.rollout(
        config.method,
        student,
        state.params,
        teacher,
        target_params,
        batch,
        rollout_key,
        length=config.target_length,
        step=state.step,
        speculative_gamma=config.speculative_rollouts,
    )
    models = learner, teacher, target_params
    gradients, sums = loss_gradients(models, state.params, batch, dropout_key, config)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    metrics = _metrics(config, sums, origin, batch) | {"gradient_norm": optax.global_norm(gradients)}
    if schedule is not None:
      metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics

  return step


def compile_train_step(
    student,
    teacher,
    tx: optax.GradientTransformation,
    config: StepConfig,
    *,
    schedule: optax.Schedule | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> TrainStep:
  """Jit `make_train_step`'s step; the state is donated: the one passed in is gone afterwards.

  On a mesh the state and the teacher lie as `parallel.partitioning` says, the batch is split over data and fsdp,
  metrics are replicated, and so should the key be (`run_key`). One compilation serves all sources.

  Raises:
    ConfigError: what `make_train_step` says; on a mesh, when called: a batch that does not split over it.
  """
  step = make_train_step(student, teacher, tx, config, schedule=schedule)
  if mesh is None:
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(config))
  replicated = NamedSharding(mesh, PartitionSpec())
  state = partitioning.state_shardings(abstract_state(student, tx), student, mesh)
  target = partitioning.param_shardings(teacher, mesh) if config.method.needs_target else None
  batch = partitioning.batch_sharding(mesh)
  jitted = jax.jit(
      step,
      donate_argnums=0,
      in_shardings=(state, target, batch, replicated),
      out_shardings=(state, replicated),
      compiler_options=compiler_options(config, mesh),
  )

  return _OnMesh(jitted, mesh)


@dataclasses.dataclass(frozen=True)
class _OnMesh:
  """A jitted step that is traced and run under its mesh."""

  jitted: Any
  mesh: jax.sharding.Mesh

  def __call__(self, state, target_params, batch, key):
    return self._call(self.jitted, state, target_params, batch, key)

  def lower(self, state, target_params, batch, key):
    """Lower it for arguments like these, as the jitted step's own `lower` does."""
    return self._call(self.jitted.lower, state, target_params, batch, key)

  def _call(self, function, state, target_params, batch, key):
    partitioning.check_batch(next(iter(batch.values())).shape[0], self.mesh)
    with partitioning.use_mesh(self.mesh):
      return function(state, target_params, batch, key)


def compiler_options(config: StepConfig, mesh: jax.sharding.Mesh | None = None) -> dict[str, str] | None:
  """Give what XLA must be told so that a step is compiled as configured; None is nothing."""
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  return dict(_KEEP_BARRIERS) if config.remat and platform == "cpu" else None


def check_packing(method: Method, student, teacher=None) -> None:
  """Refuse several examples in one row where a row must be a prompt, or where a model cannot keep them apart.

  Args:
    method: must take its sequences from the data set alone.
    student, teacher: LanguageModels; they must read the same kind of packed rows (`LanguageModel.packed_rows`).

  Raises:
    ConfigError: packing cannot be had; says why.
  """
  if method.needs_draft_rollouts or method.needs_target_rollouts:
    raise ConfigError(
        f"method {method.name!r} samples from prompts, which must be rows of their own: set DataConfig.pack to False,"
        " or take a method that learns from the data alone (sft, supervised_kd)"
    )
  kinds = {}
  for role, model in (("model", student), ("target", teacher)):
    if model is not None:
      kinds[role] = model.packed_rows
      if model.packed_rows is None:
        raise ConfigError(
            f"the {role} ({type(model).__name__}) cannot keep several examples in one row apart: set DataConfig.pack"
            " to False"
        )
  if len(set(kinds.values())) > 1:
    raise ConfigError(
        f"the model reads packed {kinds['model']} and the target packed {kinds['target']}: set DataConfig.pack to False"
    )


def init_state(
    model,
    tx: optax.GradientTransformation,
    *,
    rng: jax.Array | None = None,
    params: Params | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
  """Make a first state from a random key or from a copy of given parameters, laid out on the mesh.

  It is a copy because the step donates its state: the caller's parameters stay alive.

  Raises:
    ConfigError: not exactly one of `rng` and `params` is given.
  """
  if (rng is None) == (params is None):
    raise ConfigError("init_state takes exactly one of rng and params")
  shardings = None if mesh is None else partitioning.state_shardings(abstract_state(model, tx), model, mesh)
  if params is None:
    make, argument = (lambda key: _first_state(model.init(key), tx)), rng
  else:
    # Copied explicitly: jit may hand an input that it returns unchanged straight through.
    make, argument = (lambda given: _first_state(jax.tree.map(jnp.copy, given), tx)), params
  return jax.jit(make, out_shardings=shardings)(argument)


def abstract_state(model, tx: optax.GradientTransformation) -> TrainState:
  """Give the state's shapes and dtypes without making it, as a checkpoint's restore wants them."""
  return jax.eval_shape(lambda: _first_state(model.init(jax.random.key(0)), tx))


def _first_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def run_key(seed: int, mesh: jax.sharding.Mesh | None = None) -> jax.Array:
  """Make the key that all steps of a run get, where they want it."""
  sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  return jax.jit(lambda: jax.random.key(seed), out_shardings=sharding)()


def _metrics(config: StepConfig, sums: losses.LossSums, origin: rollouts.Origin, batch: Batch) -> Metrics:
  metrics: Metrics = {"loss": (sums.total, sums.count), "tokens": sums.tokens, "source": origin.source}
  if config.method.needs_teacher:
    metrics |= {"alpha": (sums.accepted, sums.tokens), "target_broken": sums.broken}
  if config.method.interleave or config.speculative_rollouts:
    metrics["rollout_kept"] = origin.kept, origin.proposed
  if config.speculative_rollouts:
    metrics["rollout_block_efficiency"] = origin.emitted, origin.blocks
  counted = origin.rows != rollouts.NOT_COUNTED
  prompt = batch.get("encoder_input_tokens")
  of_prompt = 0 if prompt is None else jnp.where(counted[:, None], prompt != PAD_ID, False)
  sources = jnp.arange(len(rollouts.SOURCES), dtype=jnp.int32)
  sequences = losses.count_sequences(batch["decoder_loss_weights"], batch.get("decoder_segment_ids"))
  return metrics | {
      "sequences": jnp.where(sources == origin.source, sequences, 0.0),
      "prompt_tokens": jnp.sum(of_prompt, dtype=jnp.int32),
      "rollout_tokens": jnp.stack([origin.draft_tokens, origin.target_tokens]),
  }


def _rematerialised(model):
  if not hasattr(model.config, "remat"):
    raise ConfigError(f"StepConfig.remat is True, but a {type(model).__name__} cannot compute its layers again")
  return type(model)(dataclasses.replace(model.config, remat=True))


def _check_teacher(student, teacher, config: StepConfig) -> None:
  method = config.method
  if not method.needs_target:
    return
  if teacher is None:
    raise ConfigError(f"method {method.name!r} needs a target model to learn from and there is none")
  if teacher.vocab_size != student.vocab_size:
    raise ConfigError(
        f"the target's vocabulary has {teacher.vocab_size} entries and the draft's {student.vocab_size}; both models"
        " must share one vocabulary"
    )
  if config.speculative_rollouts:
    check_pair(teacher, student)
