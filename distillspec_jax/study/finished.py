"""What is finished already, checked: a folder never mixes parts, or models, of two studies."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from distillspec_jax.study import lines
from distillspec_jax.study.config import OF_MEASUREMENTS, OF_MODELS, StudyConfig
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import integrity, strict_json

_SETTINGS = "study.json"  # in OUTPUT_DIR
# Files from before a setting existed were made with what it now defaults to.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(StudyConfig)}


def read_all(config: StudyConfig) -> list[dict[str, Any]]:
  """Read the finished parts of RESULTS_DIR, by name.

  Raises:
    ConfigError: a file that is damaged, no part of a study, or of a study with other settings.
  """
  parts = []
  for path in sorted(pathlib.Path(config.results_dir).glob("*.json")):
    part = _object(path)
    whole = part.get("name") == path.stem and "task" in part and isinstance(part.get("study"), dict)
    if not whole or not {"recipe", "kind"} & part.keys():
      raise ConfigError(f"{path} is no part of a study: move it away, or choose another RESULTS_DIR")
    _require_same(path, part["study"], config, OF_MODELS, "RESULTS_DIR and another OUTPUT_DIR")
    _require_same(path, part["study"], config, OF_MEASUREMENTS, "RESULTS_DIR")
    parts.append(part)
  return parts


def check_models(config: StudyConfig) -> None:
  """Look whether OUTPUT_DIR's models are of this study, and note its settings there.

  Raises:
    ConfigError: they were made with other settings.
  """
  path = pathlib.Path(config.output_dir) / _SETTINGS
  if path.is_file():
    _require_same(path, strict_json.read(path), config, OF_MODELS, "OUTPUT_DIR")
    return
  if any((path.parent / task).exists() for task in lines.TASKS):  # from before settings were noted
    _require_same(path.parent, {}, config, OF_MODELS, "OUTPUT_DIR")
  settings = {name: getattr(config, name) for name in OF_MODELS}
  integrity.write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())


def _require_same(path: pathlib.Path, found: Mapping[str, Any], config: StudyConfig, names, folder: str) -> None:
  for name in names:
    was, now = found.get(name, _DEFAULTS[name]), getattr(config, name)
    if was != now:
      raise ConfigError(
        f"{path} was made with StudyConfig.{name} = {was!r}, and this study has {now!r}: give that, or another {folder}"
      )


def _object(path: pathlib.Path) -> dict[str, Any]:
  try:
    return strict_json.read(path)
  except ConfigError as error:
    raise ConfigError(f"{error}; delete it, and what it held is made again") from error
