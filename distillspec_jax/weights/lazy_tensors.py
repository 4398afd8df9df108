"""Tensors that stay on disk until a slice of them is wanted, and what turns one layout into another on the way.

Every format gives {name: LazyTensor}; `place` brings one to its devices, slice by slice, so that a model is never in
memory twice and no device's share is read for another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distillspec_jax.types import ConfigError

Index = tuple[slice, ...]  # one slice an axis, start and stop given, step 1


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor somewhere else.

  Attributes:
    shape: its whole shape.
    dtype: what `read` gives.
    fetch: full index -> a new numpy array of that slice.
    where: file and name, as messages should say it.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[Index], np.ndarray]
  where: str

  @property
  def ndim(self) -> int:
    """Count the axes."""
    return len(self.shape)

  @property
  def nbytes(self) -> int:
    """Count the bytes of the whole tensor."""
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize

  def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
    """Read a slice (by default all), as a new array.

    Raises:
      ConfigError: the file is damaged.
    """
    index = full_index(self.shape, index)
    value = self.fetch(index)
    wanted = tuple(part.stop - part.start for part in index)
    if value.shape != wanted or value.dtype != self.dtype:
      raise ConfigError(f"{self.where} gave {value.dtype}{value.shape} instead of {self.dtype}{wanted}: it is damaged")
    return value


def full_index(shape: Sequence[int], index: Sequence[slice] | None = None) -> Index:
  """Say every slice's start and stop."""
  index = [slice(None)] * len(shape) if index is None else index
  return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def of_array(value: Any, where: str = "an array") -> LazyTensor:
  """Wrap what is in memory (a numpy or a jax array)."""
  return LazyTensor(tuple(value.shape), np.dtype(value.dtype), lambda index: np.array(value[index]), where)


def transposed(tensor: LazyTensor) -> LazyTensor:
  """Reverse the axes."""

  def fetch(index):
    return tensor.read(index[::-1]).T

  return dataclasses.replace(tensor, shape=tensor.shape[::-1], fetch=fetch)


def layer_of(stack: LazyTensor, number: int, axis: int) -> LazyTensor:
  """Take one layer of a stack; the stack's axis goes."""
  shape = (*stack.shape[:axis], *stack.shape[axis + 1 :])

  def fetch(index):
    return stack.read((*index[:axis], slice(number, number + 1), *index[axis:])).squeeze(axis)

  return dataclasses.replace(stack, shape=shape, fetch=fetch, where=f"{stack.where}, layer {number}")


def axes_joined(tensor: LazyTensor, axis: int) -> LazyTensor:
  """Make one axis of `axis` and the next, e.g. heads [H] and their width [D] -> [H*D]."""
  width = tensor.shape[axis + 1]
  shape = (*tensor.shape[:axis], tensor.shape[axis] * width, *tensor.shape[axis + 2 :])

  def fetch(index):
    parts = []
    for rows, columns in _rectangles(index[axis].start, index[axis].stop, width):
      part = tensor.read((*index[:axis], rows, columns, *index[axis + 1 :]))
      parts.append(part.reshape(*part.shape[:axis], -1, *part.shape[axis + 2 :]))
    if not parts:
      return np.empty([part.stop - part.start for part in index], tensor.dtype)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

  return dataclasses.replace(tensor, shape=shape, fetch=fetch)


def _rectangles(start: int, stop: int, width: int):
  """Cut [start, stop) of a joined axis into (rows, columns): a last part of a row, whole rows, a first part."""
  while start < stop:
    row, column = divmod(start, width)
    if column or stop - start < width:
      end = min(stop, (row + 1) * width)
      yield slice(row, row + 1), slice(column, column + end - start)
    else:
      end = stop - stop % width
      yield slice(row, end // width), slice(0, width)
    start = end


def padded(tensor: LazyTensor, axis: int, size: int) -> LazyTensor:
  """Lengthen one axis to `size` with zeros."""
  held = tensor.shape[axis]
  shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])

  def fetch(index):
    value = np.zeros([part.stop - part.start for part in index], tensor.dtype)
    start, stop = min(index[axis].start, held), min(index[axis].stop, held)
    if stop > start:
      before = (slice(None),) * axis
      value[(*before, slice(0, stop - start))] = tensor.read((*index[:axis], slice(start, stop), *index[axis + 1 :]))
    return value

  return dataclasses.replace(tensor, shape=shape, fetch=fetch)


def is_float(dtype: Any) -> bool:
  """Say whether a dtype is a floating one, bfloat16 included."""
  return bool(jax.numpy.issubdtype(dtype, jax.numpy.floating))


def cast(value: np.ndarray, dtype: Any, where: str) -> np.ndarray:
  """Convert to another floating dtype.

  Raises:
    ConfigError: a finite number became infinite.
  """
  dtype = np.dtype(dtype)
  if value.dtype == dtype:
    return value
  with np.errstate(over="ignore"):
    converted = value.astype(dtype)
  narrower = float(jax.numpy.finfo(dtype).max) < float(jax.numpy.finfo(value.dtype).max)
  if narrower and (lost := ~np.isfinite(converted) & np.isfinite(value)).any():
    largest = float(np.abs(value[lost].astype(np.float64)).max())
    raise ConfigError(
      f"{where} holds {largest:.6g}, which {dtype} cannot hold (it ends at {float(jax.numpy.finfo(dtype).max):.6g}): "
      "choose bfloat16 or float32"
    )
  return converted


def as_dtype(tensor: LazyTensor, dtype: Any) -> LazyTensor:
  """Convert each slice as it is read; see `cast`."""
  dtype = np.dtype(dtype)
  if tensor.dtype == dtype:
    return tensor

  def fetch(index):
    return cast(tensor.read(index), dtype, tensor.where)

  return dataclasses.replace(tensor, dtype=dtype, fetch=fetch)


def place(tensor: LazyTensor, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Bring a tensor to where `like.sharding` says, in its dtype: each distinct slice is read once, nothing else is."""
  tensor = as_dtype(tensor, like.dtype)
  seen: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share what was read

  def slice_of(index):
    index = full_index(tensor.shape, index)
    key = tuple((part.start, part.stop) for part in index)
    if key not in seen:
      seen[key] = np.ascontiguousarray(tensor.read(index)).reshape([part.stop - part.start for part in index])
    return seen[key]

  return jax.make_array_from_callback(tensor.shape, like.sharding, slice_of)


def read_all(tensors: Mapping[str, LazyTensor], dtype: Any) -> dict[str, np.ndarray]:
  """Read every tensor whole, as contiguous numpy arrays of `dtype`."""
  return {name: np.ascontiguousarray(as_dtype(tensor, dtype).read()) for name, tensor in tensors.items()}


def to_host(leaf: Any) -> np.ndarray:
  """Bring one parameter to the host: a lazy tensor is read, a jax array gathered from its shards.

  jax keeps a copy of what `np.asarray` fetched from a device inside the array, so a whole model would stay on the
  host; shards' arrays are let go.
  """
  if isinstance(leaf, LazyTensor):
    return leaf.read()
  if not isinstance(leaf, jax.Array) or not leaf.is_fully_addressable:
    return np.asarray(leaf)
  shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
  if len(shards) == 1:
    return np.asarray(shards[0].data)
  value = np.empty(leaf.shape, leaf.dtype)
  for shard in shards:
    value[shard.index] = np.asarray(shard.data)
  return value
