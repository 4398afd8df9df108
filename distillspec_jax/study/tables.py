"""The study's finished parts as Markdown tables: what each recipe is worth, with intervals, the grid, the trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distillspec_jax.distillation.methods import DIVERGENCES, SOURCES
from distillspec_jax.study import lines as study_lines
from distillspec_jax.study.lines import NONE, same_as

Lines = Sequence[Mapping[str, Any]]
_COLUMNS = (
  ("alpha_t0", "α, T=0", 3),
  ("tau_t0_gamma3", "τ, γ=3", 2),
  ("tau_t0_gamma5", "γ=5", 2),
  ("tau_t0_gamma7", "γ=7", 2),
  ("alpha_t1", "α, T=1", 3),
  ("tau_t1_gamma3", "τ, γ=3", 2),
  ("tau_t1_gamma5", "γ=5", 2),
  ("tau_t1_gamma7", "γ=7", 2),
)
_MEASURE = "tau_t{}_gamma7"
_GAINS = ("gain_t0_gamma7", "gain_t1_gamma7")
_QUALITY = ("bleu", "rouge2", "accuracy", "perplexity")  # what a trial's table says of quality, the first there is


def as_markdown(parts: Lines) -> str:
  """Lay out a table for each task, the grid where it was run, the transfers, and the trials."""
  lines, trials = [part for part in parts if "recipe" in part], [part for part in parts if "kind" in part]
  text = ["# Results of the study", _LEGEND]
  for task in dict.fromkeys(part["task"] for part in parts):
    mine = [line for line in lines if line["task"] == task]
    text.append(f"## {task}")
    if mine:
      text += [_target_line(mine[0]), _recipes(mine)]
    if any("/" in line["recipe"] and line["recipe"] not in study_lines.MAIN for line in mine):
      text += [f"Block efficiency at γ = 7, T = 0 and T = 1, of DistillSpec's grid (`{task}-*-0`):", _grid(mine)]
    text += _transfers(mine)
    for trial in (trial for trial in trials if trial["task"] == task):
      text.append(f"`{trial['name']}`: {_TRIALS[trial['kind']](trial['found'])}")
  return "\n\n".join(text) + "\n"


_LEGEND = (
  "Each recipe's mean over its seeds; in brackets what the seeds' 95% intervals over prompts cover together. `none` is"
  " the fine-tuned draft. τ is tokens a target call, expected exactly over the target's own texts; the gain is τ at"
  " γ = 7 over that of `none` with the same seed and prompts.\n\nThe last column of a table, or the words above it, say"
  " which parts of the study it is made of: their files PART.json have settings and environment, and\n\n```\npython -m"
  " distillspec_jax.study --gin_file=runs/study.gin --gin.OUTPUT_DIR=\"'study'\" --gin.DATA_DIR=\"'data'\""
  " --gin.PARTS=\"'PART'\"\n```\n\nmakes them where they are missing."
)


def _target_line(line: Mapping[str, Any]) -> str:
  metrics = line["measured"]["target_metrics"]
  said = ", ".join(
    f"{name} {value:.1f} [{metrics[f'{name}_ci'][0]:.1f}, {metrics[f'{name}_ci'][1]:.1f}]"
    for name, value in metrics.items()
    if isinstance(value, float)
  )
  return f"The target itself on {line['measured']['prompts']} test prompts: {said or 'no metric'}."


def _recipes(lines: Lines) -> str:
  grouped = by_recipe(lines)
  rows = [["recipe", "seeds", *(title for _, title, _ in _COLUMNS), "gain, T=0", "gain, T=1", "part"]]
  order = sorted(grouped, key=lambda recipe: (recipe != NONE, -_mean(grouped[recipe], _MEASURE.format(0))))
  for recipe in order:
    mine = [line["measured"] for line in grouped[recipe]]
    cells = [_cell(mine, key, digits) for key, _, digits in _COLUMNS]
    rows.append([recipe, str(len(mine)), *cells, *(_gain(mine, key) for key in _GAINS), _part(grouped[recipe])])
  return _table(rows)


def _part(lines: Lines) -> str:
  """Give the pattern that makes a table's line: its one file's name, or that of all of its seeds."""
  name = lines[0]["name"]
  return f"`{name}`" if len(lines) == 1 else f"`{name.rpartition('-')[0]}-*`"


def by_recipe(lines: Lines) -> dict[str, list[Mapping[str, Any]]]:
  """Put the seeds of a recipe together."""
  found: dict[str, list[Mapping[str, Any]]] = {}
  for line in lines:
    found.setdefault(line["recipe"], []).append(line)
  return found


def _mean(lines: Lines, key: str) -> float:
  return float(np.mean([line["measured"][key] for line in lines]))


def hull(found: Lines, key: str) -> tuple[float, float, float]:
  """Return the mean over seeds, the lowest and the highest end of their intervals."""
  ends = [figures[f"{key}_ci"] for figures in found]
  return float(np.mean([figures[key] for figures in found])), min(low for low, _ in ends), max(high for _, high in ends)


def _cell(found: Lines, key: str, digits: int) -> str:
  value, low, high = hull(found, key)
  return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _gain(found: Lines, key: str) -> str:
  if not all(key in figures for figures in found):
    return "–"
  value, low, high = (100 * (end - 1) for end in hull(found, key))
  return f"{value:+.0f}% [{low:+.0f}, {high:+.0f}]"


def _grid(lines: Lines) -> str:
  found = {line["recipe"]: line["measured"] for line in lines if line["seed"] == 0}
  rows = [["", *SOURCES]]
  for divergence in DIVERGENCES:
    names = [f"{divergence}/{source}" for source in SOURCES]
    rows.append([divergence, *(_both_temperatures(found.get(name) or found.get(same_as(name))) for name in names)])
  return _table(rows)


def _both_temperatures(measured: Mapping[str, Any] | None) -> str:
  return "–" if measured is None else " / ".join(f"{measured[_MEASURE.format(t)]:.2f}" for t in (0, 1))


def _transfers(lines: Lines) -> list[str]:
  """Say what a draft distilled on this task is worth on another."""
  of = [line for line in lines if line["transfer"]]
  parts = []
  for name in dict.fromkeys(name for line in of for name in line["transfer"]):
    found = [{**line, "measured": _whole(line["transfer"][name])} for line in of]
    parts += [f"The same drafts on {name} (of a mixture the mean over its rows):", _short_table(found)]
  return parts


def _whole(found: Mapping[str, Any]) -> Mapping[str, Any]:
  return found.get("mean") or found


def _short_table(lines: Lines) -> str:
  keys = (("alpha_t0", 3), ("tau_t0_gamma7", 2), ("alpha_t1", 3), ("tau_t1_gamma7", 2))
  rows = [["recipe", "seeds", "α, T=0", "τ, γ=7", "α, T=1", "τ, γ=7", "gain, T=0", "gain, T=1"]]
  of_parts = all("name" in line for line in lines)  # a trial's lines are parts of the trial
  rows[0] += ["part"] if of_parts else []
  for recipe, mine in by_recipe(lines).items():
    found = [line["measured"] for line in mine]
    cells = [_cell(found, key, digits) for key, digits in keys]
    gains = [_gain(found, key) for key in _GAINS]
    rows.append([recipe, str(len(found)), *cells, *gains, *([_part(mine)] if of_parts else [])])
  return _table(rows)


def _longer(found: Mapping[str, Any]) -> str:
  return f"{found['lines'][0]['steps']} updates instead of the table's number:\n\n{_short_table(found['lines'])}"


def _limits(found: Mapping[str, Any]) -> str:
  sizes = {name: f"{size / 1e6:.1f}M" for name, size in found["draft_parameters"].items()}
  title = (
    f"{found['method']} with one setting changed, SKD, and a draft of {sizes['larger']} parameters instead of"
    f" {sizes['usual']}:"
  )
  return f"{title}\n\n{_short_table(found['lines'])}"


def _larger_target(found: Mapping[str, Any]) -> str:
  sizes = found["parameters"]
  title = (
    f"the drafts distilled from the target of {sizes['target'] / 1e6:.1f}M parameters, before a target of"
    f" {sizes['larger'] / 1e6:.1f}M:"
  )
  return f"{title}\n\n{_short_table(found['lines'])}"


def _lossy(found: Lines) -> str:
  metric = metric_of(found[0])
  rows = [["draft", "T", "rule", "lenience", "block efficiency, γ=7", metric]]
  for point in found:
    setting = [point["recipe"], f"{point['temperature']:g}", point["rule"], f"{point['lenience']:g}"]
    rows.append([*setting, _cell([point], "tau", 2), _cell([point], metric, 1)])
  title = f"lossy rules on {found[0]['prompts']} prompts (at T = 0 the three are one; lenience 1 is lossless):"
  return f"{title}\n\n{_table(rows)}"


def _ladder(found: Mapping[str, Any]) -> str:
  rungs = found["rungs"]
  metric = metric_of(next(iter(rungs.values())))
  rows = [["decoding", "parameters", "γ", "block efficiency", metric, "ms a prompt", "relative latency"]]
  for name, rung in rungs.items():
    spoken = [str(rung["gamma"]), _cell([rung], "tau", 2)] if "gamma" in rung else ["–", "–"]
    times = [f"{rung['ms_a_prompt']:.1f}", f"{rung['relative_latency']:.2f}"]
    rows.append([name, f"{rung['parameters'] / 1e6:.1f}M", *spoken, _cell([rung], metric, 1), *times])
  title = (
    f"greedy decoding one prompt at a time, {found['timed_prompts']} prompts, median of {found['rounds']} rounds in"
    " turns; latency relative to the small model's plain decoding:"
  )
  return f"{title}\n\n{_table(rows)}"


_TRIALS = {
  "longer": _longer,
  "limits": _limits,
  "lossy": _lossy,
  "larger_target": _larger_target,
  "twice_the_target": _larger_target,
  "ladder": _ladder,
}


def metric_of(found: Mapping[str, Any]) -> str:
  """Name the metric of quality that a trial is judged by."""
  return next(name for name in (*_QUALITY, *found) if name in found and f"{name}_ci" in found and name != "tau")


def _table(rows: Sequence[Sequence[str]]) -> str:
  head, *rest = ("| " + " | ".join(row) + " |" for row in rows)
  return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])
