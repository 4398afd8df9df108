"""Native checkpoints: a run's full state, and model directories, both through Orbax.

A native MODEL_DIR holds

    model.json            what `models.from_description` builds the network from
    vocabulary/           copied as bytes
    checkpoints/<step>/   state/ (Orbax: params and, for a run, opt_state and step), data/ (the place in the data,
                          JSON), MANIFEST.json (sizes and checksums)

A checkpoint appears under its final name only when it is complete. Nothing that was saved is deleted except by
`keep`: a damaged checkpoint is moved aside to `<step>.damaged`. With several processes each writes and reads its own
parts of the arrays, in a folder that all see; process 0 does everything else.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import uuid
from typing import Any

import jax
import orbax.checkpoint as ocp

from distillspec_jax import models
from distillspec_jax.parallel import multihost
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import checkpoint_folder as folders
from distillspec_jax.weights import integrity, strict_json, trees, vocabulary_files

DESCRIPTION = "model.json"
CHECKPOINTS = "checkpoints"
_opened = itertools.count()  # the same on every host, which open the same folders in the same order


def ensure_writable(directory: str | pathlib.Path) -> pathlib.Path:
  """Make the output folder and prove that a file can be written there, before any work.

  Raises:
    ConfigError: it cannot be made or written.
  """
  if not str(directory):
    raise ConfigError("the output folder has no name: give one ('.' is the current folder)")
  directory = integrity.user_path(directory).absolute()
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
    self._writing: folders.Writing | None = None
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=False,
      cleanup_tmp_directories=True,
      multiprocessing_options=folders.processes(f"checkpoints{next(_opened)}"),
    )
    self._manager = _Manager(self.directory, options=options)

  def steps(self) -> list[int]:
    """List the steps of the checkpoints that stand complete, damaged or not, ascending; waits for one being written."""
    self.wait()
    return folders.steps_of(self.directory)

  def save(self, step: int, state: Any, data_state: dict, wait: bool = True) -> None:
    """Write one checkpoint and its manifest.

    Saving a step again that this run has saved already does nothing.

    Args:
      step: the step the state stands after.
      state: any pytree of arrays, with `params` at its top.
      data_state: the place in the data, JSON.
      wait: whether to return when all is on disk. Else when the state may be changed or donated: files are written
        meanwhile, and what goes wrong with them is raised by the next `save`, `steps`, `wait` or `close`.

    Raises:
      ConfigError: the folder holds a checkpoint of this or a later step that this run did not write.
    """
    step = int(step)
    existing = multihost.from_first("the steps saved", self.steps)
    self.wait()
    if step in self._known and step in existing:
      return
    if existing and existing[-1] >= step:
      raise ConfigError(
        f"{self.directory} holds a checkpoint of step {existing[-1]} already, so step {step} cannot be saved there: "
        "resume from it or choose another MODEL_DIR"
      )
    place = json.loads(json.dumps(data_state))
    items = {folders.STATE: ocp.args.PyTreeSave(state), folders.DATA: ocp.args.JsonSave(place)}
    if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
      raise RuntimeError(f"Orbax declined to save step {step} to {self.directory}")
    self._known.add(step)
    self._writing = folders.Writing(lambda: self._finish(step))
    if wait:
      self.wait()

  def wait(self) -> None:
    """Return when what is being written stands on disk, its manifest too.

    Raises:
      Exception: whatever kept it from being written, such as a full disk.
    """
    writing, self._writing = self._writing, None
    if writing is not None:
      writing.result()

  def _finish(self, step: int) -> None:
    self._manager.wait_until_finished()
    if multihost.is_first():
      integrity.write_manifest(self.directory / str(step))

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
    for step in reversed(multihost.from_first("the steps saved", self.steps)):
      folder = self.directory / str(step)
      read = lambda folder=folder: (folders.restore_state(folder, abstract_state), folders.read_data(folder))
      found = folders.guarded(folder, read)
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
    """Wait for what is being written, and release Orbax's threads."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _set_aside(self, damaged: dict[int, str], used: int) -> None:
    for step, problem in damaged.items():
      folder = self.directory / str(step)
      aside = folders.free_name(self.directory / f"{step}.damaged")
      if multihost.is_first():
        folder.rename(aside)
      folders.warn(
        f"checkpoint {folder} is damaged ({problem}): falling back to {self.directory / str(used)}; "
        f"the damaged one is kept as {aside}"
      )
    if damaged:
      multihost.barrier("damaged checkpoints set aside")
      self._manager.reload()


class _Manager(ocp.CheckpointManager):
  """Orbax's, but for the pre-emption service: the loop asks it, and a second asker would disturb its count."""

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def save_description(directory: str | pathlib.Path, model: models.LanguageModel) -> None:
  """Write MODEL_DIR/model.json.

  Raises:
    ConfigError: the folder describes another model already, or cannot be written.
  """
  directory = ensure_writable(directory)
  check_description(directory, model)
  path = directory / DESCRIPTION
  if multihost.is_first() and not path.exists():
    integrity.write_atomically(path, json.dumps(model.describe(), indent=2).encode() + b"\n")


def check_description(directory: str | pathlib.Path, model: models.LanguageModel) -> None:
  """Look whether MODEL_DIR may take a model.

  Raises:
    ConfigError: it describes another.
  """
  path = pathlib.Path(directory) / DESCRIPTION
  found, given = strict_json.read(path) if path.exists() else {}, json.loads(json.dumps(model.describe()))
  if not found or found == given:
    return
  was, now = (shown.get("config") if isinstance(shown.get("config"), dict) else {} for shown in (found, given))
  differing = [f"{name} {was.get(name)!r}, not {value!r}" for name, value in now.items() if was.get(name) != value]
  raise ConfigError(
    f"{directory} holds another model ({path} differs from the one given: {'; '.join(differing) or 'architecture'}):"
    " choose another folder"
  )


def is_described(directory: str | pathlib.Path) -> bool:
  """Say whether a folder describes a model."""
  return (pathlib.Path(directory) / DESCRIPTION).exists()


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
  if vocabulary_dir is not None and multihost.is_first():
    vocabulary_files.copy(vocabulary_dir, directory)
  run = RunCheckpoints(directory, keep=1)
  existing = multihost.from_first("the steps saved", run.steps)
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
  restore = lambda at: folders.guarded(at, lambda: folders.restore_params(at, abstract))
  return model, _newest(folder, step, restore)[1]


def newest_whole(folder: pathlib.Path, step: int | None = None) -> int:
  """Choose the newest step under a checkpoints/ folder whose checksums are right (or see whether those of `step` are).

  Raises:
    ConfigError: there is none.
  """
  return _newest(folder, step, lambda chosen: integrity.find_damage(chosen) or chosen)[0]


def _newest(folder: pathlib.Path, step: int | None, restore) -> tuple[int, Any]:
  """Return (step, what `restore` gives) of the newest checkpoint for which it gives no text, that is: damage."""
  steps = multihost.from_first("the steps saved", lambda: folders.steps_of(folder))
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
      folders.warn(f"checkpoint {folder / str(bad)} is damaged ({problem}): using {folder / str(candidate)} instead")
    return candidate, found
  raise ConfigError(_all_damaged(folder, damaged))


def is_step_of(folder: pathlib.Path, directory: pathlib.Path) -> bool:
  """Say whether `folder` is one step under `directory`'s checkpoints/ and `directory` a native model directory."""
  named = folder.parent == directory / CHECKPOINTS and folder.name.isdecimal()
  return named and folder.is_dir() and (directory / DESCRIPTION).is_file()


def placed(abstract_params: Params, model: models.LanguageModel, mesh: jax.sharding.Mesh | None) -> Params:
  """Give every ShapeDtypeStruct its sharding: by the rules on a mesh, else the first device."""
  if mesh is None:
    shardings = jax.tree.map(lambda _: folders.first_device(), abstract_params)
  else:
    from distillspec_jax.parallel import partitioning  # noqa: PLC0415  (needed on a mesh only)

    shardings = partitioning.param_shardings(model, mesh)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_params, shardings
  )


def read_description(path: pathlib.Path) -> models.LanguageModel:
  """Make the model that a model.json describes; a ConfigError names the file."""
  description = strict_json.read(path)
  try:
    return models.from_description(description)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
  except (AttributeError, KeyError, TypeError) as error:
    raise ConfigError(f"{path} is no model description: it needs architecture and config") from error


def _all_damaged(folder: pathlib.Path, damaged: dict[int, str]) -> str:
  listed = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
  return (
    f"no checkpoint in {folder} can be read ({listed}): restore the files from a copy, or move the folder away to "
    "start again"
  )
