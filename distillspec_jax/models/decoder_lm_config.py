"""The decoder-only network's configuration and its named sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from distillspec_jax.models.model_config import ModelConfig
from distillspec_jax.parallel.partitioning import SHARDED
from distillspec_jax.types import ConfigError

_POSITIONS = ("rotary", "learned")
_COUNTS = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_layers", "max_positions")


@dataclasses.dataclass(frozen=True)
class DecoderLMConfig(ModelConfig):
  """Shape and numerics of a decoder-only network.

  Attributes:
    vocab_size: V, the width of the logits.
    emb_dim: E.
    num_heads: H.
    head_dim: D, even with rotary positions.
    mlp_dim: F.
    num_layers: layers.
    mlp_activations: ("gelu",), or a gated product such as ("silu", "linear").
    logits_via_embedding: whether logits are read off the token table.
    positions: "rotary" (queries and keys turn by their position) or "learned" (a vector a position is added).
    max_positions: with learned positions the most tokens a text may have, prompt and output; else not looked at.
    layer_norm_epsilon: added to the mean square.
    dropout_rate: in training, when a key is given.
    dtype: of matrices while computing, and of the caches: "float32" or "bfloat16".
    param_dtype: of the stored parameters.
    remat: whether gradients compute each layer again instead of keeping what is inside it.
    partitioning: "sharded" or "replicated": how it lies on a mesh (`parallel.partitioning.TABLES`).
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_layers: int
  mlp_activations: tuple[str, ...] = ("gelu",)
  logits_via_embedding: bool = True
  positions: str = "rotary"
  max_positions: int = 1024
  layer_norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: bool = False
  partitioning: str = SHARDED

  def __post_init__(self):
    self.check(_COUNTS, {"positions": _POSITIONS})
    if self.positions == "rotary" and self.head_dim % 2:
      raise ConfigError(f"DecoderLMConfig.head_dim={self.head_dim}: rotary positions turn pairs, so it must be even.")


def _size(vocab, emb, heads, mlp, layers) -> dict[str, Any]:
  return dict(vocab_size=vocab, emb_dim=emb, num_heads=heads, head_dim=emb // heads, mlp_dim=mlp, num_layers=layers)


# The paper names its LM1B pair by the number of parameters alone: these shapes have as many.
SIZES: dict[str, dict[str, Any]] = {
    "decoder_lm_234m": _size(32128, 1024, 16, 4096, 16),
    "decoder_lm_33m": _size(32128, 512, 8, 2176, 5),
    # For CPUs.
    "decoder_lm_mini_target": _size(2560, 384, 6, 1536, 6),
    "decoder_lm_mini_draft": _size(2560, 128, 4, 512, 1),
    "decoder_lm_tiny": _size(128, 32, 4, 64, 2),
}

DecoderLMConfig.sizes = SIZES
