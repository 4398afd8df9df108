"""The launch scripts: what they install and what they hand on, seen through an interpreter that only takes notes."""

import os
import pathlib
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
