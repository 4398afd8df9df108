"""Flax's msgpack trees, read without their arrays: those become lazy tensors over the file.

T5X's `checkpoint` file is such a tree. Only what Flax writes is read: maps with text as keys, plain values, numpy
arrays and scalars (ext types 1 and 3). Sizes are checked against the file before anything is allocated. Arrays that
stand in the file carry no checksum.
"""

from __future__ import annotations

import os
import pathlib
import struct
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import raw_arrays
from distillspec_jax.weights.lazy_tensors import LazyTensor

_DEPTH = 100
_NODES = 2_000_000
_TEXT = 1 << 16  # bytes of one name
_ARRAY, _SCALAR = 1, 3  # Flax's ext types
_CHUNKED = "__msgpack_chunked_array__"  # an array of more than 1 GiB, which msgpack cannot hold in one piece
_NUMBERS = {
  0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class Bytes(NamedTuple):
  """Where raw bytes lie in the file."""

  offset: int
  size: int


def read(path: pathlib.Path) -> dict[str, Any]:
  """Read the tree of a file: nested dicts whose arrays are lazy tensors.

  Raises:
    ConfigError: truncated, damaged, or not what Flax writes.
  """
  try:
    with open(path, "rb") as file:
      walker = _Walker(path, file)
      tree = walker.value(0)
      if walker.room():
        raise walker.damaged(f"{walker.room()} bytes follow its end")
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
  if not isinstance(tree, dict):
    raise ConfigError(f"{path} holds no tree of parameters: it is damaged or no T5X file")
  return tree


class _Walker:
  """Reads one value after another from an open file."""

  def __init__(self, path: pathlib.Path, file: Any):
    self._path, self._file, self._nodes = path, file, 0
    self._size = os.fstat(file.fileno()).st_size

  def room(self) -> int:
    return self._size - self._file.tell()

  def damaged(self, reason: str) -> ConfigError:
    return ConfigError(f"{self._path} cannot be read ({reason}): it is damaged or no T5X file")

  def value(self, depth: int) -> Any:
    self._nodes += 1
    if depth > _DEPTH or self._nodes > _NODES:
      raise self.damaged(f"it nests deeper than {_DEPTH} or has more than {_NODES:,} values")
    code = self._take(1)[0]
    if code < 0x80:
      return code
    if code >= 0xE0:
      return code - 0x100
    if code in _CONSTANTS:
      return _CONSTANTS[code]
    if code in _NUMBERS:
      form = _NUMBERS[code]
      return struct.unpack(form, self._take(struct.calcsize(form)))[0]
    if code < 0x90:
      return self._map(code & 0x0F, depth)
    if code < 0xA0:
      return self._list(code & 0x0F, depth)
    if code < 0xC0:
      return self._text(code & 0x1F)
    if 0xC4 <= code <= 0xC6:
      return self._skip(self._count(code - 0xC4))
    if 0xC7 <= code <= 0xC9:
      return self._extension(self._count(code - 0xC7), depth)
    if 0xD4 <= code <= 0xD8:
      return self._extension(1 << (code - 0xD4), depth)
    if 0xD9 <= code <= 0xDB:
      return self._text(self._count(code - 0xD9))
    if code in (0xDC, 0xDD):
      return self._list(self._count(code - 0xDC + 1), depth)
    if code in (0xDE, 0xDF):
      return self._map(self._count(code - 0xDE + 1), depth)
    raise self.damaged(f"byte {code:#x} begins no value")

  def _take(self, count: int) -> bytes:
    data = self._file.read(count)
    if len(data) != count:
      raise self.damaged("it ends too early")
    return data

  def _count(self, power: int) -> int:
    return int.from_bytes(self._take(1 << power), "big")

  def _text(self, count: int) -> str:
    if count > _TEXT:
      raise self.damaged(f"a name of {count:,} bytes")
    try:
      return self._take(count).decode()
    except UnicodeDecodeError as error:
      raise self.damaged("a name is no text") from error

  def _skip(self, count: int) -> Bytes:
    place = Bytes(self._file.tell(), count)
    if count > self.room():
      raise self.damaged(f"{count:,} bytes should follow where {self.room():,} are left")
    self._file.seek(count, os.SEEK_CUR)
    return place

  def _list(self, count: int, depth: int) -> list:
    if count > self.room():
      raise self.damaged(f"a list of {count:,} values where {self.room():,} bytes are left")
    return [self.value(depth + 1) for _ in range(count)]

  def _map(self, count: int, depth: int) -> Any:
    if 2 * count > self.room():
      raise self.damaged(f"a map of {count:,} values where {self.room():,} bytes are left")
    tree = {}
    for _ in range(count):
      key = self.value(depth + 1)
      if not isinstance(key, str):
        raise self.damaged(f"a name is {type(key).__name__}, not text")
      if key in tree:
        raise self.damaged(f"{key!r} stands there twice")
      tree[key] = self.value(depth + 1)
    return self._joined(tree) if _CHUNKED in tree else tree

  def _extension(self, count: int, depth: int) -> Any:
    kind = struct.unpack("b", self._take(1))[0]
    end = self._file.tell() + count
    if count > self.room():
      raise self.damaged(f"an array of {count:,} bytes where {self.room():,} are left")
    if kind not in (_ARRAY, _SCALAR):
      return self._skip(count)
    parts = self.value(depth + 1)
    if self._file.tell() != end or not isinstance(parts, list) or len(parts) != 3:
      raise self.damaged("an array is not shape, dtype and bytes")
    shape, name, data = parts
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 8:
      raise self.damaged("an array has no shape")
    if not isinstance(data, Bytes):
      raise self.damaged("an array has no bytes")
    return self._lazy([data], shape, self._dtype(name))

  def _dtype(self, name: Any) -> np.dtype:
    name = "bfloat16" if name == "V2" else name  # as old numpy calls it
    try:
      dtype = np.dtype(jnp.bfloat16) if name == "bfloat16" else np.dtype(str(name))
    except TypeError as error:
      raise self.damaged(f"an array has dtype {str(name)[:40]!r}") from error
    if dtype.kind not in "biufcV" or not dtype.itemsize or dtype.fields:
      raise self.damaged(f"an array has dtype {str(name)[:40]!r}")
    return dtype

  def _lazy(self, regions: list[Bytes], shape: list[int], dtype: np.dtype) -> LazyTensor:
    where = f"{self._path}: the array at byte {regions[0].offset if regions else 0}"
    return raw_arrays.lazy_array(self._path, regions, shape, dtype, where)

  def _joined(self, tree: dict[str, Any]) -> LazyTensor:
    try:
      shape = [tree["shape"][str(i)] for i in range(len(tree["shape"]))]
      chunks = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
      regions = [Bytes(*region) for chunk in chunks for region in chunk.fetch.regions]
      return self._lazy(regions, shape, chunks[0].dtype)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
      raise self.damaged("an array in pieces lacks a part") from error


def plain(value: Any) -> Any:
  """Read a value of the tree that may be a numpy scalar, e.g. the version."""
  return value.read().item() if isinstance(value, LazyTensor) and not value.shape else value
