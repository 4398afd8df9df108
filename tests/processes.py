"""Real processes on this machine that form one run, with limits: none outlives its test."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).resolve().parent
# Neither optimised nor cut into parts to be compiled side by side.
LESS_OPTIMISED = (
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended."""

  code: int
  out: str
  err: str

  @property
  def errors(self):
    """The one-line errors, jax's own words left out."""
    return [line for line in self.err.splitlines() if line.startswith("error: ")]


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def environment(devices=1, **more):
  paths = [TESTS.parent, TESTS, TESTS / "distillation", os.environ.get("PYTHONPATH", "")]
  return {
    **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "KUBERNETES_"))},
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {LESS_OPTIMISED}",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONPATH": os.pathsep.join(map(str, paths)),
    **more,
  }


def joined(index, count, port, silence=6):
  """The flags of one of `count` processes; alone it needs none."""
  if count == 1:
    return []
  return [
    f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}", "--start_timeout=120",
    f"--host_timeout={silence}",
  ]  # fmt: skip


class Processes:
  """Starts `python arguments` for each list of arguments; a context that kills what is left at its end."""

  def __init__(self, commands, devices=1, **variables):
    self._folder = tempfile.TemporaryDirectory()
    self._files, self.running = [], []
    for number, arguments in enumerate(commands):
      files = [open(pathlib.Path(self._folder.name) / f"{number}.{end}", "w+") for end in ("out", "err")]
      self._files.append(files)
      self.running.append(
        subprocess.Popen(
          [sys.executable, *map(str, arguments)],
          stdout=files[0],
          stderr=files[1],
          env=environment(devices, **variables),
        )
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.running:
      if process.poll() is None:
        process.kill()
      process.wait()
    for file in (file for files in self._files for file in files):
      file.close()
    self._folder.cleanup()

  def said(self, number):
    """What a process has written so far: (stdout, stderr)."""
    texts = []
    for file in self._files[number]:
      file.seek(0)
      texts.append(file.read())
    return tuple(texts)

  def wait(self, limit):
    """Wait for all; one that is still there after `limit` seconds fails the test."""
    deadline = time.monotonic() + limit
    for number, process in enumerate(self.running):
      try:
        process.wait(max(0.1, deadline - time.monotonic()))
      except subprocess.TimeoutExpired:
        raise AssertionError(f"process {number} runs after {limit} s: {self.said(number)}") from None
    return [Ended(process.returncode, *self.said(number)) for number, process in enumerate(self.running)]

  def wait_until(self, happened, limit):
    """Wait for something that the processes do; they may not end before."""
    deadline = time.monotonic() + limit
    while not happened():
      for number, process in enumerate(self.running):
        assert process.poll() is None, (number, self.said(number))
      assert time.monotonic() < deadline, f"nothing after {limit} s: {self.said(0)}"
      time.sleep(0.02)

  def send(self, number, what=signal.SIGKILL):
    self.running[number].send_signal(what)


def run(commands, devices=1, limit=240, **variables):
  """Start, wait, give the Ended of each."""
  with Processes(commands, devices, **variables) as processes:
    return processes.wait(limit)
