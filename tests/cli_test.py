"""The frame of the entry points: flags and gin errors are one line, exit code 2."""

import dataclasses
import os
import subprocess
import sys

import gin
import pytest

from distillspec_jax import cli, gin_binding
from distillspec_jax.types import ConfigError


@dataclasses.dataclass(frozen=True)
class CliTestConfig:
  width: int
  rate: float = 0.1
  name: str | None = None
  layers: tuple[int, ...] = (1,)


def cli_test_job(folder: str, config: CliTestConfig):
  return folder, config


make_config = gin_binding.register(CliTestConfig)
job = gin_binding.register(cli_test_job)

GOOD = [
  "FOLDER = 'x'",
  "cli_test_job.folder = %FOLDER",
  "cli_test_job.config = @CliTestConfig()",
  "CliTestConfig.width = 3",
]


@pytest.fixture(autouse=True)
def fresh_gin():
  yield
  gin.clear_config()


def test_values_arrive_in_the_plain_dataclass():
  gin_binding.parse([], [*GOOD, "CliTestConfig.rate = 1", "CliTestConfig.layers = [1, 2]"])
  folder, config = job()
  assert folder == "x"
  assert config == CliTestConfig(width=3, rate=1.0, layers=(1, 2))
  assert type(config) is CliTestConfig and hash(config)


def test_files_may_include_and_later_bindings_win(tmp_path):
  (tmp_path / "base.gin").write_text("\n".join(GOOD))
  (tmp_path / "run.gin").write_text(f"include '{tmp_path}/base.gin'\nCliTestConfig.width = 4\n")
  gin_binding.parse([str(tmp_path / "run.gin")], ["CliTestConfig.width = 5"])
  assert job()[1].width == 5
  gin_binding.parse([str(tmp_path / "run.gin")])
  assert job()[1].width == 4


BAD_BINDINGS = {
  "unknown parameter": ("CliTestConfig.widht = 3", ["'CliTestConfig.widht'", "did you mean 'width'"]),
  "unknown name": ("CliTestConfg.width = 3", ["'CliTestConfg'", "did you mean 'CliTestConfig'"]),
  "unknown macro": ("FOLDR = 'y'", ["'FOLDR'", "did you mean 'FOLDER'"]),
  "unknown reference": ("cli_test_job.config = @CliTestConfi()", ["'CliTestConfi'", "did you mean 'CliTestConfig'"]),
  "no quotes": ("FOLDER = runs/x", ["FOLDER = runs/x", "quotes"]),
  "no value": ("FOLDER = ", ["FOLDER = ", "NAME = VALUE"]),
  "required": ("FOLDER = %gin.REQUIRED", ["FOLDER has no value", "--gin.FOLDER="]),
  "unset macro": ("cli_test_job.folder = %NOWHERE", ["%NOWHERE", "--gin.NOWHERE="]),
  "missing include": ("include 'no_such.gin'", ["no_such.gin"]),
  "missing module": ("import no_such_module", ["no_such_module"]),
}


@pytest.mark.parametrize("case", BAD_BINDINGS)
def test_bad_binding_is_one_line(case):
  binding, parts = BAD_BINDINGS[case]
  with pytest.raises(ConfigError) as caught:
    gin_binding.parse([], [*(g for g in GOOD if case != "unset macro" or "FOLDER" not in g), binding])
  text = str(caught.value)
  assert "\n" not in text
  for part in parts:
    assert part in text


@pytest.mark.parametrize(
  "binding, expected",
  [("CliTestConfig.width = '3'", "CliTestConfig.width = '3': expected int"),
   ("CliTestConfig.width = True", "expected int"),
   ("CliTestConfig.rate = 'fast'", "expected float"),
   ("CliTestConfig.name = 3", "expected str or None"),
   ("CliTestConfig.layers = 3", "expected tuple")],
)  # fmt: skip
def test_wrong_type_names_the_key(binding, expected):
  gin_binding.parse([], [*GOOD, binding])
  with pytest.raises(ConfigError, match="CliTestConfig") as caught:
    job()
  assert expected in cli.one_line(caught.value)


def test_missing_value_names_the_key():
  gin_binding.parse([], GOOD[:3])
  with pytest.raises(ConfigError) as caught:
    job()
  assert cli.one_line(caught.value).startswith("CliTestConfig.width has no value")


def test_error_in_a_file_names_file_and_line(tmp_path):
  path = tmp_path / "bad.gin"
  path.write_text("\n\nCliTestConfig.widht = 2\n")
  with pytest.raises(ConfigError, match=r"bad\.gin line 3.*did you mean 'width'"):
    gin_binding.parse([str(path)])
  path.write_text("\nCliTestConfig.width = = 2\n")
  with pytest.raises(ConfigError, match=r"bad\.gin line 2"):
    gin_binding.parse([str(path)])


def test_missing_file_names_the_shipped_ones():
  with pytest.raises(ConfigError, match=r"no gin file 'runs/distil\.gin'.*did you mean 'runs/distill\.gin'"):
    gin_binding.parse(["runs/distil.gin"])


DOOR = """
from absl import flags
from distillspec_jax import cli, gin_binding
from distillspec_jax.parallel.preemption import Preempted
flags.DEFINE_integer("gamma", 5, "tokens")
gin_binding.define_flags()
def main(argv):
  if flags.FLAGS.gamma == 0: raise cli.ConfigError("gamma is 0: use 1 or more")
  if flags.FLAGS.gamma == 9: raise KeyboardInterrupt
  if flags.FLAGS.gamma == 8: raise ValueError("a bug")
  if flags.FLAGS.gamma == 7: raise Preempted("told to stop: step 3 is saved")
  print(flags.FLAGS.gamma, flags.FLAGS.gin_bindings)
cli.run(main)
"""


def call_door(*arguments, **variables):
  environment = {**os.environ, **variables}
  return subprocess.run([sys.executable, "-c", DOOR, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
  "argument, code, error",
  [("--gamma=0", 2, "error: gamma is 0: use 1 or more"),
   ("--gama=1", 2, "error: unknown option --gama; did you mean 'gamma'?"),
   ("--gamma=x", 2, "error: flag --gamma=x"),
   ("stray", 2, "error: unexpected argument 'stray'"),
   ("--gin.A", 2, "error: '--gin.A' has no value"),
   ("--gamma=9", 130, "error: interrupted")],
)  # fmt: skip
def test_a_door_ends_in_one_line(argument, code, error):
  done = call_door(argument)
  assert done.returncode == code
  assert done.stderr.startswith(error) and done.stderr.count("\n") == 1
  assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback():
  done = call_door("--gamma=8")
  assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_run_that_was_told_to_stop_ends_as_its_scheduler_wants():
  done = call_door("--gamma=7")
  assert (done.returncode, done.stderr) == (0, "told to stop: step 3 is saved\n")
  assert call_door("--gamma=7", DISTILLSPEC_EXIT_WHEN_TOLD="42").returncode == 42
  assert call_door("--gamma=1", DISTILLSPEC_EXIT_WHEN_TOLD="42").returncode == 0
  wrong = call_door("--gamma=1", DISTILLSPEC_EXIT_WHEN_TOLD="later")
  assert wrong.returncode == 2 and wrong.stderr.startswith("error: DISTILLSPEC_EXIT_WHEN_TOLD=later is no exit code")


def test_gin_arguments_are_rewritten_as_in_t5x():
  done = call_door("--gin.MODEL_DIR='a=b'")
  assert done.stdout.strip() == "5 [\"MODEL_DIR = 'a=b'\"]"
