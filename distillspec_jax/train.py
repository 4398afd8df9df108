"""Train: fine-tune a model, or distil a draft from a target, by gin.

    python -m distillspec_jax.train --gin_file=runs/finetune.gin --gin.MODEL_DIR="'runs/target'"
    python -m distillspec_jax.train --gin_file=runs/distill.gin --gin.MODEL_DIR="'runs/distill'" \\
        --gin.TARGET="'runs/target'" --gin.DRAFT="'runs/draft'"

The same command again goes on where the last one stopped. MODEL_DIR ends up with model.json, vocabulary/, config.gin,
run.json, checkpoints/, best/, train_log.jsonl and TensorBoard events.
"""

from __future__ import annotations

from distillspec_jax import cli  # first: it quietens TensorFlow before it loads

# isort: split
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from distillspec_jax import gin_binding, models, run_record, training_setup, weights
from distillspec_jax.data import pipeline
from distillspec_jax.distillation import best, costs, loop, methods, optimizers, step, target_check, validation
from distillspec_jax.parallel import mesh as meshes
from distillspec_jax.parallel import multihost, partitioning, preemption
from distillspec_jax.run_log import RunLog


def train(
  model_dir: str,
  data: pipeline.DataConfig,
  step_config: step.StepConfig,
  optimizer: optimizers.OptimizerConfig,
  loop_config: loop.TrainConfig,
  mesh_config: meshes.MeshConfig = meshes.MeshConfig(),
  model: models.T5Config | models.DecoderLMConfig | None = None,
  initial_checkpoint: str | None = None,
  target: str | None = None,
  evaluation_target: str | None = None,
  dtype: str | None = None,
  target_dtype: str | None = None,
  evaluation_split: str = "validation",
  config_text: str = "",
) -> dict[str, Any]:
  """Train one model, from the beginning or from where MODEL_DIR stands.

  Args:
    model_dir: where everything is written.
    data: task, lengths and batch size.
    step_config: method and target length.
    optimizer: how parameters move.
    loop_config: how long, and when to validate and save.
    mesh_config: the devices' mesh.
    model: the network to train from scratch; where `initial_checkpoint` is given, a network that differs from the
      checkpoint's is named and not looked at.
    initial_checkpoint: the model directory to start from.
    target: the teacher's model directory; needed by every method but sft.
    evaluation_target: the model whose outputs α is measured on; the teacher by default.
    dtype: that the trained network computes in, "bfloat16" or "float32", whatever it was saved or described in; its
      parameters are float32 where they come from a checkpoint, else as `model` says.
    target_dtype: of the teacher's parameters and matrices, whatever it was saved in: "bfloat16" halves its memory.
    evaluation_split: the task's split with the held-out prompts.
    config_text: written to MODEL_DIR/config.gin.

  Returns:
    {"model_dir", "step", "best": what best/best.json holds, or None}.

  Raises:
    ConfigError: anything given cannot work; before the first compilation, except for a NaN in the loss.
    Preempted: told to stop (SIGTERM); what had been done is saved.
  """
  cli.require_same_run(_settings(**locals()))
  with preemption.Notice() as notice:
    setup = training_setup.prepare(
      model_dir,
      data,
      step_config,
      optimizer,
      loop_config,
      mesh_config,
      model=model,
      initial_checkpoint=initial_checkpoint,
      target=target,
      evaluation_target=evaluation_target,
      dtype=dtype,
      target_dtype=target_dtype,
      evaluation_split=evaluation_split,
    )
    looked = None
    if setup.teacher:
      looked = target_check.look(setup.teacher.model, setup.teacher.params, setup.mesh, setup.teacher.directory)
    optimizing = optimizer.build(loop_config.steps)
    checkpoints = weights.RunCheckpoints(setup.directory, keep=loop_config.keep_checkpoints)
    try:
      state, parts = _resumed(setup, data, step_config, loop_config, optimizing, checkpoints)
      # Only now, when nothing is refused any more: a record would stand in the way of the corrected command.
      run_record.begin(setup.directory, setup.record, setup.student.model, looked, config_text)
      state = _run(loop_config, dataclasses.replace(parts, notice=notice), state, setup.directory)
    finally:
      checkpoints.close()
  return {"model_dir": str(setup.directory), "step": int(state.step), "best": parts.best and parts.best.record}


def run_from_gin(files: Sequence[str], bindings: Sequence[str] = ()) -> dict[str, Any]:
  """Train as the command line does, inside this process.

  Args:
    files: gin files, as --gin_file takes them.
    bindings: "NAME = VALUE", as --gin.NAME=VALUE gives them.

  Returns:
    What `train` returns.
  """
  arguments, text = gin_binding.bound(_arguments, files, bindings)
  return train(**arguments, config_text=text)


def arguments_from_gin(files: Sequence[str], bindings: Sequence[str] = ()) -> dict[str, Any]:
  """Return what `train` would be called with, without training; arguments as `run_from_gin`'s."""
  return gin_binding.bound(_arguments, files, bindings)[0]


def main(argv: Sequence[str]) -> None:
  """Read the flags' gin files and bindings, join the other processes, and train."""
  del argv
  given = gin_binding.from_flags(flags.FLAGS)
  cli.join()
  multihost.say(json.dumps(run_from_gin(*given)))


def _settings(config_text: str, **arguments) -> str:
  """Write what `train` was called with, the gin file first and then a line each: hosts compare it line by line."""
  lines = [config_text]
  for name, value in arguments.items():
    if dataclasses.is_dataclass(value):
      lines += [f"{type(value).__name__}.{key} = {field!r}" for key, field in vars(value).items()]
    else:
      lines.append(f"{name} = {value!r}")
  return "\n".join(lines)


def _resumed(
  setup: training_setup.Setup,
  data: pipeline.DataConfig,
  step_config: step.StepConfig,
  loop_config: loop.TrainConfig,
  optimizer: tuple[Any, Any],
  checkpoints: weights.RunCheckpoints,
) -> tuple[step.TrainState, loop.Parts]:
  """Make the state that the run stands at, the first one where nothing is saved, and what the loop works with."""
  student, tx = setup.student, optimizer[0]
  restored = checkpoints.restore_latest(_placed_abstract_state(student.model, tx, setup.mesh))
  state, saved, _ = restored or (None, None, 0)
  parts = _parts(setup, data, step_config, loop_config, optimizer, checkpoints, saved)
  _announce(setup, data)
  if state is None:
    state = _first_state(student, tx, loop_config.seed, setup.mesh)
  return state, parts


def _parts(
  setup: training_setup.Setup,
  data: pipeline.DataConfig,
  step_config: step.StepConfig,
  loop_config: loop.TrainConfig,
  optimizer: tuple[Any, Any],
  checkpoints: weights.RunCheckpoints,
  saved: Mapping[str, Any] | None,
) -> loop.Parts:
  """Put together what the loop works with; `saved` is what a checkpoint has beside its state."""
  student, teacher = setup.student.model, setup.teacher
  tx, schedule = optimizer
  place, remembered = loop.split_place(saved)
  share = multihost.share_of(setup.mesh, data.batch_size)
  held = _validation(setup, loop_config)
  return loop.Parts(
    step=step.compile_train_step(
      student, teacher and teacher.model, tx, step_config, schedule=schedule, mesh=setup.mesh
    ),
    batches=pipeline.train_batches(
      data,
      setup.vocabulary_dir,
      share.index,
      share.count,
      place,
      packed_rows=student.packed_rows,
      rows=share.rows,
    ),
    target_params=teacher and teacher.params,
    target_name=teacher.directory if teacher else loop.Parts.target_name,
    checkpoints=checkpoints,
    validation=held,
    best=_best(setup, loop_config, held),
    meter=costs.Meter(student, teacher and teacher.model),
    remembered=remembered,
    mesh=setup.mesh,
    name=setup.directory.name,
  )


def _run(config: loop.TrainConfig, parts: loop.Parts, state: step.TrainState, directory: pathlib.Path):
  log = RunLog(directory, int(state.step))
  try:
    return loop.train(config, parts, state, log.write)
  finally:
    log.close()


def _placed_abstract_state(model: models.LanguageModel, tx, mesh) -> step.TrainState:
  """Give the state's shapes, and on a mesh the place of each array, for a checkpoint to be restored into."""
  abstract = step.abstract_state(model, tx)
  if mesh is None:
    return abstract
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    abstract,
    partitioning.state_shardings(abstract, model, mesh),
  )


def _first_state(student: training_setup.Side, tx, seed: int, mesh) -> step.TrainState:
  origin = {"params": student.params} if student.params is not None else {"rng": jax.random.key(seed)}
  return step.init_state(student.model, tx, **origin, mesh=mesh)


def _validation(setup: training_setup.Setup, config: loop.TrainConfig) -> validation.Validation | None:
  if setup.held_out is None:
    return None
  judge = setup.judge
  return validation.Validation(
    setup.student.model,
    setup.held_out,
    batch_size=config.eval_batch_size,
    target=judge and judge.model,
    target_params=judge and judge.params,
    gamma=config.eval_gamma,
    gamma_examples=config.eval_gamma_examples,
    seed=config.seed,
    mesh=setup.mesh,
  )


def _best(setup: training_setup.Setup, config: loop.TrainConfig, held) -> best.Best | None:
  if held is None:
    return None
  criterion = config.best_by if held.target is not None else validation.LOSS
  return best.Best(setup.directory, setup.student.model, criterion, pathlib.Path(setup.vocabulary_dir))


def _announce(setup: training_setup.Setup, data: pipeline.DataConfig) -> None:
  student, teacher, mesh = setup.student, setup.teacher, setup.mesh
  size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(student.model.abstract_params()))
  origin = f"from {student.directory}" if student.directory else "from scratch"
  lines = [f"training {size:,} parameters {origin} on {data.task}"]
  lines.append(run_record.method_of(setup.record))
  if teacher is not None:
    lines.append(f"target {teacher.directory}")
  devices = jax.devices()
  processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
  shape = f", mesh {dict(mesh.shape)}" if mesh else ""
  lines.append(f"{len(devices)} {devices[0].platform} device(s){processes}{shape}")
  multihost.say("; ".join(lines))


@functools.wraps(train)
def _collect(**arguments) -> dict[str, Any]:
  return arguments


def define_flags() -> None:
  """Define the gin flags, and those of several processes."""
  gin_binding.define_flags()
  cli.define_process_flags()


# Gin binds these and nothing else.
_arguments = gin_binding.register(_collect, name="train")
for _configurable in (
  models.T5Config,
  models.DecoderLMConfig,
  pipeline.DataConfig,
  methods.Method,
  methods.fixed_data_fraction,
  methods.draft_data_fraction,
  step.StepConfig,
  optimizers.OptimizerConfig,
  loop.TrainConfig,
  meshes.MeshConfig,
):
  gin_binding.register(_configurable)

if __name__ == "__main__":
  define_flags()
  cli.run(main)
