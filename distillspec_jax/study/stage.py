"""One task of the study: its models, trained when they are asked for, and what is measured of a pair.

    OUTPUT_DIR/TASK/vocabulary/               trained on the task's training texts
    OUTPUT_DIR/TASK/target/                   the target
    OUTPUT_DIR/TASK/none-SEED/                a fine-tuned draft
    OUTPUT_DIR/TASK/RECIPE-SEED/              a distilled draft
    OUTPUT_DIR/TASK/target_outputs-*.npz      a target's own texts on the test prompts, greedy and sampled

Block efficiency is the exact expectation over the target's own texts (`analysis.block_law`), for each γ from the same
teacher-forced pass; the texts' own quality is the target's, whatever the draft.
"""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distillspec_jax import evaluation, run_log, task_results, train, weights
from distillspec_jax.analysis import acceptance, block_law, measure
from distillspec_jax.analysis.bootstrap import bootstrap_ci
from distillspec_jax.analysis.costs import Pair
from distillspec_jax.data import eval_set, lookup, preparation, task_info, vocabularies
from distillspec_jax.study.config import StudyConfig
from distillspec_jax.study.lines import NONE, TASKS, Line
from distillspec_jax.weights import integrity

Columns = Mapping[str, np.ndarray]  # a figure of each prompt, [N]
TEMPERATURES = {"t0": 0.0, "t1": 1.0}
GAMMAS = (3, 5, 7)
TEST = "test"  # the split of all measurements
BATCH = 32  # prompts decoded or scored together


class Stage:
  """One task of the study; a model that is there is not trained again, one that was begun is gone on with."""

  def __init__(self, config: StudyConfig, task: str):
    self.config, self.task = config, TASKS[task]
    self.folder = pathlib.Path(config.output_dir) / task

  def check(self) -> None:
    """Look for the data of the task and of its transfer, and for the networks.

    Raises:
      ConfigError: data are not prepared, or a network's gin file is missing or wrong.
    """
    for role in ("target", "draft"):
      network = self.config.network(self.task.architecture, role)
      train.arguments_from_gin(["runs/finetune.gin", network], ["MODEL_DIR = 'none'"])
    for name in filter(None, (self.task.name, self.task.transfer)):
      lookup.find_tasks(name, TEST, lookup.Changes(data_dir=self.config.data_dir))

  def target(self) -> str:
    """Return the target's directory."""
    return self.fine_tuned("target", "target", 0)

  def draft_of(self, line: Line) -> str:
    """Return the directory of a line's draft: fine-tuned, or distilled from the target."""
    if line.recipe == NONE:
      return self.start(line.seed)
    start, target = self.start(line.seed), None if line.recipe == "sft" else self.target()
    return self.distilled(line.name.removeprefix(f"{line.task}-"), line.recipe, target, start, line.seed)

  def start(self, seed: int) -> str:
    """Return the directory of a seed's fine-tuned draft, from which its distillations begin."""
    return self.fine_tuned(f"{NONE}-{seed}", "draft", seed)

  def fine_tuned(self, name: str, role: str, seed: int, shape: Mapping[str, Any] = {}) -> str:
    """Train a model from scratch on the task's references.

    Args:
      name: of its folder.
      role: "target" or "draft": its network, updates and learning rate.
      seed: of its first parameters and of the data's order.
      shape: fields of its configuration that differ from the gin file's.

    Returns:
      Its directory.
    """
    kind = {"t5": "T5Config", "decoder_lm": "DecoderLMConfig"}[self.task.architecture]
    steps, rate = getattr(self.config, f"{role}_steps"), getattr(self.config, f"{role}_rate")
    bindings: dict[str, Any] = {"TRAIN_STEPS": steps, "SEED": seed, "LEARNING_RATE": rate}
    bindings |= {f"{kind}.{field}": value for field, value in shape.items()}
    if self.task.vocabulary:
      folder = self._vocabulary()
      bindings |= {"DataConfig.vocabulary": str(folder), f"{kind}.vocab_size": _padded(folder)}
    return self._train(name, "runs/finetune.gin", [self.config.network(self.task.architecture, role)], bindings)

  def distilled(
    self,
    name: str,
    recipe: str,
    target: str | None,
    start: str,
    seed: int,
    changes: Mapping[str, Any] = {},
  ) -> str:
    """Go on with a model by a recipe of the table, at a draft's learning rate.

    Args:
      name: of the new folder.
      recipe: a method's name or DIVERGENCE/SOURCE.
      target: the teacher's directory; None for sft, the control: the same updates on the data alone.
      start: the directory of the model that is gone on with.
      seed: of the data's order and of sampling.
      changes: gin bindings that differ from the table's.

    Returns:
      The new directory.
    """
    divergence, slash, source = recipe.partition("/")
    files = ["methods/distillspec.gin"] if slash else [f"methods/{recipe}.gin"]
    usual = {"TRAIN_STEPS": self.config.distill_steps, "LEARNING_RATE": self.config.draft_rate}
    bindings: dict[str, Any] = {**usual, "SEED": seed}
    bindings |= {"DIVERGENCE": divergence, "SOURCE": source} if slash else {}
    bindings |= changes
    if target is None:
      return self._train(name, "runs/finetune.gin", files, bindings | {"INITIAL_CHECKPOINT": start})
    return self._train(name, "runs/distill.gin", files, bindings | {"DRAFT": start, "TARGET": target})

  def _train(self, name: str, stage: str, files: list[str], bindings: Mapping[str, Any]) -> str:
    directory = self.folder / name
    shape = {
      "TASK": self.task.name,
      "INPUT_LENGTH": self.task.input_length,
      "TARGET_LENGTH": self.task.target_length,
      "BATCH_SIZE": self.task.batch_size,
    }
    lines = [f"{key} = {value!r}" for key, value in {"MODEL_DIR": str(directory), **shape, **bindings}.items()]
    lines += [f"DataConfig.data_dir = {self.config.data_dir!r}", "TrainConfig.eval_every = 0"]
    lines += ["TrainConfig.log_every = 50", "TrainConfig.checkpoint_every = 150", "TrainConfig.keep_checkpoints = 1"]
    train.run_from_gin([stage, *files], lines)
    return str(directory)

  def _vocabulary(self) -> pathlib.Path:
    folder = self.folder / "vocabulary"
    if not (folder / "vocabulary.json").is_file():
      changes = lookup.Changes(data_dir=self.config.data_dir)
      print(preparation.train_vocabulary(self.task.vocabulary, "train", self.config.pieces, str(folder), changes))
    return folder

  @property
  def vocabulary(self):
    """The models' vocabulary, once the target is there."""
    return vocabularies.load(self.folder / "target" / "vocabulary")

  def examples(self, task: str, prompts: int) -> eval_set.EvalSet:
    """Draw test prompts: at the study's lengths for its own tasks, at most 256 in and 64 out for others."""
    changes = lookup.Changes(self.vocabulary, data_dir=self.config.data_dir)
    lookup.find_tasks(task, TEST, changes)
    usual = task_info.of(task)
    lengths = min(usual.input_length, 256), min(usual.target_length, 64)
    if task == self.task.name:
      lengths = self.task.input_length, self.task.target_length
    return eval_set.eval_examples(task, TEST, prompts, *lengths, changes=changes)

  def decoding(self, pair: Pair, temperature: float, gamma: int = max(GAMMAS), **more) -> measure.MeasureConfig:
    """Give the settings of decoding on the task's own prompts, `BATCH` at a time unless told otherwise."""
    usual = {"max_new_tokens": self.task.target_length, "decode_batch_size": BATCH}
    config = measure.MeasureConfig(gamma=gamma, temperature=temperature, **usual | more)
    return evaluation.within_vocabulary(config, pair, self.vocabulary)

  def measured(self, pair: Pair, task: str, target: str = "target", base: Columns | None = None) -> dict[str, Any]:
    """Measure a pair on a task's test prompts.

    Args:
      pair: the models.
      task: a task or mixture.
      target: the name of the target's folder.
      base: what `base` gives; with it each τ is compared with that of the draft as it was before.

    Returns:
      α and, for each γ, τ at both temperatures (and `gain`, τ over the τ before), each with its interval over prompts;
      the models' own metrics; of a mixture its rows and their mean.
    """
    examples, columns, texts = self._scored(pair, task, target)
    for name, (_, blocks) in list(columns.items()):
      if base is not None and name.startswith("tau_"):
        columns[name.replace("tau_", "gain_")] = (base[name], blocks)
    found: dict[str, Any] = {"data": dict(examples.facts), "prompts": len(examples)}
    for name, (top, below) in columns.items():
      value, low, high = bootstrap_ci(top, below)
      found |= {name: value, f"{name}_ci": [low, high]}
    results = task_results.results(examples, {"texts": texts}, columns, self._likelihoods(pair, examples))
    of_ways = results["task_metrics"]
    found["target_metrics"] = of_ways["texts"] | of_ways.get("target", {})
    found["draft_metrics"] = of_ways.get("draft", {})
    if "rows" in results:
      found |= {"rows": results["rows"], "mean": results["mean"]}
    return found

  def base(self, draft: str, task: str, target: str = "target", directory: str | None = None) -> Columns:
    """Give the blocks [N] that the target's texts need with a fine-tuned draft, for each temperature and γ.

    Args:
      draft: its directory.
      task: a task or mixture.
      target: the name of the target's folder.
      directory: the target's; None is the task's own target.
    """
    path = pathlib.Path(draft) / f"blocks-{target}-{task}-{self.config.prompts}.npz"
    if not path.is_file():
      pair = Pair(*weights.load_model(directory or self.target()), *weights.load_model(draft))
      _, columns, _ = self._scored(pair, task, target)
      integrity.write_atomically(path, _as_npz({name: below for name, (_, below) in columns.items()}))
    with np.load(path) as arrays:
      return dict(arrays)

  def _scored(self, pair: Pair, task: str, target: str):
    """Draw the prompts, decode the target's texts, score them: the examples, {figure: (sums, counts)}, greedy texts."""
    examples = self.examples(task, self.config.prompts)
    texts: list[str] = []
    columns = {}
    for name, temperature in TEMPERATURES.items():
      config = self.decoding(pair, temperature, max_new_tokens=examples.decoder_target_tokens.shape[1])
      tokens, lengths = self._own_outputs(pair, f"{target}_outputs-{task}-{name}", examples, config)
      overlaps, kept = _token_acceptance(pair, examples.encoder_input_tokens, tokens, lengths, config)
      columns[f"alpha_{name}"] = (overlaps, lengths)
      for gamma in GAMMAS:
        columns[f"tau_{name}_gamma{gamma}"] = (lengths, block_law.expected_blocks(kept, lengths, gamma))
      texts = texts or evaluation.decode_texts(self.vocabulary, tokens, lengths)
    return examples, columns, texts

  def quality(self, examples: eval_set.EvalSet, rows: measure.Rows) -> dict[str, Any]:
    """Judge decoded texts by the task's own metrics, with intervals."""
    texts = evaluation.decode_texts(self.vocabulary, rows.tokens, rows.lengths)
    return task_results.results(examples, {"texts": texts}, {})["task_metrics"]["texts"]

  def _likelihoods(self, pair: Pair, examples: eval_set.EvalSet) -> np.ndarray | None:
    if not task_results.wants_scores(examples):
      return None
    return measure.log_likelihoods(pair, examples.encoder_input_tokens, examples.decoder_target_tokens, BATCH)

  def _own_outputs(self, pair: Pair, name: str, examples, config) -> tuple[np.ndarray, np.ndarray]:
    """Decode the target's own texts on the prompts, once."""
    path = self.folder / f"{name}.npz"
    if path.is_file():
      with np.load(path) as arrays:
        if np.array_equal(arrays["prompts"], examples.encoder_input_tokens):
          return arrays["tokens"], arrays["lengths"]
    rows = measure.decode_plain(pair, examples.encoder_input_tokens, config, silently)
    arrays = {"prompts": examples.encoder_input_tokens, "tokens": rows.tokens, "lengths": rows.lengths}
    integrity.write_atomically(path, _as_npz(arrays))
    return rows.tokens, rows.lengths


def step_seconds(directory: str) -> float:
  """Give the time that a training's steps took, in however many calls; compiling and loading are not in it."""
  lines = (pathlib.Path(directory) / run_log.NAME).read_text().splitlines()
  return max(json.loads(line).get("cost/seconds", 0.0) for line in lines)


def silently(items: Sequence, label: str) -> Sequence:
  """Show no progress."""
  del label
  return items


def _token_acceptance(pair: Pair, prompts, tokens, lengths, config) -> tuple[np.ndarray, np.ndarray]:
  """Score the target's texts with both models: Σ_t Σ_v min(p, q) of each [N], and each token's chance [N, T]."""
  overlaps, chances = [], []
  for first in range(0, len(prompts), BATCH):
    rows = np.arange(first, first + BATCH) % len(prompts)  # the last batch is filled up: one compilation
    batch = acceptance.teacher_forced_batch(prompts[rows], tokens[rows], lengths[rows])
    models = (pair.target, pair.target_params, pair.draft, pair.draft_params)
    overlap, kept = acceptance.token_acceptance(*models, batch, **config.sampling)
    overlaps.append(np.sum(np.asarray(overlap) * np.asarray(batch["decoder_loss_weights"]), axis=1))
    chances.append(np.asarray(kept))
  return np.concatenate(overlaps)[: len(prompts)], np.concatenate(chances)[: len(prompts)]


def _as_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  return buffer.getvalue()


def _padded(vocabulary: pathlib.Path) -> int:
  """Return the width of a network's logits for a vocabulary: a multiple of 128."""
  size = vocabularies.describe(vocabulary)["vocab_size"]
  return -(-size // 128) * 128
