"""Import of T5X checkpoints: its own form (msgpack + zarr) and its Orbax form, layers apart or stacked by scan.

The parameter names of this package are T5X's own, so the table between the two is short:

    T5X                                                    here
    any/name                    [...]                      the same name and shape        (t5x/examples/t5)
    */{query,key,value}/kernel  [E, H, D]                  [E, H*D]                       (examples/scalable_t5)
    */out/kernel                [H, D, E]                  [H*D, E]
    encoder/encoder/X           [a, L, b...]               encoder/layers_i/X [a, b...]   (scanned: L on axis 1)
    decoder/decoder/X           [a, L, b...]               decoder/layers_i/X [a, b...]

Every key that is left over or missing, and every shape that differs, is an error that names it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from distillspec_jax.models import T5
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import (
  layouts,
  lazy_tensors,
  msgpack_file,
  orbax_tree,
  t5x_config,
  trees,
  vocabulary_files,
  zarr_arrays,
)
from distillspec_jax.weights.layouts import Place
from distillspec_jax.weights.lazy_tensors import LazyTensor
from distillspec_jax.weights.t5x_config import infer_config, read_gin
from distillspec_jax.weights.t5x_export import export

__all__ = [
  "export", "find_checkpoint", "infer_config", "load", "open_checkpoint", "read_gin", "step_of", "table", "to_layers"
]  # fmt: skip

_SCANNED = {"encoder/encoder/": "encoder", "decoder/decoder/": "decoder"}
_HEADS = {"/query/kernel": 1, "/key/kernel": 1, "/value/kernel": 1, "/out/kernel": 0}  # where [H, D] stand
_MOST_LAYERS = 10_000
_TOKEN_AXES = {layouts.EMBEDDING: 0, layouts.HEAD: 1}
_STORES = ("file", "gfile", "gcs", "s3")  # a checkpoint of theirs, copied here, still names the bucket it lay in
_FILE = "checkpoint"


def find_checkpoint(directory: str | pathlib.Path, step: int | None = None) -> pathlib.Path | None:
  """Find the T5X checkpoint folder: `directory` itself, or its checkpoint_N of that (or the highest) step; or None."""
  directory = pathlib.Path(directory)
  if _is_checkpoint(directory) and step is None:
    return directory
  if not directory.is_dir():
    return None
  found = {step_of(path): path for path in directory.iterdir() if step_of(path) is not None and _is_checkpoint(path)}
  if step is not None:
    return found.get(step)
  return found[max(found)] if found else None


def step_of(checkpoint: pathlib.Path) -> int | None:
  """Read the step off a folder's name, or None."""
  match = re.fullmatch(r"checkpoint_(0|[1-9]\d{0,17})", checkpoint.name)
  return int(match[1]) if match else None


def load(
  directory: str | pathlib.Path, step: int | None = None, config: Mapping[str, Any] | None = None
) -> tuple[T5, Params]:
  """Import a T5X checkpoint as numpy arrays (`weights.load_model` brings it to devices tensor by tensor).

  The configuration comes from the shapes, then from a `config.json` or `config.gin` beside the checkpoint or in the
  folder above, then from `config`. What shapes do not tell has defaults: activations ("gelu", "linear") where there
  are wi_0 and wi_1 and ("relu",) where there is wi; a maximum relative distance of 128; no dropout; float32.

  Args:
    directory: a checkpoint_N folder, or one that holds some.
    step: which; by default the highest.
    config: T5Config fields that win over everything.

  Returns:
    (model, numpy parameters in `config.param_dtype`).

  Raises:
    ConfigError: no checkpoint there, damaged, or it does not fit the configuration.
  """
  model, tensors = open_checkpoint(directory, step, config)
  return model, trees.unflatten(lazy_tensors.read_all(tensors, np.dtype(model.config.param_dtype)))


def open_checkpoint(
  directory: str | pathlib.Path, step: int | None = None, config: Mapping[str, Any] | None = None
) -> tuple[T5, dict[str, LazyTensor]]:
  """Open a T5X checkpoint: the model and {name: lazy tensor}, all checked; arguments and errors as `load`."""
  checkpoint = find_checkpoint(directory, step)
  if checkpoint is None:
    raise ConfigError(f"{directory} holds no T5X checkpoint{'' if step is None else f' of step {step}'} (checkpoint_N)")
  native = (checkpoint / _FILE).is_file()
  found = _open_native(checkpoint) if native else _open_orbax(checkpoint)
  where = f"T5X checkpoint {checkpoint}"
  layouts.require_floats(found, where)
  tensors = to_layers(found, where)
  fields = infer_config(tensors, where) | t5x_config.beside(checkpoint)
  model = layouts.checked_model(fields, config, where, len(tensors))
  rows, size = tensors[layouts.EMBEDDING].shape[0], model.config.vocab_size
  asked = rows < size and layouts.padding_asked(config, rows, size, _vocabulary_size(checkpoint))
  tensors, advice = layouts.pad_vocabulary(tensors, _TOKEN_AXES, size, asked)
  expected = layouts.expected(model)
  trees.require_same(expected, tensors, where, advice=advice)
  return model, {name: tensors[name] for name in sorted(tensors, key=lambda name: tensors[name].where)}


def to_layers(found: Mapping[str, LazyTensor], where: str = "the checkpoint") -> dict[str, LazyTensor]:
  """Look at T5X's tensors by the table above: scanned layers apart, heads and widths as one axis."""
  places = table({name: tensor.shape for name, tensor in found.items()}, where)
  return layouts.through(places, found)


def table(shapes: Mapping[str, tuple[int, ...]], where: str = "the checkpoint") -> dict[str, Place]:
  """List every parameter: name here -> its place among tensors of these names and shapes.

  Raises:
    ConfigError: a stack without an axis of layers, or two tensors that are the same parameter.
  """
  places: dict[str, Place] = {}
  for there, shape in shapes.items():
    prefix = next((p for p in _SCANNED if there.startswith(p)), None)
    heads = next((axis for end, axis in _HEADS.items() if there.endswith(end)), None)
    rank = len(shape) - (prefix is not None)
    heads = heads if rank == 3 else None
    if prefix is None:
      here = {there: Place(there, heads=heads)}
    elif len(shape) < 2 or shape[layouts.STACK_AXIS] > _MOST_LAYERS:
      raise ConfigError(f"{where}: {there} has shape {shape}, without the layer axis 1 that scanned layers have")
    else:
      layers, rest = range(shape[layouts.STACK_AXIS]), there.removeprefix(prefix)
      here = {f"{_SCANNED[prefix]}/layers_{i}/{rest}": Place(there, layer=i, heads=heads) for i in layers}
    if twice := sorted(set(here) & set(places)):
      raise ConfigError(f"{where} holds {twice[0]} twice, as {places[twice[0]].name} and as {there}")
    places |= here
  return places


def _is_checkpoint(path: pathlib.Path) -> bool:
  return (path / _FILE).is_file() or (path / "state" / orbax_tree.METADATA).is_file()


def _vocabulary_size(checkpoint: pathlib.Path) -> int | None:
  beside = (vocabulary_files.size(folder) for folder in (checkpoint, checkpoint.parent))
  return next((size for size in beside if size is not None), None)


def _open_orbax(checkpoint: pathlib.Path) -> dict[str, LazyTensor]:
  """Open the `target` (or `params`) subtree of a T5X train state; the optimizer's part stays on disk."""
  try:
    return orbax_tree.open_tree(checkpoint / "state", ("target", "params"), tuple(_SCANNED))
  except ConfigError as error:
    raise ConfigError(f"T5X checkpoint {checkpoint}: {error}") from error


def _open_native(checkpoint: pathlib.Path) -> dict[str, LazyTensor]:
  """Open the `target` subtree: a msgpack tree whose large leaves are descriptions of zarr folders beside it."""
  path = checkpoint / _FILE
  if _starts_with(path, b"model_checkpoint_path"):
    raise ConfigError(f"{path} is TensorFlow's, of Mesh TensorFlow: convert it with T5X's convert_tf_checkpoint.py")
  tree = msgpack_file.read(path)
  inner = tree.get("optimizer", tree)
  target = (inner.get("target") if isinstance(inner, dict) else None) or tree.get("params")
  if not isinstance(target, dict):
    raise ConfigError(f"{path} has no parameters: neither optimizer/target nor target nor params")
  target = target["params"] if isinstance(target.get("params"), dict) else target
  version = msgpack_file.plain(tree.get("version"))
  wide = isinstance(version, int) and version < 3  # they wrote bfloat16 as uint16 then
  contexts = {stacked: zarr_arrays.new_context(stacked) for stacked in (False, True)}
  return {
    name: _open_leaf(checkpoint, name, leaf, wide, contexts[name.startswith(tuple(_SCANNED))])
    for name, leaf in _flatten(target).items()
  }


def _starts_with(path: pathlib.Path, text: bytes) -> bool:
  try:
    with open(path, "rb") as file:
      return file.read(len(text)) == text
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping) and "driver" not in value:
      flat |= _flatten(value, f"{prefix}{key}/")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def _open_leaf(checkpoint: pathlib.Path, name: str, leaf: Any, wide: bool, context: Any) -> LazyTensor:
  """Open one leaf: an array in the msgpack file, or a zarr folder named by its tensorstore spec."""
  where = f"T5X checkpoint {checkpoint}: {name}"
  if isinstance(leaf, LazyTensor):
    return dataclasses.replace(leaf, where=where)
  try:
    folder, described = _folder_of(leaf)
  except (TypeError, AttributeError, KeyError, ValueError) as error:
    raise zarr_arrays.damaged(where, error) from error
  tensor = zarr_arrays.open_array(zarr_arrays.Folder(checkpoint), folder, where, context, described)
  return _viewed_as_bfloat16(tensor) if wide and tensor.dtype == np.uint16 else tensor


def _folder_of(spec: Any) -> tuple[str, dict[str, Any]]:
  """Read a tensorstore spec: (the folder's name, what it says of the array)."""
  if not isinstance(spec, Mapping):
    raise ValueError(f"neither an array nor a tensorstore spec but {type(spec).__name__}")
  while spec["driver"] == "cast":  # around the array proper
    spec = spec["base"]
  kvstore = spec.get("kvstore") or {}
  if spec["driver"] != "zarr" or kvstore.get("driver") not in _STORES:
    raise ValueError(f"driver {str(spec['driver'])[:40]!r} on {str(kvstore.get('driver'))[:40]!r}, which is not read")
  path = "/".join(str(part) for part in (kvstore.get("path", ""), spec.get("path", "")) if part)
  name = pathlib.PurePosixPath(path).name  # of a whole path only the last part: it moved
  if name in ("", "..", ".") or "\0" in name:
    raise ValueError(f"a path that names no folder: {path[:80]!r}")
  metadata = dict(spec.get("metadata") or {})
  described = {"shape": list(metadata["shape"])} if "shape" in metadata else {}
  return name, described | ({"dtype": spec["dtype"]} if "dtype" in spec else {})


def _viewed_as_bfloat16(tensor: LazyTensor) -> LazyTensor:
  dtype = np.dtype(ml_dtypes.bfloat16)

  def fetch(index):
    return np.ascontiguousarray(tensor.read(index)).view(dtype)

  return dataclasses.replace(tensor, dtype=dtype, fetch=fetch)
