"""Export to T5X's native form, as its Checkpointer writes it.

    DIR/config.gin                      T5Config as T5X's operative configuration says it
    DIR/checkpoint_<step>/checkpoint    msgpack: {version, optimizer: {target: specs, state: {step}}}
    DIR/checkpoint_<step>/target.*/     one zarr folder a tensor, gzip, chunks of at most 64 MiB

Models with one relative bias a stack become those of t5x/examples/t5, models with one a layer those of
t5x/examples/scalable_t5 (layers stacked on axis 1, heads and their width apart).
"""

from __future__ import annotations

import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from distillspec_jax.models import LanguageModel
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import integrity, layouts, t5x_config, trees
from distillspec_jax.weights.layouts import Place

_VERSION = 3
_CHUNK_BYTES = 64 * 1024 * 1024
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.*)")
_HEADS = {"query/kernel": 1, "key/kernel": 1, "value/kernel": 1, "out/kernel": 0}


def export(
  directory: str | pathlib.Path,
  model: LanguageModel,
  params: Params,
  step: int = 0,
  *,
  dtype: Any = None,
  track: Callable[[Iterable, str], Iterable] = lambda items, what: items,
) -> pathlib.Path:
  """Write DIR/checkpoint_<step>, which T5X restores; it appears under its name only when it is complete.

  The optimizer's state is not written: T5X starts it anew where it restores for training (`fallback_state`).

  Args:
    directory: made where absent.
    model: a T5.
    params: its parameters, arrays or lazy tensors; one tensor of the file at a time is on the host.
    step: the step that the checkpoint is of.
    dtype: what is written; by default each in its own.
    track: what shows progress, see `convert`.

  Returns:
    The checkpoint's folder.

  Raises:
    ConfigError: T5X has no such model, the parameters do not fit it, the step is there already, or `dtype` cannot hold
      a number.
  """
  text = t5x_config.write_gin(model).encode()
  if type(step) is not int or step < 0:
    raise ConfigError(f"step={step!r}: a whole number of at least 0")
  flat = trees.flatten(params)
  trees.require_same(layouts.expected(model), flat, "the parameter tree given")
  directory = pathlib.Path(directory)
  final, gin = directory / f"checkpoint_{step}", directory / t5x_config.GIN
  if final.exists():
    raise ConfigError(f"{final} exists already: choose another folder or another step")
  if gin.is_file() and gin.read_bytes() != text:
    raise ConfigError(f"{gin} describes another model or is another program's: choose another folder")
  places = _table(flat) if model.config.relative_bias == "per_layer" else {name: Place(name) for name in flat}
  heads = model.config.num_heads
  shapes = layouts.stored(places, flat, heads)
  temporary = directory / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"
  had_gin = gin.is_file()
  with integrity.undone_on_error(directory):
    try:
      temporary.mkdir()
      specs = {}
      for name in track(sorted(shapes), "writing"):
        specs[name] = _write(temporary, name, layouts.stored_value(places, name, flat, dtype, heads))
      _write_tree(temporary / "checkpoint", specs, step)
      integrity.write_atomically(gin, text)
      temporary.rename(final)
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      if not had_gin:
        gin.unlink(missing_ok=True)
      raise
  return final


def _table(flat: dict[str, Any]) -> dict[str, Place]:
  """List every parameter's place in scalable_t5: the import's table the other way round."""
  places = {}
  for name in sorted(flat, key=lambda name: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)]):
    if match := _LAYER.fullmatch(name):
      stack, layer, rest = match[1], int(match[2]), match[3]
      heads = next((axis for end, axis in _HEADS.items() if rest.endswith(end)), None)
      places[name] = Place(f"{stack}/{stack}/{rest}", layer=layer, heads=heads)
    else:
      places[name] = Place(name)
  return places


def _write(folder: pathlib.Path, name: str, value: np.ndarray) -> dict[str, Any]:
  """Write one tensor as zarr; return the spec that stands for it in the tree, its path relative as T5X has it."""
  import tensorstore  # noqa: PLC0415

  path = f"target.{name.replace('/', '.')}"
  chunks = chunk_shape(value.shape, _CHUNK_BYTES // value.dtype.itemsize)
  spec = {
    "driver": "zarr",
    "dtype": value.dtype.name,
    "kvstore": {"driver": "file", "path": f"{path}/"},
    "metadata": {"chunks": chunks, "compressor": {"id": "gzip", "level": 1}, "shape": list(value.shape)},
  }
  here = {**spec, "kvstore": {"driver": "file", "path": f"{folder / path}/"}}
  tensorstore.open(here, create=True).result().write(np.ascontiguousarray(value)).result()
  return spec


def _write_tree(path: pathlib.Path, specs: dict[str, dict], step: int) -> None:
  import flax.serialization  # noqa: PLC0415

  target = trees.unflatten(specs)
  tree = {"version": _VERSION, "optimizer": {"target": target, "state": {"step": np.asarray(step, np.int32)}}}
  integrity.write_atomically(path, flax.serialization.msgpack_serialize(tree))


def chunk_shape(shape: Sequence[int], elements: int) -> list[int]:
  """Choose T5X's chunks: the largest axis goes down to its next divisor until a chunk has at most so many elements."""
  chunks = list(shape)
  while int(np.prod(chunks, dtype=np.int64)) > max(1, elements):
    axis = int(np.argmax(chunks))
    chunks[axis] = max(n for n in range(1, chunks[axis]) if shape[axis] % n == 0)
  return chunks
