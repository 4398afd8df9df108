"""A device's work stays the same from 1 to 64 devices along `data`, at as many rows a device."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "weak_scaling.py"
WITHIN = 0.10


@pytest.fixture(scope="module")
def rows():
  """What one device does, by program and number of devices."""
  done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=900, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
  return {(row["program"], row["devices"]): row for row in found}


@pytest.mark.parametrize("figure", ["flops", "bytes", "memory"])
@pytest.mark.parametrize("program", ["distillation step", "speculative decoding"])
def test_a_devices_work_does_not_grow(rows, program, figure):
  alone = rows[program, 1][figure]
  assert alone > 0
  for devices in (8, 64):
    assert abs(rows[program, devices][figure] / alone - 1) < WITHIN, (devices, rows)


def test_messages_do_not_grow_either(rows):
  """A step sends its gradients and sums, decoding whether all rows have ended: as much on 64 devices as on 8."""
  for program in ("distillation step", "speculative decoding"):
    assert rows[program, 1]["sent"] == 0
    few, many = (rows[program, devices]["sent"] for devices in (8, 64))
    assert 0 < few and many < few * (1 + WITHIN)


@pytest.mark.parametrize("figure", ["flops", "bytes", "memory"])
def test_rows_that_are_not_split_would_be_seen(rows, figure):
  """Negative control: each of 64 devices decodes all rows."""
  assert rows["all rows everywhere", 64][figure] > 2 * rows["speculative decoding", 1][figure]
