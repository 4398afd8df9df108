"""The same run in 1, 2 and 4 real processes over 8 devices: the same losses, texts and examples."""

import json
import pathlib
import shutil
import signal

import numpy as np
import pytest
from processes import Processes, free_port, joined, run

PROGRAM = pathlib.Path(__file__).with_name("pod_run.py")
TIMED = ("tokens_per_second", "steps_per_second", "data_wait_seconds", "cost/seconds")


def commands(count, folder, *flags, out=None, silence=20):
  port, name = free_port(), out or folder / "out"
  fixed = [PROGRAM, f"--directory={folder / 'run'}", f"--out={name}", *flags]
  return [[*fixed, *joined(index, count, port, silence)] for index in range(count)]


def train(count, folder, *flags):
  folder.mkdir(exist_ok=True)
  ended = run(commands(count, folder, *flags), devices=8 // count)
  assert [one.code for one in ended] == [0] * count, [one.err[-3000:] for one in ended]
  return json.loads((folder / "out.json").read_text())


def seen(folder, count):
  """Every process's rows together: batch number -> sorted [row, tokens]; rows that several hold, once."""
  batches = {}
  for index in range(count):
    for number, rows in json.loads((folder / f"out.rows.{index}.json").read_text()).items():
      batches.setdefault(number, []).extend(rows)
  return batches


def figures(found):
  written = found["written"]
  return [[step, {name: value for name, value in scalars.items() if name not in TIMED}] for step, scalars in written]


def assert_same_run(found, expected):
  assert [step for step, _ in figures(found)] == [step for step, _ in figures(expected)]
  for (_, one), (_, other) in zip(figures(found), figures(expected), strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)
  assert found["greedy"] == expected["greedy"]
  assert found["greedy"][0] == found["greedy"][1]  # plain and speculative


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The run of one process, and its folder: checkpoints of steps 2, 4, 6 on a 2x2x2 mesh."""
  folder = tmp_path_factory.mktemp("alone")
  return train(1, folder), folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two")
  return train(2, folder), folder


def test_two_processes_run_as_one(alone, two):
  found, folder = two
  assert (found["processes"], found["devices"]) == (2, 8)
  assert_same_run(found, alone[0])
  rows, expected = seen(folder, 2), seen(alone[1], 1)
  assert {number: sorted(each) for number, each in rows.items()} == expected  # each row once, on one process


def test_a_checkpoint_of_one_process_goes_to_two_bit_by_bit(alone, tmp_path):
  """Of 8 devices as 2x2x2 to 2 processes of 4; to other meshes of one process: tests/weights/checkpoints_test.py."""
  shutil.copytree(alone[1] / "run", tmp_path / "run")
  ended = run(commands(2, tmp_path, "--do=restore", "--mesh=4,1,2"), devices=4)
  assert [one.code for one in ended] == [0, 0], [one.err[-3000:] for one in ended]
  assert json.loads((tmp_path / "out.json").read_text()) == {"step": 6, "sums": alone[0]["sums"]}


def test_a_checkpoint_of_two_processes_goes_to_one_bit_by_bit(two, tmp_path):
  shutil.copytree(two[1] / "run", tmp_path / "run")
  assert run(commands(1, tmp_path, "--do=restore", "--mesh=8,1,1"), devices=8)[0].code == 0
  assert json.loads((tmp_path / "out.json").read_text())["sums"] == two[0]["sums"]


@pytest.mark.slow
def test_one_is_killed_the_other_stops_and_the_same_command_goes_on(two, tmp_path):
  """Killed between checkpoints; called again, the run ends where the uninterrupted one ended, bit by bit."""
  saved = tmp_path / "run" / "checkpoints"
  with Processes(commands(2, tmp_path, "--steps=4000", silence=8), devices=4) as processes:
    processes.wait_until(lambda: (saved / "2" / "MANIFEST.json").exists(), 240)
    processes.send(1)
    first, _ = processes.wait(90)
  assert first.code == 3 and len(first.errors) == 1 and "process 1 (" in first.errors[0], first
  for step in saved.iterdir():  # of the steps past what the whole run has, nothing is wanted
    if step.name != "2":
      shutil.rmtree(step)
  assert train(2, tmp_path)["sums"] == two[0]["sums"]


@pytest.mark.slow
def test_a_notice_to_one_saves_on_all_and_exits_0(two, tmp_path):
  with Processes(commands(2, tmp_path, "--steps=4000"), devices=4) as processes:
    processes.wait_until(lambda: "step 1/4000" in processes.said(0)[1], 240)
    processes.send(1, signal.SIGTERM)
    ended = processes.wait(90)
  assert [one.code for one in ended] == [0, 0], ended
  assert "told to stop: step" in ended[0].err and "told to stop" not in ended[1].err
  steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
  assert f"step {max(steps)} of 4000 is saved" in ended[0].err


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2,2,2", "1,1,8", "2,1,4"])
def test_four_processes_run_as_one(alone, tmp_path, mesh):
  """Also where processes hold the same rows: with a model axis over several of them."""
  found = train(4, tmp_path, f"--mesh={mesh}")
  assert found["processes"] == 4
  assert_same_run(found, alone[0])
  for number, rows in seen(tmp_path, 4).items():
    once = {json.dumps(row): row for row in rows}
    assert sorted(once.values()) == seen(alone[1], 1)[number]


def test_the_comparison_sees_another_run(alone):
  """The negative control: a run with one loss changed by 1e-3 of itself, or one other token, is not the same."""
  other = json.loads(json.dumps(alone[0]))
  name = next(name for name in other["written"][1][1] if name == "loss")
  other["written"][1][1][name] *= 1.001
  with pytest.raises(AssertionError):
    assert_same_run(other, alone[0])
  other = json.loads(json.dumps(alone[0]))
  other["greedy"][0][0][0] += 1
  with pytest.raises(AssertionError):
    assert_same_run(other, alone[0])
