"""The vocabulary that travels beside the weights, handled as bytes and a fingerprint.

`vocabulary/vocabulary.json` holds {kind, sha256, extra_ids, vocab_size}; the data room writes and reads what it means.
A Hugging Face directory with a tokenizer that seqio has, too, counts as a vocabulary folder (`tokenizer_files`).
"""

from __future__ import annotations

import json
import pathlib

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import integrity, strict_json, tokenizer_files

VOCABULARY = "vocabulary"
DESCRIPTION = tokenizer_files.DESCRIPTION


def vocabulary_dir(directory: str | pathlib.Path) -> pathlib.Path | None:
  """Find the vocabulary folder of a model directory (a folder that is a vocabulary itself is returned), or None."""
  directory = pathlib.Path(directory).expanduser().absolute()
  for candidate in (directory, directory / VOCABULARY):
    if (candidate / DESCRIPTION).is_file():
      return candidate
  return directory if tokenizer_files.describe(directory) else None


def describe(folder: str | pathlib.Path) -> dict:
  """Return {kind, sha256, extra_ids, vocab_size} of a vocabulary folder, or of a Hugging Face directory.

  Raises:
    ConfigError: it is neither, or its description cannot be read.
  """
  folder = pathlib.Path(folder)
  if (folder / DESCRIPTION).is_file():
    return strict_json.read(folder / DESCRIPTION)
  if (described := tokenizer_files.describe(folder)) is None:
    raise ConfigError(f"{folder} is not a vocabulary folder: it has no {DESCRIPTION}")
  return described


def fingerprint(directory: str | pathlib.Path) -> dict | None:
  """Return {"sha256", "extra_ids"} of a model directory's vocabulary, or None where it has none.

  Raises:
    ConfigError: the description is damaged, or the file beside it is another than it describes.
  """
  folder = vocabulary_dir(directory)
  if folder is None:
    return None
  description = describe(folder)
  sha256, extra_ids = description.get("sha256"), description.get("extra_ids") or 0
  if not isinstance(sha256, str) or type(extra_ids) is not int or extra_ids < 0:
    raise ConfigError(f"{folder / DESCRIPTION} is not a vocabulary description: it may be damaged")
  own = (folder / DESCRIPTION).is_file() and description.get("kind") == tokenizer_files.SENTENCEPIECE
  pieces = folder / tokenizer_files.PIECES
  if own and tokenizer_files.sha256_of(pieces) != sha256:
    raise ConfigError(f"{pieces} is not the file that {DESCRIPTION} describes: copy the whole folder again")
  return {"sha256": sha256, "extra_ids": extra_ids}


def size(directory: str | pathlib.Path) -> int | None:
  """Give the vocab_size that the vocabulary beside a model has, or None where that is not said."""
  folder = vocabulary_dir(directory)
  described = describe(folder) if folder else {}
  return described["vocab_size"] if type(described.get("vocab_size")) is int else None


def vocabularies_match(dir_a: str | pathlib.Path, dir_b: str | pathlib.Path) -> bool:
  """Require that two model directories speak of the same tokens.

  Returns:
    True where both have a vocabulary and it is the same; False where one has none, so that nothing can be compared.

  Raises:
    ConfigError: they differ; the message holds both fingerprints.
  """
  a, b = fingerprint(dir_a), fingerprint(dir_b)
  if a is None or b is None:
    return False
  if a != b:
    raise ConfigError(
      f"the vocabularies differ: {dir_a} has sha256 {a['sha256']} with {a['extra_ids']} extra ids, {dir_b} has sha256 "
      f"{b['sha256']} with {b['extra_ids']}; target and draft must share one vocabulary"
    )
  return True


def unchecked(*directories: str | pathlib.Path) -> str:
  """Say which of several model directories carry no vocabulary while another does; "" where all do, or none."""
  kept = {directory: vocabulary_dir(directory) for directory in map(str, directories)}
  bare, spoken = ([name for name, folder in kept.items() if (folder is None) == absent] for absent in (True, False))
  if not bare or not spoken:
    return ""
  verb = "carries" if len(bare) == 1 else "carry"
  return f"{', '.join(bare)} {verb} no vocabulary: taking that of {spoken[0]}, which cannot be checked"


def refuse_foreign(*directories: str | pathlib.Path) -> None:
  """Refuse Hugging Face directories whose tokenizer is another than this package can read, before one is guessed.

  Raises:
    ConfigError: there is a tokenizer, but not the SentencePiece file that it was made of.
  """
  for directory in directories:
    if tokenizer_files.lacks_pieces(directory):
      raise ConfigError(
        f"{directory} has a tokenizer, but not the {tokenizer_files.PIECES} that it was made of: put the file there, "
        "or name a vocabulary (--vocabulary; DataConfig.vocabulary in training)"
      )


def copy(source: str | pathlib.Path, directory: str | pathlib.Path) -> None:
  """Copy a vocabulary folder's files, or those of a Hugging Face directory, into MODEL_DIR/vocabulary.

  The description comes last.

  Raises:
    ConfigError: `source` is no vocabulary folder or a damaged one, or MODEL_DIR has another vocabulary.
  """
  source, destination = pathlib.Path(source), pathlib.Path(directory) / VOCABULARY
  description = describe(source)
  fingerprint(source)  # whole?
  if (destination / DESCRIPTION).is_file():
    vocabularies_match(source, destination)
  destination.mkdir(parents=True, exist_ok=True)
  own = (source / DESCRIPTION).is_file()
  names = sorted(path.name for path in source.iterdir() if path.is_file()) if own else [tokenizer_files.PIECES]
  files = {name: (source / name).read_bytes() for name in names if name != DESCRIPTION and (source / name).is_file()}
  written = json.dumps(description, indent=2).encode() + b"\n"
  files[DESCRIPTION] = (source / DESCRIPTION).read_bytes() if own else written
  for name, data in files.items():
    if not ((target := destination / name).is_file() and target.read_bytes() == data):
      integrity.write_atomically(target, data)
