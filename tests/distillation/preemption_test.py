"""A run that is told to stop, at whatever moment, saves and leaves; the same call again ends bit for bit as without."""

import json
import os
import signal
import threading

import numpy as np
import pytest
import small_run
from small_run import Batches, run, same

from distillspec_jax.distillation import best
from distillspec_jax.parallel.preemption import Notice, Preempted
from distillspec_jax.weights import checkpoints

MOMENTS = 20
TIMED = ("tokens_per_second", "steps_per_second", "data_wait_seconds", "cost/seconds")
SHAPE = dict(steps=6, checkpoint_every=4, eval_every=3, log_every=2)


class Moments:
  """Notes what happens in a run, in whatever thread, and sends SIGTERM to this process at the chosen (name, number)."""

  def __init__(self, chosen=None):
    self.chosen, self.seen = chosen, []

  def __call__(self, name):
    moment = (name, sum(seen == name for seen, _ in self.seen))
    self.seen.append(moment)
    if moment == self.chosen:
      os.kill(os.getpid(), signal.SIGTERM)

  def around(self, name, function):
    def called(*args, **kwargs):
      self(f"before {name}")
      try:
        return function(*args, **kwargs)
      finally:
        self(f"after {name}")

    return called


def observed(moments, monkeypatch):
  """Make a data iterator, a validation, checkpoints and a log that report their moments."""

  class Data(Batches):
    def __next__(self):
      moments("data")
      return super().__next__()

  class Saves(checkpoints.RunCheckpoints):
    def save(self, *args, **kwargs):
      return moments.around("save", super().save)(*args, **kwargs)

    def _finish(self, step):
      return moments.around("writing", super()._finish)(step)

  held = small_run.held_out_outputs()
  monkeypatch.setattr(held, "measure", moments.around("validation", type(held).measure.__get__(held)))
  tx, step = small_run.compiled("distillspec", small_run.OptimizerConfig(learning_rate=0.05))
  monkeypatch.setattr(small_run, "compiled", lambda *_, **__: (tx, moments.around("step", step)))
  return dict(batches=Data, saves=Saves)


def go(directory, written, moments, monkeypatch, **config):
  """Train once, under notice; the final state, or None where it was told to stop."""
  with monkeypatch.context() as patches, Notice() as notice:
    parts = observed(moments, patches)
    try:
      return run(directory, notice=notice, written=written, **parts, **(SHAPE | config))
    except Preempted as stopped:
      assert "told to stop" in str(stopped)
      return None


def lines(written):
  """What was logged, once each, without times."""
  found = []
  for step, scalars in written:
    line = [step, {name: value for name, value in scalars.items() if name not in TIMED}]
    if line not in found:
      found.append(line)
  return sorted(found, key=lambda line: (line[0], "loss" not in line[1]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run: its directory, state, log and moments."""
  directory, written, moments = tmp_path_factory.mktemp("whole"), [], Moments()
  with pytest.MonkeyPatch.context() as monkeypatch:
    state = go(directory, written, moments, monkeypatch)
  return directory, state, lines(written), moments.seen


def twenty(seen):
  """One moment of each kind, and random others."""
  rng, kinds = np.random.default_rng(0), {}
  for moment in rng.permutation(len(seen)):
    kinds.setdefault(seen[moment][0], seen[moment])
  others = [moment for moment in seen if moment not in kinds.values()]
  return [*kinds.values(), *(others[i] for i in rng.choice(len(others), MOMENTS - len(kinds), replace=False))]


def test_any_of_twenty_random_moments(whole, tmp_path, monkeypatch):
  directory, state, log, seen = whole
  stopped = 0
  for number, moment in enumerate(twenty(seen)):
    folder, written = tmp_path / str(number), []
    found = go(folder, written, Moments(moment), monkeypatch)
    if found is None:
      stopped += 1
      found = go(folder, written, Moments(), monkeypatch)
    assert same(found, state), moment
    assert lines(written) == log, moment
    records = [json.loads((where / "best" / best.RECORD).read_text()) for where in (directory, folder)]
    assert records[0] == records[1]
  assert stopped > MOMENTS // 2


def test_a_wrong_place_in_the_data_is_seen(whole, tmp_path, monkeypatch):
  """The negative control of the comparison above."""
  assert go(tmp_path, [], Moments(("data", 1)), monkeypatch) is None

  class Misplaced(Batches):
    def __init__(self, place=None):
      super().__init__({"number": place["number"] + 1})

  assert not same(run(tmp_path, batches=Misplaced, **SHAPE), whole[1])


def test_a_validation_that_was_due_is_made_up_for_and_may_end_the_run(tmp_path):
  """Told to stop right before the validation that would have stopped the run early."""
  early = dict(stop_after=1, eval_every=2, steps=30, best_by="validation_loss")
  slow = small_run.OptimizerConfig(learning_rate=1e-9)  # nothing gets better
  expected = run(tmp_path / "whole", optimizer=slow, **(SHAPE | early))
  ended = int(expected.step)
  assert ended < 30 and ended % 2 == 0

  class Told:
    """Told to stop at the step after which the validation is due."""

    asked = 0

    def reached(self):
      Told.asked += 1
      return Told.asked == ended + 1  # once before the first step

  with pytest.raises(Preempted, match=f"step {ended} of 30 is saved"):
    run(tmp_path / "told", optimizer=slow, notice=Told(), **(SHAPE | early))
  written = []
  found = run(tmp_path / "told", optimizer=slow, written=written, **(SHAPE | early))
  assert same(found, expected) and written[0][0] == ended and "validation_loss" in written[0][1]


def test_a_notice_before_the_first_step_saves_nothing(tmp_path):
  class Told:
    def reached(self):
      return True

  with pytest.raises(Preempted, match="told to stop before the first step"):
    run(tmp_path, notice=Told(), **SHAPE)
  assert checkpoints.RunCheckpoints(tmp_path).steps() == []


def test_outside_a_notice_and_outside_the_main_thread_sigterm_is_what_it_was():
  before = signal.getsignal(signal.SIGTERM)
  with Notice() as notice:
    assert signal.getsignal(signal.SIGTERM) is not before and not notice.reached()
    signal.raise_signal(signal.SIGTERM)
    assert notice.reached() and notice.reached()
  assert signal.getsignal(signal.SIGTERM) is before

  def elsewhere():
    with Notice() as quiet:
      found.append((signal.getsignal(signal.SIGTERM) is before, quiet.reached()))

  found = []
  thread = threading.Thread(target=elsewhere)
  thread.start()
  thread.join()
  assert found == [(True, False)]
