"""Each process watches the others, so that none waits forever for one that is gone.

jax notices a dead process too, but ends the others with a stack trace; this is sooner and says whose fault it was.
Beats and last words go through the key-value store of jax's coordination service, which process 0 holds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

EXIT_LOST = 3  # another process of the run is gone

_BEATS = "distillspec/beat/"
_LAST_WORDS = "distillspec/last/"
AGAIN = "Start all processes again: the run goes on from its last checkpoint"
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Watch:
  """Tells the others that this process lives, and ends it with one line when another does not."""

  def __init__(self, client, process_id: int, num_processes: int, silence: float, name_of: Callable[[int], str]):
    """Take what is needed; nothing happens before `begin`.

    Args:
      client: jax's client of the coordination service.
      process_id, num_processes: this process and how many there are.
      silence: seconds without a beat after which a process counts as gone.
      name_of: process number -> what to call it.
    """
    self._client, self._me, self._silence, self._name_of = client, process_id, silence, name_of
    self.period = min(5.0, max(0.2, silence / 8))
    self._heard = {other: (None, 0.0) for other in range(num_processes) if other != process_id}
    self._over, self._leaving = threading.Event(), threading.Event()
    self._count = 0
    self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
    self._abort_handler = _Handler(self._aborted)  # kept alive as long as this

  def begin(self) -> None:
    """Start beating and listening."""
    now = time.monotonic()
    self._heard = {other: (None, now) for other in self._heard}
    self._thread.start()
    _on_abort(self._abort_handler)

  def end(self) -> None:
    """Stop: the run is over, or its processes leave together."""
    self._over.set()
    self._thread.join(2 * self.period + 5)
    _on_abort(None)

  def leave(self, words: str, code: int) -> None:
    """End this process now; the others hear `words`. Does not return."""
    self._leaving.set()
    self._say_last(words)
    _leave(code)

  def wait_for_culprit(self) -> None:
    """Give the watch the time it needs to find who is gone; returns where nobody is."""
    time.sleep(self._silence + 3 * self.period)

  def _run(self) -> None:
    while not self._over.wait(self.period):
      try:
        self._count += 1
        self._client.key_value_set(f"{_BEATS}{self._me}", str(self._count), True)
        beats = dict(self._client.key_value_dir_get(_BEATS))
        words = dict(self._client.key_value_dir_get(_LAST_WORDS))
      except Exception:  # process 0 is gone: jax is about to end this process
        continue
      if not self._leaving.is_set() and not self._over.is_set():
        self._judge(beats, words)

  def _judge(self, beats: dict[str, str], words: dict[str, str]) -> None:
    now = time.monotonic()
    for other, (beat, when) in self._heard.items():
      found = beats.get(f"{_BEATS}{other}")
      if said := words.get(f"{_LAST_WORDS}{other}"):
        self._follow(f"{self._name_of(other)} stopped: {said}")
      elif found != beat:
        self._heard[other] = (found, now)
      elif now - when > self._silence:
        self._follow(
          f"{self._name_of(other)} has not answered for {now - when:.0f} s: it was killed or lost its network. {AGAIN}"
        )

  def _follow(self, why: str) -> None:
    """End this process because of another; where all fail for one reason, this one's own words come first."""
    if self._leaving.wait(2 * self.period):
      return
    self._leaving.set()
    _print(f"error: {self._name_of(self._me)}: {why}")
    self._say_last(why)
    _leave(EXIT_LOST)

  def _say_last(self, words: str) -> None:
    try:
      self._client.key_value_set(f"{_LAST_WORDS}{self._me}", words or "an error", True)
      if self._me == 0:
        time.sleep(4 * self.period)  # the store goes with this process: let the others read
    except Exception:
      pass  # there is nobody left to tell

  def _aborted(self, number: int) -> None:
    """Say in one line what jax says in forty, when its service ends this process."""
    del number
    if not self._leaving.is_set():
      _print(
        f"error: {self._name_of(self._me)}: lost {self._name_of(0)}, where all processes meet (or jax found another one"
        f" dead, see above). {AGAIN}"
      )
    _leave(EXIT_LOST)


def _on_abort(handler) -> None:
  """Have `handler` called where native code gives up (SIGABRT): Python's own handlers would never get their turn."""
  install = ctypes.CDLL(None).signal
  install.argtypes, install.restype = [ctypes.c_int, _Handler if handler else ctypes.c_void_p], ctypes.c_void_p
  install(int(signal.SIGABRT), handler)


def _print(line: str) -> None:
  os.write(2, f"{line}\n".encode())  # no locks, no buffers: other threads may be anywhere


def _leave(code: int) -> None:
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (OSError, RuntimeError, ValueError):
      pass
  os._exit(code)
