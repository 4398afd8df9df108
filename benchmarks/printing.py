"""What the benchmarks print and write: the environment, tables in Markdown, JSON; and how much memory they have."""

from __future__ import annotations

import json
import pathlib
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distillspec_jax.types import ConfigError


def environment_line(environment: dict[str, Any]) -> str:
  """Say in one line what the times were taken on."""
  return (
      f"environment: jax {environment['jax']}, python {environment['python']}, {environment['devices']} x "
      f"{environment['device_kind']} ({environment['backend']}), {environment['cpu_count']} CPU cores, "
      f"{environment['platform']}"
  )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Lay out a Markdown table; floats get three significant digits, None a dash."""
  cells = [list(columns)] + [[_cell(value) for value in row] for row in rows]
  widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
  padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in cells]
  lines = ["| " + " | ".join(row) + " |" for row in padded]
  lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
  return "\n".join(lines)


def write_json(path: str | None, report: dict[str, Any]) -> None:
  """Write the report where a path is given."""
  if path:
    pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n")


def run(main: Callable[[Sequence[str] | None], Any]) -> None:
  """Call a benchmark's main; what the user got wrong is one line on stderr and exit code 2."""
  try:
    main(None)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def share(value: float | None) -> str | None:
  """Write a share as percent."""
  return None if value is None else f"{value:.1%}"


def resident_bytes(peak: bool = False) -> int:
  """Say how much memory this process has now, or had at most so far; without Linux's /proc always the latter."""
  try:
    status = pathlib.Path("/proc/self/status").read_text()
  except OSError:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
  # Not ru_maxrss: a new process begins with that of the one that started it.
  name = "VmHWM:" if peak else "VmRSS:"
  return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def _cell(value: Any) -> str:
  if value is None:
    return "–"
  if isinstance(value, float):
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"
  return str(value)
