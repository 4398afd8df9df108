"""A decoder-only network (pre-norm, rotary or learned positions) behind `LanguageModel`.

What the encoder-decoder's batches call `encoder_input_tokens` is here the prompt that the text goes on from: both are
one sequence, START, x_1 ... x_n, y_1 ... y_T, and each row has its own n. Losses, measures and decoders then see the
T positions of y alone, exactly as with a T5.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from distillspec_jax.models import layers
from distillspec_jax.models.decoder_lm_config import DecoderLMConfig
from distillspec_jax.models.flax_model import FlaxModel
from distillspec_jax.models.kv_cache import KVCache, write
from distillspec_jax.parallel.partitioning import constrain
from distillspec_jax.tokens import PAD_ID, shift_right
from distillspec_jax.types import Batch, ConfigError, Params


@flax.struct.dataclass
class DecoderLMState:
  """A DecoderLM in the middle of decoding: `cache` holds START, the prompt and the output so far."""

  cache: KVCache


def _norm(config: DecoderLMConfig) -> layers.RMSNorm:
  return layers.RMSNorm(epsilon=config.layer_norm_epsilon, dtype=config.dtype, param_dtype=config.param_dtype)


class Layer(nn.Module):
  """Causal self-attention and feed-forward, each normed before and added after."""

  config: DecoderLMConfig

  def setup(self):
    c = self.config
    dtypes = dict(dtype=c.dtype, param_dtype=c.param_dtype)
    self.pre_self_attention_layer_norm = _norm(c)
    self.self_attention = layers.Attention(
        c.num_heads, c.head_dim, c.emb_dim, rotary=c.positions == "rotary", **dtypes
    )
    self.pre_mlp_layer_norm = _norm(c)
    self.mlp = layers.Mlp(c.mlp_dim, c.mlp_activations, dropout_rate=c.dropout_rate, **dtypes)
    self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

  def __call__(self, x, positions, self_cache, bias, deterministic):
    """Run over x [B, Q, E] at positions [B, Q]; `self_cache` is (keys, values) to write into, or None."""
    y = self.pre_self_attention_layer_norm(x)
    keys, values = self.self_attention.keys_values(y, positions)
    if self_cache is not None:
      keys, values = (write(old, new, positions) for old, new in zip(self_cache, (keys, values), strict=True))
    y = self.self_attention(y, keys, values, bias, positions, cached=self_cache is not None)
    x = x + self.dropout(y, deterministic=deterministic)
    y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
    x = constrain(x + self.dropout(y, deterministic=deterministic), "batch", "length", "activation_embed")
    return x, (keys, values)


class Stack(nn.Module):
  """The layers, for whole sequences and, with a cache, for the next Q tokens."""

  config: DecoderLMConfig

  def setup(self):
    c = self.config
    layer = nn.remat(Layer, static_argnums=(5,)) if c.remat else Layer
    self.layers = [layer(c) for _ in range(c.num_layers)]
    self.decoder_norm = _norm(c)
    self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))
    if c.positions == "learned":
      init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
      shape = (c.max_positions, c.emb_dim)
      self.position_embedding = self.param("position_embedding", init, shape, jnp.dtype(c.param_dtype))
    if not c.logits_via_embedding:
      self.logits_dense = layers.Dense(
          c.emb_dim, c.vocab_size, ("embed", "vocab"), dtype=c.dtype, param_dtype=c.param_dtype
      )

  def __call__(self, x, cache: KVCache | None, deterministic, packed=None):
    """Run the stack over x [B, Q, E]: ([B, Q, E], one (keys, values) pair a layer).

    Packed rows, which have no cache, come with (segment ids [B, Q], positions [B, Q] within the segment).
    """
    batch, queries = x.shape[:2]
    if cache is None:
      positions = jnp.broadcast_to(jnp.arange(queries, dtype=jnp.int32), (batch, queries))
    else:
      positions = cache.positions(queries)
    slots = jnp.arange(queries if cache is None else cache.slots, dtype=jnp.int32)
    seen = slots[None, None, :] <= positions[:, :, None]  # [B, Q, K]
    bias = jnp.where(seen, 0.0, layers.MASKED)[:, None]
    if packed is not None:
      segments, positions = packed
      bias = bias + layers.segment_bias(segments, segments)
    if self.config.positions == "learned":
      # Positions past the table belong to tokens that will be cut off: any vector does.
      table = constrain(self.position_embedding, None, None)
      x = x + table.astype(x.dtype)[jnp.clip(positions, 0, self.config.max_positions - 1)]
    x = self.dropout(x, deterministic=deterministic)
    pairs = []
    for i, layer in enumerate(self.layers):
      self_cache = None if cache is None else (cache.keys[i], cache.values[i])
      x, pair = layer(x, positions, self_cache, bias, deterministic)
      pairs.append(pair)
    return self.dropout(self.decoder_norm(x), deterministic=deterministic), pairs


class DecoderLMModule(nn.Module):
  """The token table and the stack."""

  config: DecoderLMConfig

  def setup(self):
    c = self.config
    self.token_embedder = layers.Embed(c.vocab_size, c.emb_dim, c.dtype, c.param_dtype)
    self.decoder = Stack(c)

  def __call__(self, tokens, cache=None, deterministic=True, packed=None):
    """Run tokens [B, Q] through the stack."""
    return self.decoder(self.token_embedder(tokens), cache, deterministic, packed)

  def everything(self, tokens):
    """Touch every parameter once: what `init` runs."""
    hidden, _ = self(tokens)
    return hidden if self.config.logits_via_embedding else self.decoder.logits_dense(hidden)


class DecoderLM(FlaxModel):
  """A decoder-only network as pure functions of its parameters, which carry T5X's names for such networks."""

  architecture = "decoder_lm"
  config: DecoderLMConfig
  packed_rows = "texts"
  token_inputs = 1

  @property
  def module(self) -> DecoderLMModule:
    return DecoderLMModule(self.config)

  @property
  def max_length(self) -> int | None:
    return self.config.max_positions if self.config.positions == "learned" else None

  def hidden(self, params: Params, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
    inputs = batch["decoder_input_tokens"]
    prompt = batch.get("encoder_input_tokens")
    rows, length = inputs.shape
    if "decoder_segment_ids" in batch:
      return self._hidden_packed(params, batch, dropout_rng)
    if prompt is None:
      prompt = jnp.zeros((rows, 0), jnp.int32)
    n = _lengths(prompt)[:, None]  # y_1 is predicted where x_n was fed
    at = jnp.broadcast_to(jnp.arange(prompt.shape[1] + length, dtype=jnp.int32), (rows, prompt.shape[1] + length))
    before = shift_right(jnp.pad(prompt, ((0, 0), (0, length))))
    after = jnp.take_along_axis(inputs, jnp.clip(at - n, 0, length - 1), axis=1)
    hidden, _ = self.apply(
        DecoderLMModule.__call__,
        params,
        jnp.where(at <= n, before, after),
        dropout_rng=dropout_rng,
        deterministic=dropout_rng is None,
    )
    return jnp.take_along_axis(hidden, (n + jnp.arange(length, dtype=jnp.int32)[None, :])[..., None], axis=1)

  def _hidden_packed(self, params: Params, batch: Batch, dropout_rng: jax.Array | None) -> jax.Array:
    """Run rows of several texts; a text begins with its own START and knows nothing of the ones before it."""
    prompt = batch.get("encoder_input_tokens")
    if prompt is not None and prompt.shape[1]:
      raise ConfigError(
          f"a packed batch with encoder_input_tokens of width {prompt.shape[1]}: a decoder-only model reads several"
          ' texts in one row only where no text has a prompt; make the batches with packed_rows="texts"'
      )
    return self.apply(
        DecoderLMModule.__call__,
        params,
        batch["decoder_input_tokens"],
        dropout_rng=dropout_rng,
        deterministic=dropout_rng is None,
        packed=(batch["decoder_segment_ids"], batch["decoder_positions"]),
    )[0]

  def start(self, params: Params, prompt: jax.Array, slots: int) -> tuple[DecoderLMState, jax.Array]:
    """Prefill: the cache holds START and all of the prompt but its last token, which is pending."""
    _, pairs = self.apply(DecoderLMModule.__call__, params, shift_right(prompt))
    widen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots), (0, 0)))
    keys, values = zip(*((widen(key), widen(value)) for key, value in pairs), strict=True)
    cache = KVCache(keys=keys, values=values, length=_lengths(prompt))
    return DecoderLMState(cache), _token_before(prompt, 0)

  def previous(self, prompt: jax.Array) -> jax.Array:
    return _token_before(prompt, 1)

  def extend(
      self, params: Params, state: DecoderLMState, tokens: jax.Array, *, last_only: bool = False
  ) -> tuple[jax.Array, DecoderLMState]:
    hidden, pairs = self.apply(DecoderLMModule.__call__, params, tokens, state.cache)
    keys, values = zip(*pairs, strict=True)
    cache = KVCache(keys=keys, values=values, length=state.cache.length + tokens.shape[1])
    return self.unembed(params, hidden[:, -1:] if last_only else hidden), DecoderLMState(cache)


def _lengths(prompt: jax.Array) -> jax.Array:
  """Count each prompt's tokens, up to the last that is no padding: [B, S] -> [B] int32."""
  places = jnp.arange(1, prompt.shape[1] + 1, dtype=jnp.int32)[None, :]
  return jnp.max(jnp.where(prompt != PAD_ID, places, 0), axis=1, initial=0)


def _token_before(prompt: jax.Array, steps: int) -> jax.Array:
  """Give the token that lies `steps` before the prompt's last; START before the first: [B, S] -> [B] int32."""
  fed = jnp.pad(prompt, ((0, 0), (1, 0)))  # START, x_1 ... x_S
  return jnp.take_along_axis(fed, jnp.maximum(_lengths(prompt) - steps, 0)[:, None], axis=1)[:, 0]
