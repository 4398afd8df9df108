"""Who belongs to a run: flags, and what Slurm and Kubernetes leave in the environment."""

import pytest

from distillspec_jax.parallel import cluster
from distillspec_jax.parallel.cluster import Cluster
from distillspec_jax.types import ConfigError

SLURM = {
  "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9",
  "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
  """An environment that says nothing."""
  for name in (*SLURM, "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_PORT"):
    monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)


def test_nothing_said_is_alone():
  assert cluster.given(None, None, None) is None and cluster.detected() is None
  assert cluster.given("", None, None) is None


def test_flags():
  found = cluster.given("10.0.0.2:8476", 4, 3)
  assert (found.host, found.port, found.num_processes, found.process_id) == ("10.0.0.2", 8476, 4, 3)
  assert cluster.given("[::1]:99", 2, 0).host == "::1"
  assert cluster.given(None, 1, None).num_processes == 1


@pytest.mark.parametrize(
  "flags, message",
  [
    (("a:1", None, None), "--coordinator=a:1 without --num_processes and --process_id: give all three"),
    ((None, 2, 0), "without --coordinator"),
    ((None, None, 0), "without --coordinator and --num_processes"),
    (("a", 2, 0), "--coordinator=a is no address"),
    (("a:0", 2, 0), "--coordinator=a:0 is no address"),
    (("a:70000", 2, 0), "is no address"),
    (("a:1", 2, 2), "--process_id=2 is not one of 2 processes: they are numbered from 0 to 1"),
    (("a:1", 2, -1), "--process_id=-1"),
    (("a:1", 0, 0), "--num_processes=0"),
  ],
)
def test_wrong_flags_are_one_line(flags, message):
  with pytest.raises(ConfigError) as caught:
    cluster.given(*flags)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_slurm_with_a_process_for_each_accelerator(monkeypatch):
  set_all(monkeypatch, SLURM)
  # jax's rule for the port: the job's number modulo 4096, in the last 4096 ports.
  assert cluster.detected() == Cluster(f"gpu003:{4097 % 4096 + 65536 - 4096}", 16, 9, (1,))


@pytest.mark.parametrize("tasks", ["1", "1(x4)", "1,1(x3)"])
def test_slurm_with_a_process_for_each_node_has_all_its_accelerators(monkeypatch, tasks):
  set_all(monkeypatch, SLURM | {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_TASKS_PER_NODE": tasks})
  found = cluster.detected()
  assert (found.num_processes, found.process_id, found.local_devices) == (4, 2, None)


def test_slurm_with_one_task_is_alone(monkeypatch):
  set_all(monkeypatch, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
  assert cluster.detected() is None


def test_any_pod_is_alone_but_one_of_an_indexed_job_is_not(monkeypatch):
  monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
  assert cluster.detected() is None
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
  with pytest.raises(ConfigError, match="of a Kubernetes job, but the others are unknown.*--coordinator=HOST:PORT"):
    cluster.detected()
