"""Arrays that lie uncompressed in a file, read slice by slice with ordinary reads.

No memory map: pages of a map count as resident memory, so a mapped model would be there twice, and a file that shrinks
under a map ends the process.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distillspec_jax.types import ConfigError
from distillspec_jax.weights.lazy_tensors import Index, LazyTensor

_BLOCK = 1 << 23  # bytes read at a time where only some columns are wanted


def lazy_array(
  path: pathlib.Path, regions: Sequence[tuple[int, int]], shape: Sequence[int], dtype: np.dtype, where: str
) -> LazyTensor:
  """Describe an array in C order.

  Args:
    path: the file.
    regions: (offset in the file, bytes) of the pieces that make up the array, in order.
    shape: of the array.
    dtype: of the array, little-endian.
    where: how messages name it.
  """
  shape, dtype = tuple(shape), np.dtype(dtype)
  if sum(size for _, size in regions) != math.prod(shape) * dtype.itemsize:
    raise ConfigError(f"{where} has {sum(s for _, s in regions)} bytes, which {dtype}{shape} does not have: damaged")

  return LazyTensor(shape, dtype, RawArray(path, tuple(regions), shape, dtype, where), where)


class RawArray(NamedTuple):
  """What fetches slices of such an array."""

  path: pathlib.Path
  regions: tuple[tuple[int, int], ...]
  shape: tuple[int, ...]
  dtype: np.dtype
  where: str

  def __call__(self, index: Index) -> np.ndarray:
    value = np.empty([part.stop - part.start for part in index], self.dtype)
    if value.size:
      try:
        with open(self.path, "rb", buffering=0) as file:
          _fill(_Pieces(file, self.regions, self.where), 0, self.shape, index, value)
      except OSError as error:
        raise ConfigError(f"{self.where} cannot be read: {error.strerror or error}") from error
    return value


class _Pieces:
  """Pieces of a file as one run of bytes."""

  def __init__(self, file: io.RawIOBase, regions: Sequence[tuple[int, int]], where: str):
    self._file, self._regions, self._where = file, regions, where

  def read_into(self, begin: int, target: np.ndarray) -> None:
    view, first = memoryview(target.reshape(-1).view(np.uint8)), 0
    for offset, size in self._regions:
      skip = begin - first
      first += size
      if not view or skip >= size:
        continue
      wanted = view[: size - skip]
      self._read_at(offset + skip, wanted)
      view, begin = view[len(wanted) :], begin + len(wanted)

  def _read_at(self, offset: int, view: memoryview) -> None:
    self._file.seek(offset)
    while view:
      count = self._file.readinto(view)
      if not count:
        raise ConfigError(f"{self._where} ends before its last byte: the file is truncated, copy it again")
      view = view[count:]


def _fill(pieces: _Pieces, begin: int, shape: tuple[int, ...], index: Index, value: np.ndarray) -> None:
  """Read shape[index], of the array that begins at byte `begin`, into `value`."""
  itemsize = value.dtype.itemsize
  if not shape:
    pieces.read_into(begin, value)
    return
  row = math.prod(shape[1:])
  first, last = index[0].start, index[0].stop
  if all((part.start, part.stop) == (0, size) for part, size in zip(index[1:], shape[1:], strict=True)):
    pieces.read_into(begin + first * row * itemsize, value)
  elif len(shape) == 2:
    columns, step = index[1], max(1, _BLOCK // (row * itemsize))
    for at in range(first, last, step):
      count = min(step, last - at)
      block = np.empty(count * row, value.dtype)
      inner = block[columns.start : (count - 1) * row + columns.stop]
      pieces.read_into(begin + (at * row + columns.start) * itemsize, inner)
      value[at - first : at - first + count] = block.reshape(count, row)[:, columns]
  else:
    for at in range(first, last):
      _fill(pieces, begin + at * row * itemsize, shape[1:], index[1:], value[at - first])
