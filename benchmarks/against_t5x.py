"""T5X's decoder on our parameters: its example network and `temperature_sample`, compiled, on one device.

Our parameter names, shapes and layouts are those of t5x/examples/t5, so its network takes our tree as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from against import PLAIN

from distillspec_jax.analysis.costs import Pair
from distillspec_jax.models import T5, LanguageModel
from distillspec_jax.tokens import EOS_ID
from distillspec_jax.types import ConfigError

TITLE = "T5X"
_FIELDS = (
    "vocab_size emb_dim num_heads head_dim mlp_dim num_encoder_layers num_decoder_layers mlp_activations "
    "logits_via_embedding dropout_rate"
).split()
# What their network writes into its code.
_FIXED = {
    "relative_bias": "shared",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


def version() -> str:
  """Import T5X and say which it is.

  Raises:
    ConfigError: it is not installed, or does not run with this jax.
  """
  try:
    import t5x  # noqa: PLC0415
    from t5x.examples.t5 import network  # noqa: F401, PLC0415
  except (ImportError, AttributeError) as error:
    raise ConfigError(f'--against t5x needs T5X: pip install -e ".[t5x]" ({error})') from error
  return f"t5x {t5x.__version__}"


def prepare(pair: Pair, args) -> Callable[[np.ndarray], dict[str, Callable[[], np.ndarray]]]:
  """Wrap the target's parameters in their model; see `against`. T5X has no speculative decoding.

  Raises:
    ConfigError: a target that their network cannot be.
  """
  check(pair.target)
  from t5x import decoding, models  # noqa: PLC0415

  model = models.EncoderDecoderModel(
      module=_network(pair.target),
      input_vocabulary=None,  # asked for eos_id alone, which is given below
      output_vocabulary=None,
      optimizer_def=None,
      decode_fn=decoding.temperature_sample,
  )

  @jax.jit
  def predict(params, prompt):
    batch = {
        "encoder_input_tokens": prompt,
        "decoder_input_tokens": jnp.zeros((prompt.shape[0], args.output_length), jnp.int32),  # its width is the limit
    }
    # Temperature 0 is argmax there; topk would be left unused.
    settings = {"temperature": 0.0, "topk": 0, "eos_id": EOS_ID}
    return model.predict_batch_with_aux(params, batch, decoder_params=settings, num_decodes=1)[0]

  return lambda prompt: {PLAIN: lambda: predict(pair.target_params, prompt)}


def check(model: LanguageModel) -> None:
  """Refuse a model that T5X's example network cannot be.

  Raises:
    ConfigError: another architecture, or another value of what their code fixes.
  """
  if not isinstance(model, T5):
    raise ConfigError(f"--against t5x takes T5 models, not {type(model).__name__}.")
  for name, value in _FIXED.items():
    if (ours := getattr(model.config, name)) != value:
      raise ConfigError(f"--against t5x: T5X's network has {name} {value!r}, the target {ours!r}.")


def _network(model: LanguageModel):
  from t5x.examples.t5 import network  # noqa: PLC0415

  fields = {name: getattr(model.config, name) for name in _FIELDS}
  return network.Transformer(network.T5Config(**fields, dtype=jnp.float32))
