"""T5's configuration and its named sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from distillspec_jax.models.model_config import ModelConfig
from distillspec_jax.parallel.partitioning import SHARDED
from distillspec_jax.types import ConfigError

_GATED = ("gelu", "linear")
_BIAS_SHARING = ("shared", "per_layer")
_COUNTS = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "num_decoder_layers")


@dataclasses.dataclass(frozen=True)
class T5Config(ModelConfig):
  """Shape and numerics of a T5 (v1.0 or v1.1).

  Attributes:
    vocab_size: V, the width of the logits; the vocabulary's own size may be smaller (T5 pads 32,100 to 32,128).
    emb_dim: E.
    num_heads: H.
    head_dim: D.
    mlp_dim: F.
    num_encoder_layers: layers of the encoder.
    num_decoder_layers: layers of the decoder.
    mlp_activations: ("relu",) in v1.0, ("gelu", "linear") in v1.1.
    logits_via_embedding: tied logits (v1.0).
    relative_bias: one relative position bias for all layers of a stack ("shared"), or one a layer ("per_layer").
    relative_attention_num_buckets: buckets of that bias.
    relative_attention_max_distance: from here on all distances share the last bucket, in tokens.
    layer_norm_epsilon: added to the mean square.
    dropout_rate: in training, when a key is given; the paper's runs use 0.
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
  num_encoder_layers: int
  num_decoder_layers: int
  mlp_activations: tuple[str, ...] = _GATED
  logits_via_embedding: bool = False
  relative_bias: str = "shared"
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: bool = False
  partitioning: str = SHARDED

  def __post_init__(self):
    self.check(_COUNTS, {"relative_bias": _BIAS_SHARING})
    buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
    if buckets < 4 or buckets % 4 or distance <= buckets // 2:
      raise ConfigError(
          f"T5Config has {buckets} relative buckets up to distance {distance}: "
          "the buckets must be a multiple of 4 and the distance more than half of them."
      )


def _size(vocab, emb, heads, head_dim, mlp, encoder, decoder, **more) -> dict[str, Any]:
  return dict(
      vocab_size=vocab,
      emb_dim=emb,
      num_heads=heads,
      head_dim=head_dim,
      mlp_dim=mlp,
      num_encoder_layers=encoder,
      num_decoder_layers=decoder,
      **more,
  )


_V1_0 = dict(mlp_activations=("relu",), logits_via_embedding=True)

SIZES: dict[str, dict[str, Any]] = {
    "t5_small": _size(32128, 512, 8, 64, 2048, 6, 6, **_V1_0),
    "t5_base": _size(32128, 768, 12, 64, 3072, 12, 12, **_V1_0),
    "t5_large": _size(32128, 1024, 16, 64, 4096, 24, 24, **_V1_0),
    "t5_3b": _size(32128, 1024, 32, 128, 16384, 24, 24, **_V1_0),
    "t5_11b": _size(32128, 1024, 128, 128, 65536, 24, 24, **_V1_0),
    "t5_1_1_small": _size(32128, 512, 6, 64, 1024, 8, 8),
    "t5_1_1_base": _size(32128, 768, 12, 64, 2048, 12, 12),
    "t5_1_1_large": _size(32128, 1024, 16, 64, 2816, 24, 24),
    "t5_1_1_xl": _size(32128, 2048, 32, 64, 5120, 24, 24),
    "t5_1_1_xxl": _size(32128, 4096, 64, 64, 10240, 24, 24),
    # For CPUs; their vocabulary is small because on a CPU the logits of 32k pieces would cost more than the layers.
    "t5_mini_target": _size(2560, 384, 6, 64, 1024, 1, 6),
    "t5_mini_draft": _size(2560, 128, 4, 32, 256, 1, 1),
    "t5_tiny": _size(128, 32, 4, 8, 64, 2, 2),
}

T5Config.sizes = SIZES
