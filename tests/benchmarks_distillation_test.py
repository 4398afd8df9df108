"""The distillation benchmark beside torch: the same step, the same law, the same loss; operations, peaks, memory."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from benchmarks_test import FOLDER, ROOT, TINY, TINY_DRAFT, run
from references.law import FALSE_ALARM, chi_square

from distillspec_jax.distillation.costs import Meter
from distillspec_jax.tokens import EOS_ID
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import huggingface

SHAPES = ["--batch=3", "--input_length=5", "--output_length=6", "--chunk=4"]
DISTILLED = [f"--teacher={TINY}", f"--student={TINY_DRAFT}", *SHAPES]


@pytest.fixture
def random_models(monkeypatch):
  monkeypatch.syspath_prepend(str(FOLDER))
  import random_models

  return random_models


@pytest.fixture
def distillation(random_models):
  import distillation

  return distillation


@pytest.fixture
def distillation_torch(random_models):
  pytest.importorskip("torch", reason="torch is not installed")
  pytest.importorskip("transformers", reason="transformers is not installed")
  import distillation_torch

  return distillation_torch


@functools.cache
def make_model(text, seed):
  import random_models

  return random_models.make(text, seed)


def make_pieces(distillation, *more, teacher=0):
  args = distillation._parse([*DISTILLED, "--against=huggingface", *more])
  return distillation.Pieces(args, make_model(args.teacher, teacher), make_model(args.student, 1))


@pytest.fixture
def torch_step(tmp_path, distillation, distillation_torch):
  """Make torch's step of the models that `make_pieces` makes, in given dtypes."""
  pieces = make_pieces(distillation)
  huggingface.export(tmp_path / "teacher", pieces.teacher, pieces.teacher_params)
  huggingface.export(tmp_path / "student", pieces.student, pieces.params)
  both = {"teacher": ("float32", "float32"), "student": ("float32", "float32")}
  return lambda **dtypes: distillation_torch.Step(tmp_path, pieces.args, "cpu", both | dtypes)


def test_distillation_against_huggingface(tmp_path, distillation_torch):
  file = tmp_path / "report.json"
  done = run("distillation.py", "--against=huggingface", *DISTILLED, "--repeats=1", f"--json={file}")
  assert done.returncode == 0, done.stderr[-2000:]
  for column in ("Hugging Face: transformers ", "| torch/ours |", "of peak FLOP/s", "| ours/torch |", "the imports"):
    assert column in done.stdout
  report = json.loads(file.read_text())
  rows = report["pieces"]
  assert [row["piece"] for row in rows] == ["whole step", "rollout", "teacher", "student", "optimizer"]
  for row in rows:
    assert row["torch_to_ours"] == pytest.approx(row["torch_seconds"] / row["seconds"])
    assert row["torch_seconds"] > 0
  for name in ("loss", "gradient_norm"):
    assert report["check"]["ours"][name] == pytest.approx(report["check"]["torch"][name], rel=1e-4)
    assert report["check"]["ours"][name] > 0
  for library in ("ours", "torch"):
    found = report["memory"][library]
    assert 0 < found["before_bytes"] <= found["bytes"] and not found["on_device"]


def test_another_step_is_no_comparison(distillation, distillation_torch, monkeypatch):
  monkeypatch.setattr(distillation_torch, "_memory_of", lambda *_: {})
  pieces, other = (make_pieces(distillation, teacher=seed) for seed in (0, 2))
  _, found = distillation_torch.prepare(pieces)
  assert found["check"]["ours"]["loss"] == pytest.approx(found["check"]["torch"]["loss"], rel=1e-4)
  # Ours judges with another teacher than the one that torch was given.
  pieces.judged = other.judged
  with pytest.raises(RuntimeError, match="not the same step: loss"):
    distillation_torch.prepare(pieces)


def test_torch_samples_the_students_law_and_cuts_nothing_off(distillation, torch_step):
  pieces, step, rows = make_pieces(distillation), torch_step(), 20_000
  prompt = np.asarray(pieces.prompts["encoder_input_tokens"])[:1]
  step.length, step.prompts = 1, step.prompts[:1].repeat(rows, 1)
  step.mask = step.prompts.new_ones(step.prompts.shape)
  logits = np.asarray(pieces.student.score(pieces.params, {
    "encoder_input_tokens": prompt, "decoder_input_tokens": np.zeros((1, 1), np.int32)
  }), np.float64)[0, 0]  # fmt: skip

  def law(temperature, top_k):
    weights = np.exp((logits - logits.max()) / temperature)
    weights[np.argsort(-weights)[top_k:]] = 0
    return {(token,): p for token, p in enumerate(weights / weights.sum()) if p > 0}

  sampled = step.rollout()[:, 1:].numpy()
  assert chi_square(sampled, law(1.0, 128)) > FALSE_ALARM
  # Controls: what their default of 50 would leave, and another temperature.
  assert chi_square(sampled, law(1.0, 50)) < FALSE_ALARM
  assert chi_square(sampled, law(1.5, 128)) < FALSE_ALARM


def test_torch_takes_the_mean_over_a_sequence_then_over_sequences(torch_step):
  import torch

  step = torch_step()
  sequences = torch.tensor([[0, 5, 6, EOS_ID, 0, 0, 0], [0, 9, 8, 7, 6, 5, 4], [0, EOS_ID, 3, 3, 3, 3, 3]])
  inputs = dict(input_ids=step.prompts, decoder_input_ids=sequences[:, :-1])
  with torch.no_grad():
    logits = [model(**inputs).logits.numpy().astype(np.float64) for model in (step.teacher, step.student)]
  p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in logits)
  p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
  divergences = np.sum(np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0), -1)
  expected = np.mean([divergences[0, :3].mean(), divergences[1].mean(), divergences[2, :1].mean()])
  loss = step.loss(sequences, step.teach(sequences)).item()
  assert loss == pytest.approx(expected, rel=1e-5)
  assert abs(divergences.mean() / expected - 1) > 1e-3, "the control: the mean over all tokens is another number"
  with pytest.raises(RuntimeError, match="a row ended early"):
    step.rollout = lambda: sequences
    step()


def test_torch_keeps_float32_parameters_where_it_computes_in_bfloat16(torch_step):
  import torch

  exact, mixed = torch_step(), torch_step(teacher=("bfloat16", "bfloat16"), student=("bfloat16", "float32"))
  assert {p.dtype for p in mixed.student.parameters()} == {torch.float32}
  assert {p.dtype for p in mixed.teacher.parameters()} == {torch.bfloat16}
  sequences = exact.rollout()
  found, expected = mixed.judged(sequences), exact.judged(sequences)
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=0.05) and found[name] != value
  assert mixed() > 0


@pytest.mark.parametrize(
  "settings, message",
  [
    (["--divergence=rkl"], "--against compares fkl and adamw"),
    (["--optimizer=adafactor"], "--against compares fkl and adamw"),
    ([f"--teacher={TINY},param_dtype=bfloat16"], "no float32 teacher of bfloat16 parameters"),
  ],
)
def test_what_torch_cannot_be_compared_in_is_said(distillation, distillation_torch, settings, message):
  with pytest.raises(ConfigError, match=message):
    distillation_torch.prepare(make_pieces(distillation, *settings))


def test_flops_are_those_of_the_meter(distillation):
  pieces = make_pieces(distillation)
  meter = Meter(pieces.student, pieces.teacher)
  meter.add_step({"prompt_tokens": 3 * 5, "tokens": 3 * 6, "rollout_tokens": [3 * 6, 0], "alpha": 0.5})
  spent, flops = meter.scalars(), pieces.flops()
  assert flops["whole step"] == spent["cost/target_flops"] + spent["cost/draft_flops"]
  assert flops["teacher"] == spent["cost/target_flops"]
  assert "optimizer" not in flops


def test_peaks_of_devices(distillation):
  for kind, peak in {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "cpu": None,
    "NVIDIA GeForce RTX 3090": None,
  }.items():
    assert distillation.peak_flops(kind) == peak


def test_memory_is_this_processes_own(random_models):
  import printing

  before = printing.resident_bytes()
  large = np.ones(1 << 27, np.uint8)
  assert printing.resident_bytes() - before > 0.9 * large.nbytes
  code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import printing; print(printing.resident_bytes(peak=True))"
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
  # A process begins with the most that the one which started it ever had, as getrusage tells it.
  assert 0 < int(child.stdout) < large.nbytes + before
  del large
  assert printing.resident_bytes(peak=True) - before > 0.9 * (1 << 27)
