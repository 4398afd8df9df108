"""The main job from end to end: train a target and a draft on real text, distil the draft, decode faster.

    python -m distillspec_jax.quickstart --output_dir=quickstart_output

Each part is a run that can be made by itself (gin_configs/runs/quickstart/*.gin, `distillspec_jax.evaluate`). What is
chosen is chosen on validation prompts (the draft's best step, the distilled draft's best step); what is reported is
measured on test prompts. The same command again goes on where it was stopped.
"""

from __future__ import annotations

from distillspec_jax import cli  # first: it quietens TensorFlow before it loads

# isort: split
import functools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

TASK = "pydoc_summary"
INPUT_LENGTH, TARGET_LENGTH = 64, 32
TEMPERATURES = {"t0": 0.0, "t1": 1.0}
MORE_GAMMAS = (5,)  # also measured after distillation, on fewer prompts, for the figure of speed-up by gamma

_OUTPUT_DIR = flags.DEFINE_string("output_dir", "quickstart_output", "Where everything is written.")
_GAMMA = flags.DEFINE_integer("gamma", 3, "Tokens drafted a block.")
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 320, "Test prompts that the figures are taken from.")
_SEED = flags.DEFINE_integer("seed", 0, "Of initial parameters, the data's order and all sampling.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Train a few steps only: shows that all parts run, the figures mean nothing.")

_SMOKE_BINDINGS = {
    "TRAIN_STEPS": 20,
    "BATCH_SIZE": 8,
    "OptimizerConfig.warmup_steps": 5,
    "TrainConfig.eval_every": 10,
    "TrainConfig.eval_examples": 32,
}
_SMOKE_PROMPTS, _SMOKE_TIMING_PROMPTS = 32, 4


def main(argv: Sequence[str]) -> None:
  """Run all parts, write summary.json and report.html, print the table."""
  del argv
  from distillspec_jax import weights  # noqa: PLC0415  (after the flags, so that a wrong one is answered at once)
  from distillspec_jax.decoding.speculative import check_gamma  # noqa: PLC0415

  check_gamma(_GAMMA.value)
  begin = time.monotonic()
  output = weights.ensure_writable(_OUTPUT_DIR.value)
  clock = functools.partial(_say, begin)
  _prepare(clock)
  _train_all(output, clock)
  results = _evaluate_all(output, clock)
  summary = {
      "task": TASK,
      "gamma": _GAMMA.value,
      "devices": _devices(),
      "seconds": round(time.monotonic() - begin, 1),
      **{name: _summarise(results[name]) for name in TEMPERATURES},
  }
  (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  print(table(summary))
  print(f"\nsummary {output / 'summary.json'}\nreport  {_report(output)}\n{time.monotonic() - begin:.0f} s in all")


def _prepare(clock) -> None:
  from distillspec_jax.data import sources  # noqa: PLC0415

  clock(f"1/5 data: {TASK}, docstrings of the installed packages (made once, about a minute)")
  manifest = sources.pydoc_summary().manifest
  clock(f"    {manifest['pairs']} pairs, {manifest['words']:,} words, checksum {manifest['checksum'][:12]}")


def _train_all(output: pathlib.Path, clock) -> None:
  """Train the target, the draft and the distilled draft, each in its own folder of `output`."""
  target, draft = (repr(str(output / name)) for name in ("target", "draft"))
  best_draft = repr(str(output / "draft" / "best"))
  clock("2/5 target: fine-tune 18M parameters from scratch")
  _train(output, "target", {})
  clock("3/5 draft: fine-tune 1M parameters from scratch; its best acceptance is \"before\"")
  _train(output, "draft", {"EVALUATION_TARGET": target})
  clock(f"4/5 distil the draft from the target on its own samples (DistillSpec, on-policy); it starts from {draft}")
  _train(output, "distill", {"TARGET": target, "DRAFT": best_draft})


def _train(output: pathlib.Path, name: str, macros: Mapping[str, Any]) -> None:
  from distillspec_jax import train  # noqa: PLC0415

  bindings = {"MODEL_DIR": repr(str(output / name)), "SEED": _SEED.value, **macros}
  if _SMOKE.value:
    bindings |= _SMOKE_BINDINGS
  train.run_from_gin([f"runs/quickstart/{name}.gin"], [f"{key} = {value}" for key, value in bindings.items()])


def _evaluate_all(output: pathlib.Path, clock) -> dict[str, dict[str, dict[str, Any]]]:
  """Evaluate both drafts at each temperature on test prompts: {"t0": {"before": metrics, "after": metrics}, ...}."""
  clock("5/5 evaluate both drafts on test prompts")
  evaluator = _Evaluator(output, clock)
  number = _SMOKE_PROMPTS if _SMOKE.value else _NUM_EXAMPLES.value
  results = {}
  for name, temperature in TEMPERATURES.items():
    of_gamma = functools.partial(evaluator.run, temperature=temperature)
    results[name] = {
        label: of_gamma(label, gamma=_GAMMA.value, num_examples=number, folder=f"{name}/{label}")
        for label in evaluator.drafts
    }
    for gamma in set(MORE_GAMMAS) - {_GAMMA.value}:
      of_gamma("after", gamma=gamma, num_examples=min(number, 32), folder=f"{name}/after_gamma{gamma}")
  return results


class _Evaluator:
  """Evaluates the drafts of one output folder; what both share is loaded and measured once."""

  def __init__(self, output: pathlib.Path, clock):
    from distillspec_jax import weights  # noqa: PLC0415
    from distillspec_jax.data import vocabularies  # noqa: PLC0415

    self.drafts = {"before": output / "draft" / "best", "after": output / "distill" / "best"}
    self._output, self._clock = output, clock
    self._target = weights.load_model(output / "target")
    self._pairs = {label: (*self._target, *weights.load_model(folder)) for label, folder in self.drafts.items()}
    self._vocabulary = vocabularies.load(output / "target" / "vocabulary")
    self._costs = None

  def run(self, label: str, *, temperature: float, gamma: int, num_examples: int, folder: str) -> dict[str, Any]:
    """Evaluate one draft at one setting, and write evaluation/FOLDER."""
    from distillspec_jax import evaluation  # noqa: PLC0415
    from distillspec_jax.analysis.costs import Costs, Pair  # noqa: PLC0415
    from distillspec_jax.analysis.measure import MeasureConfig  # noqa: PLC0415
    from distillspec_jax.data import eval_set, lookup  # noqa: PLC0415

    config = MeasureConfig(
        max_new_tokens=TARGET_LENGTH,
        gamma=gamma,
        temperature=temperature,
        decode_batch_size=16,  # a batch goes on until its slowest row has ended
        # Many: prompts differ more than repeated runs of one do.
        timing_prompts=_SMOKE_TIMING_PROMPTS if _SMOKE.value else min(num_examples, 48),
        timing_repeats=2,
        seed=_SEED.value,
    )
    changes = lookup.Changes(self._vocabulary)
    examples = eval_set.eval_examples(
        TASK, "test", num_examples, INPUT_LENGTH, TARGET_LENGTH, _SEED.value, changes
    )
    named = {"target": str(self._output / "target"), "draft": str(self.drafts[label]), "task": TASK, "split": "test"}
    metrics = evaluation.evaluate(
        Pair(*self._pairs[label]),
        examples,
        self._vocabulary,
        config,
        self._output / "evaluation" / folder,
        settings=named,
        label=label,
        costs=self._costs,
        quiet=True,
    )
    self._costs = self._costs or Costs.from_dict(metrics["pass_times"])  # both drafts have one shape
    self._clock(
        f"    {label}, T={temperature:g}, gamma {gamma}: acceptance {metrics['alpha']:.3f}, "
        f"{metrics['block_efficiency']:.2f} tokens a block, {metrics['speedup']:.2f}x"
    )
    return metrics


def _summarise(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Put one temperature's metrics of both drafts into summary.json's names."""
  before, after = metrics["before"], metrics["after"]
  summary = {}
  for name in ("alpha", "alpha_ci", "block_efficiency", "speedup"):
    stem = name.removesuffix("_ci")
    suffix = name[len(stem) :]
    summary[f"{stem}_before{suffix}"], summary[f"{stem}_after{suffix}"] = before[name], after[name]
  summary |= {
      "speedup_before_ci": before["speedup_ci"],
      "speedup_after_ci": after["speedup_ci"],
      "predicted_speedup_before": before["predicted_speedup"],
      "predicted_speedup_after": after["predicted_speedup"],
      "cost_ratio": after["cost_ratio"],
      "verify_cost": after["verify_cost"],
      "best_gamma_before": before["best_gamma"],
      "best_gamma_after": after["best_gamma"],
  }
  if "greedy_identical" in after:
    both = (before["greedy_identical"], after["greedy_identical"])
    summary["greedy_identical"] = [sum(column) for column in zip(*both, strict=True)]
  return summary


def table(summary: Mapping[str, Any]) -> str:
  """Lay summary.json out as text."""
  rows = [("", "T=0 before", "T=0 after", "T=1 before", "T=1 after")]
  cells = lambda form: [form(summary[name], when) for name in TEMPERATURES for when in ("before", "after")]
  interval = lambda of, key: "[{:.3f}, {:.3f}]".format(*of[key])
  rows.append(("acceptance rate", *cells(lambda of, when: f"{of[f'alpha_{when}']:.3f}")))
  rows.append(("  95% interval", *cells(lambda of, when: interval(of, f"alpha_{when}_ci"))))
  rows.append(("block efficiency", *cells(lambda of, when: f"{of[f'block_efficiency_{when}']:.2f}")))
  rows.append(("speed-up measured", *cells(lambda of, when: f"{of[f'speedup_{when}']:.2f}x")))
  rows.append(("speed-up predicted", *cells(lambda of, when: f"{of[f'predicted_speedup_{when}']:.2f}x")))
  rows.append(("best gamma", *cells(lambda of, when: str(of[f"best_gamma_{when}"]))))
  lines = ["", "{:<20}{:>17}{:>17}{:>17}{:>17}".format(*rows[0])]
  lines += ["{:<20}{:>17}{:>17}{:>17}{:>17}".format(*row) for row in rows[1:]]
  same, every = summary["t0"]["greedy_identical"]
  lines.append(
      f"gamma {summary['gamma']}; a draft step costs {summary['t0']['cost_ratio']:.3f} of a target step; "
      f"greedy texts identical to the target's own: {same} of {every}"
  )
  return "\n".join(lines)


def _report(output: pathlib.Path) -> pathlib.Path:
  from distillspec_jax.analysis import report_files  # noqa: PLC0415

  return report_files.write_report([output / "evaluation"], output)


def _devices() -> list[str]:
  import jax  # noqa: PLC0415

  return [str(device) for device in jax.devices()]


def _say(begin: float, text: str) -> None:
  minutes, seconds = divmod(int(time.monotonic() - begin), 60)
  print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)


if __name__ == "__main__":
  cli.run(main)
