"""T5 v1.0 and v1.1 (Raffel et al. 2020) in Flax linen, behind `LanguageModel`."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from distillspec_jax.models import layers
from distillspec_jax.models.flax_model import FlaxModel
from distillspec_jax.models.kv_cache import KVCache, write
from distillspec_jax.models.t5_config import T5Config
from distillspec_jax.parallel.partitioning import constrain, use_table
from distillspec_jax.tokens import PAD_ID, START_ID
from distillspec_jax.types import Batch, Params


@flax.struct.dataclass
class T5State:
  """A T5 in the middle of decoding.

  Attributes:
    cache: the decoder's self-attention cache.
    cross_keys: one [B, H, S, D] array a layer, from the encoder; made once by `start`, never touched again.
    cross_values: like `cross_keys`.
    encoder_bias: [B, 1, 1, S] float32, 0 at the prompt's tokens and MASKED at its padding.
  """

  cache: KVCache
  cross_keys: tuple[jax.Array, ...]
  cross_values: tuple[jax.Array, ...]
  encoder_bias: jax.Array


def _dtypes(config: T5Config) -> dict[str, str]:
  return dict(dtype=config.dtype, param_dtype=config.param_dtype)


def _norm(config: T5Config, **kw) -> layers.RMSNorm:
  return layers.RMSNorm(epsilon=config.layer_norm_epsilon, **_dtypes(config), **kw)


def _attention(config: T5Config) -> layers.Attention:
  return layers.Attention(config.num_heads, config.head_dim, config.emb_dim, **_dtypes(config))


def _mlp(config: T5Config) -> layers.Mlp:
  return layers.Mlp(config.mlp_dim, config.mlp_activations, dropout_rate=config.dropout_rate, **_dtypes(config))


def _relative_bias(config: T5Config) -> layers.RelativeBias:
  return layers.RelativeBias(
      config.num_heads,
      config.relative_attention_num_buckets,
      config.relative_attention_max_distance,
      config.param_dtype,
  )


def _dropout(config: T5Config) -> nn.Dropout:
  return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward, each normed before and added after."""

  config: T5Config

  def setup(self):
    self.pre_attention_layer_norm = _norm(self.config)
    self.attention = _attention(self.config)
    self.pre_mlp_layer_norm = _norm(self.config)
    self.mlp = _mlp(self.config)
    self.dropout = _dropout(self.config)
    if self.config.relative_bias == "per_layer":
      self.relpos_bias = _relative_bias(self.config)

  def __call__(self, x, bias, mask, deterministic):
    if self.config.relative_bias == "per_layer":
      bias = self.relpos_bias.square(x.shape[1], bidirectional=True)
    y = self.pre_attention_layer_norm(x)
    y = self.attention(y, *self.attention.keys_values(y), _add(bias, mask))
    x = x + self.dropout(y, deterministic=deterministic)
    y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
    return constrain(x + self.dropout(y, deterministic=deterministic), "batch", "length", "activation_embed")


class DecoderLayer(nn.Module):
  """Causal self-attention, attention to the encoder, feed-forward."""

  config: T5Config

  def setup(self):
    self.pre_self_attention_layer_norm = _norm(self.config)
    self.self_attention = _attention(self.config)
    self.pre_cross_attention_layer_norm = _norm(self.config)
    self.encoder_decoder_attention = _attention(self.config)
    self.pre_mlp_layer_norm = _norm(self.config)
    self.mlp = _mlp(self.config)
    self.dropout = _dropout(self.config)
    if self.config.relative_bias == "per_layer":
      self.relpos_bias = _relative_bias(self.config)

  def __call__(self, x, self_cache, positions, bias, cross, encoder_bias, deterministic):
    """Run one layer; `self_cache` is (keys, values) to write into at `positions`, or None for a whole sequence."""
    y = self.pre_self_attention_layer_norm(x)
    keys, values = self.self_attention.keys_values(y)
    if self_cache is not None:
      keys, values = (write(old, new, positions) for old, new in zip(self_cache, (keys, values), strict=True))
    cached = self_cache is not None
    y = self.self_attention(y, keys, values, bias, cached=cached)
    x = x + self.dropout(y, deterministic=deterministic)
    y = self.encoder_decoder_attention(self.pre_cross_attention_layer_norm(x), *cross, encoder_bias, cached=cached)
    x = x + self.dropout(y, deterministic=deterministic)
    y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
    x = constrain(x + self.dropout(y, deterministic=deterministic), "batch", "length", "activation_embed")
    return x, (keys, values)


class Encoder(nn.Module):
  """The encoder's stack."""

  config: T5Config

  def setup(self):
    layer = nn.remat(EncoderLayer, static_argnums=(4,)) if self.config.remat else EncoderLayer
    self.layers = [layer(self.config) for _ in range(self.config.num_encoder_layers)]
    self.encoder_norm = _norm(self.config)
    self.dropout = _dropout(self.config)
    if self.config.relative_bias == "shared":
      self.relpos_bias = _relative_bias(self.config)

  def __call__(self, x, mask, deterministic):
    bias = None
    if self.config.relative_bias == "shared":
      bias = self.relpos_bias.square(x.shape[1], bidirectional=True)
    x = self.dropout(x, deterministic=deterministic)
    for layer in self.layers:
      x = layer(x, bias, mask, deterministic)
    return self.dropout(self.encoder_norm(x), deterministic=deterministic)


class Decoder(nn.Module):
  """The decoder's stack, for whole sequences and, with a cache, for the next Q tokens."""

  config: T5Config

  def setup(self):
    layer = nn.remat(DecoderLayer, static_argnums=(7,)) if self.config.remat else DecoderLayer
    self.layers = [layer(self.config) for _ in range(self.config.num_decoder_layers)]
    self.decoder_norm = _norm(self.config)
    self.dropout = _dropout(self.config)
    if self.config.relative_bias == "shared":
      self.relpos_bias = _relative_bias(self.config)
    if not self.config.logits_via_embedding:
      self.logits_dense = layers.Dense(
          self.config.emb_dim, self.config.vocab_size, ("embed", "vocab"), **_dtypes(self.config)
      )

  def _bias(self, layer, positions, length):
    """Give the causal bias: of a whole sequence, or of queries at `positions` over a cache of `length` slots."""
    table = self.relpos_bias if self.config.relative_bias == "shared" else layer.relpos_bias
    if positions is None:
      causal = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, layers.MASKED)
      return table.square(length, bidirectional=False) + causal[None, None]
    return layers.cached_causal_bias(table.by_distance(length), positions)

  def __call__(self, x, cache: KVCache | None, cross, encoder_bias, deterministic, segments=None):
    """Run the stack over x [B, Q, E]; `cross` holds a (keys, values) pair a layer.

    The bias `segments` [B, 1, Q, Q] keeps the examples of packed rows apart; there is no cache then.
    """
    positions = None if cache is None else cache.positions(x.shape[1])
    length = x.shape[1] if cache is None else cache.slots
    shared = self._bias(None, positions, length) if self.config.relative_bias == "shared" else None
    x = self.dropout(x, deterministic=deterministic)
    written = []
    for i, layer in enumerate(self.layers):
      bias = self._bias(layer, positions, length) if shared is None else shared
      if segments is not None:  # they are contiguous, so distances within one need no change
        bias = _add(bias, segments)
      self_cache = None if cache is None else (cache.keys[i], cache.values[i])
      x, pair = layer(x, self_cache, positions, bias, cross[i], encoder_bias, deterministic)
      written.append(pair)
    x = self.dropout(self.decoder_norm(x), deterministic=deterministic)
    if cache is None:
      return x, None
    keys, values = zip(*written, strict=True)
    return x, KVCache(keys=keys, values=values, length=cache.length + positions.shape[1])

  def cross_pairs(self, encoded):
    """Project the encoder's output to each layer's keys and values."""
    return [layer.encoder_decoder_attention.keys_values(encoded) for layer in self.layers]


class T5Module(nn.Module):
  """Encoder, decoder and the token table they share."""

  config: T5Config

  def setup(self):
    self.token_embedder = layers.Embed(self.config.vocab_size, self.config.emb_dim, **_dtypes(self.config))
    self.encoder = Encoder(self.config)
    self.decoder = Decoder(self.config)

  def encode(self, prompt, deterministic=True, mask=None):
    """Encode prompts [B, S]: (cross-attention pairs, encoder bias [B, 1, 1, S] unless a mask is given)."""
    if mask is None:
      mask = jnp.where(prompt != PAD_ID, 0.0, layers.MASKED)[:, None, None, :]
    encoded = self.encoder(self.token_embedder(prompt), mask, deterministic)
    return self.decoder.cross_pairs(encoded), mask

  def hidden(self, prompt, decoder_tokens, deterministic=True, segments=None):
    """Teacher forcing: [B, S], [B, T] -> [B, T, E]; packed rows have `segments`, ids like prompt and decoder_tokens."""
    if segments is None:
      cross, mask = self.encode(prompt, deterministic)
      return self.decoder(self.token_embedder(decoder_tokens), None, cross, mask, deterministic)[0]
    of_prompts, of_outputs = segments
    cross, _ = self.encode(prompt, deterministic, layers.segment_bias(of_prompts, of_prompts))
    mask, own = layers.segment_bias(of_outputs, of_prompts), layers.segment_bias(of_outputs, of_outputs)
    return self.decoder(self.token_embedder(decoder_tokens), None, cross, mask, deterministic, own)[0]

  def step(self, tokens, state: T5State):
    """Feed [B, Q] tokens into a decoding state: ([B, Q, E], the new cache)."""
    cross = list(zip(state.cross_keys, state.cross_values, strict=True))
    return self.decoder(self.token_embedder(tokens), state.cache, cross, state.encoder_bias, True)

  def everything(self, prompt, decoder_tokens):
    """Touch every parameter once: what `init` runs."""
    hidden = self.hidden(prompt, decoder_tokens)
    return hidden if self.config.logits_via_embedding else self.decoder.logits_dense(hidden)


class T5(FlaxModel):
  """A T5 as pure functions of its parameters, which carry T5X's names."""

  architecture = "t5"
  config: T5Config
  packed_rows = "pairs"
  token_inputs = 2  # of the encoder and of the decoder

  @property
  def module(self) -> T5Module:
    return T5Module(self.config)

  def hidden(self, params: Params, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
    packed = "decoder_segment_ids" in batch
    return self.apply(
        T5Module.hidden,
        params,
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        dropout_rng=dropout_rng,
        deterministic=dropout_rng is None,
        segments=(batch["encoder_segment_ids"], batch["decoder_segment_ids"]) if packed else None,
    )

  def start(self, params: Params, prompt: jax.Array, slots: int) -> tuple[T5State, jax.Array]:
    c = self.config
    cross, bias = self.apply(T5Module.encode, params, prompt)
    with use_table(self.partitioning):
      cache = KVCache.empty(c.num_decoder_layers, prompt.shape[0], c.num_heads, slots, c.head_dim, jnp.dtype(c.dtype))
    keys, values = zip(*cross, strict=True)
    pending = jnp.full((prompt.shape[0],), START_ID, jnp.int32)
    return T5State(cache=cache, cross_keys=keys, cross_values=values, encoder_bias=bias), pending

  def previous(self, prompt: jax.Array) -> jax.Array:
    return jnp.zeros((prompt.shape[0],), jnp.int32)  # the decoder begins with an empty cache

  def extend(
      self, params: Params, state: T5State, tokens: jax.Array, *, last_only: bool = False
  ) -> tuple[jax.Array, T5State]:
    hidden, cache = self.apply(T5Module.step, params, tokens, state)
    return self.unembed(params, hidden[:, -1:] if last_only else hidden), state.replace(cache=cache)


def _add(bias: jax.Array, mask: jax.Array) -> jax.Array:
  """Add [1, H, Q, K] and [B, 1, 1 or Q, K]: [B, H, Q, K]."""
  shape = jnp.broadcast_shapes(bias.shape, mask.shape)
  return jnp.broadcast_to(bias, shape) + jnp.broadcast_to(mask, shape)
