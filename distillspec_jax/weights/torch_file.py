"""PyTorch's own files, read only by torch's loader of weights, which runs no code, where torch is installed.

Of a file in zip form (torch 1.6 and later) that loader says where each tensor lies, and slices are read from there. The
form before it is read whole, so that such a model is in memory twice while it is loaded.
"""

from __future__ import annotations

import importlib
import math
import pathlib
import re
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import lazy_tensors, raw_arrays
from distillspec_jax.weights.lazy_tensors import LazyTensor

_SAFE_SINCE = (2, 6)  # before it, files in the oldest form could run code in spite of weights_only (CVE-2025-32434)
_ADVICE = "load them with transformers and call model.save_pretrained(DIR, safe_serialization=True)"
_LOCAL_HEADER = 30  # bytes before a record's name in a zip file


def open_file(path: pathlib.Path) -> dict[str, LazyTensor]:
  """List the tensors of a `pytorch_model.bin`.

  Raises:
    ConfigError: torch is absent or too old, the file is damaged, or it holds anything but tensors.
  """
  try:
    torch = importlib.import_module("torch")  # no part of this package needs it
  except ImportError as error:
    raise ConfigError(
      f"{path.parent} has PyTorch pickles only, which this package reads with torch alone (not installed): install "
      f"torch, or {_ADVICE}"
    ) from error
  version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
  if version < _SAFE_SINCE:
    raise ConfigError(f"{path} is a PyTorch pickle, and torch {torch.__version__} may run code in one: {_ADVICE}")
  try:
    with open(path, "rb") as file:
      zipped = file.read(4) == b"PK\x03\x04"
    records = _records(path) if zipped else {}
    tensors = _load(torch, path, map_location="meta" if zipped else "cpu")
    if zipped and any(_offset(value) is None for value in tensors.values()):  # an older torch, which says no places
      tensors, records = _load(torch, path, map_location="cpu", mmap=True), {}
  except ConfigError:
    raise
  except Exception as error:  # UnpicklingError, BadZipFile, RuntimeError, EOFError, ...
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    raise ConfigError(f"{path} cannot be read ({reason}): damaged, or it holds more than weights; {_ADVICE}") from error
  return {name: _lazy(torch, value.detach(), path, name, records) for name, value in tensors.items()}


def _load(torch, path: pathlib.Path, **options: Any) -> dict[str, Any]:
  tensors = torch.load(path, weights_only=True, **options)
  if not isinstance(tensors, dict) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()
  ):
    raise ConfigError(f"{path} holds other things than named tensors; {_ADVICE}")
  return tensors


def _offset(value: Any) -> int | None:
  """Say at which byte of the file a tensor's storage begins, where torch noted that; -1 of a sparse one."""
  return -1 if value.is_sparse else getattr(value.untyped_storage(), "_checkpoint_offset", None)


def _records(path: pathlib.Path) -> dict[int, int]:
  """List a zip file's records: where their bytes begin -> how many there are."""
  with zipfile.ZipFile(path) as archive:
    infos = archive.infolist()
    byteorder = next((archive.read(info) for info in infos if info.filename.endswith("/byteorder")), b"little")
  if byteorder != b"little":
    raise ValueError(f"its numbers are {byteorder[:20].decode(errors='replace')}-endian")
  records = {}
  with open(path, "rb") as file:
    for info in infos:
      if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{info.filename} in it is compressed, which torch does not do")
      file.seek(info.header_offset + _LOCAL_HEADER - 4)
      records[info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))] = info.file_size
  return records


def _lazy(torch, value, path: pathlib.Path, name: str, records: dict[int, int]) -> LazyTensor:
  where = f"{path}: {name}"
  try:
    narrow = value.dtype == torch.bfloat16
    dtype = np.dtype(ml_dtypes.bfloat16) if narrow else torch.empty(0, dtype=value.dtype).numpy().dtype
    storage = value.untyped_storage()
    strides = [stride * dtype.itemsize for stride in value.stride()]
    first = value.storage_offset() * dtype.itemsize
  except (TypeError, RuntimeError) as error:  # a quantised or sparse one
    raise ConfigError(f"{where} is a {value.dtype} tensor ({value.layout}), which cannot be read") from error
  shape, held = tuple(value.shape), storage.nbytes()
  size = math.prod(shape) * dtype.itemsize
  end = first + sum(stride * (n - 1) for stride, n in zip(strides, shape, strict=True)) + dtype.itemsize if size else 0
  if size > held or end > held:  # also strides of 0, by which a few bytes would be gigabytes
    raise ConfigError(f"{where} has {held:,} bytes, which cannot be {size:,}: it is damaged")
  if not records or not size:
    value = torch.empty(shape, dtype=value.dtype) if not size else value
    whole = value.view(torch.int16).numpy().view(dtype) if narrow else value.numpy()
    return lazy_tensors.of_array(whole, where)
  begin = _offset(value)
  if begin is None or records.get(begin) != held:
    raise ConfigError(f"{where} is not where torch {torch.__version__} says in the file: damaged, or {_ADVICE}")
  if value.is_contiguous():
    return raw_arrays.lazy_array(path, [(begin + first, size)], shape, dtype, where)
  stored = raw_arrays.lazy_array(path, [(begin, held)], (held // dtype.itemsize,), dtype, where)

  def fetch(index):
    numbers = stored.read()[first // dtype.itemsize :]
    return np.lib.stride_tricks.as_strided(numbers, shape, strides)[index].copy()

  return LazyTensor(shape, dtype, fetch, where)
