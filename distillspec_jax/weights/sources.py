"""A model directory opened, whatever its form: the model and its parameters as lazy tensors."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from distillspec_jax.models import LanguageModel
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import checkpoints, huggingface, integrity, orbax_tree, t5x, trees
from distillspec_jax.weights.lazy_tensors import LazyTensor

_LOOKED_FOR = (
  f"{checkpoints.DESCRIPTION} with {checkpoints.CHECKPOINTS}/ (native), checkpoint_N/ or checkpoint or state/ (T5X), "
  f"{huggingface.CONFIG} with {huggingface.WEIGHTS} or pytorch_model.bin (Hugging Face)"
)


@dataclasses.dataclass(frozen=True)
class Source:
  """A model whose parameters are still on disk.

  Attributes:
    form: "native", "t5x" or "huggingface".
    model: the network.
    tensors: every parameter's name -> lazy tensor, in the file's dtype, checked against the model.
    step: which checkpoint it is; None where the form has no steps.
  """

  form: str
  model: LanguageModel
  tensors: dict[str, LazyTensor]
  step: int | None


def detect(directory: str | pathlib.Path) -> str:
  """Name a model directory's form: "native", "t5x" or "huggingface".

  Raises:
    ConfigError: the directory is missing, or none of them.
  """
  directory = integrity.user_path(directory)
  if not directory.exists():
    raise ConfigError(f"model directory {directory} does not exist (looked for {_LOOKED_FOR})")
  if not directory.is_dir():
    raise ConfigError(f"{directory} is a file: give the model's directory (looked for {_LOOKED_FOR})")
  if (directory / checkpoints.DESCRIPTION).is_file():
    return "native"
  if t5x.find_checkpoint(directory) is not None:
    return "t5x"
  if huggingface.is_checkpoint(directory):
    return "huggingface"
  held = ", ".join(sorted(path.name for path in directory.iterdir())[:5]) or "nothing"
  raise ConfigError(f"{directory} is no model directory: looked for {_LOOKED_FOR}; it holds {held}")


def find(directory: str | pathlib.Path, step: int | None = None) -> tuple[pathlib.Path, int | None, str]:
  """Say (directory, step, form) of what a user named; one step's own folder counts as its model at that step.

  Raises:
    ConfigError: as `detect`, or a step of a form that has none.
  """
  directory = integrity.user_path(directory).absolute()
  above = directory.parent.parent
  try:
    if step is None and checkpoints.is_step_of(directory, above):
      directory, step = above, int(directory.name)
    form = detect(directory)
  except OSError as error:  # no permission, say
    raise ConfigError(f"model directory {directory} cannot be opened: {error.strerror or error}") from error
  if form == "huggingface" and step is not None:
    raise ConfigError(f"step {step} was asked for, but {directory} is a Hugging Face model and has no steps")
  return directory, step, form


def open_source(
  directory: str | pathlib.Path, step: int | None = None, *, config: Mapping[str, Any] | None = None
) -> Source:
  """Open a model directory; nothing but descriptions (and, of a native one, checksums) is read.

  Args:
    directory: as for `weights.load_model`.
    step: which checkpoint, where there are several; by default the newest.
    config: configuration fields that win over what the directory says (imports only).

  Raises:
    ConfigError: missing, damaged, or not a model that this package knows.
  """
  directory, step, form = find(directory, step)
  if form == "native":
    refuse_config(directory, config)
    return _open_native(directory, step)
  if form == "huggingface":
    return Source(form, *huggingface.open_checkpoint(directory, config), None)
  opened = t5x.open_checkpoint(directory, step, config)
  return Source(form, *opened, t5x.step_of(t5x.find_checkpoint(directory, step)))


def refuse_config(directory: pathlib.Path, config: Mapping[str, Any] | None) -> None:
  """Refuse to override what a native directory says of itself."""
  if config:
    raise ConfigError(f"{directory} is native: its {checkpoints.DESCRIPTION} is the configuration; no override")


def _open_native(directory: pathlib.Path, step: int | None) -> Source:
  model = checkpoints.read_description(directory / checkpoints.DESCRIPTION)
  step = checkpoints.newest_whole(directory / checkpoints.CHECKPOINTS, step)
  folder = directory / checkpoints.CHECKPOINTS / str(step)
  tensors = orbax_tree.open_tree(folder / "state", ("params",))
  trees.require_same(trees.flatten(model.abstract_params()), tensors, f"checkpoint {folder}")
  return Source("native", model, tensors, step)
