"""Who has come to a run's start: process 0 calls the roll before jax's service takes the port.

jax itself says who is missing, or that two processes have one number, with stack traces or not at all. Each process
connects, says its number and how many it expects, and holds the line until process 0 answers: all are there, or what
is wrong, in the same words to everybody.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time

from distillspec_jax.parallel.cluster import Cluster
from distillspec_jax.types import ConfigError

_MOST = 4096  # bytes of one word on the line
_GREETING = "distillspec"
_GRACE = 5.0  # seconds that the others wait longer than process 0, so that it is heard first


def attend(cluster: Cluster, limit: float) -> None:
  """Wait until all processes of a run have come.

  Args:
    cluster: the run, as this process sees it.
    limit: seconds.

  Raises:
    ConfigError: one does not come in time, two have one number, or they expect different numbers of processes: the same
      words on all that have come. On process 0 also a port that is taken, on the others a coordinator out of reach.
  """
  if cluster.process_id:
    _answer(cluster, limit)
  else:
    _Roll(cluster).call(limit)


class _Roll:
  """Process 0's side: who is on the line."""

  def __init__(self, cluster: Cluster):
    self._cluster = cluster
    self._came: dict[int, tuple[str, socket.socket]] = {}  # process -> its machine and its line
    self._greeted: list[socket.socket] = []  # who is to hear how it ends
    self._lines = selectors.DefaultSelector()

  def call(self, limit: float) -> None:
    """Listen until all are there; tell them so, or what is wrong."""
    with contextlib.ExitStack() as open_lines:
      open_lines.callback(self._lines.close)
      door = open_lines.enter_context(_listening(self._cluster))
      self._lines.register(door, selectors.EVENT_READ)
      try:
        self._listen(door, time.monotonic() + limit, open_lines)
        wrong = self._missing(limit)
      except ConfigError as error:
        wrong = str(error)
      for line in self._greeted:
        _say(line, {"wrong": wrong})
    if wrong:
      raise ConfigError(wrong)

  def _listen(self, door: socket.socket, deadline: float, open_lines: contextlib.ExitStack) -> None:
    while (left := deadline - time.monotonic()) > 0:
      complete = len(self._came) == self._cluster.num_processes - 1
      ready = self._lines.select(0 if complete else left)
      if complete and not ready:  # and nobody has hung up meanwhile
        return
      for key, _ in ready:
        if key.fileobj is door:
          line = open_lines.enter_context(door.accept()[0])
          line.settimeout(_GRACE)
          self._lines.register(line, selectors.EVENT_READ)
        else:
          self._hear(key.fileobj)

  def _hear(self, line: socket.socket) -> None:
    """Take a process's word; one that hangs up has not come, and who says something else is somebody else."""
    word = _heard(line)
    if word is None:
      self._lines.unregister(line)
      self._came = {index: who for index, who in self._came.items() if who[1] is not line}
    elif word.get("greeting") == _GREETING:
      self._write_down(word["process"], word["of"], word["machine"], line)

  def _write_down(self, index: int, count: int, machine: str, line: socket.socket) -> None:
    self._greeted.append(line)
    wanted = self._cluster.num_processes
    known = {0: socket.gethostname(), **{other: name for other, (name, _) in self._came.items()}}
    if count != wanted:
      raise ConfigError(f"process {index} ({machine}) has --num_processes={count}, process 0 ({known[0]}) {wanted}")
    if index in known:
      raise ConfigError(
        f"two processes have --process_id={index}, on {known[index]} and on {machine}: number them 0 to {wanted - 1}"
      )
    self._came[index] = (machine, line)

  def _missing(self, limit: float) -> str:
    missing = [str(index) for index in range(1, self._cluster.num_processes) if index not in self._came]
    if not missing:
      return ""
    names = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing)}"
    return (
      f"{names} of {self._cluster.num_processes} did not come to {self._cluster.coordinator} within {limit:.0f} s: are all"
      " started, with the same --coordinator and --num_processes?"
    )


def _answer(cluster: Cluster, limit: float) -> None:
  """Call process 0 until it takes the line and says how it stands."""
  deadline, why = time.monotonic() + limit, "no answer"
  word = dict(greeting=_GREETING, process=cluster.process_id, of=cluster.num_processes, machine=socket.gethostname())
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((cluster.host, cluster.port), timeout=min(5.0, left)) as line:
        _say(line, word)
        line.settimeout(max(0.1, deadline - time.monotonic()) + _GRACE)
        answer = _heard(line)
      if answer is not None and "wrong" in answer:
        if answer["wrong"]:
          raise ConfigError(answer["wrong"])
        return
      why = "it hung up"
    except OSError as error:
      why = error.strerror or str(error)
    time.sleep(min(0.5, limit / 10))
  raise ConfigError(
    f"process {cluster.process_id} ({socket.gethostname()}) cannot reach the coordinator {cluster.coordinator} within"
    f" {limit:.0f} s ({why}): is process 0 running there, and the port open?"
  )


def _listening(cluster: Cluster) -> socket.socket:
  try:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", cluster.port), family=family, dualstack_ipv6=dual, backlog=1024)
  except OSError as error:
    raise ConfigError(
      f"process 0 cannot listen on port {cluster.port} ({error.strerror or error}): give another --coordinator port on"
      " every host"
    ) from error


def _say(line: socket.socket, word: dict) -> None:
  with contextlib.suppress(OSError):  # who has gone meanwhile finds out by itself
    line.sendall(json.dumps(word).encode() + b"\n")


def _heard(line: socket.socket) -> dict | None:
  """Read one line of JSON; None where the other has hung up, {} where it is no such line."""
  with line.makefile("rb") as words:
    try:
      text = words.readline(_MOST)
    except TimeoutError:
      return {}
    except OSError:
      return None
  if not text:
    return None
  try:
    word = json.loads(text)
  except ValueError:
    return {}
  return word if isinstance(word, dict) else {}
