"""One checkpoint's folder: what is damaged, reading its arrays to where they belong, writing in the background."""

from __future__ import annotations

import json
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from distillspec_jax.parallel import multihost
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import integrity, trees

STATE, DATA = "state", "data"


def steps_of(folder: pathlib.Path) -> list[int]:
  """List the steps under a checkpoints/ folder, ascending; [] where there is none."""
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def guarded(folder: pathlib.Path, restore: Callable[[], Any]) -> Any:
  """Return what `restore` returns, or a text that says what is damaged; the same verdict on every host."""
  look = lambda: [integrity.find_damage(folder), integrity.has_manifest(folder)]
  problem, signed = multihost.from_first("the checkpoint's damage", look)  # one host reads all its bytes
  if problem:
    return problem
  restored = None
  try:
    restored = restore()
  except ConfigError:
    raise
  except Exception as error:
    if signed:
      raise  # the bytes are those that were written: this is no damage
    problem = f"no {integrity.MANIFEST}, and Orbax cannot read it: {_first_line(error)}"
  if problems := list(filter(None, multihost.exchange("the checkpoint restored", problem or ""))):
    return problems[0]
  if not signed:
    warn(f"checkpoint {folder} has no {integrity.MANIFEST}: it could be read, but not checked for damage")
  return restored


def restore_state(folder: pathlib.Path, abstract_state: Any) -> Any:
  """Read a whole state, each array to the sharding its leaf has, else to the first device.

  Raises:
    ConfigError: the checkpoint is of another model.
  """
  saved = _saved_tree(folder)
  trees.require_same(trees.flatten(abstract_state), trees.flatten(saved), f"checkpoint {folder}", check_dtype=True)
  return _read_tree(folder, abstract_state, partial=False)


def restore_params(folder: pathlib.Path, abstract_params: Params) -> Params:
  """Read the parameters alone; else like `restore_state`."""
  saved = _saved_tree(folder)
  trees.require_same(trees.flatten(abstract_params), trees.flatten(saved.get("params", {})), f"checkpoint {folder}")
  return _read_tree(folder, {"params": abstract_params}, partial=True)["params"]


def _saved_tree(folder: pathlib.Path) -> dict:
  return _handler().metadata(epath.Path(folder / STATE)).tree


def _read_tree(folder: pathlib.Path, abstract: Any, partial: bool) -> Any:
  def target(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first_device())

  abstract = jax.tree.map(target, abstract)
  arguments = ocp.args.PyTreeRestore(
    abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=partial
  )
  return _handler().restore(epath.Path(folder / STATE), args=arguments)


def _handler() -> ocp.PyTreeCheckpointHandler:
  return ocp.PyTreeCheckpointHandler(multiprocessing_options=processes("restore"))


def read_data(folder: pathlib.Path) -> dict:
  """Read the place in the data."""
  return json.loads((folder / DATA / "metadata").read_bytes())


def processes(name: str) -> ocp.options.MultiprocessingOptions:
  """Name the processes to Orbax: its barriers then have limits and no part in the devices' collectives."""
  if not multihost.several():
    return ocp.options.MultiprocessingOptions()
  everybody = set(range(jax.process_count()))
  return ocp.options.MultiprocessingOptions(active_processes=everybody, barrier_sync_key_prefix=name)


class Writing:
  """Something done in the background, whose error comes out where it is waited for."""

  def __init__(self, work: Callable[[], None]):
    """Begin."""
    self._error: BaseException | None = None
    self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
    self._thread.start()

  def _run(self, work):
    try:
      work()
    except BaseException as error:
      self._error = error

  def result(self) -> None:
    """Wait for the end; raise what went wrong."""
    self._thread.join()
    if self._error is not None:
      raise self._error


def free_name(path: pathlib.Path) -> pathlib.Path:
  """Give the path itself, or the first of path-2, path-3, ... that nothing stands at."""
  taken, number = path, 2
  while taken.exists():
    taken, number = path.with_name(f"{path.name}-{number}"), number + 1
  return taken


def first_device() -> jax.sharding.Sharding:
  """Give the place of arrays that nobody says a place of."""
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def warn(message: str) -> None:
  """Log a warning, and print it where logging is too quiet for one."""
  logging.warning(message)
  if not logging.get_absl_logger().isEnabledFor(logging.converter.ABSL_TO_STANDARD[logging.WARNING]):
    print(f"WARNING: {message}", file=sys.stderr, flush=True)  # a quieted log must not swallow this one
