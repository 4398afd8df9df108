"""The files of a Hugging Face directory: one file of tensors or shards with an index, read strictly, written whole.

Writing is atomic as far as several files can be: all are written under other names first, config.json goes before any
is replaced and comes last, and without it the directory is no model.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from distillspec_jax.models import LanguageModel
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import (
  huggingface_table,
  integrity,
  layouts,
  safetensors_file,
  strict_json,
  torch_file,
  trees,
)
from distillspec_jax.weights.huggingface_config import config_to, generation_config
from distillspec_jax.weights.lazy_tensors import LazyTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_TORCH, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FILES = (WEIGHTS, INDEX, _TORCH, _TORCH_INDEX)  # in the order of preference, as with them
_WRITTEN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
SHARD_BYTES = 5_000_000_000


def open_tensors(directory: pathlib.Path) -> tuple[dict[str, LazyTensor], list[str]]:
  """List the tensors of a directory and what is wrong with their distribution over shards.

  Raises:
    ConfigError: no weights, a file that is absent or damaged, or an index that names files elsewhere.
  """
  found = next((name for name in FILES if (directory / name).is_file()), None)
  if found is None:
    raise ConfigError(f"{directory} has no weights: none of {', '.join(FILES)}")
  open_file = safetensors_file.open_file if found in (WEIGHTS, INDEX) else torch_file.open_file
  if found in (WEIGHTS, _TORCH):
    return open_file(directory / found), []
  index = _read_index(directory / found, pathlib.Path(found.removesuffix(".index.json")).suffix)
  tensors: dict[str, LazyTensor] = {}
  holders: dict[str, list[str]] = {}
  for name in sorted(set(index.values())):
    for tensor, value in open_file(directory / name).items():
      tensors.setdefault(tensor, value)
      holders.setdefault(tensor, []).append(name)
  problems = []
  if twice := [f"{name} in {' and '.join(files)}" for name, files in holders.items() if len(files) > 1]:
    problems.append(f"holds {trees.few(twice)}: one of them is a duplicate")
  if lost := sorted(set(index) - set(holders)):
    problems.append(f"has an index ({found}) that names {trees.few(lost)}, which no shard holds")
  moved = [name for name, file in index.items() if name in holders and file not in holders[name]]
  if moved := [f"{name} in {holders[name][0]}" for name in moved]:
    problems.append(f"holds {trees.few(moved)}, which its index ({found}) places in another shard")
  return tensors, problems


def _read_index(path: pathlib.Path, suffix: str) -> dict[str, str]:
  index = strict_json.read(path).get("weight_map")
  if not isinstance(index, dict) or not index:
    raise ConfigError(f"{path} has no weight_map: it is damaged, copy it again")
  for name in index.values():
    if not isinstance(name, str) or "/" in name or "\\" in name or "\0" in name or not name.endswith(suffix):
      raise ConfigError(
        f"{path} names the shard {str(name)[:80]!r}: shards are {suffix} files in the same folder, and nothing else is "
        "opened"
      )
  if missing := sorted({name for name in index.values() if not (path.parent / name).is_file()}):
    raise ConfigError(f"{path.parent} lacks {trees.few(missing)}, which {path.name} names: copy it again")
  return index


def export(
  directory: str | pathlib.Path,
  model: LanguageModel,
  params: Params,
  *,
  dtype: Any = None,
  shard_bytes: int = SHARD_BYTES,
  track: Callable[[Iterable, str], Iterable] = lambda items, what: items,
) -> None:
  """Write safetensors, config.json and generation_config.json, which transformers' T5ForConditionalGeneration reads.

  Args:
    directory: made where absent; an export that is there is replaced.
    model: a T5 with one relative bias a stack.
    params: its parameters, arrays or lazy tensors; one at a time is brought to the host.
    dtype: what is written; by default each in its own.
    shard_bytes: how large a file may be before there are several, with an index.
    track: what shows progress, see `convert`.

  Raises:
    ConfigError: their T5 cannot hold this model, the parameters do not fit it, or `dtype` cannot hold a number.
  """
  described = config_to(model)
  flat = trees.flatten(params)
  trees.require_same(layouts.expected(model), flat, "the parameter tree given")
  table = huggingface_table.table(model.config)
  shapes, here = layouts.stored(table, flat), {place.name: name for name, place in table.items()}
  dtypes = {name: np.dtype(dtype or flat[here[name]].dtype) for name in shapes}
  layout = {name: (shapes[name], dtypes[name]) for name in sorted(shapes, key=lambda n: (-dtypes[n].itemsize, n))}
  described["torch_dtype"] = str(dtypes[table[layouts.EMBEDDING].name])
  files = _split(layout, shard_bytes)
  directory = pathlib.Path(directory)
  mark = f".{uuid.uuid4().hex[:8]}.tmp"
  texts = {GENERATION_CONFIG: generation_config()} | ({INDEX: _index(files)} if len(files) > 1 else {})

  def produce(name):
    return layouts.stored_value(table, name, flat, dtypes[name])

  with integrity.undone_on_error(directory):
    try:
      todo = iter(track([name for part in files.values() for name in part], "writing"))
      for file, part in files.items():
        safetensors_file.write_file(directory / (file + mark), part, produce, itertools.islice(todo, len(part)))
      next(todo, None)  # the tracker's last word
      for name, value in texts.items():
        (directory / (name + mark)).write_bytes(_json(value))
      (directory / CONFIG).unlink(missing_ok=True)
      for path in [path for path in directory.iterdir() if _WRITTEN.fullmatch(path.name)]:
        path.unlink()
      for name in (*files, *texts):
        (directory / (name + mark)).replace(directory / name)
      integrity.write_atomically(directory / CONFIG, _json(described))
    except BaseException:
      for path in directory.glob(f"*{mark}"):
        path.unlink()
      raise


def _split(layout: Mapping[str, tuple], shard_bytes: int) -> dict[str, dict[str, tuple]]:
  """Distribute tensors over files, in order; a tensor is never cut."""
  parts: list[dict[str, tuple]] = [{}]
  room = shard_bytes
  for name, (shape, dtype) in layout.items():
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size > room and parts[-1]:
      parts.append({})
      room = shard_bytes
    parts[-1][name] = (shape, dtype)
    room -= size
  if len(parts) == 1:
    return {WEIGHTS: parts[0]}
  return {f"model-{i + 1:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts)}


def _index(files: Mapping[str, Mapping[str, tuple]]) -> dict[str, Any]:
  sizes = [int(np.prod(s, dtype=np.int64)) * d.itemsize for part in files.values() for s, d in part.values()]
  weight_map = {name: file for file, part in files.items() for name in part}
  return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}


def _json(value: Any) -> bytes:
  return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
