"""The benchmark scripts run as they stand and report what the documentation names."""

import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.analysis.costs import Pair
from distillspec_jax.models import T5, T5Config
from distillspec_jax.tokens import EOS_ID
from distillspec_jax.types import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
TINY = "t5_tiny:num_encoder_layers=1,num_decoder_layers=1"


@pytest.fixture
def random_models(monkeypatch):
  monkeypatch.syspath_prepend(str(FOLDER))
  import random_models

  return random_models


def run(script, *arguments):
  """Run a script as a user would; XLA's own optimization is left out, it is not what is tested here."""
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
  command = [sys.executable, str(FOLDER / script), *arguments]
  return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_decoding_reports_every_column(tmp_path):
  file = tmp_path / "report.json"
  lengths = ["--input_length=5", "--output_length=6", "--gamma=2", "--batch", "2", "--temperature", "1"]
  done = run("decoding.py", f"--target={TINY}", f"--draft={TINY}", *lengths, "--repeats=1", f"--json={file}")
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.startswith("environment: jax ")
  for column in ("extend Q=1 ms", "extend Q=3 ms", "| v ", "| c ", "ms/token", "cγ+v", "speed-up", "predicted"):
    assert column in done.stdout
  report = json.loads(file.read_text())
  (passes,), (plain, copy, draft) = report["passes"], report["decoding"]
  assert set(passes["target"]["extend_ms"]) == set(passes["draft"]["extend_ms"]) == {"1", "3"}
  assert passes["verify_cost"] > 0 and passes["cost_ratio"] > 0
  assert [row["contestant"] for row in (plain, copy, draft)] == ["plain", "exact copy", "draft"]
  assert copy["block_efficiency"] == copy["tokens_per_round"] == 3.0  # everything accepted: 6 tokens in 2 blocks
  assert 1.0 <= draft["tokens_per_round"] <= draft["block_efficiency"] <= 3.0
  for row in (copy, draft):
    assert row["predicted_speedup"] == pytest.approx(row["tokens_per_round"] / row["predicted_round_cost"])
    assert row["speedup"] == pytest.approx(plain["ms_per_token"] / row["ms_per_token"])


def test_distillation_reports_every_piece(tmp_path):
  file = tmp_path / "report.json"
  lengths = ["--batch=2", "--input_length=5", "--output_length=6", "--chunk=4"]
  done = run("distillation.py", f"--teacher={TINY}", f"--student={TINY}", *lengths, "--repeats=1", f"--json={file}")
  assert done.returncode == 0, done.stderr[-2000:]
  assert "sum of the pieces" in done.stdout and "temporary MB" in done.stdout
  report = json.loads(file.read_text())
  assert [row["piece"] for row in report["pieces"]] == ["whole step", "rollout", "teacher", "student", "optimizer"]
  assert all(row["seconds"] > 0 and row["temporary_bytes"] >= 0 for row in report["pieces"])
  assert report["tokens"] == 12


@pytest.mark.parametrize("script", ["decoding.py", "distillation.py"])
def test_wrong_settings_are_one_line(script):
  done = run(script, "--repeats=0")
  assert done.returncode == 2
  assert done.stderr.strip().splitlines() == ["error: --repeats is 0: must be at least 1."]


@pytest.mark.parametrize("tied", [False, True])
def test_random_models_never_end(random_models, tied):
  model = T5(T5Config.named("t5_tiny", logits_via_embedding=tied))
  params = random_models.never_ending(model.init(jax.random.key(0)))
  tokens = jnp.asarray(np.random.default_rng(0).permutation(np.delete(np.arange(128), EOS_ID))[:120].reshape(4, 30))
  batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens}
  probabilities = jax.nn.softmax(model.score(params, batch))
  assert np.all(probabilities[..., EOS_ID] == 0)
  assert np.sum(np.max(probabilities, axis=(0, 1)) > 1 / 128) > 40, "other tokens must keep their chances"


def test_shapes_are_read(random_models):
  assert random_models.shape("d256").emb_dim == 256
  assert random_models.shape("t5_tiny:dtype=bfloat16,mlp_dim=48") == T5Config.named(
    "t5_tiny", dtype="bfloat16", mlp_dim=48
  )
  for wrong in ("t5_none", "t5_tiny:depth=3", "t5_tiny:mlp_dim"):
    with pytest.raises(ConfigError):
      random_models.shape(wrong)


# --- decoding.py --against ---

TINY_DRAFT = f"{TINY},emb_dim=16"
needs_t5x = pytest.mark.skipif(importlib.util.find_spec("t5x") is None, reason="T5X is not installed")


@pytest.fixture
def against(random_models):
  import against

  return against


@pytest.fixture
def against_huggingface(random_models):
  pytest.importorskip("torch", reason="torch is not installed")
  pytest.importorskip("transformers", reason="transformers is not installed")
  import against_huggingface

  return against_huggingface


def run_against(library, file):
  settings = ["--input_length=5", "--output_length=8", "--gamma=2", "--batch", "1", "3", "--repeats=1"]
  models = [f"--target={TINY}", f"--draft={TINY_DRAFT}"]
  done = run("decoding.py", f"--against={library}", *models, *settings, f"--json={file}")
  assert done.returncode == 0, done.stderr[-2000:]
  assert "| ours/theirs | identical rows |" in done.stdout
  return json.loads(file.read_text())


def check_comparison(rows, title, ways):
  """Check who took part at which batch size, that all texts are the same, and what the ratio is of."""
  everybody = [("ours", way) for way in ("plain", "exact copy", "draft")]
  for batch in (1, 3):
    found = [(row["library"], row["way"]) for row in rows if row["batch"] == batch]
    assert found == everybody + [(title, way) for way in ways[batch]]
  ms = {(row["library"], row["way"], row["batch"]): row["ms_per_token"] for row in rows}
  for row in rows:
    assert row["identical_rows"] == row["batch"], row
    ratio = None if row["library"] == "ours" else ms["ours", row["way"], row["batch"]] / row["ms_per_token"]
    assert row["ours_to_theirs"] == (ratio and pytest.approx(ratio))


def test_decoding_against_huggingface(tmp_path, against_huggingface):
  report = run_against("huggingface", tmp_path / "report.json")
  assert "threads" in report["environment"]["against"]["Hugging Face"]
  check_comparison(report["against"], "Hugging Face", {1: ["plain", "exact copy", "draft"], 3: ["plain"]})


@needs_t5x
def test_decoding_against_t5x(tmp_path):
  report = run_against("t5x", tmp_path / "report.json")
  assert report["environment"]["against"]["T5X"].startswith("t5x ")
  check_comparison(report["against"], "T5X", {1: ["plain"], 3: ["plain"]})


def test_huggingface_drafts_gamma_tokens_a_block_and_gives_its_own_text(random_models, against, against_huggingface):
  import torch

  gamma, length = 3, 12
  pair = Pair(*random_models.make(TINY, seed=0), *random_models.make(TINY_DRAFT, seed=1))
  other = Pair(*random_models.make(TINY, seed=2), pair.draft, pair.draft_params)
  args = types.SimpleNamespace(gamma=gamma, output_length=length)
  prompt = random_models.prompts(1, 5, 128)
  calls = against_huggingface.prepare(pair, args)(prompt)
  passes = []

  def note(module, _):
    if type(module).__name__ == "T5Stack" and module.is_decoder:
      passes.append(id(module))

  hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
  try:
    texts = {}
    for way, call in calls.items():
      passes.clear()
      texts[way] = call()
      runs = [len(list(group)) for _, group in itertools.groupby(passes)]
      if way == "plain":
        assert runs == [length]
      else:
        assert runs[:4] == [gamma, 1, gamma, 1], "blocks of gamma drafts, each judged by one pass of the target"
  finally:
    hook.remove()
  assert set(texts) == {"plain", "exact copy", "draft"}
  for text in texts.values():
    assert against.identical_rows(text, texts["plain"]) == 1
  # The control: another model's text is not the same.
  assert against.identical_rows(against_huggingface.prepare(other, args)(prompt)["plain"](), texts["plain"]) == 0


def test_identical_rows_are_counted(against):
  tokens = np.arange(12).reshape(3, 4)
  others = tokens.copy()
  others[1, 3] += 1
  assert against.identical_rows(tokens, tokens) == 3
  assert against.identical_rows(tokens, others) == 2


@pytest.mark.parametrize("ended", [[[5, EOS_ID]], [[5]]])
def test_a_row_that_ends_early_is_no_comparison(random_models, against, monkeypatch, ended):
  pair = Pair(T5(random_models.shape(TINY)), {}, T5(random_models.shape(TINY)), {})
  theirs = types.SimpleNamespace(TITLE="theirs", prepare=lambda pair, args: lambda prompt: {"plain": lambda: ended})
  monkeypatch.setattr(against, "_module", lambda name: theirs)
  ours = lambda prompt: {"plain": lambda: types.SimpleNamespace(tokens=[[5, 7]])}  # noqa: E731
  args = types.SimpleNamespace(output_length=2, repeats=1)
  with pytest.raises(RuntimeError, match="theirs, plain: a row ended early"):
    against.compare(["theirs"], pair, [np.ones((1, 3), np.int32)], ours, args)


@pytest.mark.parametrize(
  "script, library, module",
  [
    ("decoding.py", "huggingface", "transformers"),
    ("decoding.py", "t5x", "t5x"),
    ("distillation.py", "huggingface", "transformers"),
    ("distillation.py", "huggingface", "torch"),
  ],
)
def test_a_library_that_is_not_installed_is_one_line(tmp_path, monkeypatch, script, library, module):
  (tmp_path / f"{module}.py").write_text("raise ImportError('not here')")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  done = run(script, "--against", library)
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith(f"error: --against {library} needs ")


@pytest.mark.parametrize("change", ["dtype=bfloat16", "param_dtype=bfloat16"])
def test_only_float32_is_compared(random_models, against, change):
  pair = Pair(T5(random_models.shape(f"{TINY},{change}")), {}, T5(random_models.shape(TINY)), {})
  with pytest.raises(ConfigError, match="float32"):
    against.compare(["huggingface"], pair, [], None, None)


def test_t5x_says_what_its_network_cannot_be(random_models):
  import against_t5x

  model = T5(random_models.shape("t5_tiny:relative_attention_max_distance=64"))
  with pytest.raises(ConfigError, match="relative_attention_max_distance 128, the target 64"):
    against_t5x.check(model)


def test_rows_are_followed_until_they_part(tmp_path, random_models):
  import rows

  one = np.array([[2, 3, 4], [5, 6, 7], [8, 9, 9]])
  other = np.array([[2, 3, 4], [5, 0, 7], [0, 9, 9]])
  assert rows.compared(one, other) == {"differ": 2, "rows": 3, "tokens": 3 + 2 + 1, "rate": 2 / 6}
  file = tmp_path / "rows.json"
  lengths = ["--input_length=5", "--output_length=6", "--gamma=2", "--batch=2", "--rows=4"]
  done = run("rows.py", f"--target={TINY}", f"--draft={TINY}", *lengths, f"--json={file}")
  assert done.returncode == 0, done.stderr[-2000:]
  report = json.loads(file.read_text())
  assert [row["rows"] for row in report["rows"]] == [4] * 4
  assert all(row["tokens"] == 24 for row in report["rows"] if not row["differ"])


def test_data_reports_tasks_and_waiting(tmp_path):
  file = tmp_path / "report.json"
  settings = ["--seconds=0.2", "--windows=1", "--steps=0", "--batch_size=8"]
  done = run("data.py", "--tasks", "pydoc_summary_bytes/validation", *settings, f"--json={file}")
  assert done.returncode == 0, done.stderr[-2000:]
  (row,) = json.loads(file.read_text())["tasks"]
  assert row["task"] == "pydoc_summary_bytes" and row["split"] == "validation"
  assert 0 < row["examples_per_s"] < row["tokens_per_s"] and "| examples_per_s |" in done.stdout
  done = run("data.py", "--tasks", "no_such_task", *settings)
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: unknown task 'no_such_task'")
