"""The safetensors format: a length, a JSON header, raw arrays. Read lazily and strictly, written tensor by tensor.

The header is checked whole before anything is read by it: its length against the file, every array's bytes against its
shape, and that the arrays fill the file without gap or overlap. The arrays themselves carry no checksum: a bit that
flipped in one cannot be seen.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import raw_arrays, strict_json
from distillspec_jax.weights.lazy_tensors import LazyTensor

_METADATA = "__metadata__"
_DTYPES = {
  "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
  "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def open_file(path: pathlib.Path) -> dict[str, LazyTensor]:
  """List a file's tensors; a name that the file's metadata calls a copy of another tensor is that tensor.

  Raises:
    ConfigError: truncated, damaged, or no safetensors file.
  """
  header, begin, size = _read_header(path)
  metadata = header.pop(_METADATA, {})
  if not isinstance(metadata, dict):
    raise _damaged(path, "its metadata is no JSON object")
  places = sorted((_checked(path, name, entry, size - begin), name) for name, entry in header.items())
  end = 0
  for (first, last), name in places:
    if first != end:
      raise _damaged(path, f"{name} begins at byte {first} where the tensor before ends at {end}")
    end = last
  if end != size - begin:
    raise _damaged(path, f"its tensors end at byte {end} of {size - begin}")
  tensors = {}
  for (first, last), name in places:
    entry = header[name]
    regions, where = [(begin + first, last - first)], f"{path}: {name}"
    tensors[name] = raw_arrays.lazy_array(path, regions, entry["shape"], _DTYPES[entry["dtype"]], where)
  # safetensors.torch.save_model writes tensors that share storage once, and says so here.
  copies = {name: kept for name, kept in metadata.items() if isinstance(kept, str) and kept in tensors}
  return tensors | {name: tensors[kept] for name, kept in copies.items() if name not in tensors}


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
  try:
    size = path.stat().st_size
    with open(path, "rb") as file:
      start = file.read(8)
      if start[:4] == _PICKLES[0] or start[:2] in _PICKLES[1:]:
        raise ConfigError(f"{path} cannot be read: it is a PyTorch pickle under another name, which is not opened")
      if len(start) < 8:
        raise _damaged(path, f"it has {size} bytes")
      length = int.from_bytes(start, "little")
      if length > min(strict_json.LIMIT, size - 8):
        raise _damaged(path, f"its header should have {length:,} bytes; the file has {size:,}")
      data = file.read(length)
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
  if not data.startswith(b"{"):
    raise _damaged(path, "its header is no JSON object")
  try:
    return strict_json.parse(data, "its header"), 8 + length, size
  except ConfigError as error:
    raise _damaged(path, str(error)) from error


def _checked(path: pathlib.Path, name: str, entry: Any, room: int) -> tuple[int, int]:
  """Check one tensor's entry, which must say what its bytes say; return (first byte, byte after the last)."""
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise _damaged(path, f"{name} is not described by dtype, shape and data_offsets")
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise _damaged(path, f"{name} has dtype {str(dtype)[:40]!r}; there are {', '.join(_DTYPES)}")
  if not strict_json.is_shape(shape) or not strict_json.is_shape(offsets) or len(offsets) != 2:
    raise _damaged(path, f"{name} has shape {str(shape)[:60]} and offsets {str(offsets)[:60]}")
  first, last = offsets
  if not first <= last <= room:
    raise _damaged(path, f"{name} lies at bytes {first} to {last}; there are {room}")
  if last - first != math.prod(shape) * _DTYPES[dtype].itemsize:
    raise _damaged(path, f"{name} has {last - first} bytes, which {dtype}{shape} does not have")
  return first, last


def _damaged(path: pathlib.Path, reason: str) -> ConfigError:
  return ConfigError(f"{path} cannot be read ({reason}): it is damaged or no safetensors file, copy it again")


def write_file(
  path: pathlib.Path,
  layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  produce: Callable[[str], np.ndarray],
  names: Iterable[str] | None = None,
) -> None:
  """Write a file, holding one tensor at a time.

  Args:
    path: the file; not atomic, that is the caller's part.
    layout: name -> (shape, dtype), in the order of the file.
    produce: name -> that tensor, called once each in this order.
    names: the names of `layout` again, where the caller watches them pass by.
  """
  header: dict[str, Any] = {_METADATA: {"format": "pt"}}
  end = 0
  for name, (shape, dtype) in layout.items():
    first, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [first, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # arrays are aligned
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in layout if names is None else names:
      value = np.ascontiguousarray(produce(name))
      if (value.shape, value.dtype) != layout[name]:
        raise ValueError(f"{name} is {value.dtype}{value.shape}, not {layout[name]}")
      file.write(memoryview(value.reshape(-1).view(np.uint8)))
    file.flush()
    os.fsync(file.fileno())
