"""The best model of a run: MODEL_DIR/best, a model directory of its own with the figures that chose it."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Mapping

from distillspec_jax.distillation import validation
from distillspec_jax.models.language_model import LanguageModel
from distillspec_jax.parallel import multihost
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights import checkpoints

CRITERIA = (*validation.TEMPERATURES, validation.LOSS)
RECORD = "best.json"


def check_criterion(criterion: str) -> None:
  """Raise ConfigError unless it names a figure that can choose the best model."""
  if criterion not in CRITERIA:
    raise ConfigError(f"unknown criterion {criterion!r} for the best model; there are {', '.join(CRITERIA)}")


def is_better(criterion: str, value: float, kept: float | None) -> bool:
  """Say whether a figure is strictly better than the kept one (None: there is none); NaN never is."""
  if not math.isfinite(value):
    return False
  if kept is None:
    return True
  return value < kept if criterion == validation.LOSS else value > kept


class Best:
  """Keeps the parameters with the best figure; the folder and its record change together."""

  def __init__(
      self,
      model_dir: str | pathlib.Path,
      model: LanguageModel,
      criterion: str,
      vocabulary_dir: pathlib.Path | None = None,
  ):
    """Open MODEL_DIR/best, finishing an exchange that was interrupted.

    Args:
      model_dir: the run's directory.
      model: what the parameters belong to.
      criterion: "alpha_t0" or "alpha_t1" (higher is better) or "validation_loss" (lower is).
      vocabulary_dir: copied into the folder.
    """
    check_criterion(criterion)
    self.directory = pathlib.Path(model_dir).absolute() / "best"
    self.criterion = criterion
    self._model, self._vocabulary_dir = model, vocabulary_dir
    self._new, self._old = (self.directory.with_name(f"best.{end}") for end in ("new", "old"))
    if multihost.is_first():
      self._recover()
    multihost.barrier("the best model opened")
    self.record = multihost.from_first("the best model's figures", self._read)

  def offer(self, step: int, params: Params, figures: Mapping[str, float]) -> bool:
    """Keep these parameters if they are strictly better than the kept ones; say whether they were."""
    if not self._better(figures):
      return False
    if multihost.is_first():
      shutil.rmtree(self._new, ignore_errors=True)
    multihost.barrier("the best model emptied")
    checkpoints.save_model(self._new, self._model, params, self._vocabulary_dir, step=step)
    self.record = {"step": step, "criterion": self.criterion, **figures}
    if multihost.is_first():
      (self._new / RECORD).write_text(json.dumps(self.record, indent=2) + "\n")
      self._exchange()
    multihost.barrier("the best model kept")
    return True

  def _better(self, figures: Mapping[str, float]) -> bool:
    return is_better(self.criterion, figures[self.criterion], (self.record or {}).get(self.criterion))

  def _exchange(self) -> None:
    shutil.rmtree(self._old, ignore_errors=True)
    if self.directory.exists():
      self.directory.rename(self._old)
    self._new.rename(self.directory)
    shutil.rmtree(self._old, ignore_errors=True)

  def _recover(self) -> None:
    """Put the old folder back where a run was killed between the two renames; drop an unfinished new one."""
    if self._old.exists() and not self.directory.exists():
      self._old.rename(self.directory)
    for rest in (self._old, self._new):
      shutil.rmtree(rest, ignore_errors=True)

  def _read(self) -> dict | None:
    path = self.directory / RECORD
    if not path.is_file():
      return None
    try:
      return json.loads(path.read_bytes())
    except ValueError as error:
      raise ConfigError(f"{path} is not JSON ({error}): it is damaged; move {self.directory} away to go on") from error
