"""In which dtype the models of a run lie and compute, whatever they were saved in."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from distillspec_jax.models import LanguageModel
from distillspec_jax.models.model_config import DTYPES
from distillspec_jax.types import ConfigError, Params

MASTER = "float32"  # of parameters that are trained: in bfloat16 an update under 1/256 of its parameter is lost


def check_dtype(name: str, dtype: str | None) -> None:
  """Refuse a dtype that no model computes in; None is none.

  Raises:
    ConfigError: names the setting, and the dtypes that there are.
  """
  if dtype not in (None, *DTYPES):
    raise ConfigError(f"{name} is {dtype!r}; there are {', '.join(DTYPES)}")


def of_dtype(model: LanguageModel, dtype: str, param_dtype: str | None = None) -> LanguageModel:
  """Give a model with matrices of a dtype while it computes, and parameters of `param_dtype` (None: of that too)."""
  return type(model)(dataclasses.replace(model.config, dtype=dtype, param_dtype=param_dtype or dtype))


def with_master_weights(model: LanguageModel, dtype: str | None) -> LanguageModel:
  """Give a model that is trained float32 parameters, and a dtype to compute in; None leaves what the model says."""
  return of_dtype(model, dtype or model.config.dtype, MASTER)


def frozen(model: LanguageModel, params: Params, dtype: str | None) -> tuple[LanguageModel, Params]:
  """Give a model that is only read, such as a teacher, another dtype: bfloat16 halves its memory.

  Args:
    model: the model.
    params: its parameters; given away, leaf by leaf, where their dtype changes.
    dtype: "float32" or "bfloat16", of its parameters and its matrices; None leaves both as they are.

  Returns:
    The model and its parameters.
  """
  return (model, params) if dtype is None else (of_dtype(model, dtype), _cast(params, dtype))


def trained(model: LanguageModel, params: Params, dtype: str | None) -> tuple[LanguageModel, Params]:
  """Do `with_master_weights` with the parameters too.

  Args:
    model: the model.
    params: its parameters; given away, leaf by leaf, where they are not float32.
    dtype: of its matrices while it computes; None leaves what the model says.

  Returns:
    The model and its parameters.
  """
  return with_master_weights(model, dtype), _cast(params, MASTER)


def _cast(params: Params, dtype: str) -> Any:
  def cast(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == dtype:
      return leaf
    other = leaf.astype(dtype)
    other.block_until_ready()
    leaf.delete()  # so that both copies of the whole never exist at a time
    return other

  return jax.tree.map(cast, params)
