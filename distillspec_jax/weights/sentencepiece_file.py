"""What a SentencePiece file holds, read from its bytes: pieces, scores and the normaliser; needs no other library.

The file is a protocol buffer, `ModelProto` of sentencepiece_model.proto; the numbers below are its fields'.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import struct
from collections.abc import Iterator

from distillspec_jax.types import ConfigError

UNKNOWN, UNIGRAM = 2, 1
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_LIMIT = 1 << 28  # bytes: mT5's file of 250,100 pieces has 4.3 million


@dataclasses.dataclass(frozen=True)
class Pieces:
  """A SentencePiece model.

  Attributes:
    names: the pieces, in the order of their ids.
    scores: their log-probabilities.
    unknown: the id of the unknown piece.
    unigram: whether it is a unigram model, as T5's are (not BPE).
    byte_fallback: whether what has no piece becomes bytes, not the unknown piece.
    charsmap: the compiled table of the normaliser; empty for none.
    dummy_prefix: whether a space is put before the text.
    strips: whether spaces at the ends go and runs of spaces become one.
  """

  names: list[str]
  scores: list[float]
  unknown: int | None
  unigram: bool
  byte_fallback: bool
  charsmap: bytes
  dummy_prefix: bool
  strips: bool


def read(path: pathlib.Path) -> Pieces:
  """Read a SentencePiece file.

  Raises:
    ConfigError: it cannot be read, or is none.
  """
  try:
    state = path.stat()
    if state.st_size > _LIMIT:
      raise ConfigError(f"{path} is larger than any SentencePiece model ({_LIMIT:,} bytes)")
    return _read(path.absolute(), state.st_size, state.st_mtime_ns)
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


@functools.lru_cache(maxsize=2)  # a door asks for the same file several times, and mT5's takes a second
def _read(path: pathlib.Path, size: int, changed: int) -> Pieces:
  del size, changed
  return parse(path.read_bytes(), str(path))


def parse(data: bytes, where: str) -> Pieces:
  """Read a SentencePiece model from its bytes; raises ConfigError as `read` does."""
  names, scores, unknown, trainer, normalizer = [], [], None, {}, {}
  try:
    for number, value in _fields(data):
      if number == 1:
        piece = dict(_fields(value))
        if piece.get(3, 1) == UNKNOWN:
          unknown = len(names)
        names.append(piece[1].decode())
        scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
      elif number == 2:
        trainer = dict(_fields(value))
      elif number == 3:
        normalizer = dict(_fields(value))
  except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
    raise ConfigError(f"{where} is no SentencePiece model ({error or type(error).__name__})") from error
  if not names:
    raise ConfigError(f"{where} is no SentencePiece model: it has no pieces")
  charsmap = normalizer.get(2, b"")
  return Pieces(
    names,
    scores,
    unknown,
    unigram=trainer.get(3, UNIGRAM) == UNIGRAM,
    byte_fallback=bool(trainer.get(35, False)),
    charsmap=charsmap if isinstance(charsmap, bytes) else b"",
    dummy_prefix=bool(normalizer.get(3, True)),
    strips=bool(normalizer.get(4, True)),
  )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Yield (field's number, value) of one message: whole numbers, or bytes."""
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    number, kind = tag >> 3, tag & 7
    if kind == _VARINT:
      value, at = _varint(data, at)
      yield number, value
      continue
    if kind == _BYTES:
      size, at = _varint(data, at)
    elif kind in (_FOUR_BYTES, _EIGHT_BYTES):
      size = 4 if kind == _FOUR_BYTES else 8
    else:
      raise ValueError(f"field {number} is of the unknown kind {kind}")
    if at + size > len(data):
      raise ValueError("it ends too early")
    yield number, data[at : at + size]
    at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    if at >= len(data) or shift > 63:
      raise ValueError("a number in it does not end")
    byte = data[at]
    at += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, at
    shift += 7
