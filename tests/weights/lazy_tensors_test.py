"""Lazy tensors: every layout's slice is that of the whole, no more is read than is wanted, devices get their share."""

import itertools
import math

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from distillspec_jax import models, weights
from distillspec_jax.parallel import mesh as mesh_lib
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import huggingface, lazy_tensors, raw_arrays, safetensors_file, t5x, trees

CONFIG = models.T5Config.named("t5_tiny", num_encoder_layers=1, num_decoder_layers=1)
MODEL = models.T5(CONFIG)


def spied(value, reads):
  """Wrap an array so that every slice that is read is noted."""
  tensor = lazy_tensors.of_array(value)

  def fetch(index):
    reads.append(index)
    return tensor.fetch(index)

  return lazy_tensors.LazyTensor(tensor.shape, tensor.dtype, fetch, "spied")


def size(index):
  return math.prod(part.stop - part.start for part in index)


def all_slices(length):
  return [slice(a, b) for a, b in itertools.combinations(range(length + 1), 2)]


@pytest.mark.parametrize(
  ("view", "reference", "shape"),
  [
    (lazy_tensors.transposed, lambda x: x.T, (4, 6)),
    (lambda t: lazy_tensors.layer_of(t, 2, 1), lambda x: x[:, 2], (4, 3, 5)),
    (lambda t: lazy_tensors.axes_joined(t, 1), lambda x: x.reshape(3, 8), (3, 4, 2)),
    (lambda t: lazy_tensors.axes_joined(t, 0), lambda x: x.reshape(6, 4), (2, 3, 4)),
    (
      lambda t: lazy_tensors.axes_joined(lazy_tensors.layer_of(t, 1, 1), 0),
      lambda x: x[:, 1].reshape(6, 4),
      (2, 3, 3, 4),
    ),
  ],
)  # fmt: skip
def test_every_slice_of_every_view_and_nothing_more_is_read(view, reference, shape):
  value, reads = np.random.default_rng(0).standard_normal(shape).astype(np.float32), []
  lazy, whole = view(spied(value, reads)), reference(value)
  assert lazy.shape == whole.shape
  for index in itertools.product(*map(all_slices, whole.shape)):
    reads.clear()
    part = lazy.read(index)
    np.testing.assert_array_equal(part, whole[index])
    assert sum(map(size, reads)) == part.size  # one head cut in two is read in two pieces, not whole


def test_padding_reads_what_is_there():
  value, reads = np.arange(12.0, dtype=np.float32).reshape(4, 3), []
  for axis, shape in ((0, (6, 3)), (1, (4, 5))):
    lazy = lazy_tensors.padded(spied(value, reads), axis, shape[axis])
    whole = np.zeros(shape, np.float32)
    whole[:4, :3] = value
    for index in itertools.product(*map(all_slices, shape)):
      reads.clear()
      np.testing.assert_array_equal(lazy.read(index), whole[index])
      assert sum(map(size, reads)) == value[index].size


def test_raw_files_any_slice_any_number_of_pieces(tmp_path, monkeypatch):
  monkeypatch.setattr(raw_arrays, "_BLOCK", 64)  # several blocks
  path = tmp_path / "raw"
  for shape in ((7,), (5, 6), (3, 4, 5)):
    for dtype in (np.float32, ml_dtypes.bfloat16):
      value = np.random.default_rng(1).standard_normal(shape).astype(dtype)
      data = value.tobytes()
      cut = 12 + 2 * len(data) % 7
      path.write_bytes(b"??" + data[cut:] + b"gap" + data[:cut])  # the second piece stands first
      after = 2 + len(data) - cut
      lazy = raw_arrays.lazy_array(path, [(after + 3, cut), (2, len(data) - cut)], shape, dtype, "raw")
      for index in itertools.product(*map(all_slices, shape)):
        np.testing.assert_array_equal(lazy.read(index), value[index])
  path.write_bytes(path.read_bytes()[:30])
  with pytest.raises(ConfigError, match="raw ends before its last byte"):
    lazy.read()


class CountingFile:
  """A file that counts what is read from it."""

  def __init__(self, file, counts):
    self._file, self._counts = file, counts

  def readinto(self, view):
    self._counts.append(len(view))
    return self._file.readinto(view)

  def __getattr__(self, name):
    return getattr(self._file, name)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._file.close()


def test_a_row_slice_reads_those_bytes_of_the_file_and_no_others(tmp_path, monkeypatch):
  value = np.arange(100 * 50, dtype=np.float32).reshape(100, 50)
  safetensors.numpy.save_file({"a": value, "b": value}, tmp_path / "x.safetensors")
  lazy = safetensors_file.open_file(tmp_path / "x.safetensors")["b"]
  counts = []
  monkeypatch.setattr(raw_arrays, "open", lambda *a, **k: CountingFile(open(*a, **k), counts), raising=False)
  np.testing.assert_array_equal(lazy.read([slice(10, 20), slice(None)]), value[10:20])
  assert sum(counts) == 10 * 50 * 4
  counts.clear()
  np.testing.assert_array_equal(lazy.read([slice(10, 20), slice(5, 9)]), value[10:20, 5:9])
  assert sum(counts) == (9 * 50 + 4) * 4  # from the first wanted number to the last


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
  """One model in every form that is read lazily."""
  folder = tmp_path_factory.mktemp("forms")
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), MODEL.abstract_params())
  huggingface.export(folder / "huggingface", MODEL, params)
  t5x.export(folder / "t5x", MODEL, params, 1)
  per_layer = models.T5(models.T5Config.from_dict({**CONFIG.as_dict(), "relative_bias": "per_layer"}))
  stacked = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), per_layer.abstract_params())
  t5x.export(folder / "scanned", per_layer, stacked, 1)
  return folder


@pytest.mark.parametrize("form", ["huggingface", "t5x", "scanned", "t5x_orbax"])
def test_each_device_is_given_its_own_share_and_no_more_is_read(directories, form, monkeypatch, request):
  directory = directories / form
  if form == "t5x_orbax":
    directory = request.getfixturevalue("shared_dir") / "fixtures" / form
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, fsdp=2, model=2))
  reads, whole = [], lazy_tensors.LazyTensor.read

  def noted(self, index=None):
    value = whole(self, index)
    reads.append(value.size)
    return value

  plain = weights.load_model(directory)[1]
  placing = lazy_tensors.place
  shares = {}

  def place(tensor, like):
    reads.clear()
    array = placing(tensor, like)
    shares[tensor.where] = (max(reads, default=0), array)
    return array

  monkeypatch.setattr(lazy_tensors, "place", place)
  monkeypatch.setattr(lazy_tensors.LazyTensor, "read", noted)
  model, split = weights.load_model(directory, mesh=mesh)
  monkeypatch.undo()
  jax.tree.map(np.testing.assert_array_equal, plain, split)
  assert len(shares) == len(jax.tree.leaves(split))
  for largest, array in shares.values():
    assert largest <= max(shard.data.size for shard in array.addressable_shards)
  divided = sum(array.addressable_shards[0].data.size < array.size for _, array in shares.values())
  assert divided > 5  # the mesh did divide something


def test_the_spy_sees_a_loader_that_reads_whole_tensors():
  """The control of the test above: a loader that reads whole and cuts afterwards is caught."""
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=4, model=2))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "model"))
  like = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding)
  value, reads = np.arange(32, dtype=np.float32).reshape(8, 4), []
  good = spied(value, reads)
  np.testing.assert_array_equal(lazy_tensors.place(good, like), value)
  assert len(reads) == 8 and {size(index) for index in reads} == {4}
  reads.clear()
  bad = lazy_tensors.LazyTensor((8, 4), np.dtype(np.float32), lambda index: spied(value, reads).read()[index], "bad")
  np.testing.assert_array_equal(lazy_tensors.place(bad, like), value)
  assert {size(index) for index in reads} == {32}


def test_casts():
  wide = np.array([1.0, 65504.0, -np.inf, np.nan, 1e-9], np.float32)
  np.testing.assert_array_equal(lazy_tensors.cast(wide, np.float16, "x"), wide.astype(np.float16))
  with pytest.raises(ConfigError, match="parameter y holds 70000, which float16 cannot hold"):
    lazy_tensors.cast(np.array([1.0, -70000.0], np.float32), np.float16, "parameter y")
  with pytest.raises(ConfigError, match="bfloat16 cannot hold"):
    lazy_tensors.cast(np.array([3.4e38], np.float32), ml_dtypes.bfloat16, "x")
  assert lazy_tensors.cast(wide, np.float32, "x") is wide


def test_to_host_gathers_shards():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, fsdp=2, model=2))
  value = np.arange(64, dtype=np.float32).reshape(8, 8)
  for spec in ((), ("fsdp",), ("fsdp", "model"), (None, "model")):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    np.testing.assert_array_equal(lazy_tensors.to_host(jax.device_put(value, sharding)), value)


def test_names_survive_the_trip_through_lazy_trees():
  tensors = {"a/b": lazy_tensors.of_array(np.zeros(2)), "a/c": lazy_tensors.of_array(np.ones(3))}
  assert trees.flatten(trees.unflatten(tensors)) == tensors
