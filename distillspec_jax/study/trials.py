"""The study's trials beside its table: longer runs, other settings, lossy rules, a larger target, smaller targets.

Each takes the stage of its task and returns what belongs into its file, JSON-able.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from distillspec_jax import weights
from distillspec_jax.analysis import gamma_choice, latency, measure
from distillspec_jax.analysis.costs import Pair
from distillspec_jax.models import LanguageModel
from distillspec_jax.study import lines
from distillspec_jax.study.lines import BEST_GREEDY, MAIN, NONE, Line
from distillspec_jax.study.stage import BATCH, Stage, silently

# At T = 0 there is no distribution to be lenient with: the three rules are one.
LOSSY = ((1.0, "lossy_lin"), (1.0, "lossy_sq"), (1.0, "lossy_exp"), (0.0, "lossy_exp"))
LENIENCES = (1.0, 0.7, 0.5, 0.3, 0.1, 0.03)
# Networks of other sizes, as factors of a field.
LARGER = {"larger_target": 2, "twice_the_target": 2.5}  # times the decoder layers; the second has twice the parameters
LARGER_DRAFT = {"emb_dim": 2, "num_heads": 2, "mlp_dim": 2, "num_decoder_layers": 2}
MIDDLE = {"emb_dim": 2 / 3, "num_heads": 2 / 3, "mlp_dim": 1 / 2, "num_decoder_layers": 1 / 2}  # of the target
LONGER = 4  # times the table's updates
TIMED_PROMPTS, TIMED_ROUNDS = 16, 5


def lossy(stage: Stage) -> list[dict[str, Any]]:
  """Trade quality for block efficiency: three rules by six leniences at T = 1, and their one greedy form at T = 0.

  Returns:
    For each draft, rule and lenience, the task's metrics and block efficiency, with intervals, of the same prompts.
  """
  examples = stage.examples(stage.task.name, 3 * stage.config.prompts)
  found = []
  for recipe in (NONE, MAIN[0]):
    pair = _pair(stage.target(), stage.draft_of(Line(stage.task.name, recipe, 0)))
    for (temperature, rule), lenience in itertools.product(LOSSY, LENIENCES):
      config = stage.decoding(pair, temperature, rule=rule, lenience=lenience)
      setting = {"recipe": recipe, "temperature": temperature, "rule": rule, "lenience": lenience}
      found.append(setting | {"prompts": len(examples)} | _decoded(stage, examples, pair, config))
      print(f"  {recipe}, T={temperature:g}, {rule} {lenience:g}: tau {found[-1]['tau']:.2f}", flush=True)
  return found


def larger_target(stage: Stage, name: str = "larger_target") -> dict[str, Any]:
  """Put the drafts, distilled from the target, before a larger target, trained alone on the same data.

  Args:
    stage: of the task.
    name: of the size, in LARGER, and of the larger target's folder.

  Returns:
    {"parameters": of both targets, "lines": [{"recipe", "seed", "measured": what `Stage.measured` gives}]}.
  """
  model, usual = weights.load_model(stage.target())
  directory = stage.fine_tuned(name, "target", 0, _scaled(model, {"num_decoder_layers": LARGER[name]}))
  larger, params = weights.load_model(directory)
  found: dict[str, Any] = {"parameters": {"target": _size(usual), "larger": _size(params)}, "lines": []}
  for line in lines.main_lines(stage.task.name, stage.config.seeds):
    pair = Pair(larger, params, *weights.load_model(stage.draft_of(line)))
    base = None if line.recipe == NONE else stage.base(stage.start(line.seed), stage.task.name, name, directory)
    measured = stage.measured(pair, stage.task.name, name, base)
    found["lines"].append({"recipe": line.recipe, "seed": line.seed, "measured": measured})
  return found


def longer(stage: Stage) -> dict[str, Any]:
  """Distil for four times as many updates, on the draft's texts and on the data set's.

  Whether it is their number that limits the table's gains, or the youth of a draft that makes its texts poor ones.

  Returns:
    {"lines": [{"recipe", "steps", "seed", "measured": what `Stage.measured` gives}]}.
  """
  steps, start = LONGER * stage.config.distill_steps, stage.start(0)
  found = []
  for recipe in MAIN[:2]:
    line = _varied(stage, f"longer-{recipe.replace('/', '_')}", recipe, start, {"TRAIN_STEPS": steps})
    found.append({"recipe": recipe, "steps": steps, "seed": 0, "measured": line})
  return {"lines": found}


def limits(stage: Stage) -> dict[str, Any]:
  """Change one setting of one recipe at a time: learning rate, the loss's temperature, the draft's size; and SKD.

  Returns:
    {"method": the recipe, "draft_parameters": of both drafts, "lines": [{"recipe": the setting, "seed", "measured"}]}.
  """
  task, start = stage.task, stage.start(0)
  usual, rate = weights.load_model(start), stage.config.draft_rate
  larger = stage.fine_tuned("larger-draft", "draft", 0, _scaled(usual[0], LARGER_DRAFT))
  settings: dict[str, dict[str, Any]] = {
    "rate-halved": {"LEARNING_RATE": rate / 2},
    "rate-doubled": {"LEARNING_RATE": rate * 2},
    "loss-temperature-0.5": {"Method.loss_temperature": 0.5},
  }
  measured = {name: _varied(stage, name, BEST_GREEDY, start, changes) for name, changes in settings.items()}
  measured["skd"] = _gained(stage, stage.draft_of(Line(task.name, "skd", 0)), start)
  measured["larger draft, none"] = stage.measured(_pair(stage.target(), larger), task.name)
  measured["larger draft"] = _varied(stage, "larger-draft-distilled", BEST_GREEDY, larger, {})
  sizes = {"usual": _size(usual[1]), "larger": _size(weights.load_model(larger)[1])}
  lines = [{"recipe": name, "seed": 0, "measured": of} for name, of in measured.items()]
  return {"method": BEST_GREEDY, "draft_parameters": sizes, "lines": lines}


def _varied(stage: Stage, name: str, recipe: str, start: str, changes: Mapping[str, Any]) -> dict[str, Any]:
  """Distil a draft with changed settings and measure it against the draft it was."""
  return _gained(stage, stage.distilled(name, recipe, stage.target(), start, 0, changes), start)


def _gained(stage: Stage, draft: str, start: str) -> dict[str, Any]:
  base = stage.base(start, stage.task.name)
  return stage.measured(_pair(stage.target(), draft), stage.task.name, base=base)


@dataclasses.dataclass(frozen=True)
class _Rung:
  """A target, and its draft (None: plain decoding)."""

  target: str
  draft: str | None = None


def ladder(stage: Stage) -> dict[str, Any]:
  """Teach a smaller target by the large one first, then distil a draft for it: quality against latency, greedy.

  Every rung decodes the same prompts one by one, in turns with the others; γ is what `choose_gamma` gives for it on
  other prompts. Relative latency is a rung's time a prompt over that of the smallest model's plain decoding.
  """
  rungs = _rungs(stage)
  examples = stage.examples(stage.task.name, 3 * stage.config.prompts)
  timed, others, _ = np.split(examples.encoder_input_tokens, (TIMED_PROMPTS, 2 * TIMED_PROMPTS))
  loaded = {path: weights.load_model(path) for rung in rungs.values() for path in (rung.target, rung.draft) if path}
  found, calls = {}, {}
  for name, rung in rungs.items():
    pair = Pair(*loaded[rung.target], *loaded[rung.draft or rung.target])
    config = stage.decoding(pair, 0.0, decode_batch_size=1)
    found[name] = {"parameters": _size(pair.target_params)}
    if rung.draft is None:
      found[name] |= _decoded(stage, examples, pair, config, measure.decode_plain)
      calls[name] = functools.partial(measure.decode_plain, pair, timed, config, silently)
      continue
    choice = gamma_choice.choose_gamma(pair, others if len(others) else timed, config)
    config = dataclasses.replace(config, gamma=choice.gamma)
    found[name] |= {"gamma": choice.gamma, "alpha": choice.alpha, "predicted_speedup": choice.predicted_speedup}
    found[name] |= {"draft_parameters": _size(pair.draft_params)}
    found[name] |= _decoded(stage, examples, pair, config)
    calls[name] = functools.partial(measure.decode_speculatively, pair, timed, config, silently)
  timings = latency.interleaved(calls, TIMED_ROUNDS)
  shortest = timings["small"].median_ms
  for name, timing in timings.items():
    found[name] |= {"ms_a_prompt": timing.median_ms / len(timed), "relative_latency": timing.median_ms / shortest}
  return {"method": BEST_GREEDY, "rungs": found, "timed_prompts": len(timed), "rounds": TIMED_ROUNDS}


def _decoded(stage: Stage, examples, pair: Pair, config, decode=measure.decode_speculatively) -> dict[str, Any]:
  """Decode all examples, many at once: the task's metrics and, of speculative decoding, τ."""
  config = dataclasses.replace(config, decode_batch_size=BATCH)
  decoded = decode(pair, examples.encoder_input_tokens, config, silently)
  if isinstance(decoded, measure.Rows):
    return stage.quality(examples, decoded)
  rows, summary = decoded
  tau, low, high = summary.block_efficiency()
  return stage.quality(examples, rows) | {"tau": tau, "tau_ci": [low, high]}


def _rungs(stage: Stage) -> dict[str, _Rung]:
  """Train what the ladder stands on; the small model is the draft itself."""
  method, large, small = BEST_GREEDY, stage.target(), stage.start(0)
  small_taught = stage.draft_of(Line(stage.task.name, method, 0))
  middle = stage.fine_tuned("middle", "target", 0, _scaled(weights.load_model(large)[0], MIDDLE))
  taught = stage.distilled("middle-taught", method, large, middle, 0, {"LEARNING_RATE": stage.config.target_rate})
  draft = stage.distilled("draft-for-middle", method, taught, small, 0)
  return {
    "large": _Rung(large),
    "large, fine-tuned draft": _Rung(large, small),
    "large, distilled draft": _Rung(large, small_taught),
    "middle": _Rung(middle),
    "middle, taught": _Rung(taught),
    "middle, taught, fine-tuned draft": _Rung(taught, small),
    "middle, taught, distilled draft": _Rung(taught, draft),
    "small": _Rung(small),
    "small, taught": _Rung(small_taught),
  }


def _scaled(model: LanguageModel, factors: Mapping[str, float]) -> dict[str, int]:
  """Give fields of a model's configuration, each times its factor."""
  return {name: round(getattr(model.config, name) * factor) for name, factor in factors.items()}


def _pair(target: str, draft: str) -> Pair:
  return Pair(*weights.load_model(target), *weights.load_model(draft))


def _size(params) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


TRIALS: Mapping[str, Callable[[Stage], Any]] = {
  "longer": longer,
  "limits": limits,
  "lossy": lossy,
  **{name: functools.partial(larger_target, name=name) for name in LARGER},
  "ladder": ladder,
}
