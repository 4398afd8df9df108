"""The training and evaluating doors in real processes, from gin files and flags to the files of one process."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("seqio", reason="training from tasks needs seqio and TensorFlow")

from processes import Processes, free_port, joined, run  # noqa: E402

from distillspec_jax import weights  # noqa: E402

pytestmark = pytest.mark.slow  # each process imports TensorFlow and compiles for itself
TIMED = ("tokens_per_second", "steps_per_second", "data_wait_seconds", "cost/seconds")
SETTINGS = {
  "TASK": "'tiny'", "INPUT_LENGTH": 8, "TARGET_LENGTH": 4, "BATCH_SIZE": 8, "TRAIN_STEPS": 6,
  "OptimizerConfig.warmup_steps": 1, "TrainConfig.log_every": 1, "TrainConfig.eval_every": 3,
  "TrainConfig.eval_examples": 6, "TrainConfig.checkpoint_every": 2, "T5Config.vocab_size": 384,
  "T5Config.emb_dim": 16, "T5Config.num_heads": 2, "T5Config.head_dim": 8, "T5Config.mlp_dim": 16,
  "T5Config.num_encoder_layers": 1, "T5Config.num_decoder_layers": 1, "MeshConfig.fsdp": 2,
}  # fmt: skip
DISTILL = {name: value for name, value in SETTINGS.items() if not name.startswith("T5Config")}
SHORT = ["--num_examples=5", "--timing_examples=1", "--timing_repeats=1", "--gamma=2", "--target_length=6"]


def door(name, count, flags, silence=30):
  port = free_port()
  return [
    ["-m", f"distillspec_jax.{name}", *flags, *joined(index, count, port, silence)] for index in range(count)
  ]


def gin(folder, file, directory, settings, **macros):
  (folder / "task.gin").write_text("import tiny_task\n")
  macros = {"MODEL_DIR": directory, **macros}
  bindings = {**settings, **{name: repr(str(value)) for name, value in macros.items()}}
  files = [f"--gin_file={folder / 'task.gin'}", f"--gin_file={file}"]
  return [*files, *(f"--gin.{name}={value}" for name, value in bindings.items())]


def figures(directory):
  lines = [json.loads(line) for line in (directory / "train_log.jsonl").read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def assert_close(found, expected):
  assert [line["step"] for line in found] == [line["step"] for line in expected]
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5, atol=1e-5)


def assert_ended(ended):
  assert all(one.code == 0 for one in ended), [(one.code, one.err[-2000:]) for one in ended]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """A target, and a draft distilled from it, by one process with four devices."""
  folder = tmp_path_factory.mktemp("alone")
  assert_ended(run(door("train", 1, gin(folder, "runs/finetune.gin", folder / "target", SETTINGS)), devices=4))
  assert_ended(run(door("train", 1, distill(folder, folder, folder / "draft")), devices=4))
  return folder


def distill(folder, alone, directory, **more):
  models = dict(TARGET=alone / "target", DRAFT=alone / "target" / "best")
  return gin(folder, "runs/distill.gin", directory, DISTILL | more, **models)


@pytest.mark.parametrize("count", [2, 4])
def test_distilling_in_processes_is_distilling_in_one(alone, tmp_path, count):
  assert_ended(run(door("train", count, distill(tmp_path, alone, tmp_path / "draft")), devices=4 // count, limit=400))
  assert_close(figures(tmp_path / "draft"), figures(alone / "draft"))
  for part in ("", "best"):
    one, other = (weights.load_model(folder / "draft" / part)[1] for folder in (alone, tmp_path))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count, batch", [(2, 1), (2, 4), (4, 4)])
def test_evaluating_in_processes_is_evaluating_in_one(alone, tmp_path, count, batch):
  """A batch of one is the same on every device; a larger one is split over them."""

  def evaluate(count, devices):
    out = tmp_path / str(count)
    program = tmp_path / "evaluate_tiny.py"
    program.write_text("import tiny_task\nfrom distillspec_jax import cli, evaluate\ncli.run(evaluate.main)\n")
    flags = [f"--target={alone / 'target'}", f"--draft={alone / 'draft'}", "--task=tiny", "--split=validation", *SHORT,
             f"--batch_size={batch}"]  # fmt: skip
    commands = [[program, *arguments[2:]] for arguments in door("evaluate", count, [*flags, f"--output_dir={out}"])]
    ended = run(commands, devices=devices, limit=400)
    assert_ended(ended)
    lines = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    return json.loads((out / "metrics.json").read_text()), lines, ended

  one, lines_of_one, _ = evaluate(1, 1)
  several, lines_of_several, ended = evaluate(count, 4 // count)
  assert lines_of_several == lines_of_one and several["greedy_identical"] == [5, 5]
  for name in ("alpha", "block_efficiency", "alpha_empirical"):
    assert several[name] == pytest.approx(one[name], abs=1e-5)
  assert "prompts of tiny" in ended[0].out and "prompts of tiny" not in ended[1].out


def test_killed_and_called_again_it_ends_as_if_nothing_had_been(alone, tmp_path):
  more = {"TRAIN_STEPS": 40}
  assert_ended(run(door("train", 2, distill(tmp_path, alone, tmp_path / "whole", **more)), devices=2, limit=400))
  command = lambda: door("train", 2, distill(tmp_path, alone, tmp_path / "killed", **more), silence=10)
  saved = tmp_path / "killed" / "checkpoints"
  with Processes(command(), devices=2) as processes:
    processes.wait_until(lambda: saved.is_dir() and any(path.name in "468" for path in saved.iterdir()), 300)
    processes.send(1)
    first, _ = processes.wait(120)
  assert first.code == 3 and len(first.errors) == 1 and "process 1 (" in first.errors[0], first
  assert not (saved / "40").exists()
  assert_ended(run(command(), devices=2, limit=400))
  one, other = (weights.load_model(tmp_path / name)[1] for name in ("whole", "killed"))
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
  assert figures(tmp_path / "whole") == figures(tmp_path / "killed")


def test_hosts_with_other_settings_are_refused_before_anything_is_read(alone, tmp_path):
  port = free_port()
  commands = [
    ["-m", "distillspec_jax.train", *distill(tmp_path, alone, tmp_path / "draft", **{"TrainConfig.seed": index}),
     *joined(index, 2, port)] for index in range(2)
  ]  # fmt: skip
  ended = run(commands)
  assert [one.code for one in ended] == [2, 2]
  assert ended[0].errors == ended[1].errors and "TrainConfig.seed = 1" in ended[0].errors[0]
  assert not (tmp_path / "draft").exists()


def test_a_folder_that_not_all_hosts_share_is_refused(alone, tmp_path):
  """Each process has a MODEL_DIR of its own behind one name: a link in its own working directory."""
  port = free_port()
  commands = []
  for index in range(2):
    (tmp_path / str(index)).mkdir()
    program = tmp_path / f"{index}.py"
    flags = distill(tmp_path, alone, "draft")
    lines = [
      "import os, sys, runpy",
      f"os.chdir({str(tmp_path / str(index))!r})",
      f"sys.argv[1:] = {[*flags, *joined(index, 2, port)]!r}",
      "runpy.run_module('distillspec_jax.train', run_name='__main__')",
    ]
    program.write_text("\n".join(lines) + "\n")
    commands.append([program])
  ended = run(commands, limit=200)
  assert [one.code for one in ended] == [2, 2], ended
  assert all("is not one folder for all hosts: processes 1 do not see" in one.errors[0] for one in ended)
