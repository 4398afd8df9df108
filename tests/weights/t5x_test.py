"""T5X import: inference of the configuration, files beside it, damage and misfits named."""

import json
import os
import shutil

import flax.serialization
import jax
import numpy as np
import pytest
import tensorstore

from distillspec_jax import models
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import lazy_tensors, t5x, trees


@pytest.fixture
def native(shared_dir, tmp_path):
  """A writable copy of the native golden checkpoint."""
  shutil.copytree(shared_dir / "fixtures" / "t5x_native", tmp_path / "t5x")
  for path in (tmp_path / "t5x").rglob("*"):
    path.chmod(0o755 if path.is_dir() else 0o644)
  return tmp_path / "t5x"


def test_both_forms_hold_the_same_state(shared_dir):
  ours = [t5x.load(shared_dir / "fixtures" / form) for form in ("t5x_native", "t5x_orbax")]
  assert ours[0][0] == ours[1][0]
  jax.tree.map(np.testing.assert_array_equal, ours[0][1], ours[1][1])


@pytest.mark.parametrize(
  "overrides",
  [
    {},
    {"mlp_activations": ("relu",), "logits_via_embedding": True, "num_decoder_layers": 3},
    {"relative_bias": "per_layer", "num_heads": 2, "head_dim": 6, "relative_attention_num_buckets": 16},
  ],
)
def test_the_configuration_is_read_off_the_shapes(overrides):
  config = models.T5Config.named("t5_tiny", **overrides)
  flat = trees.flatten(models.T5(config).abstract_params())
  assert models.T5Config.from_dict(t5x.infer_config(flat)) == config


def test_scanned_layers_come_apart():
  flat = {
    "decoder/decoder/mlp/wo/kernel": np.arange(24.0).reshape(4, 3, 2),
    "decoder/decoder/self_attention/query/kernel": np.arange(48.0).reshape(2, 3, 2, 4),
    "decoder/decoder/self_attention/out/kernel": np.arange(48.0).reshape(2, 3, 4, 2),
    "decoder/decoder_norm/scale": np.ones(2),
  }
  lazy = t5x.to_layers({name: lazy_tensors.of_array(value) for name, value in flat.items()})
  apart = {name: tensor.read() for name, tensor in lazy.items()}
  assert len(apart) == 10
  np.testing.assert_array_equal(apart["decoder/layers_2/mlp/wo/kernel"], flat["decoder/decoder/mlp/wo/kernel"][:, 2])
  query = flat["decoder/decoder/self_attention/query/kernel"]
  np.testing.assert_array_equal(apart["decoder/layers_1/self_attention/query/kernel"], query[:, 1].reshape(2, 8))
  out = flat["decoder/decoder/self_attention/out/kernel"]
  np.testing.assert_array_equal(apart["decoder/layers_0/self_attention/out/kernel"], out[:, 0].reshape(8, 2))


def test_steps(native):
  shutil.copytree(native / "checkpoint_3", native / "checkpoint_20")
  assert t5x.find_checkpoint(native).name == "checkpoint_20"  # 20 > 3, not "20" < "3"
  assert t5x.find_checkpoint(native, 3).name == "checkpoint_3"
  assert t5x.find_checkpoint(native / "checkpoint_3").name == "checkpoint_3"
  shutil.copytree(native / "checkpoint_3", native / "checkpoint_021")  # not as T5X writes numbers
  assert t5x.find_checkpoint(native).name == "checkpoint_20"
  with pytest.raises(ConfigError, match="no T5X checkpoint of step 4"):
    t5x.load(native, step=4)


def test_the_configuration_beside_and_the_override_win(native):
  path = native / "config.json"
  described = json.loads(path.read_text())
  described["config"] |= {"mlp_activations": ["swish", "linear"], "dropout_rate": 0.1, "dtype": "bfloat16"}
  path.write_text(json.dumps(described))
  config = t5x.load(native)[0].config
  assert (config.mlp_activations, config.dropout_rate, config.dtype) == (("silu", "linear"), 0.1, "float32")
  config = t5x.load(native, config={"dropout_rate": 0.0, "dtype": "bfloat16"})[0].config
  assert (config.dropout_rate, config.dtype) == (0.0, "bfloat16")
  path.unlink()
  assert t5x.load(native)[0].config.mlp_activations == ("gelu", "linear")
  path.write_text(json.dumps({"config": {"num_decoder_layers": 3}}))
  with pytest.raises(ConfigError, match="lacks decoder/layers_2/.* and "):
    t5x.load(native)


def test_gin_beside():
  text = """
# Macros:
NUM_HEADS = 6
ACTIVATIONS = \\
    ('gelu', 'linear')
# Parameters for network.T5Config:
network.T5Config.num_heads = %NUM_HEADS
network.T5Config.mlp_activations = %ACTIVATIONS
t5x.examples.t5.network.T5Config.dropout_rate = 0.1
network.T5Config.dtype = 'bfloat16'
network.T5Config.initializer = @init()
network.Transformer.config = @network.T5Config()
"""
  assert t5x.read_gin(text) == {
    "num_heads": 6, "mlp_activations": ("gelu", "linear"), "dropout_rate": 0.1, "dtype": "bfloat16"
  }  # fmt: skip


def test_gin_in_blocks():
  text = """
include 't5x/examples/t5/t5_1_1/base.gin'
HEADS = 6  # for attention
network.Transformer.config = @network.T5Config()
network.T5Config:
  emb_dim = 512
  num_heads = %HEADS  # as above
  # mlp_dim = 7
  mlp_activations = ('gelu', 'linear')
utils.CheckpointConfig:
  emb_dim = 3
network.T5Config.head_dim = 64
"""
  assert t5x.read_gin(text) == {
    "emb_dim": 512, "num_heads": 6, "mlp_activations": ("gelu", "linear"), "head_dim": 64
  }  # fmt: skip


@pytest.mark.parametrize(
  ("described", "message"),
  [
    ({"mlp_activation": ["gelu", "linear"]}, "config.json has mlp_activation in its T5Config, which this package does"),
    ({"use_rope": True, "param_scan_axis": 1}, "config.json has use_rope in"),
    ({"logits_via_embedding": []}, r"logits_via_embedding is '\[\]'; it must be true or false"),
    ({"relative_attention_max_distance": 1e308}, r"max_distance is '1e\+308'; it must be a whole number"),
    ({"param_scan_axis": 0}, "param_scan_axis = 0: only 1 can be read"),
    ({"relative_attention_num_buckets": 16}, r"rel_embedding \(4, 32\) where the model has \(4, 16\)"),
  ],
)
def test_another_network_beside_is_refused(native, described, message):
  path = native / "config.json"
  path.write_text(json.dumps({"config": {"dtype": "bfloat16", "remat_policy": "minimal", "scan_layers": True}}))
  assert t5x.load(native)[0].config.dtype == "float32"  # the control: what changes no network
  path.write_text(json.dumps({"config": described}))
  with pytest.raises(ConfigError, match=message):
    t5x.load(native)


def test_misfits_are_named(native):
  with pytest.raises(ConfigError, match=r"wi_0/kernel \(32, 64\) where the model has \(32, 65\)"):
    t5x.load(native, config={"mlp_dim": 65})
  checkpoint = native / "checkpoint_3" / "checkpoint"
  original = checkpoint.read_bytes()
  tree = flax.serialization.msgpack_restore(original)
  del tree["optimizer"]["target"]["decoder"]["layers_1"]["mlp"]["wo"]
  tree["optimizer"]["target"]["prompt"] = {"embedding": np.ones((2, 2), np.float32)}
  checkpoint.write_bytes(flax.serialization.msgpack_serialize(tree))
  with pytest.raises(ConfigError, match="lacks decoder/layers_1/mlp/wo/kernel; it holds prompt/embedding, which"):
    t5x.load(native)
  tree["optimizer"]["target"] = {"dense": {"kernel": np.ones((2, 2), np.float32)}}
  checkpoint.write_bytes(flax.serialization.msgpack_serialize(tree))
  with pytest.raises(ConfigError, match="is no T5 that this package knows"):
    t5x.load(native)
  for data in (b"", b"garbage", original[:100]):
    checkpoint.write_bytes(data)
    with pytest.raises(ConfigError, match="checkpoint"):
      t5x.load(native)


@pytest.mark.parametrize("damage", ["delete chunk", "truncate chunk", "garbage", "delete .zarray", "delete folder"])
def test_damage_is_named(native, damage):
  folder = native / "checkpoint_3" / "target.decoder.layers_0.mlp.wi_0.kernel"
  if damage == "delete chunk":  # zarr itself would give zeros
    (folder / "0.0").unlink()
  elif damage == "truncate chunk":
    (folder / "0.0").write_bytes((folder / "0.0").read_bytes()[:50])
  elif damage == "garbage":
    (folder / "0.0").write_bytes(b"garbage")
  elif damage == "delete .zarray":
    (folder / ".zarray").unlink()
  else:
    shutil.rmtree(folder)
  with pytest.raises(ConfigError, match="decoder/layers_0/mlp/wi_0/kernel cannot be read") as caught:
    t5x.load(native)
  assert "\n" not in str(caught.value)


def test_damaged_orbax_form(shared_dir, tmp_path):
  shutil.copytree(shared_dir / "fixtures" / "t5x_orbax", tmp_path / "t5x")
  victim = tmp_path / "t5x" / "checkpoint_3" / "state" / "manifest.ocdbt"
  victim.chmod(0o644)
  victim.write_bytes(b"")
  with pytest.raises(ConfigError, match="state cannot be read"):
    t5x.load(tmp_path / "t5x")
  victim.unlink()
  os.mkfifo(victim)  # reading it would wait for ever
  with pytest.raises(ConfigError, match="state cannot be read .manifest.ocdbt is no ordinary file"):
    t5x.load(tmp_path / "t5x")


def test_a_checkpoint_made_for_a_bucket_with_a_cast(tmp_path):
  """Public checkpoints name a bucket in their specs, cast on reading, and come in v1.0's shape."""
  config = models.T5Config.named(
    "t5_tiny", mlp_activations=("relu",), logits_via_embedding=True, num_encoder_layers=1, num_decoder_layers=1
  )
  model = models.T5(config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), model.abstract_params())
  checkpoint = tmp_path / "checkpoint_7"
  checkpoint.mkdir()
  target = {}
  for name, value in trees.flatten(params).items():
    folder = "target." + name.replace("/", ".")
    if value.ndim == 1:
      target[name] = value  # small leaves stand in the msgpack file itself
      continue
    metadata = {"shape": value.shape, "chunks": [max(1, n // 2) for n in value.shape], "dtype": "<f4"}
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{checkpoint / folder}/"}, "metadata": metadata}
    tensorstore.open(spec, create=True).result().write(value).result()
    base = {"driver": "zarr", "kvstore": {"driver": "gcs", "bucket": "b", "path": f"t5/checkpoint_7/{folder}/"}}
    target[name] = {"driver": "cast", "dtype": "float32", "base": base}
  tree = {"version": 3, "optimizer": {"target": trees.unflatten(target), "state": {"step": np.int32(7)}}}
  (checkpoint / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
  loaded, same = t5x.load(tmp_path)
  assert loaded == model
  jax.tree.map(np.testing.assert_array_equal, same, params)
