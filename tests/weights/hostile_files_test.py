"""Hostile and broken files: one line that names the cause, no code run, nothing allocated for what is only claimed."""

import json
import os
import pickle
import re
import struct
import tracemalloc

import flax.serialization
import jax
import msgpack
import numpy as np
import pytest
import safetensors.numpy

from distillspec_jax import models
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import (
  huggingface,
  msgpack_file,
  orbax_tree,
  safetensors_file,
  sources,
  strict_json,
  t5x,
)

MODEL = models.T5(models.T5Config.named("t5_tiny", num_encoder_layers=1, num_decoder_layers=1))


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), MODEL.abstract_params())


@pytest.fixture
def theirs(tmp_path, params):
  huggingface.export(tmp_path / "hf", MODEL, params)
  return tmp_path / "hf"


@pytest.fixture
def t5x_dir(tmp_path, params):
  t5x.export(tmp_path / "t5x", MODEL, params, 1)
  return tmp_path / "t5x"


def refused(load, message):
  """Call; the error is one line with the message, and what was allocated is small."""
  tracemalloc.start()
  try:
    with pytest.raises(ConfigError, match=message) as caught:
      load()
    assert tracemalloc.get_traced_memory()[1] < 100e6
  finally:
    tracemalloc.stop()
  assert "\n" not in str(caught.value)


def packed(header, data=b""):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


class Runs:
  """A pickle of this makes a folder when it is opened by what runs code."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "it has 0 bytes"),
    (b"1234567", "it has 7 bytes"),
    (struct.pack("<Q", 1 << 62) + b"{}", "header should have 4,611,686,018,427,387,904 bytes; the file has 10"),
    (struct.pack("<Q", 1 << 20) + b"{}", "header should have 1,048,576 bytes; the file has 10"),
    (packed(b"[]"), "no JSON object"),
    (packed(b"{"), "cannot be read as JSON"),
    (packed(b'{"\xff": 1}'), "cannot be read as JSON"),
    (packed(DEEP), "nested too deeply"),
    (packed(b'{"n": ' + b"9" * 5000 + b"}"), "cannot be read as JSON"),
    (packed(b'{"a": 1, "a": 2}'), "'a' stands there twice"),
    (packed({"a": 5}), "a is not described"),
    (packed({"a": F32, "__metadata__": 3}, bytes(8)), "metadata is no JSON object"),
    (packed({"a": {**F32, "extra": 1}}, bytes(8)), "a is not described"),
    (packed({"a": {**F32, "dtype": "F33"}}, bytes(8)), "dtype 'F33'"),
    (packed({"a": {**F32, "dtype": ["F32"]}}, bytes(8)), "dtype"),
    (packed({"a": {**F32, "shape": [-2]}}, bytes(8)), r"shape \[-2\]"),
    (packed({"a": {**F32, "shape": [True, 2]}}, bytes(8)), "shape"),
    (packed({"a": {**F32, "shape": [2.0]}}, bytes(8)), "shape"),
    (packed({"a": {**F32, "shape": [1] * 500}}, bytes(8)), "shape"),
    (packed({"a": {**F32, "shape": [1 << 60, 1 << 60]}}, bytes(8)), "has 8 bytes, which F32"),
    (packed({"a": {**F32, "data_offsets": [0, 1 << 50]}}, bytes(8)), "there are 8"),
    (packed({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "lies at bytes 8 to 0"),
    (packed({"a": {**F32, "data_offsets": [-8, 0]}}, bytes(8)), "offsets"),
    (packed({"a": F32, "b": F32}, bytes(8)), "begins at byte 0 where the tensor before ends at 8"),
    (packed({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "begins at byte 4"),
    (packed({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)), "begins at byte 12"),
    (packed({"a": F32}, bytes(9)), "end at byte 8 of 9"),
    (pickle.dumps({"a": 1}), "is a PyTorch pickle"),
    (b"PK\x03\x04" + bytes(100), "is a PyTorch pickle"),
  ],
)  # fmt: skip
def test_safetensors(tmp_path, content, message):
  path = tmp_path / "model.safetensors"
  path.write_bytes(content)
  refused(lambda: safetensors_file.open_file(path), message)


def test_what_safetensors_itself_writes_is_read(tmp_path):
  """The control: nothing of the above refuses an honest file, an empty tensor and unaligned ones among them."""
  tensors = {"a": np.ones((0, 3), np.float32), "b": np.arange(3, dtype=np.int8), "c": np.arange(6.0).reshape(2, 3)}
  safetensors.numpy.save_file(tensors, tmp_path / "x", metadata={"format": "pt", "c": "not a tensor"})
  opened = safetensors_file.open_file(tmp_path / "x")
  assert set(opened) == set(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(opened[name].read(), value)
    assert opened[name].dtype == value.dtype


@pytest.mark.parametrize(
  ("index", "message"),
  [
    (b"", "cannot be read as JSON"),
    (DEEP, "nested too deeply"),
    (b"[1]", "is not a JSON object"),
    ({}, "no weight_map"),
    ({"weight_map": []}, "no weight_map"),
    *(
      ({"weight_map": {"shared.weight": name}}, "shards are .safetensors files in the same folder")
      for name in (*(f"{path}x.safetensors" for path in ("../", "/etc/", "a/", "..\\", "\0")), "x.bin", 3, None)
    ),
    ({"weight_map": {"shared.weight": "absent.safetensors"}}, "lacks absent.safetensors"),
  ],
)  # fmt: skip
def test_an_index(theirs, index, message):
  (theirs / "model.safetensors").rename(theirs.parent / "x.safetensors")
  text = index if isinstance(index, bytes) else json.dumps(index).encode()
  (theirs / "model.safetensors.index.json").write_bytes(text)
  refused(lambda: sources.open_source(theirs), message)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_layers": 10**9}, "num_encoder_layers is 1,000,000,000, but there are"),
    ({"num_decoder_layers": 10**9}, "num_decoder_layers is 1,000,000,000, but there are"),
    ({"vocab_size": 10**18}, r"vocab_size is 1e\+18, which no model has"),
    ({"vocab_size": "128"}, "vocab_size"),
    ({"d_model": -1}, "emb_dim"),
    ({"d_model": 2.5}, "emb_dim"),
    ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x'"),
    ({"layer_norm_epsilon": [1]}, "layer_norm_epsilon"),
    ({"dropout_rate": float("nan")}, "dropout_rate is 'nan'"),
    ({"dropout_rate": {}}, "dropout_rate"),
    ({"feed_forward_proj": ["relu"]}, "config.json|feed_forward_proj"),
    ({"dense_act_fn": {"a": 1}}, "config.json|dense_act_fn|feed_forward"),
    ({"model_type": ["t5"]}, "model_type"),
    ({"relative_attention_num_buckets": 0}, "buckets|fit"),
    ({"relative_attention_max_distance": float("nan")}, "max_distance is 'nan'; it must be a whole number"),
  ],
)  # fmt: skip
def test_a_configuration(theirs, change, message):
  path = theirs / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  refused(lambda: sources.open_source(theirs), message)


def test_json_of_absurd_size_is_not_read(theirs, monkeypatch):
  monkeypatch.setattr(strict_json, "LIMIT", 1000)
  (theirs / "config.json").write_text(json.dumps({"a": "x" * 1000}))
  refused(lambda: sources.open_source(theirs), "more than any description has")


@pytest.mark.parametrize("oldest", [False, True], ids=["zip", "oldest form"])
def test_a_pickle_runs_nothing(theirs, tmp_path, oldest):
  torch = pytest.importorskip("torch", reason="torch is not installed: pickles are refused anyway")
  made = tmp_path / "made by a pickle"
  (theirs / "model.safetensors").unlink()
  torch.save({"shared.weight": Runs(made)}, theirs / "pytorch_model.bin", _use_new_zipfile_serialization=not oldest)
  refused(lambda: sources.open_source(theirs), "holds more than weights")
  (theirs / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(made)))
  refused(lambda: sources.open_source(theirs), "pytorch_model.bin cannot be read")
  assert not made.exists()
  pickle.loads(pickle.dumps(Runs(made)))
  assert made.is_dir()  # the control: the pickle does run where it may


def edit(checkpoint, change):
  """Change the tree of a T5X checkpoint: `change` gets the target."""
  path = checkpoint / "checkpoint"
  tree = flax.serialization.msgpack_restore(path.read_bytes())
  change(tree["optimizer"]["target"])
  path.write_bytes(msgpack.packb(tree, default=lambda x: int(x)))


def spec_with(**changes):
  def change(target):
    target["token_embedder"]["embedding"].update(changes)

  return change


def no_spec(target):
  target["token_embedder"]["embedding"] = "text"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (spec_with(kvstore={"driver": "http", "base_url": "http://example.com", "path": "x/"}), "'zarr' on 'http'"),
    (spec_with(kvstore={"driver": "memory"}), "on 'memory'"),
    (spec_with(driver="n5"), "driver 'n5'"),
    (spec_with(driver="cast", base={"driver": "json", "kvstore": {"driver": "file", "path": "x"}}), "driver 'json'"),
    (spec_with(driver="cast", base=None), "cannot be read"),
    (spec_with(driver="cast"), "cannot be read"),
    (spec_with(kvstore=None), "on 'None'"),
    (spec_with(kvstore={"driver": "file", "path": ".."}), "names no folder"),
    (spec_with(kvstore={"driver": "file", "path": "/"}), "names no folder"),
    (spec_with(kvstore={"driver": "file", "path": "a\0b"}), "names no folder"),
    (spec_with(kvstore={"driver": "file", "path": "/etc/"}), "cannot be read"),  # looked for beside, where it is not
    (spec_with(metadata={"shape": [64, 64]}), r"its shape is \[128, 32\]; the tree says \[64, 64\]"),
    (spec_with(metadata=[1]), "cannot be read"),
    (spec_with(dtype="int8"), "its dtype is float32; the tree says int8"),
    (no_spec, "neither an array nor a tensorstore spec"),
  ],
)  # fmt: skip
def test_a_spec(t5x_dir, change, message):
  edit(t5x_dir / "checkpoint_1", change)
  refused(lambda: sources.open_source(t5x_dir), f"token_embedder/embedding.*{message}")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"shape": [1 << 40, 32]}, "chunks are claimed where 1 files are|the tree says"),
    ({"shape": [1 << 40, 32], "chunks": [1 << 40, 32]}, "chunk 0.0 has .* bytes, which cannot be"),
    ({"chunks": [1 << 40, 1 << 40]}, "chunk 0.0 has .* bytes, which cannot be"),
    ({"chunks": [1, 1]}, "4,096 chunks are claimed where 1 files are"),
    ({"chunks": [0, 0]}, "an empty one"),
    ({"chunks": [128]}, "shape"),
    ({"shape": "x"}, "shape"),
    ({"shape": [128.0, 32]}, "shape"),
    ({"zarr_format": 3}, "not a zarr 2 array"),
    ({"order": "F"}, "not a zarr 2 array in C order"),
    ({"filters": [{"id": "delta"}]}, "without filters"),
    ({"compressor": {"id": "pickle"}}, "compressor"),
    ({"compressor": 5}, "compressor"),
    ({"compressor": None}, "chunk 0.0 has .* bytes, which cannot be"),
    ({"dtype": "|O"}, "dtype"),
    ({"dtype": [["a", "<f4"]]}, "dtype"),
  ],
)  # fmt: skip
def test_a_zarray(t5x_dir, change, message):
  path = t5x_dir / "checkpoint_1" / "target.token_embedder.embedding" / ".zarray"
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  edit(t5x_dir / "checkpoint_1", lambda target: target["token_embedder"]["embedding"].pop("metadata"))
  refused(lambda: sources.open_source(t5x_dir), f"token_embedder/embedding cannot be read.*({message})")


def test_a_zarray_that_is_a_bomb(t5x_dir):
  path = t5x_dir / "checkpoint_1" / "target.token_embedder.embedding" / ".zarray"
  for content in (None, DEEP, b"", b"[]", b'{"a": 1, "a": 1}', b"{}"):
    path.unlink()
    if content is None:
      os.mkfifo(path)  # reading it would wait for ever
    else:
      path.write_bytes(content)
    refused(lambda: sources.open_source(t5x_dir), "embedding cannot be read")


def chunked(shape, chunks):
  return {"target": {"a": {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}}}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "it ends too early"),
    (b"\xdf\xff\xff\xff\xff", "a map of 4,294,967,295 values where 0 bytes are left"),
    (b"\xdd\xff\xff\xff\xff\x01", "a list of 4,294,967,295 values"),
    (b"\x81\xdb\xff\xff\xff\xff", "a name of 4,294,967,295 bytes"),
    (b"\x81\xa1a\xc6\xff\xff\xff\xff", "4,294,967,295 bytes should follow where 0 are left"),
    (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "an array of 4,294,967,295 bytes"),
    (b"\x81\xa1a" * 5000, "nests deeper"),
    (b"\x91" * 5000, "nests deeper"),
    (b"\x82\xa1a\x01\xa1a\x02", "'a' stands there twice"),
    (b"\x81\x01\x02", "a name is int"),
    (b"\x81\xa1\xff\x01", "a name is no text"),
    (b"\xc1", "begins no value"),
    (b"\x80\x80", "1 bytes follow its end"),
    (b"\x05", "holds no tree"),
    (pickle.dumps({"a": 1}), "damaged or no T5X file"),
    (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[2], "object", bytes(16)]))}), "dtype 'object'"),
    (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[2], "i4,O", bytes(16)]))}), "dtype"),
    (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[1 << 60], "float32", bytes(16)]))}), "has 16 bytes, which"),
    (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[-2], "float32", bytes(8)]))}), "an array has no shape"),
    (msgpack.packb({"a": msgpack.ExtType(1, b"\x01")}), "not shape, dtype and bytes"),
    (msgpack.packb(chunked({"0": 4}, {})), "an array in pieces lacks a part"),
    (msgpack.packb(chunked({"0": 4}, {"0": 7})), "an array in pieces lacks a part"),
    (b'model_checkpoint_path: "model.ckpt-1000"\n', "TensorFlow's"),
  ],
)  # fmt: skip
def test_a_msgpack_tree(tmp_path, content, message):
  (tmp_path / "checkpoint_1").mkdir()
  (tmp_path / "checkpoint_1" / "checkpoint").write_bytes(content)
  refused(lambda: sources.open_source(tmp_path), message)


def test_what_flax_itself_writes_is_read(tmp_path):
  """The control: every kind of value that Flax writes, against Flax's own reader."""
  arrays = {"f": np.arange(6, dtype=np.float32).reshape(2, 3), "h": np.ones(3, jax.numpy.bfloat16), "s": np.int32(7)}
  tree = {"a": arrays, "b": {"c": 5, "d": -3, "e": 1.5, "n": None, "t": True, "long" * 20: "text", "l": [1, 300]}}
  tree["many"] = {f"k{i}": i * 1000 for i in range(100)}
  tree["complex"] = 1 + 2j
  path = tmp_path / "tree"
  path.write_bytes(flax.serialization.msgpack_serialize(tree))
  ours, flaxs = msgpack_file.read(path), flax.serialization.msgpack_restore(path.read_bytes())
  for name, value in arrays.items():
    np.testing.assert_array_equal(ours["a"][name].read(), flaxs["a"][name])
    assert ours["a"][name].dtype == value.dtype
  assert ours["b"] == flaxs["b"] and ours["many"] == flaxs["many"]


def metadata_of(*paths, **more):
  tree = {
    str(path): {"key_metadata": [{"key": key, "key_type": 2} for key in path], "value_metadata": {"value_type": "x"}}
    for path in paths
  }
  return {"tree_metadata": tree, "use_zarr3": False, **more}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "cannot be read as JSON"),
    (DEEP, "nested too deeply"),
    (b"{}", "does not list a tree"),
    (b'{"tree_metadata": [1]}', "does not list a tree"),
    (json.dumps({"tree_metadata": {"a": {"key_metadata": [1]}}}).encode(), "does not list a tree"),
    (json.dumps(metadata_of(("target", ".."))).encode(), "is no name"),
    (json.dumps(metadata_of(("target", "a/../../b"))).encode(), "is no name"),
    (json.dumps(metadata_of(("opt_state", "a"))).encode(), "has no parameters: neither target nor params in opt_state"),
    (json.dumps(metadata_of(("target", "a"))).encode(), "cannot be read"),
    (json.dumps(metadata_of(("target", "a"), use_zarr3=True)).encode(), "zarr 3"),
    (json.dumps(metadata_of(("target", "a"), use_ocdbt=False)).encode(), "cannot be read"),
  ],
)  # fmt: skip
def test_orbax_metadata(tmp_path, content, message):
  (tmp_path / "checkpoint_1" / "state").mkdir(parents=True)
  (tmp_path / "checkpoint_1" / "state" / orbax_tree.METADATA).write_bytes(content)
  refused(lambda: sources.open_source(tmp_path), message)


@pytest.mark.parametrize("name", ["config.json", "config.gin"])
@pytest.mark.parametrize("content", [DEEP, b"\xff\xfe", b'{"config": 3}', b'{"config": {"mlp_activations": [[1]]}}'])
def test_a_configuration_beside_t5x(t5x_dir, name, content):
  (t5x_dir / "config.gin").unlink()
  (t5x_dir / name).write_bytes(content)
  if name == "config.gin" and content != b"\xff\xfe":
    assert sources.open_source(t5x_dir).model == MODEL  # text without a binding of T5Config
  else:
    refused(lambda: sources.open_source(t5x_dir), re.escape(str(t5x_dir)))


def test_gin_that_is_no_literal_is_left_out(t5x_dir):
  text = f"T5Config.num_heads = {'(' * 5000}{')' * 5000}\nT5Config.emb_dim = 10**10**10\nT5Config.head_dim = @f()"
  (t5x_dir / "config.gin").write_text(text)
  assert sources.open_source(t5x_dir).model == MODEL


def test_a_layer_number_of_a_thousand_million(tmp_path, params):
  tree = {"version": 3, "optimizer": {"target": {**params}, "state": {"step": np.int32(0)}}}
  tree["optimizer"]["target"]["encoder"] = {
    **params["encoder"], "layers_999999999": params["encoder"]["layers_0"]
  }  # fmt: skip
  (tmp_path / "checkpoint_0").mkdir()
  (tmp_path / "checkpoint_0" / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
  refused(lambda: sources.open_source(tmp_path), "num_encoder_layers is 1,000,000,000, but there are")
