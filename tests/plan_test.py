"""The door plan: tiny models on virtual devices, from the command to plan.json; errors before anything is compiled."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

pytest.importorskip("seqio", reason="a training run's configuration names a task")

import jax  # noqa: E402

from distillspec_jax import plan, weights  # noqa: E402
from distillspec_jax.models import T5, T5Config  # noqa: E402
from distillspec_jax.planning import compiled, page, planner, topologies  # noqa: E402
from distillspec_jax.types import ConfigError  # noqa: E402
from distillspec_jax.weights import integrity  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
TINY = """# A tiny model.
train.model = @T5Config()
T5Config.vocab_size = 128
T5Config.emb_dim = {width}
T5Config.num_heads = 4
T5Config.head_dim = 8
T5Config.mlp_dim = 64
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
"""
RUN = "runs/distill_xxl.gin"
SMALL = ["BATCH_SIZE = 8", "INPUT_LENGTH = 16", "TARGET_LENGTH = 6", "MeshConfig.model = 2"]


@pytest.fixture
def tiny(tmp_path):
  files = {"target_model": tmp_path / "target.gin", "draft_model": tmp_path / "draft.gin"}
  for width, path in zip((64, 32), files.values(), strict=True):
    path.write_text(TINY.format(width=width))
  return {name: str(path) for name, path in files.items()}


def door(folder, *arguments, bindings=SMALL, **environment):
  flags = [f"--gin.{line.replace(' = ', '=', 1)}" for line in bindings]
  path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
  return subprocess.run(
    [sys.executable, "-m", "distillspec_jax.plan", f"--gin_file={RUN}", *flags, *arguments],
    capture_output=True,
    text=True,
    cwd=folder,
    env=os.environ | {"PYTHONPATH": path} | environment,
    timeout=600,
  )


def test_a_plan_from_the_command_to_its_file(tmp_path, tiny):
  models = [f"--{name}={path}" for name, path in tiny.items()]
  done = door(tmp_path, "--topology=cpu-8", "--output_dir=out", "--gamma=2", *models)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "out" / "plan.json").read_text())
  assert found["topology"]["name"] == "cpu-8" and not found["exact"]
  assert found["mesh"] == {"data": 4, "fsdp": 1, "model": 2}
  sizes = found["step"]["bytes"]
  # The target: 64 wide, in bfloat16, its matrices split over two; the draft, 32 wide in float32, whole.
  matrices = lambda width: 2 * 128 * width + 3 * 4 * width * 32 + 2 * 3 * width * 64
  assert sizes["target"] == 2 * (matrices(64) // 2 + 7 * 64 + 2 * 4 * 32 // 2)
  assert sizes["parameters"] == 4 * (matrices(32) + 7 * 32 + 2 * 4 * 32)
  parts = ("parameters", "optimizer", "target", "batch and rest", "temporaries", "program")
  assert sizes["total"] == sum(sizes[name] for name in parts) <= found["topology"]["memory"]
  assert found["fits"] and found["advice"] == {"tried": [], "fits_with": None, "limited": False}
  # At least the products of the target's and the draft's matrices with the tokens that meet them.
  attention, mlp = (lambda width: 2 * width * 32), (lambda width: 3 * width * 64)
  encoder = lambda width: 2 * attention(width) + mlp(width)
  decoder = lambda width: 3 * attention(width) + mlp(width)
  by_tokens = lambda width, rows: 2 * rows * (16 * encoder(width) + 6 * decoder(width))
  least = by_tokens(64, 2) / 2 + 3 * by_tokens(32, 2)
  assert least < found["step"]["work"]["flops"] < 5 * least
  bound = found["step"]["roofline"]
  assert bound["compute"] == pytest.approx(found["step"]["work"]["flops"] / found["topology"]["flops"])
  assert bound["memory"] == pytest.approx(found["step"]["work"]["bytes"] / found["topology"]["bandwidth"])
  assert bound["least"] == max(bound[name] for name in ("compute", "memory", "interconnect")) == bound[bound["binds"]]
  assert found["step"]["work"]["messages"]["all-reduce"]["count"] > 0
  passes = found["decoding"]["passes"]
  assert [passes[name]["queries"] for name in ("target", "verify", "draft")] == [1, 3, 1]
  assert passes["draft"]["messages"] == 0 < passes["target"]["messages"]
  speculative = found["decoding"]["speculative"]
  assert speculative["block_ms"] == pytest.approx(1e3 * (2 * passes["draft"]["seconds"] + passes["verify"]["seconds"]))
  for text in ("ESTIMATES", "It fits: ", "| parameters ", "| all-reduce ", "Plain decoding takes", "| speed-up"):
    assert text in done.stdout
  assert "the step for cpu-8" in done.stderr and "Traceback" not in done.stderr


def test_what_would_make_it_fit(tmp_path, tiny):
  models = [f"--{name}={path}" for name, path in tiny.items()]
  settings = ["--topology=cpu-2", "--memory_gib=0.0026", "--nodecoding", "--tries=3"]
  bindings = [*SMALL[1:], "BATCH_SIZE = 32"]
  # A platform that is not here, nor need be.
  done = door(tmp_path, *settings, "--output_dir=out", *models, bindings=bindings, JAX_PLATFORMS="cuda")
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "out" / "plan.json").read_text())
  assert not found["fits"] and "decoding" not in found
  tried = found["advice"]["tried"]
  assert tried and [trial["fits"] for trial in tried[:-1]] == [False] * (len(tried) - 1)
  assert tried[-1]["fits"] and found["advice"]["fits_with"] == tried[-1]["settings"]
  assert tried[-1]["total"] <= found["topology"]["memory"] < found["step"]["bytes"]["total"]
  assert "It does NOT fit" in done.stdout and f"It fits with {tried[-1]['settings'][0]}" in done.stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--topology=v5e64"], "unknown topology 'v5e64'; did you mean v5e-64? There are v5e-N"),
    (["--topology=cpu-2", "--tries=-1"], "--tries=-1: compilations at most, 0 or more"),
    # A folder that is there, where nothing can be written, whoever asks.
    (["--topology=cpu-2", "--output_dir=/proc/self"], "cannot write to the output folder /proc/self"),
  ],
)
def test_a_wrong_flag_is_one_line_before_anything_is_compiled(arguments, message, tmp_path, tiny):
  done = door(tmp_path, *arguments, *[f"--{name}={path}" for name, path in tiny.items()])
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert done.stderr.startswith(f"error: {message}")


@pytest.fixture
def planned(tmp_path, tiny, monkeypatch):
  """Call the door inside this process, with a planner that has found nothing but a name."""
  given = types.SimpleNamespace(
    gin_file=[RUN], gin_bindings=SMALL, gin_search_paths=[], topology="cpu-2", gamma=5, decoding=True, tries=6,
    memory_gib=None, output_dir=str(tmp_path / "out"), **tiny,
  )  # fmt: skip
  monkeypatch.setattr(plan, "flags", types.SimpleNamespace(FLAGS=given))
  # The door's settings of jax are for the whole process.
  monkeypatch.setattr(plan, "jax", types.SimpleNamespace(config=types.SimpleNamespace(update=lambda *_: None)))
  monkeypatch.setattr(planner, "plan", lambda run, *_, **__: {"run": run})
  monkeypatch.setattr(page, "page", lambda found: f"the tables of {found['run']}")
  return tmp_path / "out" / "plan.json"


def test_a_full_disk_takes_the_file_and_not_the_tables(planned, capsys, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(integrity, "write_atomically", full)
  with pytest.raises(ConfigError, match="plan.json cannot be written: No space left on device; the tables are printed"):
    plan.main([])
  assert capsys.readouterr().out == f"the tables of {RUN}\n"


def test_nobody_reading_takes_the_tables_and_not_the_file(planned, monkeypatch):
  def closed(*_):
    raise BrokenPipeError

  monkeypatch.setattr(page, "page", closed)
  with pytest.raises(BrokenPipeError):
    plan.main([])
  assert json.loads(planned.read_text()) == {"run": RUN}


def test_too_little_memory_to_compile_is_one_line(planned, monkeypatch):
  def large(*_, **__):
    raise MemoryError("Unable to allocate 74.5 GiB")

  monkeypatch.setattr(planner, "plan", large)
  with pytest.raises(ConfigError, match="too little memory here to plan for rows so long .Unable to allocate 74.5 GiB"):
    plan.main([])


@pytest.mark.parametrize(
  ("binding", "message"),
  [
    ("MeshConfig.model = 3", "mesh data=-1, fsdp=1, model=3 does not divide 8"),
    ("BATCH_SIZE = 6", "batch_size is 6: data x fsdp = 4 of 8 devices"),
    ("StepConfig.accumulate = 3", "StepConfig.accumulate = 3 times"),
    ("MeshConfig.dcn = (3, 1, 1)", r"dcn=\(3, 1, 1\) does not divide data, fsdp, model = \(4, 1, 2\)"),
    ("MeshConfig.dcn = (2, 1, 1)", "asks for 2 slices, and a topology is one"),
    ("train.target_dtype = 'float99'", "train.target_dtype is 'float99'; there are float32, bfloat16"),
  ],
)
def test_what_cannot_be_is_said_before_anything_is_compiled(binding, message, tiny, monkeypatch):
  monkeypatch.setattr(compiled, "compile_step", lambda *_: pytest.fail("it was compiled"))
  wanted = plan.request_from_gin([RUN], [*SMALL, binding], **tiny)
  with pytest.raises(ConfigError, match=message):
    planner.plan("a run", wanted, topologies.named("cpu-8"))


def test_models_come_from_flags_directories_and_names(tmp_path, tiny, monkeypatch):
  monkeypatch.chdir(tmp_path)
  wanted = plan.request_from_gin([RUN], [], **tiny)
  assert (wanted.teacher.config.emb_dim, wanted.student.config.emb_dim) == (64, 32)
  # What the run says of a network is of train.model alone, in `train` too; train.dtype is of any.
  with pytest.raises(ConfigError, match="T5Config.emb_dim changes nothing: nothing in these gin files uses @T5Config"):
    plan.request_from_gin([RUN], ["T5Config.emb_dim = 128"], **tiny)
  cooled = plan.request_from_gin([RUN], ["train.dtype = 'bfloat16'"], **tiny)
  assert (cooled.student.config.dtype, cooled.student.config.param_dtype) == ("bfloat16", "float32")
  assert cooled.teacher == wanted.teacher
  file = tmp_path / "halved.gin"
  file.write_text(TINY.format(width=32) + "T5Config.dtype = 'bfloat16'\nT5Config.param_dtype = 'bfloat16'\n")
  master = plan.request_from_gin([RUN], [], target_model=tiny["target_model"], draft_model=str(file)).student.config
  assert (master.dtype, master.param_dtype) == ("bfloat16", "float32")  # as `train` brings it to its devices
  named = plan.request_from_gin([RUN], [])
  assert named.teacher == T5(T5Config.named("t5_1_1_xxl", dtype="bfloat16"))
  assert named.student == T5(T5Config.named("t5_1_1_small", dtype="bfloat16"))
  assert (named.batch_size, named.input_length, named.step_config.target_length) == (32, 1024, 64)
  assert (named.teacher_dtype, named.mesh_config.model, named.mesh_config.draft_partitioning) == (
    "bfloat16", 8, "replicated"
  )  # fmt: skip
  other = plan.request_from_gin([RUN], ["TARGET = 'runs/t5_1_1_xl'"], draft_model="t5_1_1_base")
  assert other.teacher.config.emb_dim == 2048 and other.student.config.emb_dim == 768
  scratch = plan.request_from_gin(["runs/finetune.gin"], [])
  assert scratch.teacher is None and scratch.student.config.emb_dim == 128


@pytest.mark.parametrize(
  ("files", "bindings", "flags", "message"),
  [
    ([RUN], ["TARGET = 'runs/mine'"], {}, "the target runs/mine is not here.*--target_model, one of .*t5_1_1_xxl"),
    ([RUN], [], {"target_model": "t5_1_1_xll"}, "no gin file 'models/t5_1_1_xll.gin'.*did you mean"),
    ([RUN], [], {"target_model": "tasks/xsum.gin"}, "tasks/xsum.gin binds no train.model"),
    ([RUN], ["TARGET = None"], {}, "method 'distillspec' needs a target"),
    ([RUN], ["TARGET = 'gs://mine/t5_1_1_xxl'"], {}, "is an address and no folder"),
    ([RUN], ["TARGET = '~nobody-here/t5_1_1_xxl'"], {}, "there is no such home directory"),
    ([RUN], [], {"target_model": "runs/mine"}, "the target runs/mine is not here"),
    ([RUN], [], {"gamma": 0}, "--gamma=0"),
    ([RUN], [], {"gamma": 10**9}, "--gamma=1000000000: 1 to 1024 tokens"),
    ([RUN], ["train.model = 't5_small'"], {}, r"train.model = 't5_small': expected @T5Config\(\) or @DecoderLMConfig"),
    ([RUN], ["train.data = 3"], {}, r"train.data = 3: expected @DataConfig\(\)"),
    ([RUN], ["train.step_config = None"], {}, r"train.step_config = None: expected @StepConfig\(\)"),
    ([RUN], ["StepConfig.method = 'skd'"], {}, r"StepConfig.method = 'skd': expected @Method\(\)"),
    (["runs/finetune.gin"], ["StepConfig.target_length = 8"], {}, "target_length is 32 and StepConfig.target_length 8"),
    (["runs/finetune.gin"], ["train.target = 'runs/t5_1_1_xl'"], {}, "'sft' learns from the data alone"),
    ([RUN], ["train.dtype = 'int8'"], {"draft_model": "t5_small"}, "train.dtype is 'int8'; there are float32, bfloat16"),
    (["runs/finetune.gin"], ["DataConfig.pack = True"], {}, "packed rows are not planned for"),
    (["runs/distill_xxxl.gin"], [], {}, "no gin file 'runs/distill_xxxl.gin'"),
  ],
)
def test_what_cannot_be_planned(files, bindings, flags, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match=message):
    plan.request_from_gin(files, bindings, **flags)


def test_a_model_that_is_there_says_itself_what_it_is(tmp_path):
  model = T5(T5Config.named("t5_tiny"))
  weights.save_model(tmp_path / "t5_1_1_xxl", model, model.init(jax.random.key(0)))
  found = plan.request_from_gin([RUN], [f"TARGET = {str(tmp_path / 't5_1_1_xxl')!r}"], draft_model="t5_1_1_small")
  assert found.teacher == model
  found = plan.request_from_gin([RUN], [], target_model=str(tmp_path / "t5_1_1_xxl"), draft_model="t5_1_1_small")
  assert found.teacher == model
