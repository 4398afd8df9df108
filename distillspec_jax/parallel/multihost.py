"""Several processes as one run: starting, agreeing, waiting for each other with a limit.

Everything here is nothing at all in a run of one process. What waits has a limit and, past it, names who did not come.
Text goes through the key-value store of jax's coordination service; arrays never do.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the one place of the service's client; orbax takes it from there too
from jax.sharding import Mesh

from distillspec_jax.parallel import cluster as clusters
from distillspec_jax.parallel import partitioning, roll_call
from distillspec_jax.parallel.watch import AGAIN, Watch
from distillspec_jax.types import ConfigError

_T = TypeVar("_T")
_ROOM = "distillspec/"
_used: collections.Counter[str] = collections.Counter()  # a barrier's name serves once
_hosts: dict[int, str] = {}  # process -> its machine's name
_watch: Watch | None = None


class HostLost(RuntimeError):
  """Another process of the run did not come in time; the message is one line that names it."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """How long to wait, in seconds.

  Attributes:
    start: for all processes to come together.
    barrier: for one another, later on; checking a large checkpoint's bytes is part of it.
    silence: without a sign of life, after which a process counts as gone.
  """

  start: float = 300.0
  barrier: float = 1200.0
  silence: float = 60.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not getattr(self, field.name) > 0:
        raise ConfigError(f"the time limit {field.name} is {getattr(self, field.name)}: give seconds above 0")


_limits = Limits()


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  limits: Limits = Limits(),
  *,
  takes_notice: bool = True,
) -> bool:
  """Join the other processes, if there are any; before jax is asked for devices.

  Args:
    coordinator, num_processes, process_id: as the flags say; all None: the environment is asked, and a process
      that nothing says belongs to others is alone.
    limits: how long to wait.
    takes_notice: whether the run asks `preemption.Notice`; else SIGTERM ends a process, as it does one that is alone.

  Returns:
    Whether there are several processes.

  Raises:
    ConfigError: values that cannot be, a coordinator that cannot be reached, or others that do not come in time.
  """
  global _watch, _limits
  if several():
    return True
  cluster = clusters.given(coordinator, num_processes, process_id) or clusters.detected(limits.start)
  if cluster is None or cluster.num_processes == 1:
    return False
  _limits = limits
  roll_call.attend(cluster, limits.start)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # looked at where the devices are CPUs
  jax.config.update("jax_enable_preemption_service", takes_notice)
  with clusters.ends_process_after(limits.start, cluster):
    jax.distributed.initialize(
      cluster.coordinator,
      cluster.num_processes,
      cluster.process_id,
      local_device_ids=cluster.local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=int(4 * limits.start) + 60,  # it would end in a stack trace: the line above it is sooner
      heartbeat_timeout_seconds=max(10, int(3 * limits.silence)),
      shutdown_timeout_seconds=max(5, int(limits.silence)),
    )
  client = _client()
  client.key_value_set(f"{_ROOM}name/{cluster.process_id}", socket.gethostname(), True)
  _wait(f"{_ROOM}named", limits.start, "after the start")
  _hosts.update({int(key.rpartition("/")[2]): name for key, name in client.key_value_dir_get(f"{_ROOM}name/")})
  _watch = Watch(client, cluster.process_id, cluster.num_processes, limits.silence, _name)
  _watch.begin()
  return True


def stop() -> None:
  """Leave together with the others, at a run's end; nothing for one process.

  Raises:
    HostLost: one of them does not come to the end.
  """
  global _watch
  if _watch is None:
    return
  barrier("the end")
  _watch.end()
  _watch = None
  jax.distributed.shutdown()


def leave(words: str, code: int) -> None:
  """End this process of several now, and tell the others why: they end too. Returns where there is one process."""
  if _watch is not None:
    _watch.leave(words, code)


def blame(error: BaseException) -> None:
  """Where a collective failed, give the watch time to find whose fault it was; it ends the process with that name."""
  if _watch is not None and isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError)):
    _watch.wait_for_culprit()


def several() -> bool:
  """Say whether this process has joined others; asks for no devices."""
  return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


def is_first() -> bool:
  """Say whether this process is the one that writes reports."""
  return not several() or distributed.global_state.process_id == 0


def say(text: object) -> None:
  """Print a line, once for all processes."""
  if is_first():
    print(text, flush=True)


def barrier(name: str, limit: float | None = None) -> None:
  """Wait until every process is here.

  Args:
    name: what is waited for, in words; may serve again.
    limit: seconds; by default `Limits.barrier`.

  Raises:
    HostLost: somebody is not; says who.
  """
  if several():
    _wait(_fresh(name), limit, name)


def exchange(name: str, text: str, limit: float | None = None) -> list[str]:
  """Give every process's text, in the order of their numbers.

  Raises:
    HostLost: one does not come in time.
  """
  if not several():
    return [text]
  key, client = _fresh(name), _client()
  client.key_value_set(f"{key}/{distributed.global_state.process_id}", f"={text}")  # the store takes no empty text
  _wait(f"{key}/all", limit, name)
  return [client.blocking_key_value_get(f"{key}/{index}", _ms(limit))[1:] for index in range(_count())]


def require_same(what: str, text: str, limit: float | None = None) -> None:
  """See that all processes have the same text; only hashes travel unless they differ.

  Args:
    what: names it in the error, such as "the configuration".
    text: any length.
    limit: seconds to wait for one another.

  Raises:
    ConfigError: they do not; the same error on every host names the hosts that differ from process 0, and their first
      differing line.
    HostLost: one does not come in time.
  """
  if not several():
    return
  import hashlib  # noqa: PLC0415

  hashes = exchange(f"{what}, hashed", hashlib.sha256(text.encode()).hexdigest(), limit)
  if len(set(hashes)) == 1:
    return
  reference = from_first(f"{what}, in full", lambda: text, limit)
  told = exchange(f"{what}, compared", json.dumps(_first_difference(reference, text)), limit)
  differing = {index: json.loads(found) for index, found in enumerate(told) if json.loads(found)}
  listed = "; ".join(f"{_name(index)} has {own!r}, process 0 {first!r}" for index, (first, own) in differing.items())
  raise ConfigError(f"the hosts disagree on {what}: {listed}. Start every process with the same files and versions")


def from_first(name: str, make: Callable[[], _T], limit: float | None = None) -> _T:
  """Have process 0 make a value (JSON-able) and give it to all; an error of its making is everybody's.

  Raises:
    ConfigError: what `make` raised on process 0.
    HostLost: process 0 does not come in time.
  """
  if not several():
    return make()
  key, client = _fresh(name), _client()
  if is_first():
    try:
      value = make()
    except ConfigError as error:
      client.key_value_set(key, json.dumps({"error": str(error)}))
      raise
    client.key_value_set(key, json.dumps({"value": value}))
    return value
  try:
    answer = json.loads(client.blocking_key_value_get(key, _ms(limit)))
  except jax.errors.JaxRuntimeError as error:
    found = _lost_first(name, error) or HostLost(f"{_name(0)} did not say {name} within {_seconds(limit):.0f} s")
    raise found from error
  if "error" in answer:
    raise ConfigError(answer["error"])
  return answer["value"]


def fetch(tree: Any) -> Any:
  """Bring arrays to every host as numpy arrays, those too whose parts lie on several."""

  def one(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
      return jax.device_get(leaf)
    from jax.experimental import multihost_utils  # noqa: PLC0415

    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(one, tree)


def settled(tree: _T) -> _T:
  """Give arrays back, computed already where the devices are CPUs of several processes.

  Two programs of which neither needs the other's results may overlap there, in another order on each process, and then
  their collectives wait for each other for ever. Accelerators run programs in order and need no such care.
  """
  return jax.block_until_ready(tree) if several() and jax.default_backend() == "cpu" else tree


@dataclasses.dataclass(frozen=True)
class Share:
  """What of each global batch a process feeds to its devices.

  Attributes:
    rows: [b] int, the global batch's rows, ascending.
    index, count: this share's number among the different ones; processes whose devices hold the same rows (of one
      model axis) have the same.
  """

  rows: np.ndarray
  index: int = 0
  count: int = 1


def share_of(mesh: Mesh | None, rows: int) -> Share:
  """Say which rows of a global batch [rows, ...], split over data and fsdp, this process's devices hold.

  Raises:
    ConfigError: the processes hold shares of different sizes.
  """
  if mesh is None or jax.process_count() == 1:
    return Share(np.arange(rows))
  held: dict[int, set[int]] = collections.defaultdict(set)
  for device, (taken,) in partitioning.batch_sharding(mesh, 1).devices_indices_map((rows,)).items():
    held[device.process_index] |= set(range(*taken.indices(rows)))
  shares = sorted({tuple(sorted(mine)) for mine in held.values()})
  if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != rows:
    raise ConfigError(f"mesh {dict(mesh.shape)} gives the hosts unequal parts of a batch: choose axes that divide them")
  own = tuple(sorted(held[jax.process_index()]))
  return Share(np.array(own), shares.index(own), len(shares))


def _first_difference(reference: str, text: str) -> list[str]:
  """Give the first pair of lines that differ, or []."""
  if reference == text:
    return []
  ours, theirs = text.splitlines(), reference.splitlines()
  length = max(len(ours), len(theirs)) + 1
  for first, own in zip(theirs + [""] * (length - len(theirs)), ours + [""] * (length - len(ours)), strict=True):
    if first != own:
      return [first.strip()[:200], own.strip()[:200]]
  return ["", ""]  # only line ends differ


def _client():
  return distributed.global_state.client


def _count() -> int:
  return distributed.global_state.num_processes


def _seconds(limit: float | None) -> float:
  return _limits.barrier if limit is None else limit


def _ms(limit: float | None) -> int:
  return int(1000 * _seconds(limit))


def _fresh(name: str) -> str:
  _used[name] += 1
  return f"{_ROOM}{name}/{_used[name]}"


def _name(index: int) -> str:
  return f"process {index} ({_hosts[index]})" if index in _hosts else f"process {index}"


def _lost_first(name: str, error: Exception) -> HostLost | None:
  """Make the error of a service that is gone, in place of one of waiting in vain; None where waiting was in vain."""
  if "DEADLINE_EXCEEDED" in str(error):
    return None
  why = (str(error).splitlines() or [""])[0][:200]
  own = _name(distributed.global_state.process_id)
  return HostLost(f"{own}: lost {_name(0)}, where all processes meet, while waiting for {name!r} ({why}). {AGAIN}")


def _wait(key: str, limit: float | None, name: str) -> None:
  try:
    _client().wait_at_barrier(key, _ms(limit))
  except jax.errors.JaxRuntimeError as error:
    if found := _lost_first(name, error):
      raise found from error
    late = re.search(r"timed out task names:\s*((?:\S*\d+\s*)+)", str(error))
    who = [int(re.search(r"(\d+)$", task)[1]) for task in late[1].split()] if late else []
    listed = ", ".join(map(_name, who)) or "another process"
    raise HostLost(f"{listed} did not come to {name!r} within {_seconds(limit):.0f} s: see what it says") from error
