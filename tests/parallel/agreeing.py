"""One process of a few, which agree, wait, fail or are killed as --scenario says. No arrays, so nothing is compiled."""

import json
import os
import signal
import sys
import time

from absl import flags

from distillspec_jax import cli
from distillspec_jax.parallel import multihost
from distillspec_jax.parallel.preemption import Notice, Preempted
from distillspec_jax.types import ConfigError

_SCENARIO = flags.DEFINE_string("scenario", None, "What happens.")
cli.define_process_flags()


def agree(index):
  found = [
    multihost.exchange("texts", ["", "ü\n2"][index]),
    multihost.exchange("texts", "again"),
    multihost.from_first("a value", lambda: {"from": index}),
    [multihost.several(), multihost.is_first()],
  ]
  multihost.require_same("the weather", "rain")
  multihost.barrier("done")
  multihost.barrier("done")
  print(json.dumps(found))
  multihost.say("once")


def refuse(index):
  def make():
    raise ConfigError(f"made on {index}")

  multihost.from_first("a value", make)


def differ(index):
  cli.require_same_run(f"BATCH_SIZE = 8\nSEED = {index}\nTASK = 'x'")


def late(index):
  if index == 1:
    time.sleep(60)
  multihost.barrier("lunch", 2)


def killed(index):
  if index == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  multihost.barrier("lunch", 100)


def coordinator_killed(index):
  if index == 0:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
  multihost.barrier("lunch", 100)


def broken(index):
  if index == 1:
    raise OSError("no space left")
  multihost.barrier("lunch", 100)


def preempted(index):
  del index
  with Notice() as notice:
    for step in range(10_000):
      if notice.reached():
        print(step)
        raise Preempted("told to stop: saved")
      if step == 3:
        print("ready", flush=True)
      time.sleep(0.01)


def waiting(index):
  print("ready", flush=True)
  multihost.barrier(["lunch", "supper"][index], 100)


def main(argv):
  del argv
  cli.join(takes_notice=_SCENARIO.value == "preempted")
  globals()[_SCENARIO.value](flags.FLAGS.process_id)
  sys.stdout.flush()


if __name__ == "__main__":
  cli.run(main)
