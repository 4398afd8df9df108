"""PyTorch's own files, read only by torch's loader of weights, which runs no code, where torch is installed."""

from __future__ import annotations

import importlib
import pathlib
import re

import ml_dtypes
import numpy as np

from distillspec_jax.types import ConfigError
from distillspec_jax.weights.lazy_tensors import LazyTensor

_SAFE_SINCE = (2, 6)  # before it, files in the oldest form could run code in spite of weights_only (CVE-2025-32434)
_ADVICE = "load them with transformers and call model.save_pretrained(DIR, safe_serialization=True)"


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
      zipped = file.read(4) == b"PK\x03\x04"  # the oldest form has no map
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
  except Exception as error:  # UnpicklingError, RuntimeError, EOFError, ...
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    raise ConfigError(f"{path} cannot be read ({reason}): damaged, or it holds more than weights; {_ADVICE}") from error
  if not isinstance(tensors, dict) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()
  ):
    raise ConfigError(f"{path} holds other things than named tensors; {_ADVICE}")
  return {name: _lazy(torch, value, f"{path}: {name}") for name, value in tensors.items()}


def _lazy(torch, value, where: str) -> LazyTensor:
  narrow = value.dtype == torch.bfloat16
  try:
    dtype = np.dtype(ml_dtypes.bfloat16) if narrow else value[:0].numpy().dtype if value.ndim else value.numpy().dtype
  except (TypeError, RuntimeError) as error:
    raise ConfigError(f"{where} is a {value.dtype} tensor, which cannot be read") from error

  def fetch(index):
    part = value[index]
    return part.view(torch.int16).numpy().view(dtype).copy() if narrow else part.numpy().copy()

  return LazyTensor(tuple(value.shape), dtype, fetch, where)
