"""JSON that strangers wrote: one object, of bounded size and depth, no name twice; anything else is a ConfigError."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from distillspec_jax.types import ConfigError

LIMIT = 100_000_000  # bytes: an index of a million tensors is smaller


def read(path: pathlib.Path) -> dict[str, Any]:
  """Read a file that holds one JSON object.

  Raises:
    ConfigError: absent, too large, or no such object.
  """
  try:
    size = path.stat().st_size
    if size > LIMIT:
      raise ConfigError(f"{path} has {size:,} bytes, more than any description has ({LIMIT:,}): it is no JSON file")
    data = path.read_bytes()
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
  return parse(data, str(path))


def parse(data: bytes, where: str) -> dict[str, Any]:
  """Read one JSON object from bytes; raises ConfigError as `read` does."""
  try:
    value = json.loads(data, object_pairs_hook=_once)
  except RecursionError as error:
    raise ConfigError(f"{where} is JSON nested too deeply: it is damaged or hostile") from error
  except ValueError as error:  # UnicodeDecodeError and numbers of too many digits are ValueErrors, too
    raise ConfigError(f"{where} cannot be read as JSON ({str(error)[:160]}): it may be damaged") from error
  if not isinstance(value, dict):
    raise ConfigError(f"{where} is not a JSON object")
  return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) != len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
  return value


def is_shape(value: Any, most: int = 8) -> bool:
  """Say whether a JSON value is a shape: a short list of whole numbers that are not negative."""
  return isinstance(value, list) and len(value) <= most and all(type(size) is int and size >= 0 for size in value)
