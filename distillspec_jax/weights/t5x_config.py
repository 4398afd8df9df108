"""The configuration of a T5X model: read off the parameters' shapes, and from config.gin or config.json beside them."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from distillspec_jax.models import T5, LanguageModel, T5Config
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import layouts, strict_json

GIN, JSON = "config.gin", "config.json"
_GIN_LIMIT = 10_000_000  # bytes
# Fields read from a configuration file beside the checkpoint.
_FILE_FIELDS = (
  "vocab_size emb_dim num_heads head_dim mlp_dim num_encoder_layers num_decoder_layers mlp_activations "
  "logits_via_embedding dropout_rate"
).split()
# What T5X's networks have written into their code.
_FIXED = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
# What that file says of how T5X computed, not of what the parameters are, or what shapes say better. `dtype`, bfloat16
# by habit, can be overridden.
_OF_THE_RUN = set(
  "dtype param_dtype float32_attention_logits remat_policy remat scan_layers relative_bias partitioning".split()
)


def infer_config(flat: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Any]:
  """Read the T5Config fields off the parameters' shapes; heads come from the relative bias table [H, buckets]."""
  shared = "encoder/relpos_bias/rel_embedding" in flat
  bias = "encoder/relpos_bias/rel_embedding" if shared else "encoder/layers_0/relpos_bias/rel_embedding"
  embedding, query, wo = (
    "token_embedder/embedding", "encoder/layers_0/attention/query/kernel", "encoder/layers_0/mlp/wo/kernel"
  )  # fmt: skip
  needed = [bias, embedding, query, wo]
  if missing := [name for name in needed if name not in flat or len(flat[name].shape) != 2]:
    raise ConfigError(
      f"{where} is no T5 that this package knows: it has no {missing[0]} with two axes "
      f"(it has {', '.join(sorted(flat)[:3])}, ...)"
    )
  heads, buckets = flat[bias].shape
  vocab, emb = flat[embedding].shape
  gates = sum(f"encoder/layers_0/mlp/wi_{i}/kernel" in flat for i in range(2))
  return {
    "vocab_size": vocab,
    "emb_dim": emb,
    "num_heads": heads,
    "head_dim": max(1, flat[query].shape[1] // max(1, heads)),
    "mlp_dim": flat[wo].shape[0],
    "num_encoder_layers": _count_layers(flat, "encoder"),
    "num_decoder_layers": max(1, _count_layers(flat, "decoder")),
    "mlp_activations": ("gelu", "linear") if gates == 2 else ("relu",),
    "logits_via_embedding": "decoder/logits_dense/kernel" not in flat,
    "relative_bias": "shared" if shared else "per_layer",
    "relative_attention_num_buckets": buckets,
  }


def _count_layers(flat: Mapping[str, Any], stack: str) -> int:
  found = [int(match[1]) for name in flat if (match := re.match(rf"{stack}/layers_(\d{{1,9}})/", name))]
  return max(found, default=-1) + 1


def beside(checkpoint: pathlib.Path) -> dict[str, Any]:
  """Read the known fields of config.json or config.gin in the checkpoint's folder or the one above; {} without one.

  Raises:
    ConfigError: such a file cannot be read.
  """
  for folder in (checkpoint, checkpoint.parent):
    if (path := folder / JSON).is_file():
      fields = strict_json.read(path).get("config", {})
      if not isinstance(fields, dict):
        raise ConfigError(f"{path}: 'config' is no JSON object")
    elif (path := folder / GIN).is_file():
      fields = read_gin(_text(path))
    else:
      continue
    return _known(fields, path)
  return {}


def _known(fields: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """Take the fields that are read; what this package does not know may be another network, so it is refused."""
  known = {name: fields[name] for name in (*_FILE_FIELDS, *_FIXED) if name in fields}
  rest = {name: value for name, value in fields.items() if name not in known and name not in _OF_THE_RUN}
  axis = rest.pop("param_scan_axis", layouts.STACK_AXIS)
  if axis != layouts.STACK_AXIS:
    raise ConfigError(f"{path} says param_scan_axis = {axis!r}: only {layouts.STACK_AXIS} can be read")
  if rest:
    raise ConfigError(
      f"{path} has {', '.join(sorted(rest)[:4])} in its T5Config, which this package does not know: take out of the "
      "file what does not change the network"
    )
  activations = known.get("mlp_activations")
  if isinstance(activations, list | tuple):
    known["mlp_activations"] = tuple("silu" if name == "swish" else name for name in activations)  # the same function
  return known


def _text(path: pathlib.Path) -> str:
  try:
    if path.stat().st_size > _GIN_LIMIT:
      raise ConfigError(f"{path} has {path.stat().st_size:,} bytes: it is no gin file")
    return path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path} cannot be read ({str(error)[:120]}): it may be damaged") from error


def read_gin(text: str) -> dict[str, Any]:
  """Read the T5Config of a gin file, lines or blocks, macros resolved; what is no literal is left out."""
  bindings = {}
  block = ""
  for line in re.sub(r"\\\n\s*", " ", re.sub(r"(?m)(^|\s)#.*$", "", text)).splitlines():
    if match := re.fullmatch(r"(\S+):\s*", line):
      block = f"{match[1]}."
    elif "=" in line:
      name, value = map(str.strip, line.split("=", 1))
      bindings[(block if line[0].isspace() else "") + name] = value
    elif line.strip():
      block = ""
  fields = {}
  for name, value in bindings.items():
    if match := re.fullmatch(r"(?:\w+[./])*T5Config\.(\w+)", name):
      if value.startswith("%"):
        value = bindings.get(value[1:], bindings.get(f"{value[1:]}/macro.value", ""))
      try:
        fields[match[1]] = ast.literal_eval(value[:1000])
      except (ValueError, SyntaxError, MemoryError, RecursionError):
        continue
  return fields


def write_gin(model: LanguageModel) -> str:
  """Say a T5's configuration as T5X's own operative config does; T5X's gin files can include it.

  Raises:
    ConfigError: T5X's networks do not have this model.
  """
  if not isinstance(model, T5):
    raise ConfigError(f"only T5 models can be written for T5X, not {type(model).__name__}")
  config: T5Config = model.config
  for name, value in _FIXED.items():
    if getattr(config, name) != value:
      other = getattr(config, name)
      raise ConfigError(f"T5X's networks have {name} = {value} in their code; a model of {other} cannot be written")
  lines = [f"network.T5Config.{name} = {getattr(config, name)!r}" for name in ("dtype", *_FILE_FIELDS)]
  scanned = config.relative_bias == "per_layer"
  if scanned:
    lines.append("network.T5Config.scan_layers = True")
  examples = "scalable_t5" if scanned else "t5"
  imports = ["from __gin__ import dynamic_registration", f"from t5x.examples.{examples} import network"]
  return "\n".join([*imports, "", "# Parameters for network.T5Config:", "# " + "=" * 78, *sorted(lines)]) + "\n"
