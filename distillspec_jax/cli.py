"""The frame of every entry point: absl flags, one-line errors, quiet TensorFlow, compiled programs kept, hosts joined.

Entry points import this module first, so that the environment is set before anything heavy loads. Only entry
points, this module and `gin_binding` know absl flags or gin.

    def main(argv): ...
    if __name__ == "__main__":
      cli.run(main)
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import sys
import traceback
from collections.abc import Callable, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow only reads text here; its start-up notes are noise
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags  # noqa: E402

from distillspec_jax.types import ConfigError  # noqa: E402

EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_LOST = 3  # with several processes: another one is gone
EXIT_INTERRUPTED = 130
_LIBRARIES = ("flax", "optax", "orbax-checkpoint", "numpy")  # that the hosts of a run must have alike, beside jax
_EXIT_WHEN_TOLD = "DISTILLSPEC_EXIT_WHEN_TOLD"  # for schedulers that take 0 for the run's end and would not start it again


def run(main: Callable[[Sequence[str]], object]) -> None:
  """Parse the flags, call `main(argv)`, leave the process.

  A `ConfigError`, an unknown flag or a wrong flag value is one line on stderr, `error: ...`, and exit code 2;
  Ctrl-C is one line and 130; a run that was told to stop and has saved says so and exits with 0, or what the environment
  has as DISTILLSPEC_EXIT_WHEN_TOLD; anything else is a bug and keeps its traceback. Of several processes (`join`) all end when one does, and those that lost another exit
  with 3. `--gin.NAME=VALUE` is accepted for doors that define `--gin_bindings` (T5X's calling style).
  """
  app.run(functools.partial(_guarded, main), flags_parser=_parse_flags)


def define_process_flags() -> None:
  """Define the flags that `join` reads."""
  flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; not needed on a TPU pod, under Slurm or Kubernetes.")
  flags.DEFINE_integer("num_processes", None, "Processes of this run, all together; 1: alone, whatever started it.")
  flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
  flags.DEFINE_float("start_timeout", 300.0, "Seconds to wait for all processes to come together.")
  flags.DEFINE_float("host_timeout", 60.0, "Seconds without a sign of life after which a process counts as gone.")


def join(*, takes_notice: bool = True) -> bool:
  """Join the other processes of this run, if there are any, as the flags or the environment say; say whether.

  Args:
    takes_notice: whether the door saves and leaves at SIGTERM (`preemption.Notice`); else SIGTERM ends it.

  Raises:
    ConfigError: see `multihost.start`.
  """
  from distillspec_jax.parallel import multihost  # noqa: PLC0415

  given = flags.FLAGS
  limits = multihost.Limits(start=given.start_timeout, silence=given.host_timeout)
  return multihost.start(
    given.coordinator or None, given.num_processes, given.process_id, limits, takes_notice=takes_notice
  )


def require_same_run(settings: str) -> None:
  """Refuse to go on where the processes of a run have other settings, versions or code of this package.

  Raises:
    ConfigError: they have; names the hosts and the first difference.
  """
  from distillspec_jax.parallel import multihost  # noqa: PLC0415

  if multihost.several():
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", *_LIBRARIES))
    versions = f"Python {platform.python_version()}, {found}, code of this package {code}"
    multihost.require_same("the configuration", f"{settings}\n{versions}")


def use_compilation_cache() -> None:
  """Keep compiled programs on disk between runs, apart for each jax version and kind of processor."""
  import jax  # noqa: PLC0415

  from distillspec_jax.data.sources import cache_folder  # noqa: PLC0415

  if jax.config.jax_compilation_cache_dir:  # the user's own choice, by environment variable
    return
  folder = cache_folder() / "compiled" / f"jax-{jax.__version__}-{_processor()}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return  # a read-only home costs time, nothing else
  jax.config.update("jax_compilation_cache_dir", str(folder))


def near(given: str, possible: Sequence[str]) -> str:
  """Say what was probably meant: "; did you mean 'a' or 'b'?", or "" where nothing is near."""
  matches = difflib.get_close_matches(given, list(possible), n=3, cutoff=0.6)
  return f"; did you mean {' or '.join(repr(m) for m in matches)}?" if matches else ""


def one_line(error: BaseException) -> str:
  """Return the first line of an error's text (gin appends where it was calling from)."""
  return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _guarded(main, argv):
  from distillspec_jax.parallel import multihost  # noqa: PLC0415  (brings jax, which --help does not need)
  from distillspec_jax.parallel.preemption import Preempted  # noqa: PLC0415

  _set_up_logging()
  try:
    if len(argv) > 1:
      raise ConfigError(f"unexpected argument {argv[1]!r}: options are written --name=value (see --help)")
    when_told = _exit_when_told()
    use_compilation_cache()
    result = main(argv)
    multihost.stop()
    return result
  except ConfigError as error:
    _leave(one_line(error), EXIT_CONFIG)
  except multihost.HostLost as error:
    _leave(one_line(error), EXIT_LOST)
  except KeyboardInterrupt:
    _leave("interrupted", EXIT_INTERRUPTED)
  except Preempted as notice:
    if multihost.is_first():
      print(notice, file=sys.stderr, flush=True)
    multihost.stop()
    return when_told
  except Exception as error:
    multihost.blame(error)
    if multihost.several():
      traceback.print_exc()
    multihost.leave(one_line(error), EXIT_BUG)
    raise


def _exit_when_told() -> int:
  given = os.environ.get(_EXIT_WHEN_TOLD, "0")
  if not given.isdecimal() or int(given) > 255:
    raise ConfigError(f"{_EXIT_WHEN_TOLD}={given} is no exit code: give a number from 0 to 255, or unset it")
  return int(given)


def _set_up_logging() -> None:
  """Let this package's own notes through, as plain lines; of the libraries' only warnings."""
  for library in ("absl", "jax", "matplotlib"):
    logging.getLogger(library).setLevel(logging.WARNING)
  own = logging.getLogger("distillspec_jax")
  if not own.handlers:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    own.addHandler(handler)
  own.setLevel(logging.INFO)
  own.propagate = False  # absl's handler would say it again


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(_rewrite_gin(argv))
  except flags.UnrecognizedFlagError as error:
    own = [name for name in flags.FLAGS if len(name) > 1]
    _leave(f"unknown option --{error.flagname}{near(error.flagname, own)} (--help lists the options)", EXIT_CONFIG)
  except (flags.Error, ConfigError) as error:
    _leave(one_line(error), EXIT_CONFIG)


def _rewrite_gin(argv: Sequence[str]) -> list[str]:
  """Turn --gin.NAME=VALUE into --gin_bindings=NAME = VALUE, as T5X does."""
  rewritten = []
  for argument in argv:
    if argument.startswith("--gin."):
      name, equals, value = argument[len("--gin.") :].partition("=")
      if not equals or not name:
        raise ConfigError(f"{argument!r} has no value: write --gin.NAME=VALUE, text in quotes: --gin.NAME=\"'text'\"")
      argument = f"--gin_bindings={name} = {value}"
    rewritten.append(argument)
  return rewritten


def _leave(message: str, code: int):
  sys.stdout.flush()
  print(f"error: {message}", file=sys.stderr, flush=True)
  if multihost := sys.modules.get("distillspec_jax.parallel.multihost"):
    multihost.leave(message, code)
  sys.exit(code)


def _processor() -> str:
  """Name the processor: programs compiled for one CPU must not run on another that shares the home folder."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    text = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  except OSError:
    text = platform.processor()
  return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _door(name: str) -> None:
  module = importlib.import_module(f"distillspec_jax.{name}")
  getattr(module, "define_flags", lambda: None)()  # most doors define theirs when they are imported
  run(module.main)


# What setup.py's console scripts call.
train = functools.partial(_door, "train")
evaluate = functools.partial(_door, "evaluate")
convert = functools.partial(_door, "convert")
report = functools.partial(_door, "report")
prepare_data = functools.partial(_door, "prepare_data")
quickstart = functools.partial(_door, "quickstart")
transfer = functools.partial(_door, "transfer")
study = functools.partial(_door, "study.door")
plan = functools.partial(_door, "plan")
generate_targets = functools.partial(_door, "generate_targets")
