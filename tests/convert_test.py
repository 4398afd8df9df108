"""The convert door, called as a user calls it."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import distillspec_jax as ds
from distillspec_jax import conversion, models, weights
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import sources, t5x, trees

MODEL = models.T5(models.T5Config.named("t5_tiny", vocab_size=264, num_encoder_layers=1, num_decoder_layers=1))
SIZES = [leaf.size for leaf in jax.tree.leaves(MODEL.abstract_params())]


def convert(**flags):
  command = [sys.executable, "-m", "distillspec_jax.convert", *[f"--{name}={value}" for name, value in flags.items()]]
  root = os.path.dirname(os.path.dirname(ds.__file__))
  environment = {**os.environ, "PYTHONPATH": root}
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A native model with a vocabulary of bytes, which has no file."""
  directory = tmp_path_factory.mktemp("source")
  vocabulary = directory / "vocabulary"
  vocabulary.mkdir()
  described = {"kind": "byte", "sha256": hashlib.sha256(b"").hexdigest(), "extra_ids": 3, "vocab_size": 262}
  (vocabulary / "vocabulary.json").write_text(json.dumps(described))
  weights.save_model(directory / "model", MODEL, draw(MODEL), vocabulary, step=40)
  return directory / "model"


def draw(model):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), model.abstract_params())


def everything(directory):
  return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_from_form_to_form_and_back(source, tmp_path):
  """native -> T5X -> Hugging Face -> native, each verified by the door itself and at the end by this test."""
  at = source
  for form, held in (("t5x", "config.gin"), ("huggingface", "model.safetensors"), ("orbax", "model.json")):
    answer = convert(source=at, output_dir=tmp_path / form, format=form, verify=True)
    assert answer.returncode == 0, answer.stderr
    assert f"-> {form}: {sum(SIZES):,} parameters, verified, with its vocabulary" in answer.stdout, answer.stdout
    assert (tmp_path / form / held).is_file()
    assert f"{len(SIZES)} tensors" in answer.stderr and "comparing" in answer.stderr
    at = tmp_path / form
    assert weights.vocabularies_match(source, at)
    model, params = ds.load_model(at)
    assert model == MODEL
    jax.tree.map(np.testing.assert_array_equal, params, ds.load_model(source)[1])
  assert (tmp_path / "t5x" / "checkpoint_40").is_dir()  # the native step
  table = [line.split() for line in answer.stdout.splitlines()[:3]]
  assert table[0] == ["tensors", "parameters", "bytes"]
  assert table[2][-4:] == [f"{len(SIZES)}", f"{sum(SIZES):,}", f"{4 * sum(SIZES):,}", "float32"]
  assert {path.name for path in tmp_path.iterdir()} == {"t5x", "huggingface", "orbax"}


def test_dtypes(source, tmp_path):
  params = ds.load_model(source)[1]
  for form, dtype in (("huggingface", "float16"), ("t5x", "bfloat16"), ("orbax", "bfloat16")):
    output = tmp_path / f"{form} {dtype}"
    output.mkdir()  # one that is there, empty
    answer = run_main(source=source, output_dir=output, format=form, dtype=dtype, verify=True)
    assert f"{dtype}" in answer and f"{2 * sum(SIZES):,}" in answer
    held = sources.open_source(output)
    assert {tensor.dtype for tensor in held.tensors.values()} == {np.dtype(dtype)}
    for name, leaf in trees.flatten(params).items():
      np.testing.assert_array_equal(held.tensors[name].read(), np.asarray(leaf).astype(dtype))
  assert held.model.config.param_dtype == "bfloat16"


def run_main(**fields):
  """Convert in this process, which saves seconds; return what was printed."""
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    conversion.run(conversion.Request(**fields))
  return said.getvalue()


@pytest.mark.parametrize("form", ["orbax", "huggingface", "t5x"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_nothing_is_left_of_what_fails(source, tmp_path, monkeypatch, form, there):
  output = tmp_path / "deep" / "out"
  if there:
    output.mkdir(parents=True)
  before = everything(tmp_path)
  # The control: what is written is other than the source, in one number of one parameter.
  shown = sources.open_source(source)
  name = "decoder/layers_0/mlp/wo/kernel"
  right = shown.tensors[name]
  wrong = dataclasses.replace(right, fetch=lambda index: right.fetch(index) + (calls() == 1))
  calls = itertools.count(1).__next__
  opened = sources.open_source
  once = dataclasses.replace(shown, tensors={**shown.tensors, name: wrong})
  monkeypatch.setattr(sources, "open_source", lambda at, *a, **k: once if at == source else opened(at, *a, **k))
  with pytest.raises(ConfigError, match=rf"{name}\[0, 0\] is .* where the source has .*2,048 of 2,048 differ"):
    run_main(source=source, output_dir=output, format=form, verify=True)
  assert everything(tmp_path) == before

  def broken(index):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  once = dataclasses.replace(shown, tensors={**shown.tensors, name: dataclasses.replace(wrong, fetch=broken)})
  with pytest.raises(ConfigError, match="cannot write .*: No space left on device; nothing was kept"):
    run_main(source=source, output_dir=output, format=form)
  assert everything(tmp_path) == before


KILLED = """
import os, signal, sys
from distillspec_jax import cli, conversion, convert

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell started in the background ignores

def track(items, what):
  for number, item in enumerate(items):
    if number == 3:
      os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    yield item

conversion.track = track
cli.run(convert.main)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_left_of_what_is_stopped(source, tmp_path, number, status):
  flags = [f"--source={source}", f"--output_dir={tmp_path / 'deep' / 'out'}", "--format=t5x"]
  root = os.path.dirname(os.path.dirname(ds.__file__))
  environment = {**os.environ, "PYTHONPATH": root, "SIGNAL": str(int(number))}
  answer = subprocess.run([sys.executable, "-c", KILLED, *flags], env=environment, capture_output=True, text=True)
  assert answer.returncode == status and "Traceback" not in answer.stderr, answer.stderr
  assert everything(tmp_path) == []


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  monkeypatch.setattr(sys, "stderr", Terminal())
  assert list(conversion.track(range(3), "writing")) == [0, 1, 2]
  assert "writing:" in sys.stderr.getvalue() and "0/3" in sys.stderr.getvalue()


def test_numbers_that_float16_cannot_hold(tmp_path):
  params = draw(MODEL)
  params["encoder"]["encoder_norm"]["scale"][1] = 7e4
  weights.save_model(tmp_path / "model", MODEL, params)
  for form in ("huggingface", "t5x"):
    answer = convert(source=tmp_path / "model", output_dir=tmp_path / "out", format=form, dtype="float16")
    assert answer.returncode == 2, answer.stderr
    assert "encoder/encoder_norm/scale holds 70000, which float16 cannot hold" in answer.stderr
    assert everything(tmp_path) == [name for name in everything(tmp_path) if name.startswith("model")]
  with pytest.raises(ConfigError, match="native models are float32 or bfloat16"):
    run_main(source=tmp_path / "model", output_dir=tmp_path / "out", format="orbax", dtype="float16")


def test_mistakes_are_one_line(source, tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "damaged").mkdir()
  (tmp_path / "damaged" / "config.json").write_text("{}")
  (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
  for flag_values, message in (
    ({"source": tmp_path / "absent", "output_dir": tmp_path / "out"}, "does not exist"),
    ({"source": tmp_path / "damaged", "output_dir": tmp_path / "out"}, "model_type is None"),
    ({"source": source, "output_dir": source}, "--output_dir is --source"),
    ({"source": source, "output_dir": source.parent, "format": "huggingface"}, "is not empty"),
    ({"source": source, "output_dir": tmp_path / "file"}, "is a file"),
    ({"source": source, "output_dir": tmp_path / "file" / "a" / "b"}, "file is a file, no folder"),
    ({"source": "~nosuchuser/x", "output_dir": tmp_path / "out"}, "~nosuchuser/x: there is no such home directory"),
    ({"source": source, "output_dir": "~nosuchuser/x"}, "no such home directory"),
    ({"source": source, "output_dir": tmp_path / "out", "format": "gguf"}, "--format=gguf: there are orbax, hugg"),
    ({"source": source, "output_dir": tmp_path / "out", "dtype": "int8"}, "--dtype=int8: there are float32, bf"),
    ({"source": source, "output_dir": ""}, "--source and --output_dir need names"),
    ({"source": source, "output_dir": tmp_path / ("x" * 300)}, "cannot be opened: File name too long"),
    ({"source": source, "output_dir": tmp_path / "out", "vocabulary": "x" * 300}, "cannot be opened: File name too"),
    ({"source": "x" * 300, "output_dir": tmp_path / "out"}, "cannot be opened: File name too long"),
    ({"source": source, "output_dir": tmp_path / "out", "vocabulary": tmp_path / "v"}, "does not exist"),
    ({"source": source, "output_dir": tmp_path / "out", "step": 3}, "no checkpoint of step 3: it holds 40"),
  ):
    with pytest.raises(ConfigError, match=message) as caught:
      run_main(**flag_values)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
  answer = convert(source=source, output_dir=source)
  assert answer.returncode == 2 and answer.stderr.count("\n") == 1, answer.stderr


def test_other_networks_stay_native(tmp_path):
  config = models.DecoderLMConfig.named(next(name for name in models.DecoderLMConfig.sizes if "tiny" in name))
  model = models.DecoderLM(config)
  weights.save_model(tmp_path / "model", model, draw(model))
  for form in ("huggingface", "t5x"):
    with pytest.raises(ConfigError, match="only T5 models can be written"):
      run_main(source=tmp_path / "model", output_dir=tmp_path / "out", format=form)
  run_main(source=tmp_path / "model", output_dir=tmp_path / "out", format="orbax", dtype="bfloat16", verify=True)
  assert ds.load_model(tmp_path / "out")[0].config.param_dtype == "bfloat16"


def test_a_sentencepiece_file_is_brought_along(shared_dir, tmp_path):
  pytest.importorskip("seqio", reason="seqio is not installed: no vocabulary can be made from a file")
  pieces = shared_dir / "data" / "vocab" / "t5_spiece.model"
  sizes = dict(emb_dim=8, head_dim=4, num_heads=2, mlp_dim=8, num_encoder_layers=1, num_decoder_layers=1)
  model = models.T5(models.T5Config.named("t5_tiny", vocab_size=32128, **sizes))
  t5x.export(tmp_path / "source", model, draw(model))
  answer = convert(source=tmp_path / "source", output_dir=tmp_path / "out", vocabulary=pieces)
  assert answer.returncode == 0, answer.stderr
  description = json.loads((tmp_path / "out" / "vocabulary" / "vocabulary.json").read_text())
  assert (description["extra_ids"], description["vocab_size"]) == (100, 32100)
  assert (tmp_path / "out" / "vocabulary" / "spiece.model").read_bytes() == pieces.read_bytes()
  (tmp_path / "garbage.model").write_bytes(b"garbage")
  answer = convert(source=tmp_path / "out", output_dir=tmp_path / "new", vocabulary=tmp_path / "garbage.model")
  assert answer.returncode == 2 and "garbage.model is no SentencePiece model" in answer.stderr
  assert "Traceback" not in answer.stderr

  narrow = shared_dir / "fixtures" / "t5x_native"
  for fields, message in (
    ({"source": narrow, "vocabulary": pieces}, "has 32,100 ids, 100 of them sentinels, .*--extra_ids=0.* has 128"),
    ({"source": narrow, "vocabulary": tmp_path / "out"}, "has 32,100 ids, 100 of them sentinels; the model has 128"),
    ({"source": tmp_path / "out", "vocabulary": pieces, "extra_ids": 129}, "has 32,129 ids"),
    ({"source": tmp_path / "out", "vocabulary": pieces, "extra_ids": -1}, "--extra_ids=-1: a whole number of at least"),
  ):
    with pytest.raises(ConfigError, match=message):
      run_main(output_dir=tmp_path / "new", **fields)
    assert not (tmp_path / "new").exists()
  run_main(source=tmp_path / "out", output_dir=tmp_path / "new", vocabulary=pieces, extra_ids=128)  # as many as fit
