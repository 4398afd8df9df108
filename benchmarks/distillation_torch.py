"""The on-policy step in torch, as a user of transformers writes it, on our weights; and what compares it with ours."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import against_huggingface
import jax
import numpy as np
import printing
import random_models
import torch
import torch.nn.functional as F

from distillspec_jax.tokens import EOS_ID
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import huggingface

_ROLES = ("teacher", "student")
_FLOAT32 = ("float32", "float32")
_TOLERANCE = 1e-4  # relative, of the loss and of its gradient's norm
_STEPS = 3  # that the memory is the peak of


def prepare(pieces) -> tuple[Step, dict[str, Any]]:
  """Take our weights over, hold the two steps against each other and measure the memory of both.

  Args:
    pieces: our step, distillation.Pieces.

  Returns:
    Torch's step; and for the report "check" ("ours", "torch" -> "loss", "gradient_norm") and "memory" ("ours",
    "torch" -> what `report_memory` gives).

  Raises:
    ConfigError: models that transformers cannot hold, or dtypes or a device that torch has not.
    RuntimeError: the two are not the same step.
  """
  args, device = pieces.args, _device()
  models = {"teacher": (pieces.teacher, pieces.teacher_params), "student": (pieces.student, pieces.params)}
  dtypes = _dtypes(args)
  with tempfile.TemporaryDirectory() as folder:
    for role, model in models.items():
      huggingface.export(pathlib.Path(folder, role), *model)
    memory = {library: _memory_of(library, folder, device, args) for library in ("ours", "torch")}
    exact = Step(folder, args, device, dict.fromkeys(_ROLES, _FLOAT32))
    theirs = Step(folder, args, device, dtypes)
  sequences = exact.rollout()
  check = {"ours": pieces.judged(np.asarray(sequences[:, 1:].cpu(), np.int32)), "torch": exact.judged(sequences)}
  for name, value in check["ours"].items():
    if not np.isclose(value, check["torch"][name], rtol=_TOLERANCE, atol=0.0):
      raise RuntimeError(f"not the same step: {name} of the same sequences is {value}, torch's {check['torch'][name]}")
  if device == "cuda":
    torch.set_float32_matmul_precision("high")  # as jax's products of float32 on a GPU
  return theirs, {"check": check, "memory": memory}


def loaded(args) -> tuple[Callable, Callable[[], int]]:
  """Make the step of weights in files: a call, and what says how much a GPU gave at most, in bytes (a CPU: 0)."""
  peak = torch.cuda.max_memory_allocated if args.device == "cuda" else lambda: 0
  return Step(args.weights, args, args.device, _dtypes(args)), peak


def tables(rows: list[dict[str, Any]], memory: Mapping[str, Mapping[str, Any]]) -> str:
  """Lay out the times and the memory of both."""
  columns = ["piece", "ours s", "torch s", "torch/ours", "ours, of peak FLOP/s"]
  lines = [
      [
          row["piece"],
          f"{row['seconds']:.4f}",
          f"{row['torch_seconds']:.4f}",
          row["torch_to_ours"],
          printing.share(row["peak_share"]),
      ]
      for row in rows
  ]
  ours, theirs = (memory[library]["bytes"] / 1e6 for library in ("ours", "torch"))
  what = "on the GPU" if memory["ours"]["on_device"] else "of the process, beyond the imports"
  peaks = printing.table(["peak memory", "ours MB", "torch MB", "ours/torch"], [[what, ours, theirs, ours / theirs]])
  return printing.table(columns, lines) + "\n\n" + peaks


class Step:
  """One on-policy step, FKL, and its pieces; the student's parameters move with every call."""

  def __init__(self, folder: str, args, device: str, dtypes: Mapping[str, tuple[str, str]]):
    """Load both models.

    Args:
      folder: holds "teacher" and "student", each as `weights.huggingface.export` writes it.
      args: batch, input_length, output_length and learning_rate.
      device: torch's name of it.
      dtypes: "teacher" and "student" -> (dtype to compute in, dtype of the parameters).
    """
    torch.manual_seed(0)
    self.device, self.length = device, args.output_length
    self.teacher, self.student = (
        against_huggingface.load(pathlib.Path(folder, role)).to(device=device, dtype=getattr(torch, dtypes[role][1]))
        for role in _ROLES
    )
    # Parameters kept in float32 and multiplied in bfloat16 are what torch calls autocast.
    self._mixed = {role: to_compute != to_keep for role, (to_compute, to_keep) in dtypes.items()}
    prompts = random_models.prompts(args.batch, args.input_length, self.student.config.vocab_size)
    self.prompts = torch.tensor(prompts, dtype=torch.long, device=device)
    self.mask = torch.ones_like(self.prompts)
    self.teacher.requires_grad_(False)
    self.student.train()
    # Fused is what transformers' own Trainer takes by default, and torch's fastest.
    self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)

  def rollout(self) -> torch.Tensor:
    """Sample with the student, nothing cut off: [B, 1 + T] int64, the start token first."""
    self.student.eval()
    with torch.no_grad(), self._precision("student"):
      sequences = self.student.generate(
          input_ids=self.prompts,
          attention_mask=self.mask,
          do_sample=True,
          temperature=1.0,
          top_k=0,
          top_p=1.0,
          max_new_tokens=self.length,
          use_cache=True,
      )
    self.student.train()
    return sequences

  def teach(self, sequences: torch.Tensor) -> torch.Tensor:
    """Give the teacher's log-probabilities [B, T, V] float32."""
    with torch.no_grad():
      return F.log_softmax(self._logits("teacher", sequences), dim=-1)

  def loss(self, sequences: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Give KL(teacher || student), the mean over a sequence's tokens, then over sequences: a scalar."""
    log_probs = F.log_softmax(self._logits("student", sequences), dim=-1)
    divergences = F.kl_div(log_probs, reference, reduction="none", log_target=True).sum(-1)
    ends = (sequences[:, 1:] == EOS_ID).long()
    weights = (ends.cumsum(-1) == ends).float()  # nothing counts after the end
    return ((divergences * weights).sum(-1) / weights.sum(-1)).mean()

  def learn(self, sequences: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Give the loss and leave its gradients with the student."""
    loss = self.loss(sequences, reference)
    loss.backward()
    return loss.detach()

  def __call__(self) -> float:
    """Make a step and give its loss.

    Raises:
      RuntimeError: a row ended early, so that the times do not compare.
    """
    sequences = self.rollout()
    if sequences.shape != (len(self.prompts), 1 + self.length) or (sequences == EOS_ID).any():
      raise RuntimeError(f"torch: a row ended early, so the times do not compare; sequences {sequences}")
    loss = self.learn(sequences, self.teach(sequences))
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    self._wait()
    return float(loss)

  def pieces(self) -> dict[str, Callable[[], None]]:
    """Give the step's pieces as calls that wait: "rollout", "teacher", "student", "optimizer"."""
    sequences = self.rollout()
    reference = self.teach(sequences)
    self.learn(sequences, reference)
    gradients = [parameter.grad for parameter in self.student.parameters()]

    def student():
      self.optimizer.zero_grad(set_to_none=True)
      self.learn(sequences, reference)

    def optimizer():
      for parameter, gradient in zip(self.student.parameters(), gradients, strict=True):
        parameter.grad = gradient
      self.optimizer.step()
      self.optimizer.zero_grad(set_to_none=True)

    teacher = lambda: self.teach(sequences)  # noqa: E731
    calls = {"rollout": self.rollout, "teacher": teacher, "student": student, "optimizer": optimizer}
    return {name: lambda call=call: (call(), self._wait())[1] for name, call in calls.items()}

  def judged(self, sequences: torch.Tensor) -> dict[str, float]:
    """Give "loss" and "gradient_norm" on given sequences."""
    loss = self.learn(sequences, self.teach(sequences))
    squares = sum(float(parameter.grad.square().sum()) for parameter in self.student.parameters())
    self.optimizer.zero_grad(set_to_none=True)
    return {"loss": float(loss), "gradient_norm": squares**0.5}

  def _logits(self, role: str, sequences: torch.Tensor) -> torch.Tensor:
    with self._precision(role):
      inputs = dict(input_ids=self.prompts, attention_mask=self.mask, decoder_input_ids=sequences[:, :-1])
      return getattr(self, role)(**inputs, use_cache=False).logits.float()

  def _precision(self, role: str) -> contextlib.AbstractContextManager:
    return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self._mixed[role])

  def _wait(self) -> None:
    if self.device != "cpu":
      torch.cuda.synchronize()


def _device() -> str:
  """Choose torch's device to be ours.

  Raises:
    ConfigError: torch has no such device.
  """
  backend = jax.default_backend()
  if backend == "cpu" or (backend == "gpu" and torch.cuda.is_available()):
    return {"cpu": "cpu", "gpu": "cuda"}[backend]
  raise ConfigError(
      f"--against compares on one device: jax has a {backend} and torch {torch.__version__} cannot use it; install "
      "torch for it, or set JAX_PLATFORMS=cpu"
  )


def _dtypes(args) -> dict[str, tuple[str, str]]:
  found = {role: random_models.shape(getattr(args, role)) for role in _ROLES}
  for role, config in found.items():
    if (config.dtype, config.param_dtype) == ("float32", "bfloat16"):
      raise ConfigError(f"--against: torch has no float32 {role} of bfloat16 parameters; set dtype=bfloat16 too.")
  return {role: (config.dtype, config.param_dtype) for role, config in found.items()}


def _memory_of(library: str, folder: str, device: str, args) -> dict[str, Any]:
  """Let a process of its own make steps and say how much memory it took."""
  settings = ("teacher", "student", "batch", "input_length", "output_length", "chunk", "learning_rate")
  done = subprocess.run(
      [
          sys.executable,
          str(pathlib.Path(__file__).with_name("distillation.py")),
          *(f"--{name}={getattr(args, name)}" for name in settings),
          *(f"--memory_of={library}", f"--weights={folder}", f"--device={device}", f"--repeats={_STEPS}"),
          *(["--remat"] if args.remat else []),
      ],
      capture_output=True,
      text=True,
      # glibc keeps what threads have freed for each thread apart; two such arenas are enough for either library.
      env={"MALLOC_ARENA_MAX": "2"} | os.environ,
  )
  if done.returncode:
    raise RuntimeError(f"the process that measures the memory of {library} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])
