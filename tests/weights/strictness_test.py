"""Nothing guessed, nothing lost: what is missing, left over, twice there or of another shape is named at once."""

import json
import re
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from distillspec_jax import models, weights
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import huggingface, layouts, sources, t5x, trees

MODEL = models.T5(models.T5Config.named("t5_tiny", num_encoder_layers=1, num_decoder_layers=1))
TIED = models.T5(
  models.T5Config.named("t5_tiny", num_encoder_layers=1, num_decoder_layers=1, logits_via_embedding=True)
)
ROWS = MODEL.config.vocab_size


def draw(model, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), model.abstract_params())


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def params():
  return draw(MODEL)


@pytest.fixture
def whole(tmp_path, params):
  huggingface.export(tmp_path / "whole", MODEL, params)
  return tmp_path / "whole"


@pytest.fixture
def shards(tmp_path, params):
  huggingface.export(tmp_path / "shards", MODEL, params, shard_bytes=60_000)
  return tmp_path / "shards"


def tensors_of(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


def rewrite(directory, change, metadata=None):
  """Write the weights again, changed: as safetensors' own writer does it."""
  tensors = tensors_of(directory)
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata=metadata)


def test_everything_wrong_is_said_at_once(whole):
  def change(tensors):
    del tensors["encoder.final_layer_norm.weight"]
    tensors["decoder.block.7.layer.0.layer_norm.weight"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()

  rewrite(whole, change)
  with pytest.raises(ConfigError) as caught:
    sources.open_source(whole)
  text = str(caught.value)
  assert "lacks encoder.final_layer_norm.weight" in text
  assert "holds decoder.block.7.layer.0.layer_norm.weight, which the model has no place for" in text
  assert f"lm_head.weight (32, {ROWS}) where the model has ({ROWS}, 32)" in text
  assert "\n" not in text


def test_shards_give_the_same_and_their_disorder_is_named(shards, whole, params):
  files = sorted(shards.glob("model-*.safetensors"))
  assert len(files) > 2 and not (shards / "model.safetensors").exists()
  assert_same(huggingface.load(shards)[1], params)
  index = json.loads((shards / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  held = {name: file.name for file in files for name in safetensors.numpy.load_file(file)}
  assert held == index["weight_map"]

  first, second = (safetensors.numpy.load_file(file) for file in files[:2])
  moved = next(iter(first))
  safetensors.numpy.save_file({**second, moved: first[moved]}, files[1])
  with pytest.raises(ConfigError, match=f"holds {moved} in {files[0].name} and {files[1].name}: one"):
    sources.open_source(shards)
  safetensors.numpy.save_file({name: first[name] for name in first if name != moved}, files[0])
  with pytest.raises(ConfigError, match=rf"{moved} in {files[1].name}, which its index .* places in another shard"):
    sources.open_source(shards)
  safetensors.numpy.save_file(second, files[1])
  with pytest.raises(ConfigError, match=rf"index .* that names {moved}, which no shard holds; it lacks {moved}"):
    sources.open_source(shards)


def test_of_a_whole_file_and_shards_the_whole_one_counts_as_with_transformers(shards, whole):
  rewrite(whole, lambda tensors: tensors.update({n: v + 1 for n, v in tensors.items()}))
  (whole / "model.safetensors").rename(shards / "model.safetensors")
  expected = safetensors.numpy.load_file(shards / "model.safetensors")["shared.weight"]
  np.testing.assert_array_equal(huggingface.load(shards)[1]["token_embedder"]["embedding"], expected)


def test_an_export_replaces_another_and_its_shards(shards):
  params = draw(MODEL, 1)
  huggingface.export(shards, MODEL, params)
  assert {path.name for path in shards.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
  assert_same(huggingface.load(shards)[1], params)


def test_an_export_that_fails_leaves_what_was_there(shards, tmp_path, params):
  before = {path.name: path.read_bytes() for path in shards.iterdir()}
  broken = jax.tree.map(np.copy, params)
  broken["encoder"]["encoder_norm"]["scale"][0] = 1e9
  for directory in (shards, tmp_path / "new" / "er"):
    with pytest.raises(ConfigError, match="encoder/encoder_norm/scale holds 1e.09, which float16 cannot hold"):
      huggingface.export(directory, MODEL, broken, dtype=np.float16, shard_bytes=50_000)
  assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_are_read_and_written(whole, tmp_path, params, dtype):
  rewrite(whole, lambda tensors: tensors.update({n: v.astype(dtype) for n, v in tensors.items()}))
  expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
  _, loaded = weights.load_model(whole)
  assert_same(loaded, expected)
  if dtype != np.float64:
    huggingface.export(tmp_path / "out", MODEL, params, dtype=dtype)
    assert {value.dtype for value in tensors_of(tmp_path / "out").values()} == {np.dtype(dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == np.dtype(dtype).name
    assert_same(weights.load_model(tmp_path / "out")[1], expected)
  narrow = weights.load_model(whole, config={"param_dtype": "bfloat16"})[1]
  assert_same(narrow, jax.tree.map(lambda x: x.astype(dtype).astype(ml_dtypes.bfloat16), params))


def test_whole_numbers_are_no_parameters(whole):
  name = "encoder.block.0.layer.0.SelfAttention.q.weight"
  rewrite(whole, lambda tensors: tensors.update({name: np.ones(tensors[name].shape, np.int8)}))
  with pytest.raises(ConfigError, match=f"holds {name} as int8"):
    sources.open_source(whole)


def test_ties(tmp_path):
  params = draw(TIED)
  huggingface.export(tmp_path, TIED, params)
  table = tensors_of(tmp_path)["shared.weight"]
  copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
  rewrite(tmp_path, lambda tensors: tensors.update(dict.fromkeys(copies, table)))
  assert_same(huggingface.load(tmp_path)[1], params)
  other = np.array(table)
  other[-1, -1] += 1  # in the last block that is compared
  rewrite(tmp_path, lambda tensors: tensors.update({copies[1]: other}))
  with pytest.raises(ConfigError, match=f"{copies[1]} differs from shared.weight"):
    sources.open_source(tmp_path)
  rewrite(tmp_path, lambda tensors: tensors.update({copies[1]: other[:-1]}))
  with pytest.raises(ConfigError, match=f"{copies[1]} differs from shared.weight"):
    sources.open_source(tmp_path)


def test_tensors_that_share_storage(tmp_path):
  """safetensors.torch.save_model keeps one of several names, and says in the metadata which the others were."""
  torch = pytest.importorskip("torch", reason="torch is not installed: no file with shared storage can be made")
  import safetensors.torch

  params = draw(TIED)
  huggingface.export(tmp_path, TIED, params)
  tensors = {name: torch.tensor(value) for name, value in tensors_of(tmp_path).items()}

  class Module(torch.nn.Module):
    def state_dict(self, *arguments, **keywords):
      table = tensors["shared.weight"]
      return {**tensors, "encoder.embed_tokens.weight": table, "lm_head.weight": table}

  safetensors.torch.save_model(Module(), str(tmp_path / "model.safetensors"))
  kept = set(tensors_of(tmp_path))
  assert len(kept & {"shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"}) == 1
  assert_same(huggingface.load(tmp_path)[1], params)


def test_pytorch_files_are_read_by_the_loader_of_weights(whole, shards, params, monkeypatch):
  torch = pytest.importorskip("torch", reason="torch is not installed: pickles are refused anyway")
  tensors = {name: torch.tensor(value) for name, value in tensors_of(whole).items()}
  (whole / "model.safetensors").unlink()
  for zipped in (True, False):
    torch.save(tensors, whole / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert sources.detect(whole) == "huggingface"
    assert_same(weights.load_model(whole)[1], params)
  narrow = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
  torch.save(narrow, whole / "pytorch_model.bin")
  rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
  assert_same(weights.load_model(whole)[1], rounded)

  index = {}
  for i, path in enumerate(sorted(shards.glob("model-*.safetensors"))):
    held = {name: torch.tensor(value) for name, value in safetensors.numpy.load_file(path).items()}
    torch.save(held, shards / f"pytorch_model-{i}.bin")
    index |= dict.fromkeys(held, f"pytorch_model-{i}.bin")
  for path in shards.glob("model*"):
    path.unlink()
  (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
  assert_same(weights.load_model(shards)[1], params)
  (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
  with pytest.raises(ConfigError, match="shards are .bin files in the same folder"):
    sources.open_source(shards)

  torch.save({"shared.weight": 3}, whole / "pytorch_model.bin")
  with pytest.raises(ConfigError, match="other things than named tensors"):
    sources.open_source(whole)
  monkeypatch.setattr(torch, "__version__", "2.5.1")
  with pytest.raises(ConfigError, match="torch 2.5.1 may run code"):
    sources.open_source(whole)
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ConfigError, match="with torch alone .not installed.*safe_serialization=True"):
    sources.open_source(whole)


def test_tensors_of_pytorch_that_are_not_plain(whole, params):
  torch = pytest.importorskip("torch", reason="torch is not installed: pickles are refused anyway")
  tensors = {name: torch.tensor(value) for name, value in tensors_of(whole).items()}
  (whole / "model.safetensors").unlink()
  name = "shared.weight"
  torch.save({n: torch.nn.Parameter(value) for n, value in tensors.items()}, whole / "pytorch_model.bin")
  assert_same(weights.load_model(whole)[1], params)  # with gradients, and with axes the other way round
  torch.save({**tensors, name: tensors[name].T.contiguous().T}, whole / "pytorch_model.bin")
  assert_same(weights.load_model(whole)[1], params)
  for odd, message in (
    (torch.zeros(1, 1).expand(ROWS, 32), f"{name} has 4 bytes, which cannot be {ROWS * 32 * 4:,}"),
    (tensors[name].to_sparse(), "cannot be read"),
    (tensors[name].to(torch.float8_e4m3fn), f"{name} is a torch.float8_e4m3fn tensor"),
    (tensors[name].to(torch.complex64), f"{name} as complex64"),
  ):
    torch.save({**tensors, name: odd}, whole / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=message) as caught:
      weights.load_model(whole)
    assert "\n" not in str(caught.value)

  torch.save(tensors, whole / "pytorch_model.bin")
  with zipfile.ZipFile(whole / "pytorch_model.bin") as archive:
    held = {info.filename: archive.read(info) for info in archive.infolist()}
  for change, message in (
    (dict(compression=zipfile.ZIP_DEFLATED), "data/0 in it is compressed|data.pkl in it is compressed"),
    ({"/byteorder": b"big"}, "its numbers are big-endian"),
    ({"/data/0": b"1234"}, "is not where torch .* says in the file"),
  ):
    with zipfile.ZipFile(whole / "pytorch_model.bin", "w", change.pop("compression", zipfile.ZIP_STORED)) as archive:
      for file, data in held.items():
        archive.writestr(file, next((new for end, new in change.items() if file.endswith(end)), data))
    with pytest.raises(ConfigError, match=message):
      weights.load_model(whole)


LONGER = ROWS + 28


def is_padded(loaded, params, rows):
  """Check the tables: the file's rows, then zeros."""
  table, head = loaded["token_embedder"]["embedding"], loaded["decoder"]["logits_dense"]["kernel"]
  assert table.shape[0] == rows and head.shape[1] == rows
  np.testing.assert_array_equal(table[:ROWS], params["token_embedder"]["embedding"])
  np.testing.assert_array_equal(head[:, :ROWS], params["decoder"]["logits_dense"]["kernel"])
  assert not np.asarray(table[ROWS:]).any() and not np.asarray(head[:, ROWS:]).any()


@pytest.mark.parametrize("form", ["huggingface", "t5x"])
def test_a_vocabulary_is_padded_where_that_was_asked_for(tmp_path, params, form):
  (huggingface if form == "huggingface" else t5x).export(tmp_path, MODEL, params)
  model, loaded = weights.load_model(tmp_path, config={"vocab_size": LONGER})
  assert model.vocab_size == LONGER
  is_padded(loaded, params, LONGER)
  with pytest.raises(ConfigError, match=rf"\({ROWS}, 32\) where the model has \({ROWS - 1}, 32\)"):
    weights.load_model(tmp_path, config={"vocab_size": ROWS - 1})  # rows are never thrown away


def describe(directory, form, size):
  if form == "huggingface":
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": size}))
  else:
    (directory / "config.json").write_text(json.dumps({"config": {"vocab_size": size}}))


@pytest.mark.parametrize("form", ["huggingface", "t5x"])
def test_lacking_rows_are_an_error_where_nobody_asked(tmp_path, form):
  """The description claims 128; the file has 100, as T5's 32,100 of 32,128. The vocabulary beside settles it."""
  small = models.T5(models.T5Config.from_dict({**MODEL.config.as_dict(), "vocab_size": 100}))
  params = draw(small)
  (huggingface if form == "huggingface" else t5x).export(tmp_path, small, params)
  describe(tmp_path, form, 128)
  with pytest.raises(ConfigError, match="100 tokens, the configuration 128: to pad with zeros, ask.*vocab_size=128"):
    weights.load_model(tmp_path)
  vocabulary = tmp_path / "vocabulary" / "vocabulary.json"
  vocabulary.parent.mkdir()
  for size, padded in ((99, False), (100, True)):
    vocabulary.write_text(json.dumps({"kind": "sentencepiece", "sha256": "x", "extra_ids": 0, "vocab_size": size}))
    if padded:
      _, loaded = weights.load_model(tmp_path)
      table = np.asarray(loaded["token_embedder"]["embedding"])
      np.testing.assert_array_equal(table[:100], params["token_embedder"]["embedding"])
      assert table.shape[0] == 128 and not table[100:].any()
    else:
      with pytest.raises(ConfigError, match="to pad with zeros"):
        weights.load_model(tmp_path)
  describe(tmp_path, form, 256)  # not what 100 rounds up to
  with pytest.raises(ConfigError, match="to pad with zeros"):
    weights.load_model(tmp_path)


def test_the_same_parameter_plain_and_stacked(tmp_path, params):
  stacked = {"encoder/encoder/mlp/wo/kernel": (64, 1, 32), "encoder/layers_0/mlp/wo/kernel": (64, 32)}
  with pytest.raises(ConfigError, match="holds encoder/layers_0/mlp/wo/kernel twice"):
    t5x.table(stacked)


@pytest.mark.parametrize("bias", ["shared", "per_layer"])
def test_what_is_expected_of_a_model_is_what_the_model_has(bias):
  for encoder, decoder in ((1, 1), (3, 2), (1, 12)):
    config = {**MODEL.config.as_dict(), "num_encoder_layers": encoder, "num_decoder_layers": decoder}
    model = models.T5(models.T5Config.from_dict({**config, "relative_bias": bias}))
    assert layouts.expected(model) == trees.flatten(model.abstract_params())


def test_a_claim_of_many_layers_is_answered_without_a_network_of_that_many(whole, monkeypatch):
  """Tracing a network takes time for each layer; a file of ten thousand empty tensors is small."""
  traced, abstract = [], models.T5.abstract_params

  def noted(self):
    traced.append(self.config.num_encoder_layers)
    return abstract(self)

  monkeypatch.setattr(models.T5, "abstract_params", noted)
  safetensors.numpy.save_file({f"t{i}": np.ones(0, np.float32) for i in range(10_000)}, whole / "model.safetensors")
  path = whole / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 9_999}))
  with pytest.raises(ConfigError, match="lacks decoder.block.0.*holds t0, t1, t10, t100 and 9996 more"):
    sources.open_source(whole)
  assert max(traced, default=0) <= 1


def test_there_and_back_through_every_form(tmp_path, params):
  """native -> T5X -> Hugging Face -> native, every bit."""
  weights.save_model(tmp_path / "native", MODEL, params)
  model, loaded = weights.load_model(tmp_path / "native")
  t5x.export(tmp_path / "t5x", model, loaded)
  model, loaded = weights.load_model(tmp_path / "t5x")
  huggingface.export(tmp_path / "hf", model, loaded)
  model, loaded = weights.load_model(tmp_path / "hf")
  weights.save_model(tmp_path / "again", model, loaded)
  for directory in ("native", "t5x", "hf", "again"):
    source = sources.open_source(tmp_path / directory)
    assert source.model == MODEL
    for name, leaf in trees.flatten(params).items():
      np.testing.assert_array_equal(source.tensors[name].read(), leaf)
      assert source.tensors[name].dtype == leaf.dtype


def test_every_error_names_where(whole):
  with pytest.raises(ConfigError, match=re.escape(str(whole))):
    weights.load_model(whole, config={"num_heads": 3})
