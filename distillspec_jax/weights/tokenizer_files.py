"""Hugging Face's tokenizer files to and from a vocabulary: a SentencePiece file with sentinels behind it, or bytes.

A Hugging Face directory carries its vocabulary as spiece.model beside tokenizer_config.json, or names ByT5Tokenizer,
which has no file. Written are spiece.model, tokenizer.json (which says in full what SentencePiece does, so that both
of their major versions give the ids that seqio gives), tokenizer_config.json and special_tokens_map.json.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import integrity, sentencepiece_file, strict_json

DESCRIPTION = "vocabulary.json"  # of a vocabulary folder
PIECES = "spiece.model"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
_CONFIG = "config.json"
SENTENCEPIECE, BYTE = "sentencepiece", "byte"
_BYT5 = "ByT5Tokenizer"
_BYTE_IDS = 3 + 256  # padding, end, unknown; the bytes
_T5_SENTINELS, _BYT5_SENTINELS = 100, 125  # what their classes add where nothing is said
_MOST_SENTINELS = 100_000
_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")
_NAMES = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2


def describe(directory: str | pathlib.Path) -> dict[str, Any] | None:
  """Describe the vocabulary that a Hugging Face directory carries.

  Args:
    directory: with config.json or tokenizer_config.json.

  Returns:
    {kind, sha256, extra_ids, vocab_size}, as in a vocabulary folder's vocabulary.json; None where there is neither
    spiece.model nor the word of a ByT5Tokenizer.

  Raises:
    ConfigError: damaged files, or tokens that a seqio vocabulary does not have.
  """
  directory = pathlib.Path(directory)
  files = (TOKENIZER_CONFIG, _CONFIG, SPECIAL_TOKENS)
  said, config, special = (strict_json.read(directory / n) if (directory / n).is_file() else {} for n in files)
  if not said and not config:
    return None
  names = [name.removesuffix("Fast") for name in map(str, (said.get("tokenizer_class"), config.get("tokenizer_class")))]
  if (directory / PIECES).is_file():
    pieces = sentencepiece_file.read(directory / PIECES)
    base, sha256, kind = len(pieces.names), sha256_of(directory / PIECES), SENTENCEPIECE
    default = 0 if any(map(_SENTINEL.fullmatch, pieces.names)) else _T5_SENTINELS  # mT5's file holds its own
  elif _BYT5 in names:
    base, sha256, kind, default = _BYTE_IDS, hashlib.sha256(b"").hexdigest(), BYTE, _BYT5_SENTINELS
  else:
    return None
  extra_ids = _extra_ids(said, special, default)
  _check_added(said, base, extra_ids, kind, directory)
  size = config.get("vocab_size")
  if type(size) is int and size < base + extra_ids:
    raise ConfigError(
      f"{directory}: its tokenizer has {base} ids and {extra_ids} sentinels, more than {_CONFIG}'s vocab_size {size}: "
      f'say how many there are as "extra_ids" in {TOKENIZER_CONFIG}'
    )
  return {"kind": kind, "sha256": sha256, "extra_ids": extra_ids, "vocab_size": base + extra_ids}


def lacks_pieces(directory: str | pathlib.Path) -> bool:
  """Say whether a directory has a tokenizer of theirs, but not the SentencePiece file that it was made of."""
  directory = pathlib.Path(directory)
  theirs = (directory / TOKENIZER).is_file() or (directory / TOKENIZER_CONFIG).is_file()
  return theirs and describe(directory) is None


def sha256_of(path: pathlib.Path) -> str:
  """Give the SHA-256 of a file; a ConfigError names one that cannot be read."""
  return hashlib.sha256(_read(path)).hexdigest()


def _extra_ids(said: Mapping[str, Any], special: Mapping[str, Any], default: int) -> int:
  """Count the sentinels behind the pieces: as many as are said, or as are named, or as their class adds."""
  if type(said.get("extra_ids")) is int and said["extra_ids"] > 0:
    return _checked_sentinels(said["extra_ids"], TOKENIZER_CONFIG)
  named = set()
  for place in (said, special):
    for key in ("additional_special_tokens", "extra_special_tokens"):
      listed = place.get(key) if isinstance(place.get(key), list) else []
      named |= {match[0] for match in map(_SENTINEL.fullmatch, map(_content, listed)) if match}
  if named and default:
    return len(named)
  return 0 if said.get("extra_ids") == 0 else default


def _checked_sentinels(number: Any, where: Any) -> int:
  if type(number) is not int or not 0 <= number <= _MOST_SENTINELS:
    raise ConfigError(f"{where} says {str(number)[:40]} extra ids; a vocabulary has 0 to {_MOST_SENTINELS:,}")
  return number


def _content(token: Any) -> str:
  return str(token.get("content")) if isinstance(token, Mapping) else str(token)


def _check_added(said: Mapping[str, Any], base: int, extra_ids: int, kind: str, where: pathlib.Path) -> None:
  """Refuse tokens added behind the vocabulary, and sentinels in another order than T5's (seqio has no others)."""
  added = said.get("added_tokens_decoder")
  for number, token in (added if isinstance(added, Mapping) else {}).items():
    content = _content(token)
    if not str(number).isdecimal():
      raise ConfigError(f"{where / TOKENIZER_CONFIG}: added_tokens_decoder names the id {number!r}: it may be damaged")
    if (match := _SENTINEL.fullmatch(content)) and kind == SENTENCEPIECE and int(number) >= base:
      if int(number) != base + extra_ids - 1 - int(match[1]):
        raise ConfigError(
          f"{where}: {content} is id {number}; in a T5 vocabulary of {base} pieces and {extra_ids} sentinels it is "
          f"{base + extra_ids - 1 - int(match[1])}"
        )
    elif not match and int(number) >= base:
      raise ConfigError(
        f"{where}: its tokenizer has the token {content!r} added (id {number}), which seqio's has not: "
        "take the tokenizer's files out of the folder and name a vocabulary, if texts do without it"
      )


def write_tokenizer(vocabulary_folder: str | pathlib.Path, output_dir: str | pathlib.Path) -> None:
  """Write the tokenizer files that transformers opens, from a vocabulary folder.

  Args:
    vocabulary_folder: holds vocabulary.json and, unless it is of bytes, spiece.model.
    output_dir: a Hugging Face model directory; files of the same names are replaced.

  Raises:
    ConfigError: the folder is damaged, or its SentencePiece model is of a kind that T5's tokenizers are not.
  """
  folder, output = pathlib.Path(vocabulary_folder), pathlib.Path(output_dir)
  described = strict_json.read(folder / DESCRIPTION)
  kind = described.get("kind")
  if kind not in (SENTENCEPIECE, BYTE):
    raise ConfigError(f"{folder / DESCRIPTION} describes no vocabulary of a known kind, but {str(kind)[:40]!r}")
  extra_ids = _checked_sentinels(described.get("extra_ids"), folder / DESCRIPTION)
  sentinels = [f"<extra_id_{number}>" for number in range(extra_ids)]
  files = {}
  special = dict(zip(("pad_token", "eos_token", "unk_token"), _NAMES, strict=True))
  config = {"extra_ids": extra_ids, "clean_up_tokenization_spaces": False, **special}
  if sentinels:
    special = {**special, "additional_special_tokens": sentinels}
    config["additional_special_tokens"] = sentinels
  if kind == SENTENCEPIECE:
    data = _read(folder / PIECES)
    if hashlib.sha256(data).hexdigest() != described.get("sha256"):
      raise ConfigError(f"{folder / PIECES} is not the file that {DESCRIPTION} describes: copy the whole folder again")
    pieces = sentencepiece_file.parse(data, str(folder / PIECES))
    files = {PIECES: data, TOKENIZER: _json(_tokenizer(pieces, sentinels, folder / PIECES), indent=None)}
    # Not T5Tokenizer: their version 5 makes T5's own normaliser anew there, whatever tokenizer.json says.
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    config["legacy"] = True  # where T5Tokenizer is asked for by name: texts as SentencePiece splits them
  else:
    config["tokenizer_class"] = _BYT5
  for name, content in {**files, TOKENIZER_CONFIG: _json(config), SPECIAL_TOKENS: _json(special)}.items():
    integrity.write_atomically(output / name, content)


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise ConfigError(f"{path} cannot be read ({error.strerror or error}): copy the whole folder again") from error


def _json(value: Any, indent: int | None = 2) -> bytes:
  return json.dumps(value, ensure_ascii=False, indent=indent).encode() + b"\n"


def _tokenizer(pieces: sentencepiece_file.Pieces, sentinels: list[str], where: pathlib.Path) -> dict[str, Any]:
  """Say in tokenizer.json's terms what SentencePiece does with these pieces, sentinels as seqio numbers them."""
  if not pieces.unigram or pieces.unknown != 2 or not pieces.dummy_prefix:
    raise ConfigError(f"{where} is no T5 vocabulary: a unigram model with ids 0, 1, 2 for padding, end, unknown")
  vocab = [*zip([*_NAMES, *pieces.names[3:]], pieces.scores, strict=True), *((name, 0.0) for name in sentinels[::-1])]
  first = len(pieces.names) + len(sentinels) - 1
  added = [_added(number, name) for number, name in enumerate(_NAMES)]
  # A sentinel takes the space before it, as seqio's pieces "▁<extra_id_0>" do.
  added += [_added(first - n, name, lstrip=True, rstrip=not pieces.strips) for n, name in enumerate(sentinels)][::-1]
  space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
  charsmap = base64.b64encode(pieces.charsmap).decode()
  normalizers = [{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else []
  if pieces.strips:  # a space before the text unless it has one; none after it; one where there are several
    normalizers += [
      {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
      {"type": "Strip", "strip_left": False, "strip_right": True},
    ]
    before = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
  else:
    normalizers += [{"type": "Prepend", "prepend": "▁"}, space]
    before = None
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": {"type": "Sequence", "normalizers": normalizers},
    "pre_tokenizer": before,
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
      "pair": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
      ],
      "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    },
    "decoder": {
      "type": "Sequence",
      "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
      ],
    },
    "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": pieces.byte_fallback},
  }


def _added(number: int, name: str, lstrip: bool = False, rstrip: bool = False) -> dict[str, Any]:
  flags = {"single_word": False, "lstrip": lstrip, "rstrip": rstrip, "normalized": False, "special": True}
  return {"id": number, "content": name, **flags}
