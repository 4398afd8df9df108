"""Tokenizer files for transformers and from them: the same ids as seqio's vocabulary gives, whatever the text."""

import hashlib
import json
import pathlib

import numpy as np
import pytest

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import sentencepiece_file, tokenizer_files, vocabulary_files

TEXTS = [
  "Hello world",
  "  leading and  double   spaces ",
  "line\nbreak\tand tab\r\n",
  "Das Haus ist ﬁne ½ 日本語 naïve \u00a0x ﷺ Å ①",
  "emoji 🎉🎉 ▁ under_score e\u0301tude \u200b zero",
  "1. def f(x): return x**2  # ok",
  "x" * 60,
  "",
]
SENTINELS = ["a <extra_id_0> b <extra_id_1> c", "<extra_id_5> start", "end <extra_id_0>"]


@pytest.fixture(scope="module")
def small():
  """A unigram model of 400 pieces, which takes white space as it is and has bytes for what it lacks."""
  subwords = pytest.importorskip("distillspec_jax.data.subwords", reason="needs the data room")
  pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
  readme = pathlib.Path(__file__).resolve().parents[2] / "README.md"
  return subwords.train_unigram([line for line in readme.read_text().splitlines() if line.strip()] * 2, 400)


def folder_of(path, data, extra_ids):
  """Write a vocabulary folder by hand."""
  path.mkdir(parents=True)
  size = 259 if data is None else len(sentencepiece_file.parse(data, "").names)
  if data is not None:
    (path / "spiece.model").write_bytes(data)
  described = {"kind": "byte" if data is None else "sentencepiece", "vocab_size": size + extra_ids}
  described["extra_ids"], sha256 = extra_ids, hashlib.sha256(data or b"").hexdigest()
  (path / "vocabulary.json").write_text(json.dumps({**described, "sha256": sha256}))
  return path


def directory_of(path, data, extra_ids, padded=28):
  """Make a Hugging Face directory, without weights, of a vocabulary."""
  folder = folder_of(path / "vocabulary", data, extra_ids)
  size = json.loads((folder / "vocabulary.json").read_text())["vocab_size"]
  described = {"model_type": "t5", "vocab_size": size + padded, "is_encoder_decoder": True}
  (path / "config.json").write_text(json.dumps(described))
  tokenizer_files.write_tokenizer(folder, path)
  return path


def bare(path, **files):
  """Make a Hugging Face directory of given files: JSON, or bytes for spiece_model."""
  path.mkdir(parents=True)
  for name, value in files.items():
    name = name.replace("spiece_model", "spiece.model")
    (path / (name if "." in name else f"{name}.json")).write_bytes(
      value if isinstance(value, bytes) else json.dumps(value).encode()
    )
  return path


def opened(directory):
  transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
  return transformers.AutoTokenizer.from_pretrained(str(directory))


def seqio_of(directory):
  vocabularies = pytest.importorskip("distillspec_jax.data.vocabularies", reason="seqio is not installed")
  return vocabularies.load(directory)


def assert_same_ids(tokenizer, vocabulary, texts):
  for text in texts:
    ids = vocabulary.encode(text)
    assert tokenizer(text).input_ids == [*ids, 1], repr(text)
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}  # what a T5 is called with


def lines_of(path, count=300):
  return [line for line in path.read_text().splitlines() if line][:count]


@pytest.mark.parametrize("extra_ids", [0, 7])
def test_ids_are_seqios_where_white_space_counts(extra_ids, small, tmp_path):
  directory = directory_of(tmp_path, small, extra_ids)
  tokenizer, vocabulary = opened(directory), seqio_of(directory / "vocabulary")
  docs = pathlib.Path(__file__).resolve().parents[2] / "docs"
  texts = TEXTS + lines_of(docs / "architecture.md") + [(docs / "distillation.md").read_text()]
  assert_same_ids(tokenizer, vocabulary, texts + (SENTINELS if extra_ids else []))
  assert len(tokenizer) == vocabulary.vocab_size == 400 + extra_ids
  assert tokenizer.decode(tokenizer("a  b\n 🎉").input_ids, skip_special_tokens=True) == "a  b\n 🎉"
  if extra_ids:
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_6>"]) == [406, 400]


def test_ids_are_seqios_with_t5s_vocabulary(shared_dir, tmp_path):
  directory = directory_of(tmp_path, (shared_dir / "data" / "vocab" / "t5_spiece.model").read_bytes(), 100)
  tokenizer, vocabulary = opened(directory), seqio_of(directory / "vocabulary")
  docs = pathlib.Path(__file__).resolve().parents[2] / "docs"
  texts = TEXTS + SENTINELS + ["The <extra_id_0>ly end."] + lines_of(docs / "architecture.md")
  assert_same_ids(tokenizer, vocabulary, texts)
  assert len(tokenizer) == 32_100 and tokenizer.convert_tokens_to_ids("<extra_id_0>") == 32_099
  assert tokenizer("translate English to German: Hello.").input_ids == [13959, 1566, 12, 2968, 10, 8774, 5, 1]
  assert tokenizer.decode([8774, 296, 1], skip_special_tokens=True) == vocabulary.decode([8774, 296])


@pytest.mark.parametrize("extra_ids", [0, 125])
def test_bytes(extra_ids, tmp_path):
  directory = directory_of(tmp_path, None, extra_ids)
  tokenizer, vocabulary = opened(directory), seqio_of(directory / "vocabulary")
  assert type(tokenizer).__name__ == "ByT5Tokenizer"
  assert_same_ids(tokenizer, vocabulary, TEXTS)
  assert len(tokenizer) == vocabulary.vocab_size == 259 + extra_ids


@pytest.mark.parametrize("kind", ["small", "byte"])
def test_there_and_back(kind, small, tmp_path):
  directory = directory_of(tmp_path / "model", small if kind == "small" else None, 7)
  given = json.loads((directory / "vocabulary" / "vocabulary.json").read_text())
  vocabulary_files.copy(directory / "vocabulary", tmp_path / "native")
  for name in ("vocabulary.json", "spiece.model"):
    (directory / "vocabulary" / name).unlink(missing_ok=True)
  assert tokenizer_files.describe(directory) == vocabulary_files.describe(directory) == given
  assert vocabulary_files.vocabulary_dir(directory) == directory
  assert vocabulary_files.vocabularies_match(directory, tmp_path / "native")
  vocabulary_files.copy(directory, tmp_path / "again")
  assert vocabulary_files.describe(tmp_path / "again" / "vocabulary") == given
  assert seqio_of(directory).encode("ab c") == seqio_of(tmp_path / "again" / "vocabulary").encode("ab c")


def test_saved_by_transformers(small, tmp_path):
  """ByT5's tokenizer needs no file; of others transformers keeps no SentencePiece file: refused, not guessed."""
  opened(directory_of(tmp_path / "byte", None, 125)).save_pretrained(str(tmp_path / "saved byte"))
  (tmp_path / "saved byte" / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 384}))
  described = tokenizer_files.describe(tmp_path / "saved byte")
  assert (described["kind"], described["extra_ids"], described["vocab_size"]) == ("byte", 125, 384)
  opened(directory_of(tmp_path / "small", small, 7)).save_pretrained(str(tmp_path / "saved"))
  assert not (tmp_path / "saved" / "spiece.model").exists()
  assert vocabulary_files.vocabulary_dir(tmp_path / "saved") is None
  with pytest.raises(ConfigError, match="not the spiece.model that it was made of"):
    vocabulary_files.refuse_foreign(tmp_path / "saved")
  (tmp_path / "saved" / "spiece.model").write_bytes(small)
  assert vocabulary_files.vocabularies_match(tmp_path / "saved", tmp_path / "small")


T5_NAMES = [f"<extra_id_{number}>" for number in range(100)]


@pytest.mark.parametrize(
  ("files", "extra_ids"),
  [
    # What lies in google/t5-small, t5-v1_1-*, flan-t5-*, mt5-*.
    ({"tokenizer_config": {"model_max_length": 512}, "config": {"vocab_size": 528}}, 100),
    ({"tokenizer_config": {"extra_ids": 100, "additional_special_tokens": T5_NAMES}}, 100),
    ({"special_tokens_map": {"additional_special_tokens": T5_NAMES[:9]}, "config": {"vocab_size": 528}}, 9),
    ({"tokenizer_config": {"extra_ids": 0, "additional_special_tokens": None}, "config": {"vocab_size": 412}}, 0),
    ({"config": {"model_type": "t5", "vocab_size": 528}}, 100),
    ({"tokenizer_config": {"added_tokens_decoder": {"499": {"content": "<extra_id_0>"}, "1": "</s>"}}}, 100),
  ],
)
def test_sentinels_of_files_on_the_hub(files, extra_ids, small, tmp_path):
  described = tokenizer_files.describe(bare(tmp_path / "model", spiece_model=small, **files))
  sha256 = hashlib.sha256(small).hexdigest()
  expected = {"kind": "sentencepiece", "sha256": sha256, "extra_ids": extra_ids, "vocab_size": 400 + extra_ids}
  assert described == expected


def test_byt5_of_the_hub(tmp_path):
  files = {"config": {"tokenizer_class": "ByT5Tokenizer", "vocab_size": 384}}
  described = tokenizer_files.describe(bare(tmp_path / "a", **files))
  assert (described["kind"], described["extra_ids"], described["vocab_size"]) == ("byte", 125, 384)
  assert tokenizer_files.describe(bare(tmp_path / "b", config={"vocab_size": 384})) is None
  assert tokenizer_files.describe(tmp_path) is None


def test_vocabularies_are_compared_by_content_not_by_size(small, tmp_path):
  other = bytearray(small)
  place = other.index(b"distillspec") if b"distillspec" in other else other.index(b"task")
  other[place] ^= 1  # one letter of one piece
  one, same, another = (bare(tmp_path / name, spiece_model=bytes(data), tokenizer_config={"extra_ids": 5})
                        for name, data in (("one", small), ("same", small), ("another", other)))  # fmt: skip
  assert vocabulary_files.describe(one)["vocab_size"] == vocabulary_files.describe(another)["vocab_size"]
  assert vocabulary_files.vocabularies_match(one, same)
  with pytest.raises(ConfigError, match="the vocabularies differ"):
    vocabulary_files.vocabularies_match(one, another)
  nothing = bare(tmp_path / "nothing", config={})
  assert not vocabulary_files.vocabularies_match(one, nothing)
  note = vocabulary_files.unchecked(nothing, one)
  assert note == f"{nothing} carries no vocabulary: taking that of {one}, which cannot be checked"
  assert not vocabulary_files.unchecked(one, same) and not vocabulary_files.unchecked(nothing, nothing)


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ({"extra_ids": 100}, "400 ids and 100 sentinels, more than config.json's vocab_size 450"),
    ({"extra_ids": 9, "added_tokens_decoder": {"400": {"content": "<extra_id_0>"}}}, "in a T5 vocabulary .* it is 408"),
    ({"extra_ids": 9, "added_tokens_decoder": {"409": {"content": "<mine>"}}}, "has the token '<mine>' added"),
    ({"added_tokens_decoder": {"x": {"content": "<mine>"}}, "extra_ids": 1}, "names the id 'x'"),
  ],
)
def test_tokenizers_that_seqio_does_not_have_are_refused(said, message, small, tmp_path):
  directory = bare(tmp_path / "model", spiece_model=small, tokenizer_config=said, config={"vocab_size": 450})
  with pytest.raises(ConfigError, match=message):
    vocabulary_files.vocabulary_dir(directory)


def test_damaged_files_are_named(small, tmp_path):
  folder = folder_of(tmp_path / "vocabulary", small, 5)
  out = tmp_path / "out"
  out.mkdir()
  for data in (b"pieces", b"", b"\x0a\xff\xff\xff\xff\x0f", small[:-1]):
    with pytest.raises(ConfigError, match="it is no SentencePiece model"):
      sentencepiece_file.parse(data, "it")
    (folder / "spiece.model").write_bytes(data)
    with pytest.raises(ConfigError, match="is not the file that vocabulary.json describes"):
      tokenizer_files.write_tokenizer(folder, out)
  (folder / "spiece.model").unlink()
  with pytest.raises(ConfigError, match="spiece.model cannot be read"):
    tokenizer_files.write_tokenizer(folder, out)
  (folder / "vocabulary.json").write_text(json.dumps({"kind": "words", "extra_ids": 0}))
  with pytest.raises(ConfigError, match="no vocabulary of a known kind, but 'words'"):
    tokenizer_files.write_tokenizer(folder, out)
  assert not list(out.iterdir())


def test_mutations_end_in_an_error_that_names_a_file(small, tmp_path):
  """Hostile values and flipped bytes: described, or refused in one line, whatever they are."""
  rng = np.random.default_rng(0)
  values = [None, True, -1, 10**30, 1.5, "x", "▁<extra_id_0>", [], [[]], [{}], {}, {"content": 3}, {"7": []}, [1, 1]]
  keys = ["extra_ids", "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "tokenizer_class"]
  directory = bare(tmp_path / "model", spiece_model=small, config={"vocab_size": 528})
  outcomes = {"described": 0, "refused": 0}

  def ask():
    try:
      described = tokenizer_files.describe(directory)
      assert described is None or described["vocab_size"] <= 528
      outcomes["described"] += 1
    except ConfigError as error:
      assert "\n" not in str(error) and ("model" in str(error) or "tokenizer_config" in str(error))
      outcomes["refused"] += 1

  for key in keys:
    for value in values:
      (directory / "tokenizer_config.json").write_text(json.dumps({key: value}))
      ask()
  (directory / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 5}))
  for _ in range(200):
    data = bytearray(small)
    for place in rng.integers(0, len(data), 3):
      data[place] = rng.integers(0, 256)
    (directory / "spiece.model").write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.3 else data)
    ask()
  assert min(outcomes.values()) > 20, outcomes


def test_pieces_are_read_as_sentencepiece_reads_them(small, tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
  (tmp_path / "it.model").write_bytes(small)
  processor = sentencepiece.SentencePieceProcessor(model_proto=small)
  read = sentencepiece_file.read(tmp_path / "it.model")
  ids = range(processor.GetPieceSize())
  assert read.names == [processor.IdToPiece(i) for i in ids] and read.scores == [processor.GetScore(i) for i in ids]
  assert (read.unknown, read.unigram, read.byte_fallback) == (2, True, True)
  assert read.dummy_prefix and not read.strips
