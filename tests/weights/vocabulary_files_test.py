"""The vocabulary beside the weights: copied as bytes, compared by fingerprint."""

import hashlib
import json

import pytest

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import vocabulary_files


def vocabulary(folder, data=b"pieces", extra_ids=100):
  folder.mkdir(parents=True)
  (folder / "spiece.model").write_bytes(data)
  sha256 = hashlib.sha256(data).hexdigest()
  description = {"kind": "sentencepiece", "sha256": sha256, "extra_ids": extra_ids, "vocab_size": 132}
  (folder / "vocabulary.json").write_text(json.dumps(description))
  return folder


def test_is_found_in_a_model_directory(tmp_path):
  folder = vocabulary(tmp_path / "model" / "vocabulary")
  assert vocabulary_files.vocabulary_dir(tmp_path / "model") == folder
  assert vocabulary_files.vocabulary_dir(folder) == folder
  assert vocabulary_files.vocabulary_dir(tmp_path) is None


def test_match(tmp_path):
  for name, changes in {"a": {}, "b": {}, "c": {"data": b"others"}, "d": {"extra_ids": 0}}.items():
    vocabulary(tmp_path / name / "vocabulary", **changes)
  (tmp_path / "none").mkdir()
  assert vocabulary_files.vocabularies_match(tmp_path / "a", tmp_path / "b")
  assert not vocabulary_files.vocabularies_match(tmp_path / "a", tmp_path / "none")
  with pytest.raises(ConfigError) as caught:
    vocabulary_files.vocabularies_match(tmp_path / "a", tmp_path / "c")
  assert all(hashlib.sha256(data).hexdigest() in str(caught.value) for data in (b"pieces", b"others"))
  with pytest.raises(ConfigError, match="100 extra ids.*with 0"):
    vocabulary_files.vocabularies_match(tmp_path / "a", tmp_path / "d")
  (tmp_path / "b" / "vocabulary" / "vocabulary.json").write_text("[")
  with pytest.raises(ConfigError, match="may be damaged"):
    vocabulary_files.vocabularies_match(tmp_path / "a", tmp_path / "b")


def test_what_is_compared_is_the_file_itself(tmp_path):
  """A description that says what another folder's says, beside another file, or that says nothing."""
  whole, tampered = vocabulary(tmp_path / "whole" / "vocabulary"), vocabulary(tmp_path / "tampered" / "vocabulary")
  (tampered / "spiece.model").write_bytes(b"others")
  for given in (tampered, tampered.parent):
    with pytest.raises(ConfigError, match="spiece.model is not the file that vocabulary.json describes"):
      vocabulary_files.vocabularies_match(whole, given)
    with pytest.raises(ConfigError, match="is not the file that vocabulary.json describes"):
      vocabulary_files.copy(tampered, tmp_path / "model")
  assert not (tmp_path / "model").exists()
  (tampered / "spiece.model").unlink()
  with pytest.raises(ConfigError, match="spiece.model cannot be read .No such file.*copy the whole folder again"):
    vocabulary_files.vocabularies_match(whole, tampered)
  damaged = ({}, {"sha256": None}, {"sha256": 3}, {"sha256": "x", "extra_ids": "1"}, {"sha256": "x", "extra_ids": -1})
  for described in damaged:
    for folder in (whole, tampered):
      (folder / "vocabulary.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="is not a vocabulary description"):
      vocabulary_files.vocabularies_match(whole, tampered)


def test_copy(tmp_path):
  source = vocabulary(tmp_path / "source", bytes(range(256)))
  for _ in range(2):
    vocabulary_files.copy(source, tmp_path / "model")
  copied = sorted((tmp_path / "model" / "vocabulary").iterdir())
  assert [path.name for path in copied] == ["spiece.model", "vocabulary.json"]
  assert all(path.read_bytes() == (source / path.name).read_bytes() for path in copied)
  with pytest.raises(ConfigError, match="the vocabularies differ"):
    vocabulary_files.copy(vocabulary(tmp_path / "other"), tmp_path / "model")
  with pytest.raises(ConfigError, match="is not a vocabulary folder"):
    vocabulary_files.copy(tmp_path / "model", tmp_path / "new")
