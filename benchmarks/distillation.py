"""Time one on-policy distillation step and its pieces; random weights, no EOS stop.

    python benchmarks/distillation.py                       # T5 v1.1 small teaches a d256 draft
    python benchmarks/distillation.py --preset quickstart   # the quickstart's pair
    python benchmarks/distillation.py --preset base         # T5 v1.1 base teaches small, bfloat16: for a GPU
    python benchmarks/distillation.py --against huggingface

What the columns mean is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import against_huggingface
import jax
import jax.numpy as jnp
import numpy as np
import optax
import printing
import random_models

from distillspec_jax import process_memory, tokens, weights
from distillspec_jax.analysis import latency
from distillspec_jax.distillation import losses, methods, rollouts
from distillspec_jax.distillation.costs import Size
from distillspec_jax.distillation.optimizers import OPTIMIZERS, OptimizerConfig
from distillspec_jax.distillation.step import (
    StepConfig,
    TrainState,
    abstract_state,
    compile_train_step,
    compiler_options,
    init_state,
    make_train_step,
)
from distillspec_jax.models import T5, LanguageModel
from distillspec_jax.planning.chips import peak_flops
from distillspec_jax.types import ConfigError, Params

PRESETS = {
    "small": dict(teacher="t5_1_1_small", student="d256", batch=8, input_length=128, output_length=64),
    "quickstart": dict(teacher="t5_mini_target", student="t5_mini_draft", batch=32, input_length=64, output_length=32),
    "base": dict(
        teacher="t5_1_1_base:dtype=bfloat16,param_dtype=bfloat16",
        student="t5_1_1_small:dtype=bfloat16",
        batch=32,
        input_length=128,
        output_length=64,
    ),
}
WHOLE = "whole step"

Model = tuple[LanguageModel, Params]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Measure, print, and give the report that --json writes."""
  args = _parse(argv)
  if args.memory_of:
    return report_memory(args)
  if args.against:
    # On a GPU torch and the processes whose memory is measured need room beside this one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  environment = latency.environment()
  if args.against:
    environment["against"] = {against_huggingface.TITLE: against_huggingface.version()}
  print(printing.environment_line(environment), flush=True)
  for title, version in environment.get("against", {}).items():
    print(f"{title}: {version}", flush=True)
  print(
      f"teacher {args.teacher}, student {args.student}, batch {args.batch}, {args.input_length} tokens in, "
      f"{args.output_length} sampled, {args.divergence}, {args.optimizer}, chunks of {args.chunk}"
      f"{', rematerialised' if args.remat else ''}, medians of {args.repeats}"
  )
  pieces = Pieces(args, random_models.make(args.teacher, seed=0), random_models.make(args.student, seed=1))
  report = {"benchmark": "distillation", "settings": vars(args), "environment": environment}
  report |= _compared(pieces) if args.against else _measured(pieces)
  printing.write_json(args.json, report)
  return report


def _measured(pieces: Pieces) -> dict[str, Any]:
  programs = pieces.compile()
  timings = latency.interleaved({name: call for name, (_, call) in programs.items()}, pieces.args.repeats)
  rows = pieces_rows(pieces, programs, timings)
  print("\n" + pieces_table(rows), flush=True)
  return {"pieces": rows, "tokens": int(timings[WHOLE].result["tokens"])}


def _compared(pieces: Pieces) -> dict[str, Any]:
  import distillation_torch  # noqa: PLC0415  (needs torch)

  theirs, found = distillation_torch.prepare(pieces)
  programs = pieces.compile()
  calls = {("ours", name): call for name, (_, call) in programs.items()}
  calls |= {("torch", name): call for name, call in {WHOLE: theirs, **theirs.pieces()}.items()}
  timings = latency.interleaved(calls, pieces.args.repeats)
  rows = pieces_rows(pieces, programs, {name: timings["ours", name] for name in programs})
  for row in rows:
    row["torch_seconds"] = timings["torch", row["piece"]].median_ms / 1e3
    row["torch_to_ours"] = row["torch_seconds"] / row["seconds"]
  print("\n" + distillation_torch.tables(rows, found["memory"]), flush=True)
  return {"pieces": rows, "tokens": int(timings["ours", WHOLE].result["tokens"])} | found


def report_memory(args) -> dict[str, Any]:
  """Make a few steps, say on stdout how much memory they took beyond the imports, and nothing else.

  Returns:
    What is printed as JSON: "bytes", at most; "before_bytes", after loading and compiling; "on_device", whether the
    first is what a GPU gave instead, and the second None.
  """
  if args.memory_of == "torch":
    import distillation_torch  # noqa: PLC0415  (needs torch)

    make = lambda: distillation_torch.loaded(args)  # noqa: E731
    against_huggingface.version()  # imports what loading imports
  else:
    make = lambda: _loaded(args)  # noqa: E731
  imported = printing.resident_bytes()
  step, peak_on_device = make()
  before = printing.resident_bytes() - imported
  for _ in range(args.repeats):
    step()
  if on_device := peak_on_device():
    report = {"bytes": on_device, "before_bytes": None, "on_device": True}
  else:
    report = {"bytes": printing.resident_bytes(peak=True) - imported, "before_bytes": before, "on_device": False}
  print(json.dumps(report), flush=True)
  return report


def _loaded(args) -> tuple[Callable, Callable[[], int]]:
  """Make the step of weights in files, in as little memory as it takes: a call, and what says how much a GPU gave."""

  def load(who: str) -> Model:
    config = random_models.shape(getattr(args, who))
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return weights.load_model(pathlib.Path(args.weights, who), config=dtypes)

  abstract = (T5(random_models.shape(getattr(args, who))) for who in ("teacher", "student"))
  pieces = Pieces(args, *((model, model.abstract_params()) for model in abstract))
  # Compiled before there are weights: what compiling takes for a while is not needed beside them.
  compiled = pieces.compile_step(abstract_state(pieces.student, pieces.tx))
  process_memory.return_freed()
  pieces = Pieces(args, load("teacher"), load("student"))
  # The given parameters themselves, no copy: the first step takes them over.
  state = TrainState(jnp.zeros((), jnp.int32), pieces.params, jax.jit(pieces.tx.init)(pieces.params))
  process_memory.return_freed()
  _, step = pieces.stepping(state, compiled)
  stats = lambda: jax.local_devices()[0].memory_stats() or {}  # noqa: E731
  return step, lambda: stats().get("peak_bytes_in_use", 0)


class Pieces:
  """The step, and the same work as programs of their own, on the same arrays."""

  def __init__(self, args, teacher: Model, student: Model):
    self.args = args
    self.teacher, self.teacher_params = teacher
    self.student, self.params = student
    self.learner = T5(dataclasses.replace(self.student.config, remat=args.remat))
    method = methods.named("on_policy_gkd", divergence=args.divergence)
    self.config = StepConfig(method, target_length=args.output_length, chunk=args.chunk, remat=args.remat)
    self.tx, _ = OptimizerConfig(name=args.optimizer, learning_rate=args.learning_rate).build(1)
    prompts = random_models.prompts(args.batch, args.input_length, self.student.vocab_size)
    self.prompts = {"encoder_input_tokens": jnp.asarray(prompts)}
    self.key = jax.random.key(0)

  def compile(self) -> dict[str, tuple[Any, Callable]]:
    """Give name -> (compiled program, a call of it without arguments), the whole step first."""
    sample = jax.jit(self.rollout).lower(self.params, self.prompts, self.key).compile()
    batch, _ = sample(self.params, self.prompts, self.key)
    teach = jax.jit(self.teach).lower(self.teacher_params, batch).compile()
    learn = jax.jit(jax.grad(self.loss), compiler_options=compiler_options(self.config)).lower(self.params, batch).compile()
    gradients = learn(self.params, batch)
    return {
        WHOLE: self.stepping(init_state(self.student, self.tx, params=self.params)),
        "rollout": (sample, lambda: sample(self.params, self.prompts, self.key)),
        "teacher": (teach, lambda: teach(self.teacher_params, batch)),
        "student": (learn, lambda: learn(self.params, batch)),
        "optimizer": self._updating(gradients),
    }

  def flops(self) -> dict[str, float]:
    """Give name -> floating-point operations (`distillation.costs`); the optimizer's are not counted."""
    teacher, student = Size.of(self.teacher), Size.of(self.student)
    read = self.args.batch * self.args.input_length, self.args.batch * self.args.output_length
    parts = {"rollout": student.forward(*read), "teacher": teacher.forward(*read)}
    parts["student"] = 3.0 * student.forward(*read)
    return {WHOLE: sum(parts.values()), **parts}

  def judged(self, sampled: np.ndarray) -> dict[str, float]:
    """Take the step on given sequences [B, T], in float32 throughout: "loss" and "gradient_norm"."""
    exact = dict(dtype="float32", param_dtype="float32")
    teacher, student = (T5(dataclasses.replace(model.config, **exact)) for model in (self.teacher, self.student))
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
    method = dataclasses.replace(self.config.method, fixed_data_fraction=1.0)
    step = make_train_step(student, teacher, self.tx, dataclasses.replace(self.config, method=method))
    batch = self.prompts | {
        "decoder_input_tokens": tokens.shift_right(sampled),
        "decoder_target_tokens": jnp.asarray(sampled),
        "decoder_loss_weights": tokens.valid_mask(sampled),
    }
    with jax.default_matmul_precision("highest"):
      state = init_state(student, self.tx, params=cast(self.params))
      _, metrics = jax.jit(step)(state, cast(self.teacher_params), batch, self.key)
    total, count = metrics["loss"]
    return {"loss": float(total / count), "gradient_norm": float(metrics["gradient_norm"])}

  def rollout(self, params, prompts, key):
    """Sample y with the student, as the step does: the batch, and the source."""
    model = (self.config.method, self.student, params, self.teacher, None)
    return rollouts.rollout(*model, prompts, key, length=self.config.target_length)

  def teach(self, params, batch):
    """Run the teacher over the sequences and reduce its logits chunk by chunk: [T/C, B, C] float32."""
    hidden = self.teacher.hidden(params, batch)
    rows, length, width = hidden.shape
    chunk = min(self.args.chunk, length)
    padded = jnp.pad(hidden, ((0, 0), (0, -length % chunk), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(rows, -1, chunk, width), 1, 0)
    return jax.lax.map(lambda h: jnp.max(self.teacher.unembed(params, h), axis=-1), chunks)

  def loss(self, params, batch):
    """Run the student over the sequences and compare with a teacher that costs no matrix product: a scalar."""
    hidden = self.learner.hidden(params, batch)
    slope = jnp.linspace(0.0, 1.0, self.student.vocab_size)
    return losses.chunked_loss(
        self.config.method.divergence,
        (lambda h: self.student.unembed(params, h), hidden),
        batch["decoder_loss_weights"],
        # It hangs on the hidden states, so that it cannot be computed once and kept.
        teacher=((lambda h: h[..., :1].astype(jnp.float32) * slope[None, None]), hidden),
        chunk=self.config.chunk,
        reduction=self.config.reduction,
    ).loss

  def compile_step(self, state: TrainState) -> Any:
    """Compile the whole step for a state like this one."""
    step = compile_train_step(self.student, self.teacher, self.tx, self.config)
    return step.lower(state, self.teacher_params, self.prompts, self.key).compile()

  def stepping(self, state: TrainState, compiled: Any = None) -> tuple[Any, Callable]:
    """Give the compiled step and a call of it; the calls begin with this state, which they give away."""
    compiled = compiled or self.compile_step(state)
    state = [state]

    def call():
      state[0], metrics = compiled(state[0], self.teacher_params, self.prompts, self.key)
      # The state is waited for with the metrics; it must not be in the result, for the next call gives it away.
      jax.block_until_ready(state[0])
      return metrics

    return compiled, call

  def _updating(self, gradients):
    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, gradients):
      updates, opt_state = self.tx.update(gradients, state.opt_state, state.params)
      return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

    state = [init_state(self.student, self.tx, params=self.params)]
    compiled = update.lower(state[0], gradients).compile()

    def call():
      state[0] = compiled(state[0], gradients)
      jax.block_until_ready(state[0])

    return compiled, call


def pieces_rows(pieces: Pieces, programs, timings) -> list[dict[str, Any]]:
  """Say what our whole step and each piece take.

  Raises:
    RuntimeError: a row ended early, so that the times do not compare.
  """
  sampled = int(timings[WHOLE].result["tokens"])
  if sampled != pieces.args.batch * pieces.args.output_length:
    raise RuntimeError(f"a row ended early, so the times do not compare: {sampled} tokens")
  flops, peak = pieces.flops(), peak_flops(jax.devices()[0].device_kind)
  rows = []
  for name, (compiled, _) in programs.items():
    seconds = timings[name].median_ms / 1e3
    rows.append({
        "piece": name,
        "seconds": seconds,
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
        "flops": flops.get(name),
        "peak_share": flops[name] / seconds / peak if peak and name in flops else None,
    })
  return rows


def pieces_table(rows: list[dict[str, Any]]) -> str:
  """Lay out the whole step, its pieces and their sum."""
  whole = next(row["seconds"] for row in rows if row["piece"] == WHOLE)
  pieces = sum(row["seconds"] for row in rows if row["piece"] != WHOLE)
  lines = [
      [
          row["piece"],
          f"{row['seconds']:.4f}",
          f"{row['seconds'] / whole:.0%}",
          row["temporary_bytes"] / 1e6,
          printing.share(row["peak_share"]),
      ]
      for row in rows
  ]
  lines.append(["sum of the pieces", f"{pieces:.4f}", f"{pieces / whole:.0%}", None, None])
  return printing.table(["piece", "seconds", "of the whole", "temporary MB", "of peak FLOP/s"], lines)


def _parse(argv: Sequence[str] | None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--preset", choices=sorted(PRESETS), default="small", help="shapes, unless given one by one")
  parser.add_argument("--teacher", help="a size of T5Config.named, or d256; changes after a colon")
  parser.add_argument("--student", help="the same")
  parser.add_argument("--batch", type=int)
  parser.add_argument("--input_length", type=int, help="prompt tokens")
  parser.add_argument("--output_length", type=int, help="sampled tokens")
  parser.add_argument("--divergence", default="fkl")
  parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
  parser.add_argument(
      "--learning_rate", type=float, default=1e-9, help="so small that the student does not learn to end its texts"
  )
  parser.add_argument("--chunk", type=int, default=8, help="positions of T whose logits exist at a time")
  parser.add_argument("--remat", action="store_true", help="compute the student's layers again for the gradient")
  parser.add_argument("--repeats", type=int, default=7, help="timed calls of each, in turns")
  parser.add_argument("--against", choices=("huggingface",), help="set the same step in torch beside ours")
  parser.add_argument("--json", metavar="FILE", help="write everything there as JSON too")
  # For the processes of their own in which --against measures memory.
  parser.add_argument("--memory_of", choices=("ours", "torch"), help=argparse.SUPPRESS)
  parser.add_argument("--weights", help=argparse.SUPPRESS)
  parser.add_argument("--device", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  for name, value in PRESETS[args.preset].items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  for name in ("batch", "input_length", "output_length", "repeats"):
    if np.min(getattr(args, name)) < 1:
      raise ConfigError(f"--{name} is {getattr(args, name)}: must be at least 1.")
  if args.against and (args.divergence, args.optimizer) != ("fkl", "adamw"):
    raise ConfigError("--against compares fkl and adamw: leave --divergence and --optimizer as they are.")
  return args


if __name__ == "__main__":
  printing.run(main)
