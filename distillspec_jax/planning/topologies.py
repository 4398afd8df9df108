"""Machines by name, and devices that stand in for theirs: a TPU compiler's own, or virtual CPU devices."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import math
import os
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, SingleDeviceSharding

from distillspec_jax.parallel import mesh as meshes
from distillspec_jax.planning.chips import CHIPS, GIB, Chip
from distillspec_jax.types import ConfigError

_TPU = re.compile(r"(v4|v5e|v5p|v6e)-([1-9]\d{0,8})", re.ASCII)
_MANY = re.compile(r"(\d{1,9})x(h200|h100|h100-pcie|a100-80g)", re.ASCII)
_CPU = re.compile(r"cpu-([1-9]\d*)", re.ASCII)
_CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}  # what the number in a slice's name counts, a chip
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
    512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16),
}  # fmt: skip
# libtpu asks the cloud's metadata server which TPU this is and warns where there is no answer; and only one process may
# load it, which is for programs that run.
_WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_MOST_GIB = 1 << 20
_MOST_VIRTUAL = 2048  # as many as the largest slice has; more take long to make
_HOST = 8  # GPUs of one box; more of them talk over a slower network

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some devices of one kind, all joined by their fast links.

  Attributes:
    name: what the user calls it.
    devices: how many; of TPUs one a chip.
    chip: what each can do.
    slice: a TPU slice as its compiler names it ("v5e:8x8"); None for what is not a TPU.
  """

  name: str
  devices: int
  chip: Chip
  slice: str | None = None

  def with_memory(self, gib: float) -> Topology:
    """Give the same with another memory a device.

    Raises:
      ConfigError: less than a byte, more than any device has, or more than a TPU has, whose compiler knows it.
    """
    if not 1 / GIB <= gib <= _MOST_GIB:
      raise ConfigError(f"--memory_gib={gib:g}: a device's memory must be above 0 GiB, and at most {_MOST_GIB:,}")
    memory = int(gib * GIB)
    if self.slice and memory > self.chip.memory:
      most = f"{self.chip.memory / GIB:.2f}"
      raise ConfigError(f"--memory_gib={gib:g}: programs have at most {most} GiB of a device of {self.name}")
    return dataclasses.replace(self, chip=dataclasses.replace(self.chip, memory=memory))


@dataclasses.dataclass(frozen=True)
class Stand:
  """Devices to compile for.

  Attributes:
    devices: as many as the topology has.
    exact: whether the machine's own compiler stands behind them; else the figures are estimates.
  """

  devices: Sequence[jax.Device]
  exact: bool


def named(name: str) -> Topology:
  """Find a topology.

  Args:
    name: v5e-N, v6e-N (N chips), v4-N, v5p-N (N cores, two a chip), Nxh200, Nxh100, Nxh100-pcie, Nxa100-80g or cpu-N.

  Raises:
    ConfigError: an unknown name, or a size that there is not.
  """
  if match := _TPU.fullmatch(name):
    kind, number = match[1], int(match[2])
    shapes = {chips * _CORES[kind]: shape for chips, shape in (_FLAT if _CORES[kind] == 1 else _CUBES).items()}
    if number not in shapes:
      raise ConfigError(f"there is no {name}: {kind} slices are {', '.join(f'{kind}-{size}' for size in shapes)}")
    shape = "x".join(map(str, shapes[number]))
    return Topology(name, number // _CORES[kind], CHIPS[kind], f"{kind}:{shape}")
  match = _MANY.fullmatch(name)
  if match and 1 <= int(match[1]) <= _HOST:
    return Topology(name, int(match[1]), CHIPS[match[2]])
  if match:
    raise ConfigError(f"{name}: a box has 1 to {_HOST} GPUs; the network between boxes is not planned for")
  if match := _CPU.fullmatch(name):
    if len(match[1]) > 9 or int(match[1]) > _MOST_VIRTUAL:
      raise ConfigError(f"there is no {name[:20]}: cpu-N has 1 to {_MOST_VIRTUAL} virtual devices")
    return Topology(name, int(match[1]), CHIPS["cpu"])
  possible = ["v5e-64", "v6e-64", "v4-128", "v5p-128", "8xh200", "8xh100", "8xh100-pcie", "8xa100-80g", "cpu-8"]
  near = difflib.get_close_matches(name.strip().lower(), possible, n=1)
  meant = f"; did you mean {near[0]}?" if near else ""
  raise ConfigError(
      f"unknown topology {name!r}{meant} There are v5e-N and v6e-N (N chips), v4-N and v5p-N (N cores, two a chip),"
      f" Nxh200, Nxh100, Nxh100-pcie, Nxa100-80g (N up to {_HOST}) and cpu-N (N up to"
      f" {_MOST_VIRTUAL}), for example {', '.join(possible)}"
  )


def has_tpu_compiler() -> bool:
  """Whether libtpu is installed, which compiles for TPUs on any machine."""
  return importlib.util.find_spec("libtpu") is not None


def stand_for(topology: Topology) -> Stand:
  """Give devices to compile for; the first call in a process makes the virtual ones.

  Raises:
    ConfigError: jax runs already with fewer virtual devices.
  """
  if topology.slice and has_tpu_compiler():
    return Stand(_tpu_devices(topology.slice), exact=True)
  return Stand(_virtual_devices(topology.devices), exact=False)


def mesh_shape(config: meshes.MeshConfig, devices: int) -> tuple[int, int, int]:
  """Give the mesh's axes on so many devices of one slice, which a topology is.

  Raises:
    ConfigError: the axes do not divide the devices, or `dcn` lays them over several slices.
  """
  shape = config.shape(devices)
  dcn = config.over_slices(shape, 1)
  if math.prod(dcn) > 1:
    raise ConfigError(
        f"MeshConfig.dcn = {dcn} asks for {math.prod(dcn)} slices, and a topology is one; the network between slices is"
        " not planned for: plan one slice, with MeshConfig.dcn = None and its share of the axes and of the batch"
    )
  return shape


def make_mesh(config: meshes.MeshConfig, stand: Stand) -> Mesh:
  """Lay the devices out as a run on them would.

  Raises:
    ConfigError: what `mesh_shape` says.
  """
  shape = mesh_shape(config, len(stand.devices))
  if stand.exact:
    auto = (jax.sharding.AxisType.Auto,) * len(meshes.AXES)
    # 8 neighbours in a torus of 4 x 4 x 4 are an axis and half of another.
    laid_out = mesh_utils.create_device_mesh(shape, stand.devices, allow_split_physical_axes=True)
    return Mesh(laid_out, meshes.AXES, axis_types=auto)
  return meshes.make_mesh(config, np.asarray(stand.devices).ravel().tolist())


def _tpu_devices(name: str) -> Sequence[jax.Device]:
  for variable, value in _WITHOUT_A_TPU.items():
    os.environ.setdefault(variable, value)
  # The two cores of its chips are one device.
  options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)} if name.startswith("v4") else {}
  # libtpu reads XLA_FLAGS once, when it first compiles, and ends the process at a flag that is for CPUs or GPUs.
  given = os.environ.pop("XLA_FLAGS", None)
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    nothing = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(devices[0]))
    jax.jit(jnp.negative).lower(nothing).compile()
  finally:
    if given is not None:
      os.environ["XLA_FLAGS"] = given
  return devices


def _virtual_devices(number: int) -> Sequence[jax.Device]:
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    try:
      jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
      log.debug("jax runs already: taking the devices it has")
  devices = jax.devices("cpu")
  if len(devices) < number:
    raise ConfigError(
        f"{number} virtual devices are wanted and jax runs already with {len(devices)}, or XLA_FLAGS says so many: plan"
        " in a process of its own, without xla_force_host_platform_device_count"
    )
  return devices[:number]
