"""Import from and export to Hugging Face's T5 (safetensors and config.json), v1.0 and v1.1, and mT5.

`table` (huggingface_table) is the one list of names and layouts; import and export read it in two directions.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from distillspec_jax.models import T5, T5Config
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import (
  huggingface_files,
  layouts,
  lazy_tensors,
  strict_json,
  trees,
  vocabulary_files,
)
from distillspec_jax.weights.huggingface_config import config_from, config_to, may_lack_head
from distillspec_jax.weights.huggingface_files import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS, export
from distillspec_jax.weights.huggingface_table import EMBEDDING, EMBEDDING_COPIES, HEAD, UNUSED, table
from distillspec_jax.weights.lazy_tensors import LazyTensor

__all__ = [
  "CONFIG", "GENERATION_CONFIG", "INDEX", "WEIGHTS", "config_from", "config_to", "export", "is_checkpoint", "load",
  "open_checkpoint", "table",
]  # fmt: skip

_TOKEN_AXES = {EMBEDDING: 0, HEAD: 0}
_ROWS = 1 << 12  # compared at a time


def is_checkpoint(directory: str | pathlib.Path) -> bool:
  """Say whether a folder looks like one of theirs: config.json with weights beside it."""
  directory = pathlib.Path(directory)
  return (directory / CONFIG).is_file() and any((directory / name).is_file() for name in huggingface_files.FILES)


def load(directory: str | pathlib.Path, config: Mapping[str, Any] | None = None) -> tuple[T5, Params]:
  """Import a Hugging Face T5 as numpy arrays (`weights.load_model` brings it to devices tensor by tensor).

  Args:
    directory: holds config.json and model.safetensors, or its shards with model.safetensors.index.json.
    config: T5Config fields that win over config.json, e.g. {"dtype": "bfloat16", "param_dtype": "bfloat16"}.

  Returns:
    (model, numpy parameters in `param_dtype`, float32 unless overridden: exact for float16 and bfloat16 files).

  Raises:
    ConfigError: not a T5, damaged, or keys or shapes that do not fit config.json.
  """
  model, tensors = open_checkpoint(directory, config)
  return model, trees.unflatten(lazy_tensors.read_all(tensors, np.dtype(model.config.param_dtype)))


def open_checkpoint(
  directory: str | pathlib.Path, config: Mapping[str, Any] | None = None
) -> tuple[T5, dict[str, LazyTensor]]:
  """Open a Hugging Face T5: the model and {name here: lazy tensor}, all checked; arguments and errors as `load`."""
  directory = pathlib.Path(directory)
  described = strict_json.read(directory / CONFIG)
  try:
    fields = config_from(described, str(directory))
  except (TypeError, AttributeError) as error:  # a list where a name belongs
    raise ConfigError(f"{directory / CONFIG} does not describe a T5 ({error})") from error
  tensors, problems = huggingface_files.open_tensors(directory)
  model = layouts.checked_model(fields, config, str(directory), len(tensors))
  if model.config.relative_bias != "shared":
    raise ConfigError(f"{directory}: Hugging Face's T5 has one relative bias a stack; relative_bias must be 'shared'")
  tensors = _settle_copies(tensors, model.config, described, str(directory))
  tensors, advice = _pad(tensors, model.config, config, directory)
  places = table(model.config)
  shapes = layouts.stored(places, layouts.expected(model))
  expected = {name: _Shape(shape) for name, shape in shapes.items()}
  trees.require_same(expected, tensors, f"Hugging Face model {directory}", also=problems, advice=advice)
  layouts.require_floats(tensors, f"Hugging Face model {directory}")
  return model, layouts.through(places, tensors)


@dataclasses.dataclass(frozen=True)
class _Shape:
  shape: tuple[int, ...]


def _pad(tensors, config: T5Config, override, directory: pathlib.Path) -> tuple[dict[str, LazyTensor], str]:
  rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors and tensors[EMBEDDING].shape else None
  size = config.vocab_size
  asked = rows is not None and rows < size
  asked = asked and layouts.padding_asked(override, rows, size, vocabulary_files.size(directory))
  return layouts.pad_vocabulary(tensors, _TOKEN_AXES, size, asked)


def _settle_copies(
  tensors: dict[str, LazyTensor], config: T5Config, described: Mapping[str, Any], where: str
) -> dict[str, LazyTensor]:
  """Fold the copies of the token table into shared.weight; a copy that differs is an error."""
  tensors = {name: value for name, value in tensors.items() if name not in UNUSED}
  copies = [*EMBEDDING_COPIES, *([HEAD] if config.logits_via_embedding else [])]
  for name in copies:
    if name not in tensors:
      continue
    value = tensors.pop(name)
    original = tensors.setdefault(EMBEDDING, value)
    if not _same(original, value):
      hint = " (an untied model? override logits_via_embedding=False)" if name == HEAD else ""
      raise ConfigError(f"{where}: {name} differs from {EMBEDDING}, of which config.json makes it a copy{hint}")
  if not config.logits_via_embedding and HEAD not in tensors and EMBEDDING in tensors and may_lack_head(described):
    tensors[HEAD] = tensors[EMBEDDING]  # their version 5: one table for both, logits not scaled
  return tensors


def _same(a: LazyTensor, b: LazyTensor) -> bool:
  if a is b or a.fetch == b.fetch:  # one storage
    return True
  if a.shape != b.shape or not a.shape:
    return False
  blocks = [slice(at, at + _ROWS) for at in range(0, a.shape[0], _ROWS)]
  rest = [slice(None)] * (a.ndim - 1)
  return all(np.array_equal(a.read([rows, *rest]), b.read([rows, *rest])) for rows in blocks)
