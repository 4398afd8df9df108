"""seqio vocabularies to and from vocabulary folders, and the vocabulary of the prepared data set."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import pathlib
import tempfile
import urllib.request
from collections.abc import Callable, Iterator

from google.protobuf import message as protobuf

from distillspec_jax.data import sources, subwords
from distillspec_jax.data.host_tensorflow import seqio, tf
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import vocabulary_files

T5_URL = "https://storage.googleapis.com/t5-data/vocabs/cc_all.32000/sentencepiece.model"
T5_SHA256 = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
T5_VARIABLE = "DISTILLSPEC_T5_VOCABULARY"
_T5_BYTES = 791_656


class _FoundWhenUsed(seqio.SentencePieceVocabulary):
  """A SentencePiece vocabulary whose file is looked for when it is first used, not when it is made."""

  _find: Callable[[], str]

  def _model_context(self):
    with _readable(self._sentencepiece_model_file):
      return super()._model_context()

  def __init__(self):
    super().__init__("", extra_ids=sources.EXTRA_IDS)

  @property
  def _sentencepiece_model_file(self) -> str:
    return type(self)._find()

  @_sentencepiece_model_file.setter
  def _sentencepiece_model_file(self, value: str) -> None:
    del value  # seqio's constructor sets a path; this one is found when it is asked for


class PreparedVocabulary(_FoundWhenUsed):
  """The SentencePiece vocabulary of `pydoc_summary`, prepared when it is first used.

  2,460 pieces and T5's 100 sentinels behind them (`<extra_id_0>` is the last id): 2,560 ids.
  """

  _find = staticmethod(lambda: str(sources.pydoc_summary().vocabulary_dir / subwords.MODEL_FILE))


class T5Vocabulary(_FoundWhenUsed):
  """T5's own vocabulary: 32,000 pieces and 100 sentinels behind them; networks pad it to 32,128 ids.

  Its file is the one that the environment variable DISTILLSPEC_T5_VOCABULARY names, or is fetched once from T5's public
  bucket into the user's cache folder. Reading it raises a ConfigError where neither can be had.
  """

  _find = staticmethod(lambda: str(t5_file()))


def t5_file() -> pathlib.Path:
  """Return T5's SentencePiece model, fetched where need be.

  Raises:
    ConfigError: the variable names no file, or the file cannot be fetched.
  """
  given = os.environ.get(T5_VARIABLE)
  if given:
    path = pathlib.Path(given).expanduser()
    if not path.is_file():
      raise ConfigError(f"{T5_VARIABLE}={given}: no such file; it should be T5's SentencePiece model")
    return path
  path = sources.cache_folder() / "t5_vocabulary" / subwords.MODEL_FILE
  return path if path.is_file() and path.stat().st_size == _T5_BYTES else _fetch_t5(path)


def _fetch_t5(path: pathlib.Path) -> pathlib.Path:
  """Download T5's model, compare its checksum, and put it in place in one step."""
  advice = f"set {T5_VARIABLE} to a copy of T5's sentencepiece.model, or name a vocabulary with --vocabulary"
  try:
    with urllib.request.urlopen(T5_URL, timeout=30) as answer:
      content = answer.read()
  except (OSError, http.client.HTTPException) as error:
    raise ConfigError(f"cannot fetch T5's vocabulary from {T5_URL} ({error}): {advice}") from error
  if hashlib.sha256(content).hexdigest() != T5_SHA256:
    raise ConfigError(f"what {T5_URL} gave is not T5's vocabulary (wrong checksum): {advice}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
      (pathlib.Path(work) / path.name).write_bytes(content)
      os.replace(pathlib.Path(work) / path.name, path)
  except OSError as error:
    raise ConfigError(
      f"cannot write to {path.parent} ({error.strerror or error}): name another folder in DISTILLSPEC_CACHE"
    ) from error
  return path


def given(path: str | os.PathLike) -> seqio.Vocabulary:
  """Make a seqio vocabulary of what a user names: a vocabulary folder, a model directory, or a SentencePiece file.

  Raises:
    ConfigError: it is none of these.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_file():
    if path.suffix != ".model":
      raise ConfigError(f"{path} is no vocabulary: give a folder with {subwords.DESCRIPTION_FILE}, or a .model file")
    vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids=sources.EXTRA_IDS)
    with _readable(path):
      vocabulary.load_model()
    return vocabulary
  inside = path / "vocabulary"
  return load(inside if (inside / subwords.DESCRIPTION_FILE).is_file() else path)


@contextlib.contextmanager
def _readable(path: str | os.PathLike) -> Iterator[None]:
  """Turn what SentencePiece says of a file that is none of its into a ConfigError."""
  try:
    yield
  except (RuntimeError, protobuf.DecodeError) as error:
    raise ConfigError(f"{path} is no SentencePiece model ({str(error).strip()})") from error


def load(vocabulary_dir: str | os.PathLike) -> seqio.Vocabulary:
  """Make a seqio vocabulary from a folder.

  Raises:
    ConfigError: the folder is absent, incomplete, damaged, or of an unknown kind.
  """
  folder = pathlib.Path(vocabulary_dir)
  description = describe(folder)
  kind, extra_ids = description["kind"], description["extra_ids"]
  if kind == subwords.BYTE:
    vocabulary = seqio.ByteVocabulary(extra_ids=extra_ids)
  elif kind == subwords.SENTENCEPIECE:
    model = folder / subwords.MODEL_FILE
    if not model.is_file():
      raise ConfigError(f"the vocabulary {folder} has no {subwords.MODEL_FILE}: copy the whole folder again")
    found = hashlib.sha256(model.read_bytes()).hexdigest()
    if found != description["sha256"]:
      raise ConfigError(
        f"{model} is not the file that {subwords.DESCRIPTION_FILE} describes (sha256 {found[:12]}..., expected"
        f" {description['sha256'][:12]}...): copy the whole folder again"
      )
    vocabulary = seqio.SentencePieceVocabulary(str(model), extra_ids=extra_ids)
  else:
    raise ConfigError(f"the vocabulary {folder} is of the unknown kind {kind!r}; known: sentencepiece, byte")
  if vocabulary.vocab_size != description["vocab_size"]:
    raise ConfigError(
      f"the vocabulary {folder} has {vocabulary.vocab_size} ids, its {subwords.DESCRIPTION_FILE} says"
      f" {description['vocab_size']}"
    )
  return vocabulary


def save(vocabulary: seqio.Vocabulary, vocabulary_dir: str | os.PathLike) -> None:
  """Write a SentencePiece or byte vocabulary to a folder.

  Raises:
    ConfigError: another kind of vocabulary.
  """
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    kind = subwords.SENTENCEPIECE
    with tf.io.gfile.GFile(vocabulary.sentencepiece_model_file, "rb") as file:
      model = file.read()
  elif isinstance(vocabulary, seqio.ByteVocabulary):
    kind, model = subwords.BYTE, b""
  else:
    raise ConfigError(
      f"cannot save a {type(vocabulary).__name__}; a model's vocabulary is a SentencePieceVocabulary or ByteVocabulary"
    )
  subwords.write_folder(
    pathlib.Path(vocabulary_dir),
    kind=kind,
    model=model,
    extra_ids=vocabulary.extra_ids,
    vocab_size=vocabulary.vocab_size,
  )


def describe(vocabulary_dir: str | os.PathLike) -> dict:
  """Return {kind, sha256, extra_ids, vocab_size} of a vocabulary folder, or of a Hugging Face directory's tokenizer.

  Raises:
    ConfigError: no such folder, or its description cannot be read.
  """
  folder = pathlib.Path(vocabulary_dir)
  description = vocabulary_files.describe(folder)
  if missing := {"kind", "sha256", "extra_ids", "vocab_size"} - set(description):
    raise ConfigError(f"{folder / subwords.DESCRIPTION_FILE} lacks {', '.join(sorted(missing))}")
  return description
