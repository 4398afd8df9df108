"""The quickstart: its summary and table from made-up metrics, and (slow) all of its parts with a few steps."""

import json
import os
import subprocess
import sys

from processes import LESS_OPTIMISED

from distillspec_jax import quickstart

SUMMARY = {"task", "gamma", "devices", "seconds", "t0", "t1"}
EACH = {
  f"{name}_{when}"
  for name in ("alpha", "block_efficiency", "speedup")
  for when in ("before", "after")
} | {"alpha_before_ci", "alpha_after_ci", "predicted_speedup_after", "cost_ratio"}


def metrics(alpha, greedy=None):
  made = dict(
    alpha=alpha, alpha_ci=[alpha - 0.01, alpha + 0.01], block_efficiency=1 + alpha, speedup=1 + alpha / 2,
    speedup_ci=[1.0, 2.0], predicted_speedup=1.5 + alpha, cost_ratio=0.05, verify_cost=1.3, best_gamma=4,
  )  # fmt: skip
  return made | ({"greedy_identical": greedy} if greedy else {})


def test_the_summary_puts_before_and_after_side_by_side():
  greedy = quickstart._summarise({"before": metrics(0.5, [9, 10]), "after": metrics(0.6, [10, 10])})
  assert greedy["alpha_before"] == 0.5 and greedy["alpha_after"] == 0.6
  assert greedy["alpha_after_ci"] == [0.59, 0.61]
  assert greedy["greedy_identical"] == [19, 20]
  assert EACH <= set(greedy)
  assert "greedy_identical" not in quickstart._summarise({"before": metrics(0.5), "after": metrics(0.6)})


def test_the_table_shows_the_summary():
  t0 = quickstart._summarise({"before": metrics(0.5, [9, 10]), "after": metrics(0.6, [10, 10])})
  t1 = quickstart._summarise({"before": metrics(0.4), "after": metrics(0.7)})
  text = quickstart.table({"gamma": 3, "t0": t0, "t1": t1})
  acceptance = next(line for line in text.splitlines() if line.startswith("acceptance"))
  assert acceptance.split()[-4:] == ["0.500", "0.600", "0.400", "0.700"]
  assert "19 of 20" in text


def test_all_parts_run(tmp_path):
  command = [sys.executable, "-m", "distillspec_jax.quickstart", "--smoke", f"--output_dir={tmp_path / 'out'}"]
  environment = {**os.environ, "XLA_FLAGS": LESS_OPTIMISED}
  done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stderr[-2000:]
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert SUMMARY <= set(summary) and EACH <= set(summary["t0"]) and EACH <= set(summary["t1"])
  assert summary["t0"]["greedy_identical"] == [64, 64]
  assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
  assert "acceptance rate" in done.stdout
