"""MeshConfig: what divides the devices, how slices are laid out, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from distillspec_jax.parallel import mesh as meshes
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh
from distillspec_jax.types import ConfigError


@pytest.mark.parametrize(
    "sizes,devices,shape",
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 1, -1), 8, (1, 1, 8)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_shapes(sizes, devices, shape):
  assert MeshConfig(*sizes).shape(devices) == shape


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1), (-1, 1, -1), (-1, -1, -1)])
def test_bad_axes_are_one_clear_line(sizes):
  with pytest.raises(ConfigError, match="data=.*fsdp=.*model=") as error:
    MeshConfig(*sizes)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (1, 1, 1)])
def test_a_mesh_that_does_not_divide_the_devices_is_one_clear_line(sizes):
  with pytest.raises(ConfigError, match="does not divide 8 device") as error:
    make_mesh(MeshConfig(*sizes))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes,needed", [((4, 4, 1), 16), ((-1, 16, 1), 16), ((9, 1, 1), 9)])
def test_a_mesh_larger_than_the_devices_is_one_clear_line(sizes, needed):
  with pytest.raises(ConfigError, match=f"needs {needed} devices and there are 8") as error:
    make_mesh(MeshConfig(*sizes))
  assert "\n" not in str(error.value)


def test_make_mesh_uses_the_devices_it_is_given():
  mesh = make_mesh(MeshConfig(1, 2, 2), devices=jax.devices()[4:])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "model": 2}
  assert set(mesh.devices.ravel()) == set(jax.devices()[4:])
  whole = make_mesh()
  assert dict(whole.shape) == {"data": jax.device_count(), "fsdp": 1, "model": 1}
  assert set(whole.devices.ravel()) == set(jax.devices())


# ---- slices


@dataclasses.dataclass(frozen=True)
class Device:
  """What laying devices out looks at, of a GPU on one of several slices."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "gpu"
  device_kind: str = "made up"


def slices_along(axis, grid):
  """The slice of each device along one axis, at the start of the others."""
  return [device.slice_index for device in np.moveaxis(grid, axis, 0)[:, 0, 0]]


@pytest.mark.parametrize(
    "sizes,slices,dcn",
    [
        ((8, 1, 1), 1, (1, 1, 1)),
        ((8, 1, 1), 2, (2, 1, 1)),
        ((-1, 2, 2), 2, (2, 1, 1)),
        ((2, 4, 1), 4, (2, 2, 1)),
        ((1, 8, 1), 4, (1, 4, 1)),
        ((1, 1, 8), 2, (1, 1, 2)),
        ((1, 4, 2), 8, (1, 4, 2)),
    ],
)
def test_slices_go_to_the_slowest_axis_first(sizes, slices, dcn):
  config = MeshConfig(*sizes)
  assert config.over_slices(config.shape(8), slices) == dcn


def test_devices_of_a_slice_stay_together():
  """Two slices, four devices each, listed in turns: along data the slice changes once, along the other axes never."""
  devices = [Device(i, slice_index=i % 2) for i in range(8)]
  grid = meshes._hybrid(devices, (4, 1, 2), (2, 1, 1), marked=True)
  assert grid.shape == (4, 1, 2) and set(grid.ravel()) == set(devices)
  assert slices_along(0, grid) == [0, 0, 1, 1]
  assert all(len({d.slice_index for d in row}) == 1 for row in grid.reshape(4, 2))
  grid = meshes._hybrid(devices, (1, 8, 1), (1, 2, 1), marked=True)
  assert slices_along(1, grid) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("dcn", [(2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2)])
def test_equal_runs_of_unmarked_devices_are_the_slices(dcn):
  """What devices that say their slices get, devices that do not say them get from their order."""
  shape, inside = (4, 2, 2), 16 // int(np.prod(dcn))
  marked = [Device(i, slice_index=i // inside) for i in range(16)]
  want = meshes._hybrid(marked, shape, dcn, marked=True)
  np.testing.assert_array_equal(meshes._hybrid(marked, shape, dcn, marked=False), want)


def test_a_mesh_over_slices_of_cpus():
  mesh = make_mesh(MeshConfig(2, 2, 2, dcn=(1, 2, 1)))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}
  ids = np.vectorize(lambda d: d.id)(mesh.devices)
  np.testing.assert_array_equal(ids[:, 0], [[0, 1], [2, 3]])  # the first slice
  np.testing.assert_array_equal(ids[:, 1], [[4, 5], [6, 7]])
  assert make_mesh(MeshConfig(2, 2, 2, dcn=(1, 1, 1))) == make_mesh(MeshConfig(2, 2, 2))


@pytest.mark.parametrize(
    "config,slices,message",
    [
        (MeshConfig(8, 1, 1, dcn=(3, 1, 1)), 1, "dcn=.3, 1, 1. does not divide data, fsdp, model = .8, 1, 1."),
        (MeshConfig(1, 1, 8, dcn=(2, 1, 1)), 2, "does not divide"),
        (MeshConfig(8, 1, 1, dcn=(4, 1, 1)), 2, "on 2 slices: dcn=.4, 1, 1. asks for 4 slices"),
        (MeshConfig(8, 1, 1), 3, "on 3 slices: its axes cannot be cut into so many"),
    ],
)
def test_slices_that_the_axes_do_not_fit_are_one_clear_line(config, slices, message):
  with pytest.raises(ConfigError, match=message) as error:
    config.over_slices(config.shape(8), slices)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(dcn=(2, 1)), "dcn=.2, 1. must be three whole numbers"),
        (dict(dcn=(0, 1, 1)), "must be three whole numbers"),
        (dict(dcn=(2, 1, 1.0)), "must be three whole numbers"),
        (dict(target_partitioning="split"), "target_partitioning is 'split'; there are sharded, replicated"),
        (dict(draft_partitioning=""), "draft_partitioning is ''; there are"),
    ],
)
def test_bad_fields_are_one_clear_line(fields, message):
  with pytest.raises(ConfigError, match=message) as error:
    MeshConfig(**fields)
  assert "\n" not in str(error.value)
