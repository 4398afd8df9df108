"""What a training run needs before its first step: models, vocabulary, held-out prompts; and every check of them.

Everything that cannot work is refused here, in one line, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distillspec_jax import models, run_record, weights
from distillspec_jax.data import eval_set, lookup, pipeline, vocabularies
from distillspec_jax.decoding.speculative import check_pair
from distillspec_jax.distillation import loop, methods, optimizers, precision, step
from distillspec_jax.parallel import mesh as meshes
from distillspec_jax.parallel import multihost, partitioning
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import checkpoint_folder, vocabulary_files

_NAMED = 4  # fields at most in a line of text
_SEEN_WITHIN = 15.0  # seconds: network file systems show a new file to others with a delay

_Place = tuple[jax.sharding.Mesh | None, str]  # a mesh, and which of partitioning.TABLES a model follows on it


@dataclasses.dataclass(frozen=True)
class Side:
  """One model of a run.

  Attributes:
    model: the network.
    params: its parameters; None: to be drawn.
    directory: where it came from; None: made new.
  """

  model: models.LanguageModel
  params: Params | None = None
  directory: str | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
  """What `prepare` found and made.

  Attributes:
    directory: MODEL_DIR.
    mesh: the devices' mesh; None on one device.
    student: what is trained.
    teacher: what it learns from, or None.
    judge: what α is measured against, or None.
    vocabulary_dir: the run's vocabulary.
    held_out: prompts and references of validations, or None.
    record: what kind of run it is, for `run_record.begin`.
  """

  directory: pathlib.Path
  mesh: jax.sharding.Mesh | None
  student: Side
  teacher: Side | None
  judge: Side | None
  vocabulary_dir: str
  held_out: Mapping[str, np.ndarray] | None
  record: Mapping[str, Any]


def prepare(
  model_dir: str,
  data: pipeline.DataConfig,
  step_config: step.StepConfig,
  optimizer: optimizers.OptimizerConfig,
  loop_config: loop.TrainConfig,
  mesh_config: meshes.MeshConfig,
  *,
  model: models.T5Config | models.DecoderLMConfig | None,
  initial_checkpoint: str | None,
  target: str | None,
  evaluation_target: str | None,
  dtype: str | None,
  target_dtype: str | None,
  evaluation_split: str,
) -> Setup:
  """Check a run and load what it needs; arguments as `train.train`'s.

  Raises:
    ConfigError: anything given cannot work.
  """
  precision.check_dtype("train.dtype", dtype)
  precision.check_dtype("train.target_dtype", target_dtype)
  directory = weights.ensure_writable(model_dir)
  _check_shared(directory)
  mesh = _mesh(mesh_config, data.batch_size, step_config.accumulate)
  _check_lengths(data, step_config)
  asked = lookup.Changes(prompt=data.prompt, data_dir=data.data_dir, cache_dir=data.cache_dir)
  lookup.find_tasks(data.task, data.split, asked)
  if not data.train_on_evaluation_data:
    lookup.refuse_training(data.task)
  given = [initial_checkpoint, target, evaluation_target]
  vocabulary_dir = multihost.from_first("the vocabulary", lambda: choose_vocabulary(directory, data, given))
  held_out = _held_out(data, loop_config, evaluation_split, vocabulary_dir)
  student = _student(model, initial_checkpoint, (mesh, mesh_config.draft_partitioning), dtype)
  of_target = (mesh, mesh_config.target_partitioning)
  teacher = _teacher(target, step_config.method, of_target, target_dtype)
  judge = _load(evaluation_target, of_target) if evaluation_target else teacher
  _check_models(data, step_config, vocabulary_dir, student, teacher, judge)
  weights.check_description(directory, student.model)
  record = run_record.record_of(step_config.method, data.task, optimizer.name, teacher and teacher.model)
  run_record.check(directory, record)
  return Setup(directory, mesh, student, teacher, judge, vocabulary_dir, held_out, record)


def _check_models(
  data: pipeline.DataConfig,
  step_config: step.StepConfig,
  vocabulary_dir: str,
  student: Side,
  teacher: Side | None,
  judge: Side | None,
) -> None:
  """Refuse models that do not fit each other, the vocabulary or the lengths."""
  sides = {"model": student, "target": teacher, "evaluation_target": judge}
  _check_vocabulary_fits(vocabulary_dir, sides)
  for side in filter(None, (teacher, judge)):
    check_pair(side.model, student.model)
  if data.pack:
    step.check_packing(step_config.method, student.model, teacher and teacher.model)
  _check_positions(data, step_config, sides)


def _check_shared(directory: pathlib.Path) -> None:
  """Refuse a MODEL_DIR that is not one folder for all hosts: each would keep a part of every checkpoint."""
  if not multihost.several():
    return
  name = multihost.from_first("a file in MODEL_DIR", lambda: _leave_a_file(directory))
  deadline = time.monotonic() + _SEEN_WITHIN
  while not (seen := (directory / name).is_file()) and time.monotonic() < deadline:
    time.sleep(0.2)
    list(directory.iterdir())  # has a network file system look again
  shown = multihost.exchange("what MODEL_DIR shows", str(seen))
  blind = [index for index, found in enumerate(shown) if found != "True"]
  if multihost.is_first():
    (directory / name).unlink()
  if blind:
    raise ConfigError(
      f"{directory} is not one folder for all hosts: processes {', '.join(map(str, blind))} do not see what process 0"
      " writes there; choose a MODEL_DIR on a file system that all share"
    )


def _leave_a_file(directory: pathlib.Path) -> str:
  name = f".seen-{uuid.uuid4().hex}"
  (directory / name).write_text("by all hosts?")
  return name


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


def choose_vocabulary(directory: pathlib.Path, data: pipeline.DataConfig, given: Sequence[str | None]) -> str:
  """Put the vocabulary into MODEL_DIR: that of the models given, which must agree, or else the task's own.

  Args:
    directory: MODEL_DIR.
    data: whose task, or `vocabulary`, gives one where the models have none.
    given: the models' directories.

  Returns:
    The vocabulary's folder.

  Raises:
    ConfigError: vocabularies that differ, or one that cannot be read.
  """
  given = [name for name in given if name]
  folders = [folder for folder in map(weights.vocabulary_dir, given) if folder is not None]
  for other in folders[1:]:
    weights.vocabularies_match(folders[0], other)
  own = directory / "vocabulary"
  if folders:
    _first_vocabulary(folders[0], directory)
  if note := vocabulary_files.unchecked(*given):
    multihost.say(note)
  if data.vocabulary:
    with tempfile.TemporaryDirectory() as folder:
      vocabularies.save(vocabularies.given(data.vocabulary), folder)
      put = vocabulary_files.copy if folders else _first_vocabulary  # refused where it is another than the models'
      put(folder, directory)
  elif not folders and not run_record.exists(directory):  # a run that has begun keeps the vocabulary it began with
    vocabulary_files.refuse_foreign(*given)
    if given:
      multihost.say(f"the models carry no vocabulary: taking that of {data.task}")
    task, _ = next(iter(lookup.find_tasks(data.task, data.split, prepared=False).values()))
    vocabularies.save(task.output_features["targets"].vocabulary, own)
  return str(own)


def _first_vocabulary(source: str | pathlib.Path, directory: pathlib.Path) -> None:
  """Put a vocabulary into MODEL_DIR; another that a refused run left there, without a run or model, is set aside."""
  own = directory / vocabulary_files.VOCABULARY
  if not (run_record.exists(directory) or weights.is_described(directory)):
    given, found = (vocabulary_files.fingerprint(folder) for folder in (source, own))
    if given and found and given != found:
      aside = checkpoint_folder.free_name(own)
      own.rename(aside)
      multihost.say(f"{own} was of no run and no model: it is {aside} now")
  vocabulary_files.copy(source, directory)


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


def _student(
  config: models.T5Config | models.DecoderLMConfig | None, directory: str | None, place: _Place, dtype: str | None
) -> Side:
  if directory:
    model, params = precision.trained(*weights.load_model(directory, mesh=place[0]), dtype)
    _say_what_is_not_looked_at(config, model, directory)
    return Side(*partitioning.lay_out(model, params, *place), directory)
  if config is None:
    raise ConfigError("nothing to train: give train.model (a configuration) or train.initial_checkpoint (a directory)")
  model = models.from_config(config)
  if dtype:
    model = precision.of_dtype(model, dtype, config.param_dtype)
  return Side(partitioning.lay_out(model, None, *place)[0])


def _say_what_is_not_looked_at(config, model: models.LanguageModel, directory: str) -> None:
  """Tell who configured a network beside a checkpoint that the checkpoint's is trained."""
  if config is None or config == model.config:
    return
  kind, own = type(config).__name__, vars(model.config)
  differing = [f"{kind}.{name}" for name, value in vars(config).items() if value != own.get(name)]
  named = ", ".join(differing) if len(differing) <= _NAMED else f"{len(differing)} fields of {kind}"
  multihost.say(f"train.model is not looked at, the network is that of {directory}; they differ in {named}")


def _teacher(target: str | None, method: methods.Method, place: _Place, dtype: str | None) -> Side | None:
  if not method.needs_target:
    if target:
      raise ConfigError(
        f"method {method.name!r} learns from the data alone, but train.target is {target!r}: choose another method, or"
        " set train.evaluation_target to measure α against it"
      )
    return None
  if not target:
    raise ConfigError(f"method {method.name!r} needs a target to learn from: set train.target to its directory")
  return _load(target, place, dtype)


def _load(directory: str, place: _Place, dtype: str | None = None) -> Side:
  model, params = precision.frozen(*weights.load_model(directory, mesh=place[0]), dtype)
  return Side(*partitioning.lay_out(model, params, *place), directory)


def _check_vocabulary_fits(vocabulary_dir: str, sides: Mapping[str, Side | None]) -> None:
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
    raise ConfigError(
      f"the models' vocab_size must be the same: {listed}; fine-tune a draft with the target's (T5Config.vocab_size or"
      " DecoderLMConfig.vocab_size), or choose another pair"
    )


def _check_positions(
  data: pipeline.DataConfig, step_config: step.StepConfig, sides: Mapping[str, Side | None]
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
