"""Native checkpoints: a run's full state, and model directories, both through Orbax.

A native MODEL_DIR holds

    model.json            what `models.from_description` builds the network from
    vocabulary/           copied as bytes
    checkpoints/<step>/   state/ (Orbax: params and, for a run, opt_state and step), data/ (the place in the data,
                          JSON), MANIFEST.json (sizes and checksums)

A checkpoint appears under its final name only when it is complete. Nothing that was saved is deleted except by
`keep`: a damaged checkpoint is moved aside to `<step>.damaged`.
"""

from __future__ import annotations

import json
import pathlib
import sys
import uuid
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from distillspec_jax import models
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import integrity, strict_json, trees, vocabulary_files

DESCRIPTION = "model.json"
CHECKPOINTS = "checkpoints"
_STATE, _DATA = "state", "data"


def ensure_writable(directory: str | pathlib.Path) -> pathlib.Path:
  """Make the output folder and prove that a file can be written there, before any work.

  Raises:
    ConfigError: it cannot be made or written.
  """
  if not str(directory):
    raise ConfigError("the output folder has no name: give one ('.' is the current folder)")
  directory = pathlib.Path(directory).expanduser().absolute()
  probe = directory / f".writable-{uuid.uuid4().hex}"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"x")
    probe.unlink()
  except OSError as error:
    reason = error.strerror or str(error)
    raise ConfigError(f"cannot write to the output folder {directory}: {reason}. Choose another folder.") from error
  return directory


class RunCheckpoints:
  """The checkpoints of one training run, under MODEL_DIR/checkpoints."""

  def __init__(self, directory: str | pathlib.Path, keep: int | None = 3):
    """Open MODEL_DIR (made where absent); folders that an interrupted save left are removed.

    Args:
      directory: MODEL_DIR.
      keep: how many of the newest checkpoints stay; None for all.

    Raises:
      ConfigError: keep < 1, or the folder cannot be written.
    """
    if keep is not None and keep < 1:
      raise ConfigError(f"keep={keep}: at least 1 checkpoint must be kept (None keeps all)")
    self.directory = ensure_writable(pathlib.Path(directory) / CHECKPOINTS)
    self._known: set[int] = set()  # steps that this run wrote or went on from
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def steps(self) -> list[int]:
    """List the steps of the checkpoints that stand complete, damaged or not, ascending."""
    return steps_of(self.directory)

  def save(self, step: int, state: Any, data_state: dict) -> None:
    """Write one checkpoint and its manifest; returns when both are on disk.

    Saving a step again that this run has saved already does nothing.

    Args:
      step: the step the state stands after.
      state: any pytree of arrays, with `params` at its top.
      data_state: the place in the data, JSON.

    Raises:
      ConfigError: the folder holds a checkpoint of this or a later step that this run did not write.
    """
    step = int(step)
    existing = self.steps()
    if step in self._known and step in existing:
      return
    if existing and existing[-1] >= step:
      raise ConfigError(
        f"{self.directory} holds a checkpoint of step {existing[-1]} already, so step {step} cannot be saved there: "
        "resume from it or choose another MODEL_DIR"
      )
    items = {_STATE: ocp.args.PyTreeSave(state), _DATA: ocp.args.JsonSave(json.loads(json.dumps(data_state)))}
    if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
      raise RuntimeError(f"Orbax declined to save step {step} to {self.directory}")
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      integrity.write_manifest(self.directory / str(step))
    _all_hosts_here(f"saved {step}")
    self._known.add(step)

  def restore_latest(self, abstract_state: Any) -> tuple[Any, dict, int] | None:
    """Restore the newest checkpoint that is whole.

    A damaged one is moved aside to `<step>.damaged`, with a warning that names it and the one used instead, so that
    the run can save that step again.

    Args:
      abstract_state: the state's pytree with arrays or ShapeDtypeStructs as leaves; a leaf's sharding, where it has
        one, is where the array goes, else the first device.

    Returns:
      (state, data_state, step), or None where nothing has been saved.

    Raises:
      ConfigError: every checkpoint is damaged (all stay where they are), or the newest whole one is of another model.
    """
    damaged: dict[int, str] = {}
    for step in reversed(self.steps()):
      folder = self.directory / str(step)
      found = _guarded(folder, lambda folder=folder: (_restore_state(folder, abstract_state), _read_data(folder)))
      if isinstance(found, str):
        damaged[step] = found
        continue
      self._set_aside(damaged, step)
      self._known.add(step)
      return *found, step
    if damaged:
      raise ConfigError(_all_damaged(self.directory, damaged))
    return None

  def close(self) -> None:
    """Release Orbax's threads."""
    self._manager.close()

  def _set_aside(self, damaged: dict[int, str], used: int) -> None:
    for step, problem in damaged.items():
      folder = self.directory / str(step)
      aside = _free_name(self.directory / f"{step}.damaged")
      if jax.process_index() == 0:
        folder.rename(aside)
      _warn(
        f"checkpoint {folder} is damaged ({problem}): falling back to {self.directory / str(used)}; "
        f"the damaged one is kept as {aside}"
      )
    if damaged:
      _all_hosts_here(f"set aside for {used}")
      self._manager.reload()


def save_description(directory: str | pathlib.Path, model: models.LanguageModel) -> None:
  """Write MODEL_DIR/model.json.

  Raises:
    ConfigError: the folder describes another model already, or cannot be written.
  """
  directory = ensure_writable(directory)
  path = directory / DESCRIPTION
  description = json.loads(json.dumps(model.describe()))
  if path.exists():
    if strict_json.read(path) != description:
      raise ConfigError(f"{directory} holds another model ({path} differs from the one given): choose another folder")
    return
  if jax.process_index() == 0:
    integrity.write_atomically(path, json.dumps(description, indent=2).encode() + b"\n")


def save_model(
  directory: str | pathlib.Path,
  model: models.LanguageModel,
  params: Params,
  vocabulary_dir: str | pathlib.Path | None = None,
  step: int | None = None,
) -> pathlib.Path:
  """Write a native model directory that holds parameters only.

  A directory that holds the same model is brought up to date: the new parameters stand complete before the old ones
  go.

  Args:
    directory: MODEL_DIR, made where absent.
    model: what the parameters belong to.
    params: the parameters.
    vocabulary_dir: a vocabulary folder whose files are copied to MODEL_DIR/vocabulary.
    step: the name under checkpoints/; by default one more than the last there, or 0.

  Returns:
    MODEL_DIR.

  Raises:
    ConfigError: the folder cannot be written, holds another model or a later step, or the parameters do not fit.
  """
  trees.require_same(trees.flatten(model.abstract_params()), trees.flatten(params), "the parameter tree given")
  directory = ensure_writable(directory)
  save_description(directory, model)
  if vocabulary_dir is not None and jax.process_index() == 0:
    vocabulary_files.copy(vocabulary_dir, directory)
  run = RunCheckpoints(directory, keep=1)
  existing = run.steps()
  if step is None:
    step = existing[-1] + 1 if existing else 0
  run.save(step, {"params": params}, {})
  run.close()
  return directory


def load_native(
  directory: str | pathlib.Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[models.LanguageModel, Params]:
  """Load model and parameters of a native MODEL_DIR; of a training run only the parameters are read.

  Args:
    directory: a folder with model.json and checkpoints/.
    step: which checkpoint; by default the newest that is whole (a damaged one is passed over with a warning).
    mesh: place each parameter as `parallel.partitioning` says; without one, on the first device.

  Raises:
    ConfigError: nothing there, damaged, or the parameters do not fit model.json.
  """
  directory = pathlib.Path(directory).expanduser().absolute()
  if not (directory / DESCRIPTION).is_file():
    raise ConfigError(f"{directory} is no native model directory: it has no {DESCRIPTION}")
  model = read_description(directory / DESCRIPTION)
  folder = directory / CHECKPOINTS
  abstract = placed(model.abstract_params(), model, mesh)
  return model, _newest(folder, step, lambda at: _guarded(at, lambda: _restore_params(at, abstract)))[1]


def newest_whole(folder: pathlib.Path, step: int | None = None) -> int:
  """Choose the newest step under a checkpoints/ folder whose checksums are right (or see whether those of `step` are).

  Raises:
    ConfigError: there is none.
  """
  return _newest(folder, step, lambda chosen: integrity.find_damage(chosen) or chosen)[0]


def _newest(folder: pathlib.Path, step: int | None, restore) -> tuple[int, Any]:
  """Return (step, what `restore` gives) of the newest checkpoint for which it gives no text, that is: damage."""
  steps = steps_of(folder)
  if not steps or (step is not None and step not in steps):
    listed = f"it holds {', '.join(map(str, steps))}" if steps else "it holds none: has the run saved yet?"
    raise ConfigError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}: {listed}")
  damaged: dict[int, str] = {}
  for candidate in [step] if step is not None else reversed(steps):
    found = restore(folder / str(candidate))
    if isinstance(found, str):
      damaged[candidate] = found
      continue
    for bad, problem in damaged.items():
      _warn(f"checkpoint {folder / str(bad)} is damaged ({problem}): using {folder / str(candidate)} instead")
    return candidate, found
  raise ConfigError(_all_damaged(folder, damaged))


def is_step_of(folder: pathlib.Path, directory: pathlib.Path) -> bool:
  """Say whether `folder` is one step under `directory`'s checkpoints/ and `directory` a native model directory."""
  named = folder.parent == directory / CHECKPOINTS and folder.name.isdecimal()
  return named and folder.is_dir() and (directory / DESCRIPTION).is_file()


def placed(abstract_params: Params, model: models.LanguageModel, mesh: jax.sharding.Mesh | None) -> Params:
  """Give every ShapeDtypeStruct its sharding: by the rules on a mesh, else the first device."""
  if mesh is None:
    shardings = jax.tree.map(lambda _: _first_device(), abstract_params)
  else:
    from distillspec_jax.parallel import partitioning  # noqa: PLC0415  (needed on a mesh only)

    shardings = partitioning.param_shardings(model, mesh)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_params, shardings
  )


def _guarded(folder: pathlib.Path, restore):
  """Return what `restore` returns, or a text that says what is damaged."""
  if problem := integrity.find_damage(folder):
    return problem
  try:
    restored = restore()
  except ConfigError:
    raise
  except Exception as error:
    if integrity.has_manifest(folder):
      raise  # the bytes are those that were written: this is no damage
    return f"no {integrity.MANIFEST}, and Orbax cannot read it: {_first_line(error)}"
  if not integrity.has_manifest(folder):
    _warn(f"checkpoint {folder} has no {integrity.MANIFEST}: it could be read, but not checked for damage")
  return restored


def _restore_state(folder: pathlib.Path, abstract_state: Any) -> Any:
  saved = _saved_tree(folder)
  trees.require_same(trees.flatten(abstract_state), trees.flatten(saved), f"checkpoint {folder}", check_dtype=True)
  return _read_tree(folder, abstract_state, partial=False)


def _restore_params(folder: pathlib.Path, abstract_params: Params) -> Params:
  saved = _saved_tree(folder)
  trees.require_same(trees.flatten(abstract_params), trees.flatten(saved.get("params", {})), f"checkpoint {folder}")
  return _read_tree(folder, {"params": abstract_params}, partial=True)["params"]


def _saved_tree(folder: pathlib.Path) -> dict:
  return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / _STATE)).tree


def _read_tree(folder: pathlib.Path, abstract: Any, partial: bool) -> Any:
  def target(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or _first_device())

  abstract = jax.tree.map(target, abstract)
  arguments = ocp.args.PyTreeRestore(
    abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=partial
  )
  return ocp.PyTreeCheckpointHandler().restore(epath.Path(folder / _STATE), args=arguments)


def _read_data(folder: pathlib.Path) -> dict:
  return json.loads((folder / _DATA / "metadata").read_bytes())


def read_description(path: pathlib.Path) -> models.LanguageModel:
  """Make the model that a model.json describes; a ConfigError names the file."""
  description = strict_json.read(path)
  try:
    return models.from_description(description)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
  except (AttributeError, KeyError, TypeError) as error:
    raise ConfigError(f"{path} is no model description: it needs architecture and config") from error


def steps_of(folder: pathlib.Path) -> list[int]:
  """List the steps under a checkpoints/ folder, ascending; [] where there is none."""
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _free_name(path: pathlib.Path) -> pathlib.Path:
  taken, number = path, 2
  while taken.exists():
    taken, number = path.with_name(f"{path.name}-{number}"), number + 1
  return taken


def _first_device() -> jax.sharding.Sharding:
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _all_damaged(folder: pathlib.Path, damaged: dict[int, str]) -> str:
  listed = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
  return (
    f"no checkpoint in {folder} can be read ({listed}): restore the files from a copy, or move the folder away to "
    "start again"
  )


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _warn(message: str) -> None:
  logging.warning(message)
  if not logging.get_absl_logger().isEnabledFor(logging.converter.ABSL_TO_STANDARD[logging.WARNING]):
    print(f"WARNING: {message}", file=sys.stderr, flush=True)  # a quieted log must not swallow this one


def _all_hosts_here(name: str) -> None:
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils  # noqa: PLC0415

    multihost_utils.sync_global_devices(name)
