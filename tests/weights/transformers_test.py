"""Parity with transformers itself: what it builds at random is loaded here, what is exported here is opened there.

Runs with either major version of transformers; the two mean different things by `tie_word_embeddings`.
"""

import json
import logging

import jax
import numpy as np
import pytest

import distillspec_jax as ds
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import huggingface, trees

torch = pytest.importorskip("torch", reason="torch is not installed: no parity with transformers")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")

torch.set_num_threads(1)  # on a busy machine its threads would wait for each other, and these networks are tiny

SOURCE, TARGET, PAD, EOS = 40, 20, 0, 1
SMALL = dict(vocab_size=97, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0)
V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
MT5 = dict(model_type="mt5", tie_word_embeddings=False)
BUILT = {
  "v1.0": {},
  "v1.0, few buckets": dict(relative_attention_num_buckets=8, relative_attention_max_distance=12),
  "v1.0, wide heads": dict(num_heads=4, d_kv=16, vocab_size=130),
  "v1.0, gelu_new": dict(feed_forward_proj="gelu_new", d_kv=4),
  "v1.0, deep decoder": dict(num_layers=1, num_decoder_layers=3),
  "v1.1": V1_1,
  "v1.1, tied": dict(feed_forward_proj="gated-gelu"),
  "v1.1, silu": {**V1_1, "feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 16},
  "v1.1, near": {**V1_1, "relative_attention_max_distance": 17, "num_heads": 1, "d_kv": 20},
  "v1.1, many buckets": {**V1_1, "relative_attention_num_buckets": 64, "relative_attention_max_distance": 48},
  "v1.1, epsilon": {**V1_1, "layer_norm_epsilon": 1e-2, "vocab_size": 128, "num_heads": 5},
  "v1.1, relu": {**V1_1, "feed_forward_proj": "gated-relu", "d_model": 20},
  "byt5": {**V1_1, "num_layers": 3, "num_decoder_layers": 1, "vocab_size": 384, "d_model": 20},
  "mt5": MT5,
  "mt5, other": {**MT5, "num_decoder_layers": 1, "relative_attention_num_buckets": 20, "vocab_size": 211},
}


def build(described, one_table=False, seed=0):
  """Make a network of theirs, every parameter drawn at random; untied are those whose configuration says so."""
  described = {**SMALL, **described}
  kind = described.pop("model_type", "t5")
  names = {"t5": ("T5Config", "T5ForConditionalGeneration"), "mt5": ("MT5Config", "MT5ForConditionalGeneration")}
  config, network = (getattr(transformers, name) for name in names[kind])
  network = network(config(**described)).eval()
  if described.get("tie_word_embeddings") is False and not one_table:  # their version 5 ties all the same
    network.lm_head.weight = torch.nn.Parameter(torch.empty_like(network.shared.weight))
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in network.named_parameters():
      parameter.normal_(generator=generator)
      if "layer_norm" in name:
        parameter.mul_(0.2).add_(1.0)
      elif name == "shared.weight":  # small where it also gives the logits, or every token would call for itself again
        parameter.mul_(0.3 if parameter is network.lm_head.weight else 2.0)
      elif "relative" not in name:
        parameter.mul_(parameter.shape[1] ** -0.5)
  return network


def prompts(vocab_size, seed=1):
  rng = np.random.default_rng(seed)
  source = rng.integers(2, vocab_size, (3, SOURCE))
  for row, length in enumerate((SOURCE, 23, 9)):
    source[row, length - 1] = EOS
    source[row, length:] = PAD
  return source.astype(np.int32)


def theirs(network, source):
  """Give their greedy tokens [B, 20], EOS forbidden so that none ends early, and logits [B, 20, V] along them."""
  ids = torch.tensor(source, dtype=torch.int64)
  mask = (ids != PAD).long()
  more = dict(min_new_tokens=TARGET, max_new_tokens=TARGET, do_sample=False, num_beams=1)
  if network.config.num_decoder_layers > network.config.num_layers and not hasattr(network.config, "decoder_layers"):
    more["use_cache"] = False  # theirs is one of as many layers as the encoder has
  with torch.no_grad():
    written = network.generate(input_ids=ids, attention_mask=mask, **more)
    logits = network(input_ids=ids, attention_mask=mask, decoder_input_ids=written[:, :-1]).logits
  return written[:, 1:].numpy(), logits.numpy()


def assert_same_as_theirs(directory, network, source):
  """Load a directory here and compare logits, and the greedy tokens, at each of which ours are the likeliest too."""
  tokens, expected = theirs(network, source)
  model, params = ds.load_model(directory)
  inputs = np.concatenate([np.zeros((len(source), 1), np.int32), tokens[:, :-1].astype(np.int32)], 1)
  batch = {"encoder_input_tokens": source, "decoder_input_tokens": inputs}
  logits = np.array(jax.jit(model.score)(params, batch))
  scale = max(1.0, np.abs(expected).max())
  np.testing.assert_allclose(logits, expected, atol=2e-5 * scale, rtol=0)
  assert np.std(expected) > 0.1 and np.any(tokens[:, 1:] != tokens[:, :-1])  # neither flat nor one token for ever
  logits[..., EOS] = -np.inf
  np.testing.assert_array_equal(np.argmax(logits, -1), tokens)
  return model, params


def opened(directory, caplog, kind=None):
  """Open a directory with transformers, which must find every tensor and none too many."""
  kind = kind or transformers.T5ForConditionalGeneration
  with caplog.at_level(logging.WARNING):
    network, found = kind.from_pretrained(str(directory), output_loading_info=True)
  assert not any(found.values()), found
  said = [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
  assert not [line for line in said if "newly initialized" in line or "not used when" in line], said
  return network.eval()


@pytest.mark.parametrize("name", BUILT)
def test_there_and_back(name, tmp_path, caplog):
  network = build(BUILT[name])
  network.save_pretrained(str(tmp_path / "theirs"))
  source = prompts(network.config.vocab_size)
  model, params = assert_same_as_theirs(tmp_path / "theirs", network, source)
  untied = BUILT[name].get("tie_word_embeddings") is False
  assert model.config.logits_via_embedding != untied

  huggingface.export(tmp_path / "ours", model, params)
  again = opened(tmp_path / "ours", caplog)
  expected, found = theirs(network, source), theirs(again, source)
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_allclose(found[1], expected[1], atol=1e-6 * max(1.0, np.abs(expected[1]).max()), rtol=0)


def test_generation_here_is_theirs(tmp_path):
  for name in ("v1.0, deep decoder", "byt5"):
    network = build(BUILT[name])
    network.save_pretrained(str(tmp_path / name))
    model, params = ds.load_model(tmp_path / name)
    source = prompts(network.config.vocab_size)
    ours = ds.generate(model, params, source, max_new_tokens=TARGET, min_length=TARGET)
    np.testing.assert_array_equal(ours.tokens, theirs(network, source)[0])


def test_both_majors_find_what_they_look_for_in_an_exported_configuration(tmp_path):
  """Version 4 scales where tie_word_embeddings, version 5 where scale_decoder_outputs, which it makes of the other."""
  for name in ("v1.0", "v1.1"):
    build(BUILT[name]).save_pretrained(str(tmp_path / name))
    huggingface.export(tmp_path / f"{name} ours", *ds.load_model(tmp_path / name))
    written = json.loads((tmp_path / f"{name} ours" / "config.json").read_text())
    assert written["tie_word_embeddings"] == (name == "v1.0")
    config = transformers.T5Config.from_pretrained(str(tmp_path / f"{name} ours"))
    scales = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    assert scales == (name == "v1.0")
    generation = transformers.GenerationConfig.from_pretrained(str(tmp_path / f"{name} ours"))
    assert (generation.decoder_start_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 0)


def test_one_table_that_is_not_scaled(tmp_path, caplog):
  """What their version 5 builds of tie_word_embeddings=false; a file of it has no lm_head.weight."""
  if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 does not build such models")
  for kind in ("t5", "mt5"):
    network = build({**V1_1, "model_type": kind}, one_table=True)
    network.save_pretrained(str(tmp_path / kind))
    source = prompts(network.config.vocab_size)
    model, params = assert_same_as_theirs(tmp_path / kind, network, source)
    flat = trees.flatten(params)
    np.testing.assert_array_equal(flat["decoder/logits_dense/kernel"].T, flat["token_embedder/embedding"])
    huggingface.export(tmp_path / f"{kind} ours", model, params)
    again = opened(tmp_path / f"{kind} ours", caplog)
    np.testing.assert_array_equal(theirs(again, source)[0], theirs(network, source)[0])


def test_scaled_mt5s_of_version_4(tmp_path):
  if int(transformers.__version__.split(".")[0]) >= 5:
    pytest.skip("transformers 5 does not scale an mT5's logits")
  network = build({"model_type": "mt5", "tie_word_embeddings": True})
  network.save_pretrained(str(tmp_path))
  model, _ = assert_same_as_theirs(tmp_path, network, prompts(network.config.vocab_size))
  assert model.config.logits_via_embedding


def test_an_mt5_is_opened_as_such_again(tmp_path, caplog):
  network = build(MT5)
  network.save_pretrained(str(tmp_path / "theirs"))
  huggingface.export(tmp_path / "ours", *ds.load_model(tmp_path / "theirs"))
  again = opened(tmp_path / "ours", caplog, transformers.MT5ForConditionalGeneration)
  source = prompts(network.config.vocab_size)
  np.testing.assert_array_equal(theirs(again, source)[0], theirs(network, source)[0])


@pytest.mark.parametrize(
  ("changes", "ours"),
  [
    ({"feed_forward_proj": "relu", "dense_act_fn": "silu"}, ("silu",)),
    ({"feed_forward_proj": "gated-gelu_new"}, ("gelu", "linear")),
    ({"feed_forward_proj": "gated-swish"}, ("silu", "linear")),
    ({"feed_forward_proj": "gelu_pytorch_tanh"}, ("gelu",)),
  ],
)
def test_names_of_activations(changes, ours, tmp_path):
  network = build(changes)
  network.save_pretrained(str(tmp_path))
  model, _ = assert_same_as_theirs(tmp_path, network, prompts(network.config.vocab_size))
  assert model.config.mlp_activations == ours


def rewritten(directory, **changes):
  path = directory / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"feed_forward_proj": "gelu", "dense_act_fn": "gelu"}, "'gelu' is the exact one"),
    ({"dense_act_fn": "gelu"}, "'gelu' is the exact one"),
    ({"model_type": "umt5"}, "whose layers each have a relative bias"),
    ({"decoder_start_token_id": 5}, "decoder_start_token_id is 5; a T5 of this package has 0 there"),
    ({"eos_token_id": [1, 7]}, r"eos_token_id is \[1, 7\]"),
  ],
)
def test_what_cannot_be_imported_is_refused(changes, message, tmp_path):
  build(V1_1).save_pretrained(str(tmp_path))
  ds.load_model(tmp_path)
  rewritten(tmp_path, **changes)
  with pytest.raises(ConfigError, match=message):
    ds.load_model(tmp_path)
