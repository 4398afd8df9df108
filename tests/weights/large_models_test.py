"""Memory of imports and exports: at most 1.25 times the model and 1 GB, never the model twice.

Measured in processes of their own, as the kernel counts it (peak resident memory, mapped files included).
"""

import filecmp
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.numpy

import distillspec_jax as ds
from distillspec_jax import models
from distillspec_jax.weights import huggingface, layouts, lazy_tensors

SMALL = models.T5Config.named("t5_1_1_large", num_encoder_layers=1, num_decoder_layers=1)
LARGE = models.T5Config.named("t5_1_1_xl", num_encoder_layers=8, num_decoder_layers=8)

# Peak resident memory while loading, over what was resident before. Writing 5 to clear_refs resets the kernel's peak.
IMPORT = """
import json, pathlib, sys
import jax, numpy as np
from distillspec_jax import weights
jax.device_put(np.ones(3)).block_until_ready()
status = lambda field: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field)) * 1024
if "torch" in sys.argv:
  import torch
mesh = None
if "mesh" in sys.argv:
  from distillspec_jax.parallel import mesh as mesh_lib
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(fsdp=4, model=2))
before = status("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
model, params = weights.load_model(sys.argv[1], mesh=mesh)
if "twice" in sys.argv:
  again = jax.tree.map(lambda x: np.array(x) + 1, params)
jax.block_until_ready(params)
size = sum(x.nbytes for x in jax.tree.leaves(params))
held = {}
for shard in [shard for x in jax.tree.leaves(params) for shard in x.addressable_shards]:
  held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
peak = status("VmHWM")
print(json.dumps({"over": peak - before, "peak": peak, "bytes": size, "devices": list(held.values())}))
"""


EIGHT = "--xla_force_host_platform_device_count=8"


def environment(devices=1):
  root = os.path.dirname(os.path.dirname(ds.__file__))
  flags = os.environ.get("XLA_FLAGS", "").replace(EIGHT, "") + (f" {EIGHT}" if devices == 8 else "")
  return {**os.environ, "PYTHONPATH": root, "XLA_FLAGS": flags}


def imported(directory, *more):
  command = [sys.executable, "-c", IMPORT, str(directory), *more]
  variables = environment(8 if "mesh" in more else 1)
  answer = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
  assert answer.returncode == 0, answer.stderr[-2000:]
  return json.loads(answer.stdout.splitlines()[-1])


def converted(source, output, form, *more):
  """Convert in a process of its own; return its peak resident memory in bytes."""
  command = [sys.executable, "-m", "distillspec_jax.convert", f"--source={source}", f"--output_dir={output}"]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  with subprocess.Popen([*command, f"--format={form}", *more], env=environment(), **pipes) as child:
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
  assert child.returncode == 0, said[-2000:]
  return usage.ru_maxrss * 1024


def make(directory, config):
  """Write a model that is never in memory; its numbers repeat, so that gzip is quick. Returns its bytes."""
  model = models.T5(config)
  pattern = np.random.default_rng(0).standard_normal(4096).astype(np.float32)

  def tensor(name, like):
    # Every tensor begins elsewhere in the pattern, so that no two are the same.
    def fetch(index):
      return np.resize(np.roll(pattern, zlib.crc32(name.encode()) % 4096), like.shape)[index]

    return lazy_tensors.LazyTensor(like.shape, np.dtype(np.float32), fetch, name)

  expected = layouts.expected(model)
  huggingface.export(directory, model, {name: tensor(name, like) for name, like in expected.items()})
  return sum(4 * math.prod(like.shape) for like in expected.values())


linux = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of memory")


@linux
def test_importing_holds_the_model_once(tmp_path):
  size = make(tmp_path, SMALL)
  assert size > 3e8
  measured = imported(tmp_path)
  assert measured["bytes"] == size
  assert measured["over"] < 1.25 * size + 1e8, measured
  assert measured["devices"] == [size]
  control = imported(tmp_path, "twice")  # what holds it twice is caught
  assert control["over"] > 1.75 * size, control
  assert_shared_out(imported(tmp_path, "mesh"), size, 1e8)


@linux
def test_importing_a_pytorch_file_holds_the_model_once(tmp_path):
  torch = pytest.importorskip("torch", reason="torch is not installed: pickles are refused anyway")
  size = make(tmp_path, SMALL)
  path = tmp_path / huggingface.WEIGHTS
  tensors = {name: torch.from_numpy(value) for name, value in safetensors.numpy.load_file(path).items()}
  torch.save(tensors, tmp_path / "pytorch_model.bin")
  path.unlink()
  bare = imported(tmp_path, "torch")  # with torch itself in memory before
  assert bare["bytes"] == size and bare["over"] < 1.25 * size + 1e8, bare


def assert_shared_out(measured, size, room):
  """Check that eight devices hold an eighth each (norms and relative biases are whole), the host nothing besides."""
  assert len(measured["devices"]) == 8 and max(measured["devices"]) < 1.01 * size / 8, measured
  assert measured["over"] < 1.25 * size + room, measured


@pytest.fixture
def emptied(tmp_path):
  """A folder whose gigabytes do not stay behind."""
  yield tmp_path
  shutil.rmtree(tmp_path)


@linux
@pytest.mark.slow
def test_a_thousand_million_parameters_through_every_form(emptied):
  tmp_path = emptied
  size = make(tmp_path / "huggingface", LARGE)
  assert size > 4e9
  limit, peaks = 1.25 * size + 1e9, {}
  source = tmp_path / "huggingface"
  for form in ("t5x", "orbax"):
    peaks[f"import of {source.name}"] = imported(source)["peak"]
    peaks[f"export to {form}"] = converted(source, tmp_path / form, form, "--verify")
    source = tmp_path / form
  for form in ("huggingface", "t5x", "orbax"):
    assert_shared_out(measured := imported(tmp_path / form, "mesh"), size, 1e9)
    peaks[f"import of {form} on 8 devices"] = measured["peak"]
  peaks[f"import of {source.name}"] = imported(source)["peak"]
  peaks["export to huggingface"] = converted(source, tmp_path / "again", "huggingface", "--verify")
  print({name: f"{peak / size:.2f} x the model" for name, peak in peaks.items()})
  assert max(peaks.values()) < limit, (peaks, limit)
  for name in ("export to t5x", "export to huggingface"):  # tensor by tensor: the model is never there
    assert peaks[name] < 0.25 * size + 1e9, peaks
  files = [tmp_path / form / huggingface.WEIGHTS for form in ("huggingface", "again")]
  assert filecmp.cmp(*files, shallow=False)
