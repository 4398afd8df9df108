"""What is planned for: models, step, batch and mesh, without weights or data; and the checks that need no compiler."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distillspec_jax.decoding.speculative import check_pair
from distillspec_jax.distillation import precision, step
from distillspec_jax.distillation.optimizers import OptimizerConfig
from distillspec_jax.models import LanguageModel
from distillspec_jax.parallel import partitioning
from distillspec_jax.parallel.mesh import MeshConfig
from distillspec_jax.planning import topologies
from distillspec_jax.types import ConfigError

_STATE_AXES = {4: ("batch", "heads", "cache", "head_dim")}  # keys and values; of all else the rows alone are split


@dataclasses.dataclass(frozen=True)
class Request:
  """A training run as far as memory and time depend on it.

  Attributes:
    student: what is trained.
    teacher: what it learns from, in the dtype that it was saved in; None where the method needs none.
    step_config: method, lengths, chunks.
    optimizer: how parameters move.
    steps: updates in all, which the schedule needs.
    mesh_config: the mesh, and how the two lie on it.
    batch_size: rows of a step, all devices together.
    input_length: S.
    teacher_dtype: what the teacher is brought to when it has been loaded; None leaves it.
    gamma: tokens that the draft proposes a block, where the pair decodes.
  """

  student: LanguageModel
  teacher: LanguageModel | None
  step_config: step.StepConfig
  optimizer: OptimizerConfig
  steps: int
  mesh_config: MeshConfig
  batch_size: int
  input_length: int
  teacher_dtype: str | None = None
  gamma: int = 5

  def placed(self, mesh: Mesh) -> tuple[LanguageModel, LanguageModel | None]:
    """Give student and teacher as they lie on a mesh."""
    config = self.mesh_config
    student = partitioning.lay_out(self.student, None, mesh, config.draft_partitioning)[0]
    if self.teacher is None:
      return student, None
    teacher = precision.of_dtype(self.teacher, self.teacher_dtype) if self.teacher_dtype else self.teacher
    return student, partitioning.lay_out(teacher, None, mesh, config.target_partitioning)[0]

  def with_step(self, **changes) -> Request:
    """Change fields of the StepConfig."""
    return dataclasses.replace(self, step_config=dataclasses.replace(self.step_config, **changes))

  def with_mesh(self, **changes) -> Request:
    """Change fields of the MeshConfig."""
    return dataclasses.replace(self, mesh_config=dataclasses.replace(self.mesh_config, **changes))

  def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Give a training batch's shapes."""
    lengths = dict.fromkeys(("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"), self._outputs)
    lengths["encoder_input_tokens"] = self.input_length
    return {name: jax.ShapeDtypeStruct((self.batch_size, length), jnp.int32) for name, length in lengths.items()}

  @property
  def _outputs(self) -> int:
    return self.step_config.target_length


def check(request: Request, devices: int) -> None:
  """Refuse what cannot be compiled for so many devices.

  Raises:
    ConfigError: the mesh does not divide the devices or is of several slices, the rows do not split over it, the models
      do not fit each other.
  """
  data, fsdp, _ = topologies.mesh_shape(request.mesh_config, devices)
  ways = data * fsdp
  if request.batch_size % ways:
    raise ConfigError(
        f"DataConfig.batch_size is {request.batch_size}: data x fsdp = {ways} of {devices} devices must divide it (see"
        " MeshConfig)"
    )
  accumulate = request.step_config.accumulate
  if request.batch_size % (ways * accumulate):
    raise ConfigError(
        f"DataConfig.batch_size is {request.batch_size}: StepConfig.accumulate = {accumulate} times data x fsdp ="
        f" {ways} devices must divide it"
    )
  precision.check_dtype("train.target_dtype", request.teacher_dtype)
  if request.teacher is not None:
    check_pair(request.teacher, request.student)
  for role, model in (("model", request.student), ("target", request.teacher)):
    most = model and model.max_length
    if most is not None and request.input_length + request.step_config.target_length > most:
      raise ConfigError(
          f"the {role} has {most} positions, too few for {request.input_length} tokens in and"
          f" {request.step_config.target_length} out"
      )


def constrained_state(state: Any) -> Any:
  """Ask for a decoding state to lie on the ambient mesh as its model's table says."""
  return jax.tree.map(lambda leaf: partitioning.constrain(leaf, *_axes(leaf)), state)


def resident_bytes(request: Request, mesh: Mesh) -> dict[str, int]:
  """Count the bytes that lie on a device from step to step: {"parameters", "optimizer", "target"}."""
  student, teacher = request.placed(mesh)
  tx, _ = request.optimizer.build(request.steps)
  state = step.abstract_state(student, tx)
  where = partitioning.state_shardings(state, student, mesh)
  found = {
      "parameters": _bytes(state.params, where.params),
      "optimizer": _bytes(state.opt_state, where.opt_state),
      "target": 0,
  }
  if teacher is not None and request.step_config.method.needs_target:
    found["target"] = parameter_bytes(teacher, mesh)
  return found


def parameter_bytes(model: LanguageModel, mesh: Mesh) -> int:
  """Count a device's bytes of a model's parameters."""
  return _bytes(model.abstract_params(), partitioning.param_shardings(model, mesh))


def loading_bytes(request: Request, mesh: Mesh) -> int:
  """Count a device's bytes of the teacher as it was saved, which are there before its dtype is changed."""
  if request.teacher is None or not request.step_config.method.needs_target:
    return 0
  teacher = partitioning.lay_out(request.teacher, None, mesh, request.mesh_config.target_partitioning)[0]
  return parameter_bytes(teacher, mesh)


def rollout_bytes(request: Request, mesh: Mesh) -> int:
  """Count a device's bytes of the caches that sampling needs; of several sources the one that needs most."""
  student, teacher = request.placed(mesh)
  method, gamma = request.step_config.method, request.step_config.speculative_rollouts
  length, rows = request.step_config.target_length, request.batch_size
  cache = lambda model, more: cache_bytes(model, rows, request.input_length, length + more, mesh)
  sizes = [0]
  if method.needs_draft_rollouts and method.interleave:
    sizes.append(sum(cache(model, method.interleave_block - 1) for model in (student, teacher)))
  elif method.needs_draft_rollouts:
    sizes.append(cache(student, 0))
  if method.needs_target_rollouts:
    sizes.append(cache(teacher, gamma) + (cache(student, gamma) if gamma else 0))
  return max(sizes)


def cache_bytes(model: LanguageModel, rows: int, inputs: int, slots: int, mesh: Mesh) -> int:
  """Count a device's bytes of a decoding state."""
  state = decoding_state(model, rows, inputs, slots)
  with partitioning.use_table(model.partitioning), partitioning.use_mesh(mesh):
    parts = lambda leaf: math.prod(partitioning.ways(n, s) for n, s in zip(_axes(leaf), leaf.shape, strict=True) if n)
    return sum(leaf.size * leaf.dtype.itemsize // parts(leaf) for leaf in jax.tree.leaves(state))


def decoding_state(model: LanguageModel, rows: int, inputs: int, slots: int) -> Any:
  """Give the shapes of what `start` makes."""
  prompt = jax.ShapeDtypeStruct((rows, inputs), jnp.int32)
  return jax.eval_shape(lambda params, prompt: model.start(params, prompt, slots)[0], model.abstract_params(), prompt)


def _axes(leaf) -> tuple[str | None, ...]:
  return _STATE_AXES.get(leaf.ndim, ("batch", *[None] * (leaf.ndim - 1)))


def _bytes(tree: Any, shardings: Any) -> int:
  sizes = jax.tree.map(lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings)
  return sum(jax.tree.leaves(sizes))
