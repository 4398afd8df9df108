"""The study's finished parts as plots: PNG bytes, drawn from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distillspec_jax.analysis import figures
from distillspec_jax.study import tables
from distillspec_jax.study.lines import BEST_GREEDY, MAIN, NONE

Parts = Sequence[Mapping[str, Any]]
_TICKS = (1, 2, 5, 10, 20)
_TAU = {"greedy": "tau_t0_gamma7", "T = 1": "tau_t1_gamma7"}
_GAINS = {"greedy": "gain_t0_gamma7", "T = 1": "gain_t1_gamma7"}


def draw(parts: Parts) -> dict[str, bytes]:
  """Draw what there is something to draw of: {file name without its end: PNG bytes}."""
  lines, trials = [part for part in parts if "recipe" in part], [part for part in parts if "kind" in part]
  drawn = {}
  for task in dict.fromkeys(line["task"] for line in lines):
    drawn[f"{task}-block_efficiency"] = _block_efficiency([line for line in lines if line["task"] == task])
    drawn |= {f"{task}-{name}": png for name, png in _rows([line for line in lines if line["task"] == task]).items()}
  for trial in trials:
    if trial["kind"] in _TRIALS:
      drawn[trial["name"]] = _TRIALS[trial["kind"]](trial["found"])
  return drawn


def _block_efficiency(lines: Parts) -> bytes:
  """Draw τ at γ = 7 of the main recipes, mean over seeds, with what the seeds' intervals over prompts cover."""
  recipes = tables.by_recipe(lines)
  runs = {recipe: recipes[recipe] for recipe in (NONE, *MAIN) if recipe in recipes}
  groups = {title: [_run(recipe, seeds, key) for recipe, seeds in runs.items()] for title, key in _TAU.items()}
  return figures.block_efficiency(groups, list(runs)).png["light"]


def _run(recipe: str, seeds: Parts, key: str) -> dict[str, Any]:
  value, low, high = tables.hull([line["measured"] for line in seeds], key)
  return {"label": recipe, "block_efficiency": value, "block_efficiency_ci": [low, high]}


def _rows(lines: Parts) -> dict[str, bytes]:
  """Draw the gain of each row of a mixture that the drafts were transferred to, mean over seeds."""
  recipes, drawn = tables.by_recipe(lines), {}
  seeds = recipes.get(BEST_GREEDY, [])
  for name in seeds[0]["transfer"] if seeds else ():
    rows = [line["transfer"][name]["rows"] for line in seeds if "rows" in line["transfer"][name]]
    if rows:
      drawn[f"{name}-gain"] = _gains(rows)
  return drawn


def _gains(seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> bytes:
  mean = lambda row, key: 100 * (sum(rows[row][key] for rows in seeds) / len(seeds) - 1)
  order = sorted(seeds[0], key=lambda row: mean(row, _GAINS["greedy"]))

  def drawing(axes, theme):
    for series, (title, key) in enumerate(_GAINS.items()):
      values = [mean(row, key) for row in order]
      axes.plot(values, range(len(order)), "o", color=theme.series[series], label=title)
    axes.axvline(0, color=theme.ink, lw=1, ls=":")
    axes.set_yticks(range(len(order)), order, fontsize=6.5)
    axes.set_xlabel(f"gain in τ of {BEST_GREEDY}, γ = 7, %")

  return figures.draw(drawing, figures.LIGHT)


def _lossy(found: Parts) -> bytes:
  """Draw quality against block efficiency, a line a rule and draft, a point a lenience."""
  metric = tables.metric_of(found[0])

  def drawing(axes, theme):
    keys = dict.fromkeys((point["recipe"], point["temperature"], point["rule"]) for point in found)
    for number, key in enumerate(keys):
      points = [point for point in found if (point["recipe"], point["temperature"], point["rule"]) == key]
      recipe, temperature, rule = key
      color, style = theme.series[number % len(theme.series)], "--" if recipe == NONE else "-"
      label = f"{recipe}, {rule if temperature else 'greedy'}"
      values = [point["tau"] for point in points], [point[metric] for point in points]
      axes.plot(*values, style, marker="o", ms=3, color=color, label=label)
    axes.set_xlabel("block efficiency, γ = 7")
    axes.set_ylabel(metric)

  return figures.draw(drawing, figures.LIGHT)


def _ladder(found: Mapping[str, Any]) -> bytes:
  """Draw quality against relative latency, a point a rung: a colour for each target, a mark for each way to decode it."""
  rungs = found["rungs"]
  metric = tables.metric_of(next(iter(rungs.values())))
  targets = [name for name, rung in rungs.items() if "gamma" not in rung]
  marks = {"": "o", ", fine-tuned draft": "^", ", distilled draft": "D"}

  def drawing(axes, theme):
    for number, target in enumerate(targets):
      color = theme.series[number % len(theme.series)]
      for draft, mark in marks.items():
        if rung := rungs.get(target + draft):
          point = [rung["relative_latency"]], [rung[metric]]
          axes.plot(*point, mark, color=color, label=None if draft else target)
    axes.set_xscale("log")
    axes.set_xticks(_TICKS, [f"{tick}" for tick in _TICKS])
    axes.set_xlabel("relative latency (● plain, ▲ fine-tuned draft, ◆ distilled draft)")
    axes.set_ylabel(metric)

  return figures.draw(drawing, figures.LIGHT)


_TRIALS = {"lossy": _lossy, "ladder": _ladder}
