"""What MODEL_DIR says of the run in it, so that another kind of run does not go on with its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from distillspec_jax import weights
from distillspec_jax.distillation import target_check
from distillspec_jax.distillation.methods import Method
from distillspec_jax.models import LanguageModel
from distillspec_jax.parallel import multihost
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import integrity, strict_json

NAME, _CONFIG, _LOGITS = "run.json", "config.gin", "target_logits"


def exists(directory: pathlib.Path) -> bool:
  """Say whether a run has begun in MODEL_DIR."""
  return (directory / NAME).is_file()


def record_of(method: Method, task: str, optimizer: str, target: LanguageModel | None) -> dict[str, Any]:
  """Describe a run's kind in JSON's terms; what may change in between (rate, length) is not in it."""
  kind = {"method": dataclasses.asdict(method), "task": task, "optimizer": optimizer}
  return json.loads(json.dumps(kind | {"target": target and target.describe()}))


def check(directory: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Refuse to go on with a run of another kind.

  Raises:
    ConfigError: MODEL_DIR holds one, or its record is damaged.
  """
  if not exists(directory):
    return
  found = _read(directory / NAME)
  for name, value in record.items():
    if _kind(name, found.get(name)) != _kind(name, value):
      was, now = (_short(name, part) for part in (found.get(name), value))
      raise ConfigError(f"{directory} holds a run with {name} {was}, this one has {now}: choose another MODEL_DIR")


def begin(
  directory: pathlib.Path,
  record: Mapping[str, Any],
  model: LanguageModel,
  target_logits: Sequence[float] | None,
  config_text: str,
) -> None:
  """Write model.json, run.json and config.gin of a run that nothing stands against any more.

  Args:
    directory: MODEL_DIR.
    record: of `record_of`, which `check` has let pass.
    model: what is trained.
    target_logits: what `target_check.look` gave; None: there is no target.
    config_text: the gin configuration.

  Raises:
    ConfigError: the run that is gone on with learned from a target with other weights.
  """
  found = _read(directory / NAME) if exists(directory) else {}
  known = found.get(_LOGITS)
  if known is not None and not (isinstance(known, list) and all(isinstance(logit, float) for logit in known)):
    raise ConfigError(f"{directory / NAME}: its {_LOGITS} are no list of numbers, it is damaged; choose another MODEL_DIR")
  if target_logits and known and not target_check.same(known, target_logits, record["target"]["config"]["dtype"]):
    raise ConfigError(
      f"{directory} holds a run whose target had other weights (the same text gets other logits): give the target that"
      " it began with, or choose another MODEL_DIR"
    )
  weights.save_description(directory, model)
  if not multihost.is_first():
    return
  if not found:
    logits = {_LOGITS: list(target_logits)} if target_logits else {}
    integrity.write_atomically(directory / NAME, json.dumps({**record, **logits}, indent=2).encode() + b"\n")
  integrity.write_atomically(directory / _CONFIG, config_text.encode())


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return strict_json.read(path)
  except ConfigError as error:
    raise ConfigError(f"{error}; choose another MODEL_DIR") from error


def method_of(record: Mapping[str, Any]) -> str:
  """Say in a few words by which method a run learns: its name, divergence, λ1 and λ2."""
  method = record["method"]
  return f"{method['name']} ({method['divergence']}, {method['fixed_data_fraction']}, {method['draft_data_fraction']})"


def _kind(name: str, value: Any) -> Any:
  """Leave out what says nothing of the kind: what a method is called."""
  if name == "method" and isinstance(value, dict):
    return {field: part for field, part in value.items() if field != "name"}
  return value


def _short(name: str, value: Any) -> str:
  return method_of({name: value}) if name == "method" and value else json.dumps(value)
