"""The device mesh: (data, fsdp, model), on one slice of fast links or on several that a slower network joins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from distillspec_jax.parallel import partitioning
from distillspec_jax.types import ConfigError

AXES = ("data", "fsdp", "model")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices each axis takes; one of them may be -1, "all that are left".

  Attributes:
    data: replicas of the parameters; the batch is split over them.
    fsdp: shards of the parameters' embedding axis; the batch is split over them as well.
    model: tensor parallelism over heads, mlp width and vocabulary.
    dcn: into how many parts the network between slices cuts data, fsdp and model, of the sizes above. Their product is
      the number of slices. None: data takes as many as it can, then fsdp, then model. Devices that do not say which
      slice they are on (CPUs, for one) are one slice; with `dcn`, equal runs of the list of devices, process after
      process, are the slices.
    target_partitioning: how the target lies on the mesh, one of `partitioning.TABLES`.
    draft_partitioning: the same of the model that is trained, or that drafts. A small draft is best "replicated" where
      its target is split over `model`: it then sends nothing between devices while it drafts.
  """

  data: int = -1
  fsdp: int = 1
  model: int = 1
  dcn: tuple[int, int, int] | None = None
  target_partitioning: str = partitioning.SHARDED
  draft_partitioning: str = partitioning.SHARDED

  def __post_init__(self):
    sizes = (self.data, self.fsdp, self.model)
    if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
      raise ConfigError(
          f"{self}: each axis must be at least 1, and at most one of them -1 (all devices that are left)."
      )
    if self.dcn is not None and (len(self.dcn) != len(AXES) or not all(_is_count(size) for size in self.dcn)):
      raise ConfigError(
          f"{self}: dcn={self.dcn} must be three whole numbers of at least 1, the slices that data, fsdp and model lie"
          " on, such as (2, 1, 1)."
      )
    for name in ("target_partitioning", "draft_partitioning"):
      partitioning.check_table(getattr(self, name), f"MeshConfig.{name}")

  def __str__(self) -> str:
    return f"mesh data={self.data}, fsdp={self.fsdp}, model={self.model}"

  def shape(self, num_devices: int) -> tuple[int, int, int]:
    """Resolve -1 for this many devices.

    Raises:
      ConfigError: the axes do not divide or do not use the devices.
    """
    sizes = [self.data, self.fsdp, self.model]
    fixed = math.prod(size for size in sizes if size != -1)
    if fixed > num_devices:
      raise ConfigError(
          f"{self} needs {fixed} devices and there are {num_devices}: make the axes smaller, or start more devices."
      )
    resolved = [num_devices // fixed if size == -1 else size for size in sizes]
    if math.prod(resolved) != num_devices:
      raise ConfigError(
          f"{self} does not divide {num_devices} device(s): "
          f"the axes' product must be {num_devices} (or leave one axis at -1 and let the others divide it)."
      )
    return tuple(resolved)

  def over_slices(self, shape: Sequence[int], slices: int) -> tuple[int, int, int]:
    """Say into how many parts slices cut each axis of a mesh of this shape.

    Args:
      shape: of the whole mesh.
      slices: as many as there are; 1 also where devices do not say it.

    Raises:
      ConfigError: the axes cannot be cut so.
    """
    dcn = tuple(self.dcn) if self.dcn else _slowest_first(shape, slices)
    if any(size % parts for size, parts in zip(shape, dcn, strict=True)):
      raise ConfigError(
          f"{self}: dcn={dcn} does not divide data, fsdp, model = {tuple(shape)}: each axis must be a multiple of the"
          " slices that it lies on."
      )
    if slices > 1 and math.prod(dcn) != slices:
      asked = f"dcn={self.dcn} asks for {math.prod(dcn)} slices" if self.dcn else "its axes cannot be cut into so many"
      raise ConfigError(f"{self} on {slices} slices: {asked}; choose axes and dcn whose parts are {slices} in all.")
    return dcn


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Lay the devices (default: all of them) out as a (data, fsdp, model) mesh.

  Raises:
    ConfigError: the axes do not divide the devices, or not over their slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = config.shape(len(devices))
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  slices = _slices(devices)
  dcn = config.over_slices(shape, slices)
  if math.prod(dcn) > 1:
    return Mesh(_hybrid(devices, shape, dcn, marked=slices > 1), AXES, axis_types=auto)
  if len(devices) == jax.device_count():
    # Knows the hardware's topology; an axis may take part of one of its axes: 8x8 of a 4x4x4 torus.
    laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, AXES, axis_types=auto)
  return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=auto)


def _hybrid(devices: Sequence[jax.Device], shape: Sequence[int], dcn: Sequence[int], marked: bool) -> np.ndarray:
  """Lay devices out so that along each axis the steps within a slice are the short ones.

  Args:
    devices: all of them.
    shape: of the whole mesh.
    dcn: parts of each axis that lie on different slices.
    marked: whether the devices say which slice they are on.

  Returns:
    An array of devices of that shape.
  """
  inside = tuple(size // parts for size, parts in zip(shape, dcn, strict=True))
  if marked:
    return mesh_utils.create_hybrid_device_mesh(inside, dcn, devices, allow_split_physical_axes=True)
  cut = np.asarray(devices, dtype=object).reshape(*dcn, *inside)
  axes = [axis for pair in zip(range(len(dcn)), range(len(dcn), 2 * len(dcn)), strict=True) for axis in pair]
  return cut.transpose(axes).reshape(shape)


def _slices(devices: Sequence[jax.Device]) -> int:
  """Count the slices that devices lie on; 1 where they do not say."""
  return len({getattr(device, "slice_index", 0) for device in devices})


def _slowest_first(shape: Sequence[int], slices: int) -> tuple[int, ...]:
  """Share slices out over the axes: as many as divide the first, of what is left the second, and so on."""
  dcn = []
  for size in shape:
    dcn.append(math.gcd(size, slices))
    slices //= dcn[-1]
  return tuple(dcn)


def _is_count(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1
