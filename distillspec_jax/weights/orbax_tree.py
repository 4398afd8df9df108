"""A tree that Orbax wrote, as lazy tensors: `_METADATA` names its leaves, OCDBT (or folders) holds them as zarr."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import strict_json, zarr_arrays
from distillspec_jax.weights.lazy_tensors import LazyTensor

METADATA = "_METADATA"


class _Ocdbt(zarr_arrays.Store):
  """Arrays under names in an OCDBT store; how many bytes a key has is not listed there."""

  def __init__(self, path: pathlib.Path, context: Any):
    import tensorstore  # noqa: PLC0415

    entries = list(path.rglob("*"))
    if strange := [entry for entry in entries if not entry.is_file() and not entry.is_dir()]:
      raise ValueError(f"{strange[0].name} is no ordinary file")  # reading a pipe would wait for ever
    self._base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    self._store = tensorstore.KvStore.open(self._base, context=context).result()
    self._room = sum(entry.stat().st_size for entry in entries if entry.is_file())
    self._keys: dict[str, list[str]] = {}
    for key in self._store.list().result():
      name, _, last = key.decode().rpartition("/")
      self._keys.setdefault(name, []).append(last)

  def sizes(self, name):
    return dict.fromkeys(self._keys.get(name, ()), self._room)  # no chunk is larger than all files together

  def read(self, name, key):
    found = self._store.read(f"{name}/{key}").result()
    if found.state != "value":
      raise ValueError(f"{key} is missing")
    return found.value

  def spec(self, name):
    return self._base | {"path": f"{name}/"}


def open_tree(folder: pathlib.Path, tops: Sequence[str], stacks: tuple[str, ...] = ()) -> dict[str, LazyTensor]:
  """Open the leaves under the first of `tops` that the tree has; names are joined by "/", without the top.

  Args:
    folder: holds _METADATA.
    tops: names at the top of the tree, e.g. ("target", "params").
    stacks: how names begin from which several tensors will be cut.

  Raises:
    ConfigError: damaged, or none of the names is there.
  """
  described = strict_json.read(folder / METADATA)
  if described.get("use_zarr3"):
    raise ConfigError(f"{folder} is in zarr 3's format, which this package does not read: save it with use_zarr3=False")
  leaves = _leaves(folder, described)
  top = next((top for top in tops if any(path[0] == top for path in leaves)), None)
  if top is None:
    held = ", ".join(sorted({path[0] for path in leaves})[:6]) or "nothing"
    raise ConfigError(f"{folder} has no parameters: neither {' nor '.join(tops)} in {held}")
  contexts = {stacked: zarr_arrays.new_context(stacked) for stacked in (False, True)}
  try:
    store = _Ocdbt(folder, contexts[False]) if described.get("use_ocdbt", True) else zarr_arrays.Folder(folder)
  except Exception as error:  # tensorstore raises ValueError, OSError and others
    raise zarr_arrays.damaged(str(folder), error) from error
  tensors = {}
  for path in leaves:
    if path[0] == top:
      name, where = "/".join(path[1:]), f"{folder}: {'/'.join(path)}"
      context = contexts[name.startswith(stacks)]
      try:
        tensors[name] = zarr_arrays.open_array(store, ".".join(path), where, context)
      except ConfigError:
        raise
      except Exception as error:
        raise zarr_arrays.damaged(where, error) from error
  return tensors


def _leaves(folder: pathlib.Path, described: dict[str, Any]) -> list[tuple[str, ...]]:
  try:
    paths = []
    for entry in described["tree_metadata"].values():
      path = tuple(str(key["key"]) for key in entry["key_metadata"])
      if not path or any(not name or "/" in name or name in (".", "..") for name in path):
        raise ValueError(f"{path} is no name")
      if entry["value_metadata"].get("skip_deserialize"):
        continue  # an empty node, not an array
      paths.append(path)
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise ConfigError(f"{folder / METADATA} does not list a tree ({str(error)[:80]}): it may be damaged") from error
  if len(set(paths)) != len(paths):
    raise ConfigError(f"{folder / METADATA} lists a leaf twice: it may be damaged")
  return paths
