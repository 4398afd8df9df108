"""Zarr arrays in a folder or in an OCDBT store, read slice by slice through tensorstore.

What `.zarray` claims is checked before tensorstore sees it: shapes against the chunks that are there (tensorstore
would read an absent chunk as zeros, without a word) and chunks against the bytes they are stored in. gzip chunks carry
a checksum; uncompressed, blosc and zstd chunks do not, and a flipped bit in them may go unseen.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import strict_json
from distillspec_jax.weights.lazy_tensors import LazyTensor

_DTYPES = {
  "<f4": np.dtype("<f4"), "<f2": np.dtype("<f2"), "<f8": np.dtype("<f8"), "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "<u2": np.dtype("<u2"), "<i4": np.dtype("<i4"), "<u4": np.dtype("<u4"), "<i8": np.dtype("<i8"), "|u1": np.dtype("u1"),
  "|i1": np.dtype("i1"), "|b1": np.dtype("?"),
}  # fmt: skip
# How many bytes one stored byte can become at most: what is claimed beyond it is no honest file.
_RATIO = {None: 1, "gzip": 1_100, "zlib": 1_100, "blosc": 100_000, "zstd": 100_000, "bz2": 1_000_000}
_FRAME = 64  # bytes of headers around a chunk
_STACK_CACHE, _CACHE = 1 << 28, 1 << 24  # bytes


class Store:
  """A place with zarr arrays: names of folders, each with `.zarray` and chunks."""

  def sizes(self, name: str) -> Mapping[str, int]:
    """List an array's files and their bytes."""
    raise NotImplementedError

  def read(self, name: str, key: str) -> bytes:
    """Read one small file."""
    raise NotImplementedError

  def spec(self, name: str) -> dict[str, Any]:
    """Describe an array's place to tensorstore."""
    raise NotImplementedError


class Folder(Store):
  """Arrays as folders in a folder."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def sizes(self, name):
    return {entry.name: entry.stat().st_size for entry in (self._path / name).iterdir() if entry.is_file()}

  def read(self, name, key):
    path = self._path / name / key
    if not path.is_file():
      raise ValueError(f"{key} is missing")
    if path.stat().st_size > strict_json.LIMIT:
      raise ValueError(f"{key} has {path.stat().st_size:,} bytes")
    return path.read_bytes()

  def spec(self, name):
    return {"driver": "file", "path": f"{self._path / name}/"}


def new_context(stacked: bool = False):
  """Make tensorstore's context; where several tensors are cut from one array, decoded chunks are kept a while."""
  import tensorstore  # noqa: PLC0415

  return tensorstore.Context({"cache_pool": {"total_bytes_limit": _STACK_CACHE if stacked else _CACHE}})


def open_array(store: Store, name: str, where: str, context: Any, described: Mapping | None = None) -> LazyTensor:
  """Check an array's description and make it a lazy tensor.

  Args:
    store: where it is.
    name: its folder.
    where: how messages name it.
    context: from `new_context`.
    described: what another file says of it: {"shape", "dtype"}, where it says that.

  Raises:
    ConfigError: damaged, or claims what its files cannot hold.
  """
  try:
    sizes = store.sizes(name)
    layout = strict_json.parse(store.read(name, ".zarray"), ".zarray")
    dtype = _check(layout, sizes)
    for field, found in (("shape", layout["shape"]), ("dtype", dtype.name)):
      if described and described.get(field, found) != found:
        raise ValueError(f"its {field} is {found}; the tree says {described[field]}")
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise damaged(where, error) from error
  opened: list = []  # opened at the first read, once

  def fetch(index):
    import tensorstore  # noqa: PLC0415

    try:
      if not opened:
        spec = {"driver": "zarr", "kvstore": store.spec(name)}
        opened.append(tensorstore.open(spec, read=True, open=True, context=context).result())
      return np.array(opened[0][index].read().result())
    except Exception as error:  # tensorstore raises ValueError, OSError and others for damaged chunks
      raise damaged(where, error) from error

  return LazyTensor(tuple(layout["shape"]), dtype, fetch, where)


def damaged(where: str, error: BaseException) -> ConfigError:
  """Say in one line that an array cannot be read."""
  text = str(error) if isinstance(error, ConfigError | ValueError) else f"{type(error).__name__}: {error}"
  reason = (text.splitlines() or [type(error).__name__])[0][:200]
  return ConfigError(f"{where} cannot be read ({reason}): it is damaged, copy it again")


def _check(layout: Mapping[str, Any], sizes: Mapping[str, int]) -> np.dtype:
  """Compare a `.zarray` with the files beside it; return the dtype."""
  shape, chunks, compressor = layout["shape"], layout["chunks"], layout.get("compressor")
  if not strict_json.is_shape(shape) or not strict_json.is_shape(chunks) or len(chunks) != len(shape):
    raise ValueError(f"shape {str(shape)[:60]} and chunks {str(chunks)[:60]}")
  plain = (layout.get("zarr_format"), layout.get("filters") or None, layout.get("order")) == (2, None, "C")
  if not plain or not all([*shape, *chunks]):
    raise ValueError("not a zarr 2 array in C order without filters, or an empty one")
  if not isinstance(layout["dtype"], str) or layout["dtype"] not in _DTYPES:
    raise ValueError(f"dtype {str(layout['dtype'])[:40]!r}; there are {', '.join(_DTYPES)}")
  kind = compressor if compressor is None else compressor.get("id") if isinstance(compressor, dict) else "?"
  if kind not in _RATIO:
    raise ValueError(f"compressor {str(compressor)[:60]}; there are {', '.join(map(str, _RATIO))}")
  dtype, counts = _DTYPES[layout["dtype"]], [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
  if math.prod(counts) > len(sizes):
    raise ValueError(f"{math.prod(counts):,} chunks are claimed where {len(sizes) - 1} files are: chunks are missing")
  separator, wanted = layout.get("dimension_separator", "."), math.prod(chunks) * dtype.itemsize
  for index in itertools.product(*map(range, counts)):
    key = separator.join(map(str, index)) or "0"
    if key not in sizes:
      raise ValueError(f"chunk {key} is missing")
    if sizes[key] >= 0 and (wanted > _RATIO[kind] * sizes[key] + (0 if kind is None else _FRAME)):
      raise ValueError(f"chunk {key} has {sizes[key]:,} bytes, which cannot be {wanted:,}")
  return dtype
