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
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from distillspec_jax import gin_binding, models, weights
from distillspec_jax.data import eval_set, lookup, pipeline, vocabularies
from distillspec_jax.decoding.speculative import check_pair
from distillspec_jax.distillation import best, costs, loop, methods, optimizers, step, target_check, validation
from distillspec_jax.parallel import mesh as meshes
from distillspec_jax.parallel import partitioning
from distillspec_jax.run_log import RunLog
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import integrity, vocabulary_files

_RUN = "run.json"


@dataclasses.dataclass(frozen=True)
class _Side:
  """One model of a run, the directory it came from (None: made new) and its parameters (None: to be drawn)."""

  model: models.LanguageModel
  params: Params | None = None
  directory: str | None = None


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
    model: the network to train from scratch; not looked at where `initial_checkpoint` is given.
    initial_checkpoint: the model directory to start from.
    target: the teacher's model directory; needed by every method but sft.
    evaluation_target: the model whose outputs α is measured on; the teacher by default.
    target_dtype: of the teacher's parameters and matrices, whatever it was saved in: "bfloat16" halves its memory.
    evaluation_split: the task's split with the held-out prompts.
    config_text: written to MODEL_DIR/config.gin.

  Returns:
    {"model_dir", "step", "best": what best/best.json holds, or None}.

  Raises:
    ConfigError: anything given cannot work; before the first compilation, except for a NaN in the loss.
  """
  directory = weights.ensure_writable(model_dir)
  mesh = _mesh(mesh_config, data.batch_size, step_config.accumulate)
  _check_lengths(data, step_config)
  lookup.find_tasks(data.task, data.split, lookup.Changes(prompt=data.prompt, data_dir=data.data_dir, cache_dir=data.cache_dir))
  if not data.train_on_evaluation_data:
    lookup.refuse_training(data.task)
  vocabulary_dir = _choose_vocabulary(directory, data, [initial_checkpoint, target, evaluation_target])
  held_out = _held_out(data, loop_config, evaluation_split, vocabulary_dir)
  student = _student(model, initial_checkpoint, mesh)
  teacher = _teacher(target, step_config.method, mesh, target_dtype)
  judge = _load(evaluation_target, mesh) if evaluation_target else teacher
  sides = {"model": student, "target": teacher, "evaluation_target": judge}
  _check_vocabulary_fits(vocabulary_dir, sides)
  for side in filter(None, (teacher, judge)):
    check_pair(side.model, student.model)
  if data.pack:
    step.check_packing(step_config.method, student.model, teacher and teacher.model)
  _check_positions(data, step_config, sides)
  _check_same_run(directory, data, step_config, optimizer, teacher)
  weights.save_description(directory, student.model)
  (directory / "config.gin").write_text(config_text)

  tx, schedule = optimizer.build(loop_config.steps)
  checkpoints = weights.RunCheckpoints(directory, keep=loop_config.keep_checkpoints)
  restored = checkpoints.restore_latest(_placed_abstract_state(student.model, tx, mesh))
  state, saved, _ = restored or (None, None, 0)
  place, remembered = loop.split_place(saved)
  batches = pipeline.train_batches(
    data, vocabulary_dir, jax.process_index(), jax.process_count(), place, packed_rows=student.model.packed_rows
  )
  held = _validation(student.model, held_out, loop_config, judge, mesh)
  parts = loop.Parts(
    step=step.compile_train_step(
      student.model, teacher and teacher.model, tx, step_config, schedule=schedule, mesh=mesh
    ),
    batches=batches,
    target_params=teacher and teacher.params,
    checkpoints=checkpoints,
    validation=held,
    best=_best(directory, student.model, loop_config, held, vocabulary_dir),
    meter=costs.Meter(student.model, teacher and teacher.model),
    remembered=remembered,
    mesh=mesh,
    name=directory.name,
  )
  if teacher:
    target_check.require_finite_logits(teacher.model, teacher.params, mesh)
  _announce(student, teacher, data, mesh)
  if state is None:
    state = _first_state(student, tx, loop_config.seed, mesh)
  student = dataclasses.replace(student, params=None)  # the state has its own copy
  log = RunLog(directory, int(state.step))
  try:
    state = loop.train(loop_config, parts, state, log.write)
  finally:
    log.close()
    checkpoints.close()
  return {"model_dir": str(directory), "step": int(state.step), "best": parts.best and parts.best.record}


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
  """Read the flags' gin files and bindings, and train."""
  del argv
  result = run_from_gin(*gin_binding.from_flags(flags.FLAGS))
  if jax.process_index() == 0:
    print(json.dumps(result))


def _mesh(config: meshes.MeshConfig, batch_size: int, accumulate: int) -> jax.sharding.Mesh | None:
  """Make the mesh, or None on one device; the batch, in its micro-batches, must split over it."""
  mesh = meshes.make_mesh(config)
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % (ways * accumulate) and accumulate > 1:
    raise ConfigError(
      f"DataConfig.batch_size is {batch_size}: StepConfig.accumulate = {accumulate} times data x fsdp = {ways} devices"
      " must divide it"
    )
  if batch_size % ways:
    raise ConfigError(
      f"DataConfig.batch_size is {batch_size}: data x fsdp = {ways} devices must divide it (see MeshConfig)"
    )
  return mesh if mesh.size > 1 else None


def _check_lengths(data: pipeline.DataConfig, step_config: step.StepConfig) -> None:
  """Refuse targets of one length from the data and another in the step, where the step uses the data's."""
  if step_config.method.needs_data and data.target_length != step_config.target_length:
    raise ConfigError(
      f"DataConfig.target_length is {data.target_length} and StepConfig.target_length {step_config.target_length}:"
      " they must be equal (TARGET_LENGTH sets both)"
    )


def _choose_vocabulary(directory: pathlib.Path, data: pipeline.DataConfig, given: Sequence[str | None]) -> str:
  """Put the vocabulary into MODEL_DIR: that of the models given, which must agree, or else the task's own."""
  given = [name for name in given if name]
  folders = [folder for folder in map(weights.vocabulary_dir, given) if folder is not None]
  for other in folders[1:]:
    weights.vocabularies_match(folders[0], other)
  own = directory / "vocabulary"
  if folders:
    vocabulary_files.copy(folders[0], directory)
  if note := vocabulary_files.unchecked(*given):
    print(note, flush=True)
  if data.vocabulary:
    with tempfile.TemporaryDirectory() as folder:
      vocabularies.save(vocabularies.given(data.vocabulary), folder)
      vocabulary_files.copy(folder, directory)  # refused where it is another than the models'
  elif not folders and not (directory / _RUN).is_file():  # a run that has begun keeps the vocabulary it began with
    vocabulary_files.refuse_foreign(*given)
    if given:
      print(f"the models carry no vocabulary: taking that of {data.task}", flush=True)
    task, _ = next(iter(lookup.find_tasks(data.task, data.split, prepared=False).values()))
    vocabularies.save(task.output_features["targets"].vocabulary, own)
  return str(own)


def _held_out(
  data: pipeline.DataConfig, config: loop.TrainConfig, split: str, vocabulary_dir: str
) -> Mapping[str, np.ndarray] | None:
  if not config.eval_every:
    return None
  examples = eval_set.eval_examples(
    data.task,
    split,
    config.eval_examples,
    data.input_length,
    data.target_length,
    seed=0,
    changes=data.changes(vocabulary_dir),
  )
  return {name: getattr(examples, name) for name in ("encoder_input_tokens", "decoder_target_tokens")}


def _student(model: models.T5Config | models.DecoderLMConfig | None, initial_checkpoint: str | None, mesh) -> _Side:
  if initial_checkpoint:
    return _load(initial_checkpoint, mesh)
  if model is None:
    raise ConfigError("nothing to train: give train.model (a configuration) or train.initial_checkpoint (a directory)")
  return _Side(models.from_config(model))


def _teacher(target: str | None, method: methods.Method, mesh, dtype: str | None) -> _Side | None:
  if not method.needs_target:
    if target:
      raise ConfigError(
        f"method {method.name!r} learns from the data alone, but train.target is {target!r}: choose another method, or"
        " set train.evaluation_target to measure α against it"
      )
    return None
  if not target:
    raise ConfigError(f"method {method.name!r} needs a target to learn from: set train.target to its directory")
  return _load(target, mesh, dtype)


def _load(directory: str, mesh, dtype: str | None = None) -> _Side:
  model, params = step.frozen(*weights.load_model(directory, mesh=mesh), dtype)
  return _Side(model, params, directory)


def _check_vocabulary_fits(vocabulary_dir: str, sides: Mapping[str, _Side | None]) -> None:
  size = vocabularies.describe(vocabulary_dir)["vocab_size"]
  present = {name: side.model for name, side in sides.items() if side is not None}
  for name, model in present.items():
    if model.vocab_size < size:
      raise ConfigError(
        f"the {name}'s vocab_size is {model.vocab_size} and the vocabulary {vocabulary_dir} has {size} ids: the model"
        " needs at least as many"
      )
  sizes = {name: model.vocab_size for name, model in present.items()}
  if len(set(sizes.values())) > 1:
    listed = ", ".join(f"{name} {number}" for name, number in sizes.items())
    raise ConfigError(f"the models' vocab_size must be the same: {listed}")


def _check_positions(
  data: pipeline.DataConfig, step_config: step.StepConfig, sides: Mapping[str, _Side | None]
) -> None:
  """Refuse texts that are longer than a model's table of positions."""
  outputs = max(data.target_length, step_config.target_length)
  for name, side in sides.items():
    most = side and side.model.max_length
    inputs = 0 if side and data.pack and side.model.packed_rows == "texts" else data.input_length
    if most is not None and inputs + outputs > most:
      raise ConfigError(
        f"the {name} has {most} positions, too few for {inputs} tokens in and {outputs} out: lower"
        " INPUT_LENGTH or TARGET_LENGTH"
      )


def _check_same_run(
  directory: pathlib.Path,
  data: pipeline.DataConfig,
  step_config: step.StepConfig,
  optimizer: optimizers.OptimizerConfig,
  teacher: _Side | None,
) -> None:
  """Refuse to go on with a run of another kind; what may change in between (rate, length of the run) is not looked at."""
  kind = {
    "method": dataclasses.asdict(step_config.method),
    "task": data.task,
    "optimizer": optimizer.name,
    "target": teacher and teacher.model.describe(),
  }
  kind = json.loads(json.dumps(kind))
  path = directory / _RUN
  if path.is_file():
    found = _read_run(path)
    for name, value in kind.items():
      if found.get(name) != value:
        was, now = (_short(name, part) for part in (found.get(name), value))
        raise ConfigError(f"{directory} holds a run with {name} {was}, this one has {now}: choose another MODEL_DIR")
  elif jax.process_index() == 0:
    integrity.write_atomically(path, json.dumps(kind, indent=2).encode() + b"\n")


def _read_run(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_bytes())
  except ValueError as error:
    raise ConfigError(f"{path} is not JSON ({error}): it is damaged; choose another MODEL_DIR") from error
  if not isinstance(found, dict):
    raise ConfigError(f"{path} is not what a run writes: it should hold one object; choose another MODEL_DIR")
  return found


def _short(name: str, value: Any) -> str:
  if name == "method" and value:
    return f"{value['name']} ({value['divergence']}, {value['fixed_data_fraction']}, {value['draft_data_fraction']})"
  return json.dumps(value)


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


def _first_state(student: _Side, tx, seed: int, mesh) -> step.TrainState:
  origin = {"params": student.params} if student.params is not None else {"rng": jax.random.key(seed)}
  return step.init_state(student.model, tx, **origin, mesh=mesh)


def _validation(model, held_out, config: loop.TrainConfig, judge: _Side | None, mesh) -> validation.Validation | None:
  if held_out is None:
    return None
  return validation.Validation(
    model,
    held_out,
    batch_size=config.eval_batch_size,
    target=judge and judge.model,
    target_params=judge and judge.params,
    gamma=config.eval_gamma,
    gamma_examples=config.eval_gamma_examples,
    seed=config.seed,
    mesh=mesh,
  )


def _best(directory: pathlib.Path, model, config: loop.TrainConfig, held, vocabulary_dir: str) -> best.Best | None:
  if held is None:
    return None
  criterion = config.best_by if held.target is not None else validation.LOSS
  return best.Best(directory, model, criterion, pathlib.Path(vocabulary_dir))


def _announce(student: _Side, teacher: _Side | None, data: pipeline.DataConfig, mesh) -> None:
  if jax.process_index():
    return
  size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(student.model.abstract_params()))
  origin = f"from {student.directory}" if student.directory else "from scratch"
  lines = [f"training {size:,} parameters {origin} on {data.task}"]
  if teacher is not None:
    lines.append(f"target {teacher.directory}")
  devices = jax.devices()
  lines.append(f"{len(devices)} {devices[0].platform} device(s)" + (f", mesh {dict(mesh.shape)}" if mesh else ""))
  print("; ".join(lines), flush=True)


@functools.wraps(train)
def _collect(**arguments) -> dict[str, Any]:
  return arguments


define_flags = gin_binding.define_flags

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
