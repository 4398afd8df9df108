"""One evaluation from directories and names to files: what `evaluate` and `transfer` ask for, without flags."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from distillspec_jax import evaluation, weights
from distillspec_jax.analysis import gamma_choice, measure
from distillspec_jax.analysis.costs import Costs, Pair
from distillspec_jax.analysis.measure import MeasureConfig
from distillspec_jax.data import eval_set, task_info
from distillspec_jax.data.lookup import Changes, find_tasks
from distillspec_jax.decoding.speculative import check_pair
from distillspec_jax.parallel import mesh as meshes
from distillspec_jax.parallel import multihost, partitioning
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import loading

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be evaluated.

  Attributes:
    target, draft: model directories.
    task: a seqio task or mixture.
    output_dir: where metrics.json and outputs.jsonl go.
    split: of the task.
    gamma: tokens drafted a block, or "auto".
    measuring: further fields of MeasureConfig, but for gamma and max_new_tokens.
    input_length, target_length: tokens; 0 is the task's usual.
    num_examples: prompts; a smaller split gives what it has.
    vocabulary: for models that carry none.
    data_dir: TFDS's folder.
    prompt: a template in place of the task's own.
    mesh: sizes of data, fsdp, model; () is one device, or with several processes all devices, as data.
    target_partitioning, draft_partitioning: how each lies on the mesh, of `parallel.partitioning.TABLES`.
    profile: a folder for a trace of one batch.
    label: the run's name in reports.
  """

  target: str
  draft: str
  task: str
  output_dir: str
  split: str = "test"
  gamma: int | str = 5
  measuring: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  input_length: int = 0
  target_length: int = 0
  num_examples: int = 200
  vocabulary: str | None = None
  data_dir: str | None = None
  prompt: str | None = None
  mesh: tuple[int, ...] = ()
  target_partitioning: str = partitioning.SHARDED
  draft_partitioning: str = partitioning.SHARDED
  profile: str | None = None
  label: str = ""

  def __post_init__(self):
    for name in ("input_length", "target_length"):
      if getattr(self, name) < 0:
        raise ConfigError(f"{name} is {getattr(self, name)}: give a number of tokens, or 0 for the task's usual")
    for name in ("target_partitioning", "draft_partitioning"):
      partitioning.check_table(getattr(self, name), name)
    # Settings that cannot be are refused now; the task's usual length is known later, when the task is looked up.
    self._config(self.target_length or max(self.measuring.get("min_length", 0), 1))

  def lengths(self) -> tuple[int, int]:
    """Give S and T in tokens, once the task is registered."""
    usual = task_info.of(self.task)
    return self.input_length or usual.input_length, self.target_length or usual.target_length

  def config(self) -> MeasureConfig:
    """Give the measurement's settings, once the task is registered; "auto" stands as 1."""
    return self._config(self.lengths()[1])

  def _config(self, target_length: int) -> MeasureConfig:
    gamma = 1 if self.gamma == AUTO else self.gamma
    return MeasureConfig(max_new_tokens=target_length, gamma=gamma, **self.measuring)

  def settings(self) -> dict[str, Any]:
    """Name what metrics.json says of the run beside the measurement's own settings."""
    named = {name: getattr(self, name) for name in ("target", "draft", "task", "split", "prompt")}
    return named | {"input_length": self.lengths()[0], "mesh": ",".join(map(str, self.mesh)) or None}


def run(request: Request, costs: Costs | None = None) -> dict[str, Any]:
  """Check everything, load, measure, write, and say the result.

  Args:
    request: what is wanted.
    costs: times of single passes of an earlier evaluation with models of the same shapes; None takes them.

  Returns:
    The metrics, as written.

  Raises:
    ConfigError: anything asked for cannot be.
  """
  find_tasks(request.task, request.split, Changes(data_dir=request.data_dir))  # before any model is looked at
  weights.ensure_writable(request.output_dir)
  trace = weights.ensure_writable(request.profile) if request.profile else None
  for directory in (request.target, request.draft):
    loading.detect(directory)
  vocabulary, of_task = evaluation.find_vocabulary(
    request.target, request.draft, request.vocabulary, request.task, request.split
  )
  if of_task:
    multihost.say(f"the models carry no vocabulary: taking that of {request.task}")
  config, (input_length, target_length) = request.config(), request.lengths()
  changes = Changes(vocabulary, request.prompt, request.data_dir)
  examples = eval_set.eval_examples(
    request.task, request.split, request.num_examples, input_length, target_length, config.seed, changes
  )
  what = f"{len(examples)} prompts of {request.task}, {request.split}"
  multihost.say("\n".join([f"{what}: {input_length} tokens in, {target_length} out", *evaluation.data_lines(examples)]))
  with _use_mesh(request.mesh) as mesh:
    if mesh is not None:
      for rows in {config.batch_size, config.decode_batch_size} - {1}:  # one prompt alone lies on every device
        partitioning.check_batch(rows, mesh)
    target = partitioning.lay_out(*weights.load_model(request.target, mesh=mesh), mesh, request.target_partitioning)
    draft = partitioning.lay_out(*weights.load_model(request.draft, mesh=mesh), mesh, request.draft_partitioning)
    pair = Pair(*target, *draft)
    check_pair(pair.target, pair.draft)
    config = evaluation.within_vocabulary(config, pair, vocabulary)  # alpha and the trace are of the run's own law
    if request.gamma == AUTO:
      choice = gamma_choice.choose_gamma(pair, examples.encoder_input_tokens, config)
      multihost.say(choice)
      config, costs = dataclasses.replace(config, gamma=choice.gamma), choice.costs
    metrics = evaluation.evaluate(
      pair,
      examples,
      vocabulary,
      config,
      request.output_dir,
      settings=request.settings(),
      label=request.label,
      costs=costs,
    )
    if trace:
      measure.profile(pair, examples.encoder_input_tokens, config, str(trace))
      multihost.say(f"wrote a trace of one batch to {trace}")
  multihost.say(evaluation.summary_line(metrics, request.output_dir))
  return metrics


@contextlib.contextmanager
def _use_mesh(sizes: tuple[int, ...]):
  """Enter a mesh of these sizes; gives None where there are none and one process."""
  sizes = sizes or ((-1, 1, 1) if multihost.several() else ())
  if not sizes:
    yield None
    return
  made = meshes.make_mesh(meshes.MeshConfig(*sizes))
  with partitioning.use_mesh(made):
    yield made
