"""A run's checkpoints: exact, whole or passed over, never silently wrong."""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distillspec_jax import models
from distillspec_jax.parallel import mesh as mesh_lib
from distillspec_jax.parallel import partitioning
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import checkpoints, integrity, sources

MODEL = models.T5(models.T5Config.named("t5_tiny", num_encoder_layers=1, num_decoder_layers=1))


def small_state(number):
  params = {"a": {"kernel": jnp.arange(12.0).reshape(3, 4) + number}, "b": jnp.full((5,), number, jnp.bfloat16)}
  return {"step": jnp.int32(number), "params": params, "opt_state": optax.adamw(1e-3).init(params)}


def draw(model, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), model.abstract_params())


@functools.cache
def full_state(number=0):
  params = draw(MODEL, number)
  return {"step": jnp.int32(number), "params": params, "opt_state": optax.adafactor(1e-3).init(params)}


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run with checkpoints of steps 1 and 2; tests copy it before they break it."""
  directory = tmp_path_factory.mktemp("saved")
  run = checkpoints.RunCheckpoints(directory)
  for step in (1, 2):
    run.save(step, small_state(step), {"place": step})
  run.close()
  return directory


@pytest.fixture
def broken(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "run")
  return tmp_path / "run"


def files_of(step_folder):
  return sorted(path for path in step_folder.rglob("*") if path.is_file())


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
  path.write_bytes(b"")


def garbage(path):
  path.write_bytes(bytes(reversed(path.read_bytes())) or b"?")


def flip_one_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


def delete(path):
  path.unlink()


def test_restores_the_newest_bit_for_bit(saved):
  state, data_state, step = checkpoints.RunCheckpoints(saved).restore_latest(small_state(0))
  assert step == 2 and data_state == {"place": 2}
  assert_same(state, small_state(2))
  assert state["params"]["b"].dtype == jnp.bfloat16


def test_nothing_saved_is_none(tmp_path):
  assert checkpoints.RunCheckpoints(tmp_path / "new").restore_latest(small_state(0)) is None


def test_keeps_the_newest(tmp_path):
  run = checkpoints.RunCheckpoints(tmp_path, keep=2)
  for step in (5, 10, 15):
    run.save(step, small_state(step), {})
  assert run.steps() == [10, 15]
  run.save(15, small_state(15), {})  # once more at the end of a run: nothing to do
  assert run.steps() == [10, 15]


@pytest.mark.parametrize("damage", [truncate, empty, garbage, flip_one_bit, delete])
def test_damage_to_any_file_falls_back(saved, tmp_path, damage):
  for number, original in enumerate(files_of(saved / "checkpoints" / "2")):
    run_dir = tmp_path / str(number)
    shutil.copytree(saved, run_dir)
    victim = run_dir / original.relative_to(saved)
    damage(victim)
    assert not victim.exists() or victim.read_bytes() != original.read_bytes()
    run = checkpoints.RunCheckpoints(run_dir)
    state, data_state, step = run.restore_latest(small_state(0))
    if damage is delete and original.name == integrity.MANIFEST:
      assert step == 2  # complete, merely unchecked: what a kill between commit and manifest leaves
    else:
      assert (step, data_state) == (1, {"place": 1}), original
      assert (run_dir / "checkpoints" / "2.damaged").is_dir()
    assert_same(state, small_state(step))
    run.close()


def test_one_wrong_bit_in_an_array_is_seen(tmp_path):
  """Orbax restores such an array without a word, with other numbers in it."""
  state = {"params": {"a": np.random.default_rng(0).standard_normal((300, 100)).astype(np.float32)}}
  run = checkpoints.RunCheckpoints(tmp_path)
  run.save(1, state, {})
  run.save(2, state, {})
  flip_one_bit(max(files_of(tmp_path / "checkpoints" / "2"), key=lambda path: path.stat().st_size))
  assert run.restore_latest(state)[2] == 1


def test_the_damaged_step_can_be_saved_again(broken):
  for _ in range(2):  # twice: the second is set aside under another name
    truncate(next(path for path in files_of(broken / "checkpoints" / "2") if path.name == "manifest.ocdbt"))
    run = checkpoints.RunCheckpoints(broken)
    assert run.restore_latest(small_state(0))[2] == 1
    run.save(2, small_state(7), {"place": 7})
    run.close()
    state, data_state, step = checkpoints.RunCheckpoints(broken).restore_latest(small_state(0))
    assert step == 2 and data_state == {"place": 7}
    assert_same(state, small_state(7))
  assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == ["1", "2", "2.damaged", "2.damaged-2"]


def test_all_damaged_is_an_error_and_nothing_moves(broken):
  for step in "12":
    empty(broken / "checkpoints" / step / "state" / "_METADATA")
  with pytest.raises(ConfigError, match=r"no checkpoint in .* can be read \(2: state/_METADATA .*; 1: .*restore"):
    checkpoints.RunCheckpoints(broken).restore_latest(small_state(0))
  assert checkpoints.RunCheckpoints(broken).steps() == [1, 2]


@pytest.mark.parametrize("damage", [truncate, empty, delete])
def test_damage_without_a_manifest_is_left_to_orbax(broken, damage):
  (broken / "checkpoints" / "2" / integrity.MANIFEST).unlink()
  damage(broken / "checkpoints" / "2" / "state" / "manifest.ocdbt")
  assert checkpoints.RunCheckpoints(broken).restore_latest(small_state(0))[2] == 1


def test_another_model_is_an_error_not_damage(broken):
  other = small_state(0)
  other["params"]["a"]["kernel"] = jnp.zeros((3, 5))
  with pytest.raises(ConfigError, match=r"params/a/kernel \(3, 4\) where the model has \(3, 5\)"):
    checkpoints.RunCheckpoints(broken).restore_latest(other)
  other["params"]["c"] = jnp.zeros(2)
  with pytest.raises(ConfigError, match="lacks params/c"):
    checkpoints.RunCheckpoints(broken).restore_latest(other)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, small_state(0))
  with pytest.raises(ConfigError, match="as float32 where the model has bfloat16"):
    checkpoints.RunCheckpoints(broken).restore_latest(narrow)
  assert checkpoints.RunCheckpoints(broken).steps() == [1, 2]


def test_a_run_does_not_write_into_another(saved):
  run = checkpoints.RunCheckpoints(saved)
  for step in (1, 2):
    with pytest.raises(ConfigError, match="holds a checkpoint of step 2 already"):
      run.save(step, small_state(0), {})
  with pytest.raises(ConfigError, match="keep=0"):
    checkpoints.RunCheckpoints(saved, keep=0)


def test_restores_into_the_shardings_asked_for(saved):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("model",))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def ask(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split if leaf.shape == (3, 4) else whole)

  state, _, _ = checkpoints.RunCheckpoints(saved).restore_latest(jax.tree.map(ask, small_state(0)))
  assert state["params"]["a"]["kernel"].sharding == split
  assert state["opt_state"][0].mu["a"]["kernel"].sharding == split
  assert_same(state, small_state(2))


def on(mesh, state):
  shardings = partitioning.state_shardings(state, MODEL, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def test_a_state_on_2x2x2_goes_to_any_other_mesh_bit_for_bit(tmp_path):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, fsdp=2, model=2))
  state = full_state(3)
  run = checkpoints.RunCheckpoints(tmp_path)
  run.save(1, jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), state, on(mesh, state)), {})
  assert_same(run.restore_latest(state)[0], state)  # one device
  for shape in (dict(data=4, model=2), dict(fsdp=8), dict(model=8)):
    abstract = on(mesh_lib.make_mesh(mesh_lib.MeshConfig(**{"data": 1, **shape})), state)
    restored = run.restore_latest(abstract)[0]
    assert_same(restored, state)
    assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim), restored, abstract))
  run.close()


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
  """On CPUs the copy to the host is none: what is written must not be what the next step makes of it."""
  step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  state = step({"params": {"a": jnp.arange(3e6), "b": jnp.ones((1000, 1000))}})
  expected = jax.tree.map(np.array, state)
  run = checkpoints.RunCheckpoints(tmp_path)
  run.save(1, state, {}, wait=False)
  for _ in range(10):
    state = step(state)
  jax.block_until_ready(state)
  assert_same(run.restore_latest(expected)[0], expected)
  assert integrity.has_manifest(tmp_path / "checkpoints" / "1")  # listing the steps waited for it
  run.close()


def test_what_goes_wrong_while_it_is_written_is_raised_where_it_is_waited_for(tmp_path, monkeypatch):
  def full(folder):
    raise OSError("no space left")

  run = checkpoints.RunCheckpoints(tmp_path)
  monkeypatch.setattr(integrity, "write_manifest", full)
  run.save(1, small_state(1), {}, wait=False)
  with pytest.raises(OSError, match="no space left"):
    run.save(2, small_state(2), {}, wait=False)
  monkeypatch.undo()
  run.save(2, small_state(2), {}, wait=False)
  run.close()
  assert checkpoints.RunCheckpoints(tmp_path).steps() == [1, 2]


CHILD = """
import sys, numpy as np
from distillspec_jax.weights import checkpoints
run = checkpoints.RunCheckpoints(sys.argv[1])
for step in (1, 2):
  array = np.random.default_rng(step).standard_normal((2000, 2000)).astype(np.float32)
  run.save(step, {"params": {"a": array}}, {"place": step})
  print(step, flush=True)
"""


def child(program, *arguments, **kw):
  root = os.path.dirname(os.path.dirname(checkpoints.__file__))
  environment = {**os.environ, "PYTHONPATH": os.path.dirname(root)}
  return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], env=environment, text=True, **kw)


def test_kill_during_a_save_loses_nothing(tmp_path):
  folder = tmp_path / "checkpoints"
  process = child(CHILD, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  assert process.stdout.readline() == "1\n"
  deadline = time.monotonic() + 60
  while not any(path.name.startswith("2") for path in folder.iterdir()) and time.monotonic() < deadline:
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert any(path.name.startswith("2") for path in folder.iterdir())  # the kill fell into the save
  abstract = {"params": {"a": jax.ShapeDtypeStruct((2000, 2000), jnp.float32)}}
  run = checkpoints.RunCheckpoints(tmp_path)
  state, data_state, step = run.restore_latest(abstract)
  expected = np.random.default_rng(step).standard_normal((2000, 2000)).astype(np.float32)
  np.testing.assert_array_equal(state["params"]["a"], expected)
  assert data_state == {"place": step}
  assert all(path.name.isdecimal() for path in folder.iterdir())  # the unfinished folder is gone
  run.save(3, state, {"place": 3})
  assert run.restore_latest(abstract)[2] == 3


RESTORE = """
import sys, jax, json
from absl import logging
logging.set_verbosity(logging.ERROR)
from distillspec_jax.weights import checkpoints
print(checkpoints.load_native(sys.argv[1])[0].vocab_size)
"""


def test_the_warning_reaches_stderr_even_when_the_log_is_quiet(tmp_path):
  run = checkpoints.RunCheckpoints(tmp_path)
  checkpoints.save_description(tmp_path, MODEL)
  for step in (10, 20):
    run.save(step, {"params": full_state()["params"]}, {})
  truncate(tmp_path / "checkpoints" / "20" / "state" / "manifest.ocdbt")
  process = child(RESTORE, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  out, err = process.communicate(timeout=120)
  assert out == "128\n", err
  assert f"{tmp_path}/checkpoints/20 is damaged" in err and f"{tmp_path}/checkpoints/10" in err


def test_model_directory_round_trip(tmp_path):
  vocabulary = tmp_path / "vocabulary"
  vocabulary.mkdir()
  (vocabulary / "spiece.model").write_bytes(bytes(range(256)))
  sha256 = hashlib.sha256(bytes(range(256))).hexdigest()
  (vocabulary / "vocabulary.json").write_text(json.dumps({"kind": "sentencepiece", "sha256": sha256, "extra_ids": 0}))
  params = full_state(1)["params"]
  directory = checkpoints.save_model(tmp_path / "model", MODEL, params, vocabulary)
  model, loaded = checkpoints.load_native(directory)
  assert model == MODEL
  assert_same(loaded, params)
  assert (directory / "vocabulary" / "spiece.model").read_bytes() == bytes(range(256))

  newer = full_state(2)["params"]
  checkpoints.save_model(directory, MODEL, newer, vocabulary)
  assert_same(checkpoints.load_native(directory)[1], newer)
  assert [path.name for path in (directory / "checkpoints").iterdir()] == ["1"]

  other = models.T5(models.T5Config.named("t5_tiny"))
  with pytest.raises(ConfigError, match="holds another model"):
    checkpoints.save_model(directory, other, draw(other, 0))
  with pytest.raises(ConfigError, match="the parameter tree given does not fit"):
    checkpoints.save_model(tmp_path / "new", other, params)
  assert not (tmp_path / "new").exists()


def test_a_run_loads_as_a_model_and_on_a_mesh(tmp_path):
  checkpoints.save_description(tmp_path, MODEL)
  run = checkpoints.RunCheckpoints(tmp_path)
  for step in (10, 20):
    run.save(step, full_state(step), {})
  assert_same(checkpoints.load_native(tmp_path)[1], full_state(20)["params"])
  assert_same(checkpoints.load_native(tmp_path, step=10)[1], full_state(10)["params"])
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, fsdp=2, model=2))
  _, params = checkpoints.load_native(tmp_path, mesh=mesh)
  assert_same(params, full_state(20)["params"])
  shardings = partitioning.param_shardings(MODEL, mesh)
  assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, shardings))
  with pytest.raises(ConfigError, match=r"no checkpoint of step 11: it holds 10, 20"):
    checkpoints.load_native(tmp_path, step=11)
  truncate(tmp_path / "checkpoints" / "10" / "state" / "_METADATA")
  with pytest.raises(ConfigError, match="10: state/_METADATA has"):
    checkpoints.load_native(tmp_path, step=10)


DESCRIPTIONS = ["", "[]", "{}", '{"architecture": "t5"}', '{"architecture": "rnn", "config": {}}']


@pytest.mark.parametrize("text", [*DESCRIPTIONS, '{"architecture": "t5", "config": {"a": 1}}'])
def test_a_wrong_description_is_one_line(tmp_path, text):
  checkpoints.save_model(tmp_path, MODEL, full_state()["params"])
  (tmp_path / "model.json").write_text(text)
  with pytest.raises(ConfigError, match="model.json"):
    checkpoints.load_native(tmp_path)


def test_an_address_is_no_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for use in (checkpoints.ensure_writable, sources.find):
    with pytest.raises(ConfigError, match="gs://bucket/run is an address and no folder: mount"):
      use("gs://bucket/run")
  assert list(tmp_path.iterdir()) == []


def test_unwritable_output_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot write to the output folder .*file/sub: "):
    checkpoints.ensure_writable(tmp_path / "file" / "sub")
  with pytest.raises(ConfigError, match="cannot write to the output folder"):
    checkpoints.RunCheckpoints(tmp_path / "file")
  if os.getuid() != 0:  # root writes anywhere
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
      checkpoints.ensure_writable(tmp_path / "closed")
  made = checkpoints.ensure_writable(tmp_path / "a" / "b")
  assert made.is_dir() and not list(made.iterdir())
