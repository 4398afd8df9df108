"""Run the study: what is missing of its lines and trials; a finished one is a JSON file and is never made again."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

from distillspec_jax import weights
from distillspec_jax.analysis import latency
from distillspec_jax.analysis.costs import Pair
from distillspec_jax.study import finished, lines, trials
from distillspec_jax.study.config import OF_PARTS, StudyConfig
from distillspec_jax.study.lines import NONE, Line, Trial
from distillspec_jax.study.stage import TEMPERATURES, Stage, step_seconds
from distillspec_jax.weights import integrity


def run(config: StudyConfig) -> list[dict[str, Any]]:
  """Make the lines and trials that are missing, and return all that there are, as they are in their files."""
  began, results = time.monotonic(), weights.ensure_writable(config.results_dir)
  weights.ensure_writable(config.output_dir)
  parts = lines.parts(config.parts, config.seeds)
  for task in dict.fromkeys(part.task for part in parts):
    Stage(config, task).check()  # before hours of training
  finished.read_all(config)
  finished.check_models(config)
  for number, part in enumerate(parts, start=1):
    path = results / f"{part.name}.json"
    if path.is_file():
      continue
    if config.budget_minutes is not None and time.monotonic() - began > 60 * config.budget_minutes:
      print(f"the budget of {config.budget_minutes:g} minutes is used up: {number - 1} of {len(parts)} parts looked at")
      break
    print(f"part {number} of {len(parts)}: {part.name}", flush=True)
    make = _line if isinstance(part, Line) else _trial
    found = _described(part, config) | make(Stage(config, part.task), part)
    integrity.write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())
  return finished.read_all(config)


def _described(part: Line | Trial, config: StudyConfig) -> dict[str, Any]:
  size = {name: getattr(config, name) for name in (*OF_PARTS, "seeds")}
  return {**dataclasses.asdict(part), "name": part.name, "study": size, "environment": latency.environment()}


def _line(stage: Stage, line: Line) -> dict[str, Any]:
  """Train what the line needs and measure it."""
  target, draft = stage.target(), stage.draft_of(line)
  pair = Pair(*weights.load_model(target), *weights.load_model(draft))
  measured = {task: stage.measured(pair, task, base=_base(stage, line, task)) for task in _measured_on(stage, line)}
  found = {
    "method": None if line.method is None else dataclasses.asdict(line.method),
    "step_seconds": step_seconds(draft),
    "measured": measured.pop(stage.task.name),
    "transfer": measured,
  }
  print(_said(found), flush=True)
  return found


def _measured_on(stage: Stage, line: Line) -> list[str]:
  transfer = stage.task.transfer if line.recipe in (NONE, *lines.MAIN, *lines.ONCE) else None
  return [stage.task.name, *filter(None, [transfer])]


def _base(stage: Stage, line: Line, task: str):
  return None if line.recipe == NONE else stage.base(stage.start(line.seed), task)


def _trial(stage: Stage, trial: Trial) -> dict[str, Any]:
  began = time.monotonic()
  found = trials.TRIALS[trial.kind](stage)
  return {"seconds": time.monotonic() - began, "found": found}


def _said(found: Mapping[str, Any]) -> str:
  measured = found["measured"]
  figures = [
    f"T={name[1]}: alpha {measured[f'alpha_{name}']:.3f}, tau {measured[f'tau_{name}_gamma7']:.2f} at gamma 7"
    for name in TEMPERATURES
  ]
  return f"  {'; '.join(figures)}; steps took {found['step_seconds']:.0f} s"
