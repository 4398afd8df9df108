"""Hugging Face import and export, against golden logits, hand-written files and transformers where it is installed."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from distillspec_jax import models
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import huggingface, trees

E, H, D, F, V, BUCKETS = 16, 2, 4, 24, 40, 32
BATCH = {
  "encoder_input_tokens": np.array([[5, 9, 31, 12, 1], [7, 22, 1, 0, 0]], np.int32),
  "decoder_input_tokens": np.array([[0, 4, 17, 8], [0, 30, 2, 11]], np.int32),
}
V1_0 = {"feed_forward_proj": "relu"}  # the first T5s do not say that they are tied
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def handmade(kind, encoder=2, decoder=1, seed=0):
  """Write down, by hand and apart from the package's table, the tensors of a T5 as transformers names them."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32) * 0.5

  tensors = {"shared.weight": draw(V, E)}
  for stack, layers in (("encoder", encoder), ("decoder", decoder)):
    for i in range(layers):
      attentions = ["SelfAttention"] + (["EncDecAttention"] if stack == "decoder" else [])
      for number, name in enumerate(attentions):
        for part in "qkv":
          tensors[f"{stack}.block.{i}.layer.{number}.{name}.{part}.weight"] = draw(H * D, E)
        tensors[f"{stack}.block.{i}.layer.{number}.{name}.o.weight"] = draw(E, H * D)
        tensors[f"{stack}.block.{i}.layer.{number}.layer_norm.weight"] = draw(E)
      number = len(attentions)
      for part in ["wi"] if kind is V1_0 else ["wi_0", "wi_1"]:
        tensors[f"{stack}.block.{i}.layer.{number}.DenseReluDense.{part}.weight"] = draw(F, E)
      tensors[f"{stack}.block.{i}.layer.{number}.DenseReluDense.wo.weight"] = draw(E, F)
      tensors[f"{stack}.block.{i}.layer.{number}.layer_norm.weight"] = draw(E)
    tensors[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = draw(BUCKETS, H)
    tensors[f"{stack}.final_layer_norm.weight"] = draw(E)
  if kind is V1_1:
    tensors["lm_head.weight"] = draw(V, E)
  config = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": V, "d_model": E, "num_heads": H,
    "d_kv": D, "d_ff": F, "num_layers": encoder, "num_decoder_layers": decoder, "decoder_start_token_id": 0,
    "is_encoder_decoder": True, **kind,
  }  # fmt: skip
  return tensors, config


def write(directory, tensors, config):
  directory.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  (directory / "config.json").write_text(json.dumps(config))
  return directory


def logits_there(directory):
  torch = pytest.importorskip("torch", reason="torch is not installed: no parity with transformers")
  transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
  network = transformers.T5ForConditionalGeneration.from_pretrained(str(directory), torch_dtype=torch.float32).eval()
  source = torch.tensor(BATCH["encoder_input_tokens"].astype(np.int64))
  target = torch.tensor(BATCH["decoder_input_tokens"].astype(np.int64))
  with torch.no_grad():
    return network(input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=target).logits.numpy()


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", [V1_0, V1_1], ids=["v1.0", "v1.1"])
def test_handmade_checkpoint_agrees_with_transformers(tmp_path, kind):
  directory = write(tmp_path / "theirs", *handmade(kind))
  expected = logits_there(directory)
  model, params = huggingface.load(directory)
  assert model.config.logits_via_embedding == (kind is V1_0)
  np.testing.assert_allclose(model.score(params, BATCH), expected, atol=2e-5, rtol=1e-5)
  huggingface.export(tmp_path / "ours", model, params)
  np.testing.assert_allclose(logits_there(tmp_path / "ours"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [V1_0, V1_1], ids=["v1.0", "v1.1"])
def test_layout_and_round_trip(tmp_path, kind):
  tensors, config = handmade(kind, encoder=1, decoder=3)
  model, params = huggingface.load(write(tmp_path / "theirs", tensors, config))
  assert (model.config.num_encoder_layers, model.config.num_decoder_layers) == (1, 3)
  flat = trees.flatten(params)
  name = "decoder.block.2.layer.1.EncDecAttention.q.weight"
  np.testing.assert_array_equal(flat["decoder/layers_2/encoder_decoder_attention/query/kernel"], tensors[name].T)
  bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  np.testing.assert_array_equal(flat["encoder/relpos_bias/rel_embedding"], tensors[bias].T)
  huggingface.export(tmp_path / "ours", model, params)
  again = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
  assert set(again) == set(tensors)
  assert_same(again, tensors)
  same, params_again = huggingface.load(tmp_path / "ours")
  assert same.config.as_dict() == model.config.as_dict()
  assert_same(params_again, params)


def test_the_table_is_a_bijection_onto_the_parameters():
  for overrides in ({}, {"logits_via_embedding": True, "mlp_activations": ("relu",), "num_decoder_layers": 3}):
    config = models.T5Config.named("t5_tiny", **overrides)
    names = huggingface.table(config)
    assert set(names) == set(trees.flatten(models.T5(config).abstract_params()))
    assert len({there.name for there in names.values()}) == len(names)


def test_shards(tmp_path):
  tensors, config = handmade(V1_1)
  directory = write(tmp_path, tensors, config)
  whole = huggingface.load(directory)[1]
  (directory / "model.safetensors").unlink()
  weight_map = {}
  for number in range(2):
    part = dict(sorted(tensors.items())[number::2])
    safetensors.numpy.save_file(part, directory / f"model-0000{number + 1}-of-00002.safetensors")
    weight_map |= dict.fromkeys(part, f"model-0000{number + 1}-of-00002.safetensors")
  (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  assert_same(huggingface.load(directory)[1], whole)
  (directory / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(ConfigError, match="lacks model-00002-of-00002.safetensors"):
    huggingface.load(directory)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read_exactly(tmp_path, dtype):
  tensors, config = handmade(V1_0)
  narrow = {name: value.astype(dtype) for name, value in tensors.items()}
  directory = write(tmp_path, narrow, config)
  model, params = huggingface.load(directory)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  np.testing.assert_array_equal(params["token_embedder"]["embedding"], narrow["shared.weight"].astype(np.float32))
  _, params = huggingface.load(directory, {"param_dtype": "bfloat16"})
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_copies_of_the_token_table(tmp_path):
  tensors, config = handmade(V1_0)
  expected = huggingface.load(write(tmp_path / "plain", tensors, config))[1]
  table = tensors["shared.weight"]
  unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
  copies = {name: table for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}
  full = {**tensors, **copies, unused: np.zeros((BUCKETS, H), np.float32)}
  assert_same(huggingface.load(write(tmp_path / "all", full, config))[1], expected)
  only = {name: value for name, value in full.items() if name not in ("shared.weight", "lm_head.weight")}
  assert_same(huggingface.load(write(tmp_path / "only", only, config))[1], expected)
  for name in copies:
    with pytest.raises(ConfigError, match=f"{name} differs from shared.weight"):
      huggingface.load(write(tmp_path / name, {**full, name: table + 1}, config))
  untied = huggingface.load(tmp_path / "lm_head.weight", {"logits_via_embedding": False})[1]
  np.testing.assert_array_equal(untied["decoder"]["logits_dense"]["kernel"], (table + 1).T)


def test_configurations_of_version_5(tmp_path):
  """Their version 5 writes tie_word_embeddings=true for every T5, and the truth in scale_decoder_outputs."""
  tensors, config = handmade(V1_1)
  config |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
  model, params = huggingface.load(write(tmp_path / "untied", tensors, config))
  assert not model.config.logits_via_embedding
  del tensors["lm_head.weight"]  # one table for both, not scaled
  model, params = huggingface.load(write(tmp_path / "one", tensors, config))
  np.testing.assert_array_equal(params["decoder"]["logits_dense"]["kernel"], tensors["shared.weight"].T)
  with pytest.raises(ConfigError, match="lacks lm_head.weight"):
    huggingface.load(write(tmp_path / "old", tensors, {**config, **V1_1, "scale_decoder_outputs": None}))


@pytest.mark.parametrize("kind", [V1_0, V1_1], ids=["v1.0", "v1.1"])
def test_saved_again_by_transformers(tmp_path, kind):
  directory = write(tmp_path / "first", *handmade(kind))
  expected = logits_there(directory)
  import transformers

  transformers.T5ForConditionalGeneration.from_pretrained(str(directory)).save_pretrained(str(tmp_path / "second"))
  model, params = huggingface.load(tmp_path / "second")
  np.testing.assert_allclose(model.score(params, BATCH), expected, atol=2e-5, rtol=1e-5)


def _with(**changes):
  return lambda tensors, config: (tensors, {**config, **changes})


def _without(name):
  return lambda tensors, config: ({k: v for k, v in tensors.items() if k != name}, config)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (_without("encoder.block.1.layer.1.DenseReluDense.wo.weight"), "lacks encoder.block.1.layer.1.DenseReluDense.wo."),
    (lambda t, c: ({**t, "extra.weight": np.zeros(1, np.float32)}, c), "holds extra.weight, which the model has no"),
    (_with(num_layers=1), r"holds encoder.block.1.*and 5 more"),
    (_with(d_ff=25), r"decoder.block.0.layer.2.DenseReluDense.wi_0.weight \(24, 16\) where the model has \(25, 16\)"),
    (_with(num_heads=4), r"\(32, 2\) where the model has \(32, 4\)|\(16, 8\) where the model has \(16, 16\)"),
    (_with(model_type="bert"), "model_type is 'bert'"),
    (_with(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; it is true, false or absent"),
    (_with(scale_decoder_outputs=0), "scale_decoder_outputs is '0'; it is"),
    (_with(is_gated_act=[True]), "is_gated_act is"),
    (_with(feed_forward_proj="gelu"), "feed_forward_proj 'gelu' is not known"),
    (lambda t, c: (t, {k: v for k, v in c.items() if k != "d_kv"}), "lacks d_kv"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, change, message):
  with pytest.raises(ConfigError, match=message) as caught:
    huggingface.load(write(tmp_path, *change(*handmade(V1_1))))
  assert "\n" not in str(caught.value)


def test_pickles_and_damaged_files_are_refused(tmp_path):
  directory = write(tmp_path, *handmade(V1_1))
  path = directory / "model.safetensors"
  data = path.read_bytes()
  for damaged in (b"", data[:4], data[: len(data) // 2]):
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="model.safetensors cannot be read"):
      huggingface.load(directory)
  path.unlink()
  (directory / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(ConfigError, match="safe_serialization=True"):
    huggingface.load(directory)


def test_export_refuses_what_they_cannot_hold(tmp_path):
  for overrides, message in (
    ({"relative_bias": "per_layer"}, "per_layer"),
    ({"mlp_activations": ("linear", "gelu")}, "no feed-forward of activations"),
  ):
    model = models.T5(models.T5Config.named("t5_tiny", **overrides))
    with pytest.raises(ConfigError, match=message):
      huggingface.export(tmp_path / "out", model, {})
  model = models.T5(models.T5Config.named("t5_tiny"))
  with pytest.raises(ConfigError, match="lacks"):
    huggingface.export(tmp_path / "out", model, {})
  assert not (tmp_path / "out").exists()


def test_a_golden_model_exported_is_the_golden_model(shared_dir, tmp_path):
  fixture = pathlib.Path(shared_dir) / "fixtures" / "huggingface"
  model, params = huggingface.load(fixture)
  huggingface.export(tmp_path, model, params)
  original = safetensors.numpy.load_file(fixture / "model.safetensors")
  assert_same(safetensors.numpy.load_file(tmp_path / "model.safetensors"), original)
  shutil.copy(fixture / "config.json", tmp_path / "config.json")
  assert huggingface.load(tmp_path)[0] == model
