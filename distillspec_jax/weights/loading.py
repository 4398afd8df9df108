"""`load_model`: parameters from a directory of any form this package knows, tensor by tensor into their sharding."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from distillspec_jax.models import LanguageModel
from distillspec_jax.types import Params
from distillspec_jax.weights import checkpoints, lazy_tensors, sources, trees
from distillspec_jax.weights.sources import detect

__all__ = ["detect", "load_model", "place"]


def load_model(
  directory: str | pathlib.Path,
  step: int | None = None,
  *,
  config: Mapping[str, Any] | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[LanguageModel, Params]:
  """Load a model and its parameters.

  Each tensor goes straight to its devices, and of each only the slices that lie there are read; on the host there is
  never more than one tensor (and, of a native directory, what Orbax reads at a time).

  Args:
    directory: a native run or model directory (or one step under its checkpoints/), a T5X checkpoint (or the folder
      above it), or a Hugging Face T5.
    step: which checkpoint, where there are several; by default the newest.
    config: configuration fields that win over what the directory says (imports only), e.g. {"dtype": "bfloat16"}. A
      larger vocab_size pads the tables over the vocabulary with zeros.
    mesh: where the parameters go; without one, to the first device.

  Returns:
    (model, parameters as jax arrays in the model's param_dtype).

  Raises:
    ConfigError: missing, damaged, or not a model that this package knows.
  """
  directory, step, form = sources.find(directory, step)
  if form == "native":
    sources.refuse_config(directory, config)
    return checkpoints.load_native(directory, step, mesh)
  source = sources.open_source(directory, step, config=config)
  return source.model, place(source.model, source.tensors, mesh)


def place(
  model: LanguageModel, tensors: Mapping[str, lazy_tensors.LazyTensor], mesh: jax.sharding.Mesh | None = None
) -> Params:
  """Bring lazy tensors to their devices one after another, in the model's param_dtype."""
  likes = trees.flatten(checkpoints.placed(model.abstract_params(), model, mesh))
  return trees.unflatten({name: lazy_tensors.place(tensor, likes[name]) for name, tensor in tensors.items()})
