"""Machines by name; a TPU's own compiler where it is installed."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distillspec_jax.parallel.mesh import MeshConfig
from distillspec_jax.planning import topologies
from distillspec_jax.planning.work import Message, work_of
from distillspec_jax.types import ConfigError


@pytest.mark.parametrize(
  ("name", "devices", "kind", "slice_"),
  [
    ("v5e-64", 64, "TPU v5 lite", "v5e:8x8"),
    ("v5e-1", 1, "TPU v5 lite", "v5e:1x1"),
    ("v6e-8", 8, "TPU v6 lite", "v6e:2x4"),
    ("v4-128", 64, "TPU v4", "v4:4x4x4"),  # 128 cores, two a chip
    ("v5p-8", 4, "TPU v5", "v5p:2x2x1"),
    ("8xh200", 8, "H200", None),
    ("4xh100-pcie", 4, "H100 PCIe", None),
    ("1xa100-80g", 1, "A100", None),
    ("cpu-8", 8, "cpu", None),
  ],
)
def test_names(name, devices, kind, slice_):
  found = topologies.named(name)
  assert (found.name, found.devices, found.chip.kind, found.slice) == (name, devices, kind, slice_)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5e64", "unknown topology 'v5e64'; did you mean v5e-64.* There are v5e-N and v6e-N .*8xh200.*cpu-8"),
    ("h200", "unknown topology 'h200'; did you mean 8xh200"),
    ("8xb300", "unknown topology"),
    ("v5e-7", "there is no v5e-7: v5e slices are v5e-1, v5e-4, v5e-8, v5e-16"),
    ("v4-4", "there is no v4-4: v4 slices are v4-8, v4-16"),
    ("16xh200", "a box has 1 to 8 GPUs"),
    ("cpu-0", "unknown topology 'cpu-0'"),
    ("cpu-2049", "there is no cpu-2049: cpu-N has 1 to 2048 virtual devices"),
    ("cpu-100000000", "there is no cpu-100000000: cpu-N has 1 to 2048"),
    pytest.param("cpu-1" + 5000 * "0", "there is no cpu-10000", id="more digits than Python reads"),
    ("cpu-\u0663", "unknown topology"),  # a digit, though not of ours
    ("v5e-064", "unknown topology 'v5e-064'; did you mean v5e-64"),
    (" V5E-64", "did you mean v5e-64"),
    ("8xH200", "did you mean 8xh200"),
    ("", "unknown topology ''"),
  ],
)
def test_what_there_is_not(name, message):
  with pytest.raises(ConfigError, match=message):
    topologies.named(name)


def test_another_memory():
  assert topologies.named("v5e-64").with_memory(2).chip.memory == 2 * 2**30
  assert topologies.named("v5p-8").with_memory(95.73) == topologies.named("v5p-8")
  assert topologies.named("8xh200").with_memory(1000).chip.memory == 1000 * 2**30


@pytest.mark.parametrize("gib", [0, -1, 1e-12, 1e305, float("inf"), float("nan")])
def test_a_memory_that_no_device_has(gib):
  with pytest.raises(ConfigError, match=re.escape(f"--memory_gib={gib:g}: a device's memory must be above 0 GiB")):
    topologies.named("cpu-8").with_memory(gib)


def test_a_tpus_compiler_knows_its_memory():
  with pytest.raises(ConfigError, match="--memory_gib=16: programs have at most 15.75 GiB of a device of v5e-64"):
    topologies.named("v5e-64").with_memory(16)


@pytest.mark.parametrize("exact", [False, True])
def test_a_topology_is_one_slice(exact):
  stand = topologies.Stand(jax.devices("cpu")[:4], exact)
  mesh = lambda dcn: topologies.make_mesh(MeshConfig(-1, 1, 2, dcn=dcn), stand)
  assert dict(mesh((1, 1, 1)).shape) == dict(mesh(None).shape) == {"data": 2, "fsdp": 1, "model": 2}
  with pytest.raises(ConfigError, match=r"dcn=\(3, 1, 1\) does not divide data, fsdp, model = \(2, 1, 2\)"):
    mesh((3, 1, 1))
  with pytest.raises(ConfigError, match=r"dcn = \(2, 1, 1\) asks for 2 slices, and a topology is one.*plan one slice"):
    mesh((2, 1, 1))


def test_without_the_compiler_a_tpu_is_estimated(monkeypatch):
  monkeypatch.setattr(topologies, "has_tpu_compiler", lambda: False)
  stand = topologies.stand_for(topologies.named("v4-16"))
  assert not stand.exact and len(stand.devices) == 8


def test_virtual_devices():
  stand = topologies.stand_for(topologies.named("4xh200"))
  assert not stand.exact and len(stand.devices) == 4
  assert dict(topologies.make_mesh(MeshConfig(-1, 1, 2), stand).shape) == {"data": 2, "fsdp": 1, "model": 2}
  with pytest.raises(ConfigError, match="does not divide 4 device"):
    topologies.make_mesh(MeshConfig(1, 1, 3), stand)
  with pytest.raises(ConfigError, match="1024 virtual devices are wanted .* plan in a process of its own"):
    topologies.stand_for(topologies.named("cpu-1024"))


@pytest.mark.skipif(not topologies.has_tpu_compiler(), reason="libtpu is not installed: pip install libtpu")
@pytest.mark.parametrize("name", ["v5e-4", "v4-8"])
def test_a_tpus_own_compiler(name):
  """A split product: a quarter of the operations, one all-reduce of the result, a memory that is refused."""
  stand = topologies.stand_for(topologies.named(name))
  assert stand.exact and len(stand.devices) == 4
  mesh = topologies.make_mesh(MeshConfig(1, 1, 4), stand)
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  run = jax.jit(lambda x, w: x @ w, in_shardings=(place(None, "model"), place("model")), out_shardings=place())
  shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 1024), (1024, 512))]
  work = work_of(run.lower(*shapes).compile().as_text(), rounds=1)
  assert work.flops == 2 * 256 * 1024 * 512 / 4
  assert work.messages == {Message("all-reduce", 4, 2 * 256 * 512): 1}
  large = jax.ShapeDtypeStruct((400_000, 400_000), jnp.bfloat16)
  with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
    run.lower(large, large).compile()
