"""Hugging Face's config.json to and from a T5Config: T5 (v1.0, v1.1, Flan, ByT5) and mT5, of their versions 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distillspec_jax import tokens
from distillspec_jax.models import T5, LanguageModel
from distillspec_jax.types import ConfigError

_T5, _MT5 = "t5", "mt5"
# Their name of a function -> ours. All of the first line are one formula, the tanh approximation, which T5X means by
# "gelu"; their own "gelu" is the exact one, which T5X does not have.
_FUNCTIONS = {
  **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu"),
  **{"relu": "relu", "silu": "silu", "swish": "silu"},
}
# What is written, one name for each of ours; "gated-gelu" means gelu_new to them, by habit.
_WRITTEN = {
  ("relu",): "relu",
  ("gelu",): "gelu_new",
  ("silu",): "silu",
  ("gelu", "linear"): "gated-gelu",
  ("silu", "linear"): "gated-silu",
  ("relu", "linear"): "gated-relu",
}
_FIELDS = {  # config.json there -> T5Config here
  "vocab_size": "vocab_size",
  "d_model": "emb_dim",
  "num_heads": "num_heads",
  "d_kv": "head_dim",
  "d_ff": "mlp_dim",
  "num_layers": "num_encoder_layers",
  "num_decoder_layers": "num_decoder_layers",
  "relative_attention_num_buckets": "relative_attention_num_buckets",
  "relative_attention_max_distance": "relative_attention_max_distance",
  "layer_norm_epsilon": "layer_norm_epsilon",
  "dropout_rate": "dropout_rate",
}
_DEFAULTS = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
_SWITCHES = ("tie_word_embeddings", "scale_decoder_outputs", "is_gated_act")
_TOKENS = {"pad_token_id": tokens.PAD_ID, "eos_token_id": tokens.EOS_ID, "decoder_start_token_id": tokens.START_ID}


def config_from(described: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
  """Turn their config.json into T5Config fields.

  Args:
    described: the file's content.
    where: the file, as an error should name it.

  Returns:
    Fields of a T5Config, all but dtypes.

  Raises:
    ConfigError: another architecture, fields missing, an activation or special tokens that this package does not have.
  """
  kind = described.get("model_type")
  if kind == "umt5":
    raise ConfigError(f"{where}: model_type is 'umt5', whose layers each have a relative bias: it cannot be imported")
  if kind not in (_T5, _MT5):
    raise ConfigError(f"{where}: model_type is {kind!r}; only 't5' and 'mt5' can be imported")
  described = {**_DEFAULTS, **described}
  if described.get("num_decoder_layers") is None:
    described["num_decoder_layers"] = described.get("num_layers")
  if missing := [name for name in _FIELDS if described.get(name) is None and name != "dropout_rate"]:
    raise ConfigError(f"{where} lacks {', '.join(missing)}")
  for name, ours in _TOKENS.items():
    said = described.get(name)
    if said is not None and said not in (ours, [ours]):
      raise ConfigError(f"{where}: {name} is {said!r}; a T5 of this package has {ours} there, and no other")
  for name in _SWITCHES:
    if not isinstance(described.get(name), bool | None):  # "false" would count as true
      raise ConfigError(f"{where}: {name} is {str(described[name])[:40]!r}; it is true, false or absent")
  fields = {ours: described[theirs] for theirs, ours in _FIELDS.items() if described.get(theirs) is not None}
  return fields | {"mlp_activations": _activations(described, where), "logits_via_embedding": _is_tied(described)}


def may_lack_head(described: Mapping[str, Any]) -> bool:
  """Say whether a file of untied logits may hold the token table alone: one for both, of which logits are not scaled.

  Their version 5 makes such models and writes no `lm_head.weight` for them.
  """
  tied = described.get("tie_word_embeddings", True)
  if described.get("model_type") == _MT5:
    return bool(tied) and _major(described) >= 5
  return bool(tied) and described.get("scale_decoder_outputs") is False


def _is_tied(described: Mapping[str, Any]) -> bool:
  """Say whether logits come of the token table, scaled by E^-1/2: with us these two go together.

  In T5s `scale_decoder_outputs` says so since their version 5, which writes tie_word_embeddings=true for every T5;
  before, `tie_word_embeddings` (absent: true) did. In mT5s the latter (absent: false) did in their version 4, and
  version 5 scales none, though it writes true.
  """
  if described.get("model_type") == _MT5:
    return bool(described.get("tie_word_embeddings", False)) and _major(described) < 5
  scaled = described.get("scale_decoder_outputs")
  return bool(described.get("tie_word_embeddings", True) if scaled is None else scaled)


def _major(described: Mapping[str, Any]) -> int:
  """Give the major version of transformers that wrote the file; 0 where it does not say."""
  major = str(described.get("transformers_version", "")).partition(".")[0]
  return int(major) if major.isdecimal() else 0


def _activations(described: Mapping[str, Any], where: str) -> tuple[str, ...]:
  """Read feed_forward_proj, over which dense_act_fn and is_gated_act win, as with them."""
  default = "gated-gelu" if described.get("model_type") == _MT5 else "relu"
  projection = described.get("feed_forward_proj", default)
  gate, _, name = str(projection).rpartition("-")
  name = "gelu_new" if projection == "gated-gelu" else name
  name, gated = described.get("dense_act_fn") or name, described.get("is_gated_act")
  gated = gate == "gated" if gated is None else bool(gated)
  if name not in _FUNCTIONS or gate not in ("", "gated"):
    known = ", ".join(sorted(_WRITTEN.values()))
    exact = " (their 'gelu' is the exact one; T5's is its tanh approximation, 'gelu_new')" if name == "gelu" else ""
    raise ConfigError(f"{where}: feed_forward_proj {projection!r} is not known{exact}; there are {known}")
  return (_FUNCTIONS[name], "linear") if gated else (_FUNCTIONS[name],)


def config_to(model: LanguageModel) -> dict[str, Any]:
  """Turn a T5's configuration into their config.json, of model type t5 (their mT5 is the same network).

  Untied logits are written as tie_word_embeddings=false, which both of their major versions take to mean: a table of
  their own, not scaled.

  Raises:
    ConfigError: another architecture, a relative bias per layer, or activations that they do not have.
  """
  if not isinstance(model, T5):
    raise ConfigError(f"only T5 models can be written for Hugging Face, not {type(model).__name__}")
  config = model.config
  if config.relative_bias != "shared":
    raise ConfigError("Hugging Face's T5 has one relative bias a stack: relative_bias='per_layer' cannot be written")
  if config.mlp_activations not in _WRITTEN:
    raise ConfigError(f"Hugging Face's T5 has no feed-forward of activations {config.mlp_activations}")
  deeper = config.num_decoder_layers > config.num_encoder_layers
  return {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": _T5,
    "is_encoder_decoder": True,
    "feed_forward_proj": _WRITTEN[config.mlp_activations],
    "tie_word_embeddings": config.logits_via_embedding,
    **_TOKENS,
    **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
    # Their `generate` makes a cache of as many layers as the encoder has (4.57 and 5.23), unless it is told this.
    **({"decoder_layers": config.num_decoder_layers} if deeper else {}),
  }


def generation_config() -> dict[str, Any]:
  """Give their generation_config.json: where decoding starts and ends."""
  return dict(_TOKENS)
