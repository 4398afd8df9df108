"""Notice that a machine is about to be taken away, so that a run can save and leave.

The notice is SIGTERM: Slurm, Kubernetes and the clouds send it before they take a machine, at maintenance as well. One
process listens itself. Several have jax's pre-emption service, which spreads one host's notice and makes all of them
stop at the same step.
"""

from __future__ import annotations

import itertools
import signal
import threading

_asked = itertools.count(1)  # of this process's life: the service agrees on a count that all hosts have yet to reach


class Preempted(Exception):
  """The run was told to stop before its end; what it had done is saved, and the same command goes on from there."""


class Notice:
  """Whether the run was told to stop; a context, inside which SIGTERM is a notice and no death."""

  def __init__(self):
    """Listen to nothing yet."""
    self._given = self._listens = self._several = False
    self._before = None

  def __enter__(self) -> Notice:
    """Begin to listen; outside the main thread, where Python allows no handlers, SIGTERM stays what it was."""
    from distillspec_jax.parallel import multihost  # noqa: PLC0415  (brings jax)

    self._several = multihost.several()
    if not self._several and threading.current_thread() is threading.main_thread():
      self._before, self._listens = signal.signal(signal.SIGTERM, self._take), True
    return self

  def __exit__(self, *_) -> None:
    if self._listens:
      signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
      self._listens = False

  def reached(self) -> bool:
    """Say whether to stop now; with several processes all must ask equally often, and all get the same answer."""
    if self._several:
      from jax.experimental import multihost_utils  # noqa: PLC0415

      return multihost_utils.reached_preemption_sync_point(next(_asked))
    return self._given

  def _take(self, number, frame) -> None:
    del number, frame
    self._given = True
