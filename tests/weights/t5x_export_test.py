"""T5X export: T5X's own layout, bit for bit there and back, whole or not at all."""

import json
import shutil

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore

from distillspec_jax import models
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import sources, t5x, t5x_export, trees

TINY = models.T5Config.named("t5_tiny", num_encoder_layers=1, num_decoder_layers=2)


def draw(model, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), model.abstract_params())


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.structure(a) == jax.tree.structure(b)


def array_at(folder):
  """Read a zarr array, apart from the package."""
  spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
  return np.asarray(tensorstore.open(spec).result().read().result())


def tree_of(checkpoint):
  return flax.serialization.msgpack_restore((checkpoint / "checkpoint").read_bytes())


@pytest.mark.parametrize(
  "overrides",
  [
    {},
    {"mlp_activations": ("relu",), "logits_via_embedding": True, "dropout_rate": 0.1},
    {"mlp_activations": ("silu", "linear"), "num_heads": 2, "head_dim": 6},
    {"relative_bias": "per_layer", "num_heads": 2, "head_dim": 6, "num_encoder_layers": 11},
    {"param_dtype": "bfloat16"},
  ],
  ids=["v1.1", "v1.0", "other widths", "scanned", "bfloat16"],
)
def test_there_and_back(tmp_path, overrides):
  model = models.T5(models.T5Config.from_dict({**TINY.as_dict(), **overrides}))
  params = draw(model)
  folder = t5x.export(tmp_path, model, params, 7)
  assert folder == tmp_path / "checkpoint_7"
  override = {name: value for name, value in overrides.items() if name == "param_dtype"}
  same, again = t5x.load(tmp_path, config=override)
  assert same == model
  assert_same(again, params)
  assert sources.open_source(tmp_path).step == 7
  examples = "scalable_t5" if model.config.relative_bias == "per_layer" else "t5"
  imported = ["from __gin__ import dynamic_registration", f"from t5x.examples.{examples} import network"]
  assert (tmp_path / "config.gin").read_text().splitlines()[:2] == imported


@pytest.mark.parametrize("form", ["t5x_native", "t5x_scanned"])
def test_the_files_are_those_that_t5x_wrote(shared_dir, tmp_path, form):
  """The golden checkpoints are T5X's own: the same tree, specs, folders and numbers come out again."""
  original = shared_dir / "fixtures" / form / "checkpoint_3"
  ours = t5x.export(tmp_path, *t5x.load(shared_dir / "fixtures" / form), 3)
  there, here = tree_of(original), tree_of(ours)
  assert here["version"] == there["version"] == 3
  assert int(here["optimizer"]["state"]["step"]) == int(there["optimizer"]["state"]["step"]) == 3
  assert here["optimizer"]["state"]["step"].dtype == there["optimizer"]["state"]["step"].dtype
  assert here["optimizer"]["target"] == there["optimizer"]["target"]
  folders = {path.name for path in original.iterdir() if path.name.startswith("target.")}
  assert {path.name for path in ours.iterdir()} == folders | {"checkpoint"}
  for name in folders:
    assert (ours / name / ".zarray").read_bytes() == (original / name / ".zarray").read_bytes()
    np.testing.assert_array_equal(array_at(ours / name), array_at(original / name))


def test_scanned_layers_are_the_slices_of_the_stack(shared_dir):
  """scanned -> plain against the stacked arrays themselves, read apart from the package."""
  original = shared_dir / "fixtures" / "t5x_scanned" / "checkpoint_3"
  flat = trees.flatten(t5x.load(original.parent)[1])
  checked = 0
  for stack, layers in (("encoder", 2), ("decoder", 3)):
    for path in original.glob(f"target.{stack}.{stack}.*"):
      value, rest = array_at(path), path.name.removeprefix(f"target.{stack}.{stack}.").replace(".", "/")
      assert value.shape[1] == layers
      for i in range(layers):
        here = flat.pop(f"{stack}/layers_{i}/{rest}")
        np.testing.assert_array_equal(here, value[:, i].reshape(here.shape))
        checked += 1
  assert checked == 2 * 10 + 3 * 15
  norms = {"encoder/encoder_norm/scale", "decoder/decoder_norm/scale"}
  assert set(flat) == norms | {"token_embedder/embedding", "decoder/logits_dense/kernel"}


def test_dtypes_and_overflow(tmp_path):
  model = models.T5(TINY)
  params = draw(model)
  t5x.export(tmp_path / "half", model, params, dtype=ml_dtypes.bfloat16)
  target = tree_of(tmp_path / "half" / "checkpoint_0")["optimizer"]["target"]
  assert target["token_embedder"]["embedding"]["dtype"] == "bfloat16"
  expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
  assert_same(t5x.load(tmp_path / "half")[1], expected)
  params["decoder"]["decoder_norm"]["scale"][3] = 1e6
  with pytest.raises(ConfigError, match="parameter decoder/decoder_norm/scale holds 1e.06, which float16 cannot hold"):
    t5x.export(tmp_path / "narrow", model, params, dtype=np.float16)
  assert not (tmp_path / "narrow").exists()


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
  model = models.T5(TINY)
  params = draw(model)
  t5x.export(tmp_path, model, params, 1)
  before = sorted(path.name for path in tmp_path.rglob("*"))
  write, calls = t5x_export._write, []

  def failing(*arguments):
    calls.append(arguments)
    if len(calls) == 5:
      raise OSError("no space left on device")
    return write(*arguments)

  monkeypatch.setattr(t5x_export, "_write", failing)
  with pytest.raises(OSError, match="no space"):
    t5x.export(tmp_path, model, params, 2)
  assert sorted(path.name for path in tmp_path.rglob("*")) == before
  calls.clear()
  with pytest.raises(OSError, match="no space"):
    t5x.export(tmp_path / "new" / "er", model, params, 2)
  assert not (tmp_path / "new").exists()


def test_what_is_refused(tmp_path):
  model = models.T5(TINY)
  params = draw(model)
  t5x.export(tmp_path, model, params, 1)
  other = models.T5(models.T5Config.named("t5_tiny"))
  decoder = models.DecoderLM(models.DecoderLMConfig.named(next(iter(models.DecoderLMConfig.sizes))))
  for wrong, message in (
    ((model, params, 1), "checkpoint_1 exists already"),
    ((model, params, -1), "step=-1"),
    ((model, {}, 2), "lacks"),
    ((other, draw(other), 2), "config.gin describes another model"),
    ((decoder, {}, 2), "only T5 models"),
  ):
    with pytest.raises(ConfigError, match=message):
      t5x.export(tmp_path, *wrong)
  for field, value in (("relative_attention_num_buckets", 16), ("layer_norm_epsilon", 1e-5)):
    odd = models.T5(models.T5Config.from_dict({**TINY.as_dict(), field: value}))
    with pytest.raises(ConfigError, match=f"have {field} = "):
      t5x.export(tmp_path / "odd", odd, draw(odd))
  assert not (tmp_path / "odd").exists()


def test_inline_arrays_old_bfloat16_and_pieces(tmp_path, monkeypatch):
  """Trees whose arrays stand in the msgpack file itself, in pieces where they are large; bfloat16 as uint16 of old."""
  monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
  model = models.T5(TINY)
  params = draw(model)
  checkpoint = tmp_path / "inline" / "checkpoint_2"
  checkpoint.mkdir(parents=True)
  state = {"step": np.int32(2), "param_states": {"a": np.ones(3, np.float32)}}
  tree = {"version": 3, "optimizer": {"target": params, "state": state}}
  (checkpoint / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
  assert b"__msgpack_chunked_array__" in (checkpoint / "checkpoint").read_bytes()
  assert_same(t5x.load(tmp_path / "inline")[1], params)

  narrow = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
  t5x.export(tmp_path / "old", model, narrow)
  folder = tmp_path / "old" / "checkpoint_0"
  for path in folder.glob("target.*/.zarray"):
    path.write_text(path.read_text().replace('"bfloat16"', '"<u2"'))
  text = (folder / "checkpoint").read_bytes().replace(b"\xa8bfloat16", b"\xa6uint16")
  (folder / "checkpoint").write_bytes(text.replace(b"version\x03", b"version\x02"))
  assert_same(t5x.load(tmp_path / "old")[1], jax.tree.map(lambda x: x.astype(np.float32), narrow))
  (folder / "checkpoint").write_bytes(text)
  with pytest.raises(ConfigError, match="as uint16"):  # since version 3 these would be whole numbers
    t5x.load(tmp_path / "old")


def test_chunks_are_those_of_t5x():
  """At most so many elements, every axis divided evenly, no axis cut while a larger one can be."""
  large = 1 << 24
  for shape, elements in (((32128, 2048), large), ((2048, 24, 32, 64), large), ((7, 5), 1), ((3,), 100), ((4, 4), 8)):
    chunks = t5x_export.chunk_shape(shape, elements)
    assert np.prod(chunks) <= elements and all(n % c == 0 for n, c in zip(shape, chunks, strict=True))
  assert t5x_export.chunk_shape((32128, 2048), 1 << 24) == [8032, 2048]
  assert t5x_export.chunk_shape((4, 4), 8) == [2, 4]


def test_a_configuration_beside_from_an_older_tool_still_wins(shared_dir, tmp_path):
  shutil.copytree(shared_dir / "fixtures" / "t5x_native" / "checkpoint_3", tmp_path / "checkpoint_3")
  (tmp_path / "config.json").write_text(json.dumps({"config": {"mlp_activations": ["silu", "linear"]}}))
  assert t5x.load(tmp_path)[0].config.mlp_activations == ("silu", "linear")


def test_what_a_kill_leaves_is_no_checkpoint(tmp_path):
  model = models.T5(TINY)
  folder = t5x.export(tmp_path, model, draw(model), 5)
  folder.rename(tmp_path / "checkpoint_5.tmp-0a1b2c3d")
  assert t5x.find_checkpoint(tmp_path) is None
  with pytest.raises(ConfigError, match="is no model directory"):
    sources.open_source(tmp_path)
