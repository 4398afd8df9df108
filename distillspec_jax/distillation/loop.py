"""The host loop: batches -> compiled step -> figures, validation, the best model, checkpoints.

Steps are dispatched without waiting; batches are all that goes to the devices, and figures are fetched at log
intervals only. A checkpoint holds the place in the data and what the loop itself remembers, and a step's draws depend
on the seed and its number alone, so a run that is killed and called again goes on bit for bit as if nothing had
happened. One that is told to stop saves first, between two steps; a validation that was due then is made when the run
goes on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from distillspec_jax import process_memory
from distillspec_jax.distillation.best import Best, check_criterion
from distillspec_jax.distillation.costs import Meter
from distillspec_jax.distillation.figures import BrokenTarget, Figures, NonFinite
from distillspec_jax.distillation.optimizers import averaged
from distillspec_jax.distillation.progress import Progress
from distillspec_jax.distillation.step import TrainState, TrainStep, run_key
from distillspec_jax.distillation.stopping import Patience
from distillspec_jax.distillation.target_check import all_finite, require_finite
from distillspec_jax.distillation.validation import LOSS, Validation
from distillspec_jax.parallel import multihost, partitioning
from distillspec_jax.parallel.preemption import Notice, Preempted
from distillspec_jax.types import ConfigError, Params
from distillspec_jax.weights.checkpoints import RunCheckpoints

_REMEMBERED = "loop"  # beside the place in the data, in a checkpoint

WriteScalars = Callable[[int, Mapping[str, float]], None]


class NonFiniteLoss(ConfigError):
  """Training came to NaN or infinity; nothing of it was saved."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long a run goes on, and when it looks up from its work.

  Attributes:
    steps: updates in all, those of an interrupted run included.
    seed: of the initial parameters, the sampled sequences and dropout.
    log_every: steps between two fetches of figures.
    eval_every: steps between two validations; also before the first step and after the last. 0 = never.
    eval_examples: held-out prompts of a validation.
    eval_batch_size: prompts at a time.
    eval_gamma: tokens drafted a block when a validation measures block efficiency; 0 = it does not.
    eval_gamma_examples: held-out prompts that it is measured on: decoding costs more than scoring.
    best_by: the figure that chooses MODEL_DIR/best: "alpha_t1", "alpha_t0" or "validation_loss"; an α where
      there is no target to measure it against falls back to "validation_loss".
    stop_after: validations in a row without a better `best_by` that end the run; 0 = it goes on to `steps`.
    checkpoint_every: steps between two checkpoints; also after the last step.
    keep_checkpoints: how many of the newest stay.

  Raises:
    ConfigError: a value outside its range.
  """

  steps: int
  seed: int = 0
  log_every: int = 50
  eval_every: int = 200
  eval_examples: int = 256
  eval_batch_size: int = 64
  eval_gamma: int = 5
  eval_gamma_examples: int = 64
  best_by: str = "alpha_t1"
  stop_after: int = 0
  checkpoint_every: int = 200
  keep_checkpoints: int = 3

  def __post_init__(self):
    for field, least in (
        ("steps", 1), ("seed", 0), ("log_every", 1), ("eval_every", 0), ("eval_examples", 1), ("eval_batch_size", 1),
        ("eval_gamma", 0), ("eval_gamma_examples", 1), ("stop_after", 0), ("checkpoint_every", 1),
        ("keep_checkpoints", 1),
    ):  # fmt: skip
      if getattr(self, field) < least:
        raise ConfigError(f"TrainConfig.{field} is {getattr(self, field)}; it must be at least {least}")
    if self.seed >= 2**31:
      raise ConfigError(f"TrainConfig.seed is {self.seed}; it must be below 2**31")
    if self.stop_after and not self.eval_every:
      raise ConfigError(f"TrainConfig.stop_after is {self.stop_after} validations, and eval_every 0: there are none")
    check_criterion(self.best_by)


class Batches(Protocol):
  """An endless iterator of batches that knows its place."""

  def __next__(self) -> Mapping[str, np.ndarray]: ...

  def state(self) -> dict:
    """Give the place after the last batch handed out, in JSON's terms."""


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a run is made of.

  Attributes:
    step: of `step.compile_train_step`.
    batches: stands at the state's place in the data.
    target_params: the teacher's parameters, or None.
    target_name: what errors call the teacher: its directory.
    checkpoints: where states are saved, or None to save nothing.
    validation: held-out prompts, or None.
    best: keeps the best parameters, or None.
    meter: adds up what the run costs, or None.
    remembered: what `split_place` found in the checkpoint that the run goes on from.
    notice: says when to stop before the end, or None.
    mesh: the devices' mesh, or None.
    name: stands before every line of progress.
  """

  step: TrainStep
  batches: Batches
  target_params: Params | None = None
  target_name: str = "the target"
  checkpoints: RunCheckpoints | None = None
  validation: Validation | None = None
  best: Best | None = None
  meter: Meter | None = None
  remembered: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  notice: Notice | None = None
  mesh: jax.sharding.Mesh | None = None
  name: str = "train"


def split_place(saved: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
  """Part a checkpoint's `data_state`: the place in the data, and what the loop remembered (of old ones: nothing)."""
  if saved is None:
    return None, {}
  return {name: value for name, value in saved.items() if name != _REMEMBERED}, dict(saved.get(_REMEMBERED, {}))


def train(
    config: TrainConfig, parts: Parts, state: TrainState, write_scalars: WriteScalars = lambda step, scalars: None
) -> TrainState:
  """Train from `state.step` to `config.steps`, or until `config.stop_after` says that it is enough.

  Args:
    config: how long, and when to log, validate and save.
    parts: the compiled step and what surrounds it.
    state: where to begin; donated to the first step.
    write_scalars: receives (step, {name: number}) at each log interval and validation.

  Returns:
    The final state.

  Raises:
    NonFiniteLoss: a loss, gradient, parameter or the target's logits are NaN or infinite; the last good checkpoint
      stays the last.
    ConfigError: the data came to an end, or the target's parameters are not finite.
    Preempted: `parts.notice` said to stop; what had been done is saved.
  """
  if parts.target_params is not None:
    require_finite(parts.target_params, parts.target_name)
  done, key = int(state.step), run_key(config.seed, parts.mesh)
  run = _Run(config, parts, done, write_scalars)
  try:
    if run.is_over() or run.begin(state):
      return state
    for index in range(done, config.steps):
      state = run.one_step(state, key, index)
      if run.between(state, index + 1):
        break
    return state
  except BrokenTarget as found:
    raise NonFiniteLoss(_broken_target(str(found), parts)) from None
  except NonFinite as found:
    raise NonFiniteLoss(_diverged(str(found), parts.checkpoints)) from None
  finally:
    run.close()


class _Run:
  """One call of `train`: what it remembers from step to step, and what it does between them."""

  def __init__(self, config: TrainConfig, parts: Parts, done: int, write: WriteScalars):
    """Recall what a checkpoint remembers of the run."""
    self._config, self._parts, self._done, self._write = config, parts, done, write
    self._progress = Progress(config.steps, done, parts.name, quiet=not multihost.is_first())
    with_target = parts.validation is not None and parts.validation.target is not None
    self._patience = Patience(
        config.best_by if with_target else LOSS, 0 if parts.validation is None else config.stop_after
    )
    self._patience.restore(parts.remembered.get("patience", {}))
    if parts.meter is not None:
      parts.meter.restore(parts.remembered.get("cost", {}))
    self._figures = Figures(parts.meter)
    if "figures" in parts.remembered:
      self._figures.restore(parts.remembered["figures"])
    self._validated = parts.remembered.get("validated", done or None)  # the step of the last validation

  def is_over(self) -> bool:
    """Say whether, and tell the user that, nothing is left to do."""
    config, done, patience = self._config, self._done, self._patience
    if done < config.steps and not patience.exhausted:
      return False
    stopped = "" if done >= config.steps else f" and the run stopped early: no better {patience.criterion}"
    self._progress.say(f"step {done} of {config.steps} is done already{stopped}")
    return True

  def begin(self, state: TrainState) -> bool:
    """Do what is due before the first step of this call; say whether the run is over."""
    self._stop_if_told(state, self._done)
    if self._validated != self._done and (self._done == 0 or _due(self._config.eval_every, self._done, False)):
      self._validate(state, self._done)
    self._figures.restart_clock()
    stopped = self._is_stopped(self._done)
    if stopped and self._done % self._config.log_every:
      self._log(self._done)
    return stopped

  def one_step(self, state: TrainState, key: jax.Array, index: int) -> TrainState:
    """Take a batch and dispatch one step; the first one is waited for, because it compiles."""
    parts, first, began = self._parts, index == self._done, time.monotonic()
    try:
      batch = next(parts.batches)
    except StopIteration:
      raise ConfigError(f"the training data came to an end at step {index}: does its iterator repeat?") from None
    waited = time.monotonic() - began
    placed = partitioning.put_batch(batch, parts.mesh)
    if first:
      self._progress.say("compiling the training step ...")
    state, metrics = multihost.settled(parts.step(state, parts.target_params, placed, key))
    if first:
      jax.block_until_ready(metrics)
      process_memory.return_freed()
      self._progress.say(f"compiled; first step after {time.monotonic() - began:.1f} s")
      self._figures.restart_clock()
    self._figures.add(index + 1, metrics, waited)
    self._progress.advance()
    return state

  def between(self, state: TrainState, step: int) -> bool:
    """Do what is due after a step; say whether the run is over."""
    config, last = self._config, step == self._config.steps
    logged = last or step % config.log_every == 0
    if logged:
      self._log(step)
    if not last:
      self._stop_if_told(state, step)
    if _due(config.eval_every, step, last):
      self._figures.fetch()
      self._validate(state, step)
      self._figures.restart_clock()
    stopped = self._is_stopped(step)
    if stopped and not logged:
      self._log(step)
    if _due(config.checkpoint_every, step, last or stopped):
      self._save(state, step)
    return stopped

  def close(self) -> None:
    """Leave the bar as it stands, and wait for the checkpoint that is being written."""
    self._progress.close()
    if self._parts.checkpoints is not None:
      self._parts.checkpoints.wait()

  def _is_stopped(self, step: int) -> bool:
    patience = self._patience
    if patience.exhausted:
      self._progress.say(f"stopped at step {step}: {patience.since} validations without a better {patience.criterion}")
    return patience.exhausted

  def _stop_if_told(self, state: TrainState, step: int) -> None:
    """Save and leave where the notice has come; a validation that is due now would keep the machine too long."""
    if self._parts.notice is None or not self._parts.notice.reached():
      return
    if step > self._done:
      self._save(state, step)
    if not step:
      raise Preempted("told to stop before the first step: the same command begins again")
    raise Preempted(
        f"told to stop: step {step} of {self._config.steps} is saved, and the same command goes on from there"
    )

  def _log(self, step: int) -> None:
    scalars = self._figures.collect()
    self._write(step, scalars)
    self._progress.show(step, scalars)

  def _validate(self, state: TrainState, step: int) -> None:
    """Measure the held-out figures, report them, offer the parameters to `best`."""
    parts, self._validated = self._parts, step
    if parts.validation is None or not self._config.eval_every:
      return
    if not parts.validation.ready:
      self._progress.say("decoding the target's outputs on held-out prompts ...")
    params = averaged(state.opt_state, state.params)
    measured = parts.validation.measure(params)
    self._write(step, measured)
    self._patience.see(measured)
    kept = parts.best is not None and parts.best.offer(step, params, measured)
    text = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
    self._progress.say(f"validation at step {step}: {text}{'  (best so far)' if kept else ''}")

  def _save(self, state: TrainState, step: int) -> None:
    """Hand the state over to be written; files are written while the run goes on."""
    parts = self._parts
    self._figures.fetch()
    if parts.checkpoints is not None:
      if not bool(all_finite(state.params)):
        raise NonFinite(f"a parameter is NaN or infinite at step {step}")
      remembered = {
          "patience": self._patience.state(),
          "cost": {} if parts.meter is None else parts.meter.state(),
          "figures": self._figures.state(),
          "validated": self._validated,
      }
      parts.checkpoints.save(step, state, {**parts.batches.state(), _REMEMBERED: remembered}, wait=False)
    self._figures.restart_clock()


def _due(every: int, step: int, last: bool) -> bool:
  return bool(every) and (last or step % every == 0)


def _broken_target(what: str, parts: Parts) -> str:
  return (
      f"{what}: training stopped and nothing of it was saved; {_last_good(parts.checkpoints)}. No setting of the training"
      f" is at fault: look at the weights of {parts.target_name}, and take float32 where it computes in bfloat16"
  )


def _last_good(checkpoints: RunCheckpoints | None) -> str:
  steps = checkpoints.steps() if checkpoints is not None else []
  return f"the last good checkpoint is that of step {steps[-1]}" if steps else "no checkpoint had been saved"


def _diverged(what: str, checkpoints: RunCheckpoints | None) -> str:
  return (
      f"{what}: training stopped and nothing of it was saved; {_last_good(checkpoints)}. Lower"
      " OptimizerConfig.learning_rate, warm up longer or set OptimizerConfig.clip_norm"
  )
