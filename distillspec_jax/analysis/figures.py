"""Draw the report's figures from plain metrics (metrics.json's names) as PNG bytes, for light and dark pages.

Figures are small with large type, so that they can be read at a phone's width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

Run = dict[str, Any]  # one metrics.json, with a "label"

_SIZE = (4.8, 3.2)  # inches
_DPI = 200
_BREAK_EVEN = "pays above this"


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours of a page.

  Attributes:
    name: of the theme.
    background, ink, faint: page, text and axes, grid.
    series: of the labels, in their order; readable without colour vision by lightness.
  """

  name: str
  background: str
  ink: str
  faint: str
  series: tuple[str, ...]


Drawing = Callable[[Any, Theme], None]  # draws into matplotlib's axes
LIGHT = Theme("light", "#fffdf9", "#2b2a27", "#e4dfd5", ("#c79a5b", "#0f6b63", "#6b57a8", "#a83f5f", "#5f6a75"))
DARK = Theme("dark", "#1b1d1f", "#e6e2d9", "#3a3d40", ("#b98a4a", "#2f9c90", "#8f7ddb", "#cf6b8e", "#7d8893"))


@dataclasses.dataclass(frozen=True)
class Figure:
  """A drawn figure: a file name without its ending, a title and a caption in plain text, PNG bytes by theme."""

  name: str
  title: str
  caption: str
  png: dict[str, bytes]


def all_figures(runs: Sequence[Run]) -> list[Figure]:
  """Draw every figure that the runs have numbers for."""
  labels = ordered_labels(runs)
  groups = main_settings(runs)
  compared = [run for group in groups.values() for run in group]
  made = [acceptance(by_temperature(compared), labels), block_efficiency(groups, labels)]
  for name, group in by_temperature(runs).items():
    if any(run.get("predicted_speedup_by_gamma") or run.get("speedup") for run in group):
      made.append(speedup(name, group, labels))
  for name, group in groups.items():
    if any(run.get("accepted_length_histogram") for run in group):
      made.append(accepted_lengths(name, group, labels))
    if any(run.get("acceptance_by_position") for run in group):
      made.append(acceptance_by_position(name, group, labels))
  return made


def ordered_labels(runs: Sequence[Run]) -> list[str]:
  """List the labels: "before" first, then "after", then the others as they come."""
  labels = list(dict.fromkeys(run["label"] for run in runs))
  rank = {"before": 0, "after": 1}
  return sorted(labels, key=lambda label: rank.get(label, 2))


def temperature_name(run: Run) -> str:
  """Name a run's temperature: "greedy" or "T = 1"."""
  temperature = run.get("config", {}).get("temperature")
  if temperature is None:
    return "all runs"
  return "greedy" if temperature == 0 else f"T = {temperature:g}"


def setting_name(run: Run) -> str:
  """Name a run's temperature and γ: "greedy, γ = 3"."""
  gamma = run.get("config", {}).get("gamma")
  return temperature_name(run) + (f", γ = {gamma}" if gamma is not None else "")


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Group the runs that differ in their label alone, in the order of their labels."""
  return _grouped(runs, setting_name)


def main_settings(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Group as `by_setting`, and of each temperature keep the settings that compare the most labels.

  A γ that was measured for one label only adds a point to the speed-up by γ; it compares nothing.
  """
  most: dict[str, int] = {}
  groups = by_setting(runs)
  for group in groups.values():
    name = temperature_name(group[0])
    most[name] = max(most.get(name, 0), len({run["label"] for run in group}))
  compares_most = lambda group: len({run["label"] for run in group}) == most[temperature_name(group[0])]
  return {name: group for name, group in groups.items() if compares_most(group)}


def by_temperature(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Group the runs of one temperature, whatever their γ."""
  return _grouped(runs, temperature_name)


def _grouped(runs, name_of) -> dict[str, list[Run]]:
  labels = ordered_labels(runs)
  order = sorted(
      runs, key=lambda run: (_order(run, "temperature"), _order(run, "gamma"), labels.index(run["label"]))
  )
  groups: dict[str, list[Run]] = {}
  for run in order:
    groups.setdefault(name_of(run), []).append(run)
  return groups


def _order(run: Run, name: str) -> float:
  value = run.get("config", {}).get(name)
  return value if isinstance(value, (int, float)) else math.inf


def acceptance(groups: dict[str, list[Run]], labels: list[str]) -> Figure:
  """Draw α by temperature with its interval, and the α from which speculation pays; α does not depend on γ."""
  groups = {name: _best_known(group) for name, group in groups.items()}

  def draw(axes, theme):
    _bars(axes, theme, groups, labels, "alpha", "{:.2f}")
    for index, group in enumerate(groups.values()):
      marks = [run["break_even_alpha"] for run in group if run.get("break_even_alpha")]
      for mark in marks[:1]:
        name = _BREAK_EVEN if index == 0 else None
        axes.plot([index - 0.46, index + 0.46], [mark, mark], "--", color=theme.ink, lw=1.2, label=name, zorder=4)
    axes.set_ylim(0, 1)
    axes.set_ylabel("acceptance rate α")

  caption = (
      "Share of the draft's proposals that the target accepts, scored without sampling noise on the target's own outputs."
  )
  return _figure("acceptance", "Acceptance rate", caption, draw)


def _best_known(runs: Sequence[Run]) -> list[Run]:
  """Keep of each label the run with the most prompts."""
  prompts = lambda run: (run.get("totals") or {}).get("prompts", 0)
  labels = ordered_labels(runs)
  return [max((run for run in runs if run["label"] == label), key=prompts) for label in labels]


def block_efficiency(groups: dict[str, list[Run]], labels: list[str]) -> Figure:
  """Draw τ of every run with its interval."""

  def draw(axes, theme):
    _bars(axes, theme, groups, labels, "block_efficiency", "{:.2f}")
    axes.axhline(1, color=theme.ink, lw=1, ls=":", zorder=4)
    axes.set_ylabel("tokens a target call, τ")

  caption = "Tokens emitted for each call of the target. The dotted line is plain decoding: one."
  return _figure("block_efficiency", "Block efficiency", caption, draw)


def speedup(name: str, runs: Sequence[Run], labels: list[str]) -> Figure:
  """Draw the predicted speed-up over γ as lines, the measured one as points with intervals."""

  def draw(axes, theme):
    for label in labels:
      color = _color(theme, labels, label)
      own = [run for run in runs if run["label"] == label]
      curves = [run["predicted_speedup_by_gamma"] for run in own if run.get("predicted_speedup_by_gamma")]
      for curve in curves[:1]:
        gammas = sorted(int(gamma) for gamma in curve)
        axes.plot(gammas, [curve[str(gamma)] for gamma in gammas], color=color, lw=2, label=f"{label}, predicted")
      points = [run for run in own if is_number(run.get("speedup")) and run.get("config", {}).get("gamma")]
      for index, run in enumerate(points):
        _point(axes, theme, run["config"]["gamma"], run, "speedup", color, f"{label}, measured" if index == 0 else None)
    axes.axhline(1, color=theme.ink, lw=1, ls=":")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("γ, drafted tokens a block")
    axes.set_ylabel("speed-up over plain decoding")

  caption = (
      "Lines: τ(α, γ) / (c·γ + v) with times of single passes. Points: whole decoding, timed in turns. Dotted: no gain."
  )
  return _figure(f"speedup_{_slug(name)}", f"Speed-up by γ, {name}", caption, draw)


def accepted_lengths(name: str, runs: Sequence[Run], labels: list[str]) -> Figure:
  """Draw the share of blocks that accepted 0 ... γ proposals."""

  def draw(axes, theme):
    own = [run for run in runs if run.get("accepted_length_histogram")]
    width = 0.8 / max(len(own), 1)
    for index, run in enumerate(own):
      counts = run["accepted_length_histogram"]
      shares = [count / max(sum(counts), 1) for count in counts]
      at = [i + (index - (len(own) - 1) / 2) * width for i in range(len(counts))]
      axes.bar(at, shares, width * 0.92, color=_color(theme, labels, run["label"]), label=run["label"], zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("accepted proposals in a block")
    axes.set_ylabel("share of blocks")

  caption = "How often a block accepted none, one, ... of its proposals; cut at the end of the text."
  return _figure(f"accepted_lengths_{_slug(name)}", f"Accepted lengths, {name}", caption, draw)


def acceptance_by_position(name: str, runs: Sequence[Run], labels: list[str]) -> Figure:
  """Draw the chance that proposal i is accepted once all before it are."""

  def draw(axes, theme):
    for run in runs:
      rates = run.get("acceptance_by_position") or []
      positions = [i + 1 for i, rate in enumerate(rates) if is_number(rate)]
      color = _color(theme, labels, run["label"])
      known_rates = [rates[i - 1] for i in positions]
      axes.plot(positions, known_rates, "o-", color=color, lw=2, ms=5, label=run["label"], zorder=4)
      intervals = run.get("acceptance_by_position_ci") or []
      known = [i for i in positions if i <= len(intervals) and intervals[i - 1]]
      if known:
        axes.fill_between(known, *zip(*(intervals[i - 1] for i in known)), color=color, alpha=0.18, lw=0)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("position in the block")
    axes.set_ylabel("accepted / judged")

  caption = "Of the blocks whose proposals before this one were all accepted: how many accept this one too."
  return _figure(f"position_{_slug(name)}", f"Acceptance by position, {name}", caption, draw)


def _bars(axes, theme: Theme, groups, labels, key: str, form: str) -> None:
  """Draw one bar a run, side by side in its group, with interval and value."""
  width = 0.84 / max(len(labels), 1)
  seen, top = set(), 0.0
  for index, group in enumerate(groups.values()):
    for run in group:
      if not is_number(run.get(key)):
        continue
      place = labels.index(run["label"])
      at = index + (place - (len(labels) - 1) / 2) * width
      color = _color(theme, labels, run["label"])
      axes.bar(at, run[key], width * 0.92, color=color, label=None if place in seen else run["label"], zorder=3)
      _whisker(axes, theme, at, run, key)
      above = (run.get(f"{key}_ci") or [None, run[key]])[1]
      axes.annotate(form.format(run[key]), (at, above), (0, 3), textcoords="offset points", ha="center", fontsize=9.5)
      seen.add(place)
      top = max(top, above)
  axes.set_xticks(range(len(groups)), groups)
  axes.set_ylim(0, top * 1.16 or 1)
  axes.grid(axis="x", visible=False)


def _point(axes, theme: Theme, at: float, run: Run, key: str, color: str, label: str | None) -> None:
  axes.plot([at], [run[key]], "o", color=color, mec=theme.ink, mew=1.2, ms=8, label=label, zorder=5)
  _whisker(axes, theme, at, run, key)


def _whisker(axes, theme: Theme, at: float, run: Run, key: str) -> None:
  interval = run.get(f"{key}_ci")
  if interval:
    low, high = interval
    errors = [[max(run[key] - low, 0)], [max(high - run[key], 0)]]
    axes.errorbar([at], [run[key]], errors, fmt="none", ecolor=theme.ink, elinewidth=1.4, capsize=3, zorder=4.5)


def _figure(name: str, title: str, caption: str, drawing: Drawing) -> Figure:
  return Figure(name, title, caption, {theme.name: draw(drawing, theme) for theme in (LIGHT, DARK)})


def draw(drawing: Drawing, theme: Theme) -> bytes:
  """Draw one figure in a theme: PNG bytes, with a legend above where the drawing labels anything."""
  with _styled(theme):
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    try:
      drawing(axes, theme)
      handles, names = axes.get_legend_handles_labels()
      if handles:
        # Matplotlib lists lines before bars; what is no series belongs at the end.
        handles, names = zip(*sorted(zip(handles, names), key=lambda pair: pair[1] == _BREAK_EVEN))
        columns = min(len(names), 2 if len(names) in (2, 4) else 3)
        figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
      buffer = io.BytesIO()
      figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
      return buffer.getvalue()
    finally:
      plt.close(figure)


@contextlib.contextmanager
def _styled(theme: Theme) -> Iterator[None]:
  style = {
      "figure.facecolor": theme.background,
      "savefig.facecolor": theme.background,
      "axes.facecolor": theme.background,
      "axes.edgecolor": theme.faint,
      "axes.labelcolor": theme.ink,
      "axes.grid": True,
      "axes.axisbelow": True,
      "axes.spines.top": False,
      "axes.spines.right": False,
      "axes.spines.left": False,
      "grid.color": theme.faint,
      "grid.linewidth": 0.8,
      "text.color": theme.ink,
      "xtick.color": theme.ink,
      "ytick.color": theme.ink,
      "xtick.major.size": 0,
      "ytick.major.size": 0,
      "font.family": "DejaVu Sans",  # comes with matplotlib: figures are the same everywhere
      "font.size": 10.5,
      "legend.fontsize": 9.5,
      "legend.columnspacing": 1.2,
      "legend.handlelength": 1.3,
  }
  with plt.rc_context(style):
    yield


def _color(theme: Theme, labels: list[str], label: str) -> str:
  return theme.series[labels.index(label) % len(theme.series)]


def _slug(name: str) -> str:
  kept = name.replace("γ", "gamma").replace("=", "").lower()
  return "_".join("".join(c if c.isalnum() or c == "." else " " for c in kept).split())


def is_number(value) -> bool:
  """Say whether a value of a JSON file is a finite number."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
