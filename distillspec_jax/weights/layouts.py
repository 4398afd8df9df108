"""Where each parameter lies in another format, as a table: name, transposition, layer of a stack, heads, padding.

A format's table is {name here: Place}; `through` reads by it and `stored` writes by it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from distillspec_jax.models import T5, T5Config
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import lazy_tensors, trees
from distillspec_jax.weights.lazy_tensors import LazyTensor

STACK_AXIS = 1  # where T5X's scanned layers are stacked
_LARGEST = 2**31 - 1
_KINDS = dict(relative_attention_num_buckets=int, relative_attention_max_distance=int, logits_via_embedding=bool)
_KIND_NAMES = {int: "a whole number", bool: "true or false"}
EMBEDDING, HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"


class Place(NamedTuple):
  """Where one parameter lies.

  Attributes:
    name: the tensor there.
    transpose: the axes are the other way round there.
    layer: the parameter is this layer of a tensor that stacks all of them on `STACK_AXIS`; None where it stands alone.
    heads: this axis is two there, heads and their width; None where it is one there too.
  """

  name: str
  transpose: bool = False
  layer: int | None = None
  heads: int | None = None


def through(table: Mapping[str, Place], tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
  """Look at the tensors of another format as the parameters here; nothing is read."""
  return {name: _here(place, tensors[place.name]) for name, place in table.items()}


def _here(place: Place, tensor: LazyTensor) -> LazyTensor:
  if place.layer is not None:
    tensor = lazy_tensors.layer_of(tensor, place.layer, STACK_AXIS)
  if place.heads is not None:
    tensor = lazy_tensors.axes_joined(tensor, place.heads)
  return lazy_tensors.transposed(tensor) if place.transpose else tensor


def stored(table: Mapping[str, Place], shapes: Mapping[str, Any], num_heads: int = 1) -> dict[str, tuple[int, ...]]:
  """List what another format holds: its names -> shapes, from the parameters' shapes here."""
  listed: dict[str, tuple[int, ...]] = {}
  for name, place in table.items():
    shape = _there(place, np.broadcast_to(np.empty((), np.int8), shapes[name].shape), num_heads).shape
    if place.layer is not None:
      layers = place.layer + 1
      shape = (*shape[:STACK_AXIS], layers, *shape[STACK_AXIS:])
    listed[place.name] = shape  # of a stack the last layer, which comes last, says how many there are
  return listed


def stored_value(table: Mapping[str, Place], name: str, params: Mapping[str, Any], dtype, num_heads: int = 1):
  """Make one tensor of another format, in `dtype`, from the parameters here (arrays or lazy tensors)."""
  parts = [(here, place) for here, place in table.items() if place.name == name]
  values = []
  for here, place in parts:
    value = lazy_tensors.to_host(params[here])
    values.append(_there(place, lazy_tensors.cast(value, dtype or value.dtype, f"parameter {here}"), num_heads))
  return values[0] if parts[0][1].layer is None else np.stack(values, STACK_AXIS)


def _there(place: Place, value: np.ndarray, num_heads: int) -> np.ndarray:
  value = value.T if place.transpose else value
  if place.heads is None:
    return value
  return value.reshape(*value.shape[: place.heads], num_heads, -1, *value.shape[place.heads + 1 :])


def checked_model(fields: Mapping[str, Any], override: Mapping[str, Any] | None, where: str, tensors: int) -> T5:
  """Make the T5 that a description and the user's own fields describe.

  Raises:
    ConfigError: a field is no configuration, or claims more than a file of so many tensors can be.
  """
  fields = {**fields, **(override or {})}
  for name, value in fields.items():
    if isinstance(value, int) and value > _LARGEST:
      raise ConfigError(f"{where}: {name} is {value:.3g}, which no model has: the description is damaged")
    if name in ("num_encoder_layers", "num_decoder_layers") and isinstance(value, int) and value > max(tensors, 1):
      raise ConfigError(f"{where}: {name} is {value:,}, but there are {tensors} tensors: they do not fit each other")
    if name in ("layer_norm_epsilon", "dropout_rate") and not (
      type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1
    ):
      raise ConfigError(f"{where}: {name} is {str(value)[:40]!r}; it must be a number in [0, 1)")
    if (kind := _KINDS.get(name)) and type(value) is not kind:
      raise ConfigError(f"{where}: {name} is {str(value)[:40]!r}; it must be {_KIND_NAMES[kind]}")
  try:
    return T5(T5Config.from_dict(fields))
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}") from error
  except (TypeError, ValueError, OverflowError) as error:
    raise ConfigError(f"{where} does not describe a T5 ({error})") from error


def expected(model: T5) -> dict[str, jax.ShapeDtypeStruct]:
  """List a model's parameters: name -> shape and dtype."""
  return _expected(model.config)


@functools.lru_cache(maxsize=8)
def _expected(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Trace one layer of each stack: the others are the same, and a damaged file may claim very many."""
  one = T5(dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1))
  listed = {}
  for name, like in trees.flatten(one.abstract_params()).items():
    stack, _, rest = name.partition("/layers_0/")
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}.get(stack, 0)
    listed |= {f"{stack}/layers_{i}/{rest}": like for i in range(layers)} if rest else {name: like}
  return listed


def require_floats(tensors: Mapping[str, LazyTensor], where: str) -> None:
  """Refuse tensors of whole numbers: they are quantised, or something else."""
  wrong = {name: tensor.dtype for name, tensor in tensors.items() if not lazy_tensors.is_float(tensor.dtype)}
  if listed := [f"{name} as {dtype}" for name, dtype in wrong.items()]:
    raise ConfigError(f"{where} holds {trees.few(listed)}; parameters are float32, bfloat16, float16 or float64 here")


def pad_vocabulary(
  tensors: Mapping[str, LazyTensor], axes: Mapping[str, int], size: int, asked: bool
) -> tuple[dict[str, LazyTensor], str]:
  """Pad the tables over the vocabulary with zeros where that was asked for.

  Args:
    tensors: a file's tensors.
    axes: those that have an axis of tokens -> that axis.
    size: vocab_size.
    asked: whether padding was asked for.

  Returns:
    (the tensors, advice for the error where rows are lacking and padding was not asked for, else "").
  """
  short = {n: a for n, a in axes.items() if n in tensors and tensors[n].ndim > a and tensors[n].shape[a] < size}
  if not short:
    return dict(tensors), ""
  if not asked:
    rows = ", ".join(sorted({str(tensors[name].shape[axis]) for name, axis in short.items()}))
    return dict(tensors), (
      f"The file has {rows} tokens, the configuration {size}: to pad with zeros, ask for it with vocab_size={size} in "
      "the configuration that you override."
    )
  return {**tensors, **{n: lazy_tensors.padded(tensors[n], axis, size) for n, axis in short.items()}}, ""


def padding_asked(override: Mapping[str, Any] | None, rows: int | None, size: int, vocabulary: int | None) -> bool:
  """Say whether lacking rows may be zeros: the user said vocab_size, or the vocabulary beside is what was padded.

  The second is a vocabulary of exactly the file's rows and a configuration that rounds it up to a multiple of 128.
  """
  return "vocab_size" in (override or {}) or (
    vocabulary is not None and rows == vocabulary and size == -(-vocabulary // 128) * 128
  )
