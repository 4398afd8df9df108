"""Where Hugging Face's T5 keeps each parameter.

The table is a bijection, so that import and export are the same list read in two directions. PyTorch's Linear keeps
[out, in] and T5X [in, out]: those are transposed, and so is the relative bias ([buckets, H] there, [H, buckets] here).
"""

from __future__ import annotations

from distillspec_jax.models import T5Config
from distillspec_jax.weights import layouts
from distillspec_jax.weights.layouts import Place

EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # ties: copies of shared.weight
# The first T5 files carry a table that no T5 ever used; Hugging Face passes over it too.
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def table(config: T5Config) -> dict[str, Place]:
  """List every parameter: name here -> its place there."""
  places = {layouts.EMBEDDING: Place(EMBEDDING)}
  if not config.logits_via_embedding:
    places[layouts.HEAD] = Place(HEAD, transpose=True)
  layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
  for stack, count in layers.items():
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    places[f"{stack}/relpos_bias/rel_embedding"] = Place(bias, transpose=True)
    places[f"{stack}/{stack}_norm/scale"] = Place(f"{stack}.final_layer_norm.weight")
    for i in range(count):
      for here, (there, transpose) in _layer_table(stack, config).items():
        places[f"{stack}/layers_{i}/{here}"] = Place(f"{stack}.block.{i}.layer.{there}.weight", transpose)
  return places


def _layer_table(stack: str, config: T5Config) -> dict[str, tuple[str, bool]]:
  if stack == "encoder":
    blocks = [("attention", "pre_attention_layer_norm", "SelfAttention")]
  else:
    blocks = [
      ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
      ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
    ]
  names = {}
  for number, (here, norm, there) in enumerate(blocks):
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "out": "o"}.items():
      names[f"{here}/{ours}/kernel"] = (f"{number}.{there}.{theirs}", True)
    names[f"{norm}/scale"] = (f"{number}.layer_norm", False)
  number = len(blocks)
  inner = ["wi"] if len(config.mlp_activations) == 1 else [f"wi_{i}" for i in range(len(config.mlp_activations))]
  for name in [*inner, "wo"]:
    names[f"mlp/{name}/kernel"] = (f"{number}.DenseReluDense.{name}", True)
  names["pre_mlp_layer_norm/scale"] = (f"{number}.layer_norm", False)
  return names
