"""Which processes make up a run, and where they meet: by flags, or from what started them (TPU, Slurm, Kubernetes)."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import sys
import threading
import warnings

from distillspec_jax.types import ConfigError

_GIVE = "give --coordinator=HOST:PORT, --num_processes and --process_id, or --num_processes=1 to run alone"


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The processes of a run, as one of them sees them.

  Attributes:
    coordinator: HOST:PORT of process 0, where all meet.
    num_processes: how many there are.
    process_id: this one's number, from 0.
    local_devices: which of this machine's accelerators are this process's; None is all.

  Raises:
    ConfigError: an address that is none, or a number out of range.
  """

  coordinator: str
  num_processes: int
  process_id: int
  local_devices: tuple[int, ...] | None = None

  def __post_init__(self):
    if not re.fullmatch(r".+:\d{1,5}", self.coordinator) or not 0 < self.port < 65536:
      raise ConfigError(f"--coordinator={self.coordinator} is no address: give HOST:PORT, such as 10.0.0.2:8476")
    if self.num_processes < 1:
      raise ConfigError(f"--num_processes={self.num_processes}: there must be at least 1")
    if not 0 <= self.process_id < self.num_processes:
      raise ConfigError(
        f"--process_id={self.process_id} is not one of {self.num_processes} processes: they are numbered from 0 to"
        f" {self.num_processes - 1}"
      )

  @property
  def host(self) -> str:
    """The coordinator's host."""
    return self.coordinator.rpartition(":")[0].strip("[]")

  @property
  def port(self) -> int:
    """The coordinator's port."""
    return int(self.coordinator.rpartition(":")[2])


def given(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Cluster | None:
  """Make a cluster of what the flags say; None is left for `detected` to find out.

  Raises:
    ConfigError: some of the three without the others, or values that cannot be.
  """
  told = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
  missing = [name for name, value in told.items() if value in (None, "")]
  if len(missing) == len(told):
    return None
  if num_processes == 1 and process_id in (None, 0):
    return Cluster(coordinator or "localhost:1", 1, 0)
  if missing:
    present = ", ".join(f"{name}={value}" for name, value in told.items() if name not in missing)
    raise ConfigError(f"{present} without {' and '.join(missing)}: give all three; only --process_id differs by host")
  return Cluster(coordinator, num_processes, process_id)


def detected(limit: float = 60.0) -> Cluster | None:
  """Ask the environment, by jax's own means, which processes belong together; None where this one is alone.

  Args:
    limit: seconds to wait for the coordinator's name to be known.

  Raises:
    ConfigError: this is one process of a job whose others cannot be found.
  """
  runner = _runner()
  if runner is None:
    return None
  from jax._src.clusters import ClusterEnv  # noqa: PLC0415  (what jax.distributed.initialize asks, before it is final)

  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of Kubernetes, that its package is missing: said below
      found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(limit))
  except Exception as error:  # whatever a metadata server or an API answers
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ConfigError(f"this is a process of a {runner} job, but the others are unknown ({why}): {_GIVE}") from error
  coordinator, count, index, local = found
  if None in (coordinator, count, index):
    hint = " (pip install kubernetes lets jax ask)" if runner == "Kubernetes" else ""
    raise ConfigError(f"this is a process of a {runner} job, but the others are unknown{hint}: {_GIVE}")
  if local is not None and runner == "Slurm" and _one_task_a_node():
    local = None  # jax takes one process for one accelerator; alone on its node it may have them all
  return Cluster(coordinator, count, index, None if local is None else tuple(local))


class ends_process_after:  # noqa: N801  used like a function
  """End the process with one line if the block takes longer: jax's connecting ends in a stack trace or not at all."""

  def __init__(self, limit: float, cluster: Cluster):
    self._timer = threading.Timer(limit, self._end)
    self._timer.daemon = True
    self._limit, self._cluster = limit, cluster

  def __enter__(self):
    self._timer.start()

  def __exit__(self, *_):
    self._timer.cancel()

  def _end(self):
    mine = f"process {self._cluster.process_id} ({socket.gethostname()})"
    line = (
      f"error: {mine}: jax's service at {self._cluster.coordinator} did not bring {self._cluster.num_processes} processes"
      f" together within {self._limit:.0f} s\n"
    )
    os.write(2, line.encode())
    sys.stdout.flush()
    os._exit(2)


def _runner() -> str | None:
  """Name what started this process as one of several, as far as can be told without asking anybody."""
  environment = os.environ
  if _on_tpu():
    return "TPU"
  if int(environment.get("SLURM_NTASKS", "1")) > 1 and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(environment):
    return "Slurm"
  if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
    return "Kubernetes"
  return None


def _on_tpu() -> bool:
  import jax  # noqa: PLC0415
  from jax._src import cloud_tpu_init  # noqa: PLC0415  (set when jax is imported on such a machine)

  platforms = jax.config.jax_platforms or ""
  return cloud_tpu_init.running_in_cloud_tpu_vm and (not platforms or "tpu" in platforms)


def _one_task_a_node() -> bool:
  counts = re.sub(r"\(x\d+\)", "", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 1(x4) or 2,1
  return set(counts.split(",")) == {"1"}
