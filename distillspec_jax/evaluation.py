"""Evaluate a pair on a task: the measurements of `analysis.measure`, the texts, the task's own metrics, two files.

What `evaluate.py` calls; it has no flags, so other entry points can call it too, with models already loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distillspec_jax import item_progress, task_results, weights
from distillspec_jax.analysis import latency
from distillspec_jax.analysis.costs import Costs, Pair
from distillspec_jax.analysis.measure import MeasureConfig, Measurement, log_likelihoods, measure
from distillspec_jax.data import lookup, vocabularies
from distillspec_jax.data.eval_set import EvalSet
from distillspec_jax.data.host_tensorflow import seqio
from distillspec_jax.parallel import multihost
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import integrity, vocabulary_files


def evaluate(
    pair: Pair,
    examples: EvalSet,
    vocabulary: seqio.Vocabulary,
    config: MeasureConfig,
    output_dir: str | os.PathLike,
    *,
    settings: Mapping[str, Any],
    label: str = "",
    costs: Costs | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
  """Measure a pair on examples, and write metrics.json and outputs.jsonl.

  Args:
    pair: the models, with their parameters.
    examples: of `data.eval_set.eval_examples`.
    vocabulary: turns tokens into text.
    config: of the measurement.
    output_dir: where the two files go.
    settings: what else metrics.json shall say under "config": target, draft, task, split, ...
    label: the run's name in reports, such as "before" or "after".
    costs: times of single passes of an earlier evaluation with models of the same shapes and batch size
      (`Costs.from_dict(metrics["pass_times"])`); None takes them.
    quiet: shows no progress.

  Returns:
    The metrics, as written.

  Raises:
    ConfigError: an output folder that cannot be written, ids that the models do not have, settings that decoding
      refuses.
  """
  begin = time.monotonic()
  folder = weights.ensure_writable(output_dir)
  _check_ids(pair, examples, vocabulary)
  config = within_vocabulary(config, pair, vocabulary)
  track = (lambda items, what: items) if quiet or not multihost.is_first() else batch_progress(label)
  measurement = measure(pair, examples.encoder_input_tokens, config, costs=costs, track=track)
  texts = {
      "autoregressive": decode_texts(vocabulary, measurement.plain.tokens, measurement.plain.lengths),
      "speculative": decode_texts(vocabulary, measurement.speculative.tokens, measurement.speculative.lengths),
  }
  metrics = {
      "label": label,
      "config": {**settings, **dataclasses.asdict(config), "num_examples": len(examples)},
      "data": examples.facts,
      **measurement.metrics,
      **task_results.results(examples, texts, _columns(measurement), _likelihoods(pair, examples, config), config.seed),
      "environment": latency.environment(),
      "seconds": time.monotonic() - begin,
  }
  metrics = _finite(metrics)
  lines = output_lines(examples, vocabulary, measurement, texts)
  # Where metrics.json is, the evaluation beside it is complete: an older one goes first, the new one comes last.
  if multihost.is_first():
    (folder / "metrics.json").unlink(missing_ok=True)
    integrity.write_atomically(folder / "outputs.jsonl", "".join(_json(line) + "\n" for line in lines).encode())
    integrity.write_atomically(folder / "metrics.json", (_json(metrics, indent=2) + "\n").encode())
  return metrics


def _columns(measurement: Measurement) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Give each prompt's part in the figures that are reported row by row."""
  spoken = measurement.speculative
  return {
      "alpha": tuple(measurement.acceptance.T),
      "block_efficiency": (spoken.lengths, spoken.blocks),
  }


def _likelihoods(pair: Pair, examples: EvalSet, config: MeasureConfig) -> np.ndarray | None:
  if not task_results.wants_scores(examples):
    return None
  size = config.decode_batch_size or config.batch_size
  return log_likelihoods(pair, examples.encoder_input_tokens, examples.decoder_target_tokens, size)


def within_vocabulary(config: MeasureConfig, pair: Pair, vocabulary: seqio.Vocabulary) -> MeasureConfig:
  """Forbid the ids past the vocabulary's, which padded networks have, where the config does not say it already."""
  if config.valid_ids:
    return config
  return dataclasses.replace(config, valid_ids=min(vocabulary.vocab_size, pair.target.vocab_size))


def find_vocabulary(
    target_dir: str, draft_dir: str, given: str | None, task: str, split: str
) -> tuple[seqio.Vocabulary, bool]:
  """Find the vocabulary that the models speak.

  Args:
    target_dir, draft_dir: model directories, whose vocabularies must be the same where both have one; where one has
      none, a line is printed that says so.
    given: a vocabulary folder, a model directory or a SentencePiece file, for models that have none.
    task, split: whose own vocabulary is taken where there is no other.

  Returns:
    The vocabulary, and whether it is the task's own.

  Raises:
    ConfigError: vocabularies that differ, a folder that is none, or a Hugging Face tokenizer that seqio cannot read.
  """
  weights.vocabularies_match(target_dir, draft_dir)
  if given:
    vocabulary = vocabularies.given(given)
    with tempfile.TemporaryDirectory() as folder:  # in a folder it can be compared
      vocabularies.save(vocabulary, folder)
      for directory in (target_dir, draft_dir):
        weights.vocabularies_match(directory, folder)
    return vocabulary, False
  if note := vocabulary_files.unchecked(target_dir, draft_dir):
    print(note, flush=True)
  for directory in (target_dir, draft_dir):
    folder = weights.vocabulary_dir(directory)
    if folder is not None:
      return vocabularies.load(folder), False
  vocabulary_files.refuse_foreign(target_dir, draft_dir)
  first, _ = next(iter(lookup.find_tasks(task, split, prepared=False).values()))
  return first.output_features["targets"].vocabulary, True


def decode_texts(vocabulary: seqio.Vocabulary, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
  """Turn token rows [N, T] with lengths [N] into N texts."""
  return [vocabulary.decode(row[:length].tolist()) for row, length in zip(tokens, lengths)]


def token_pieces(vocabulary: seqio.Vocabulary, tokens: Sequence[int]) -> list[str]:
  """Say which part of the text each token adds, so that the parts together are the text.

  A token that ends inside a character adds nothing; the one that completes the character adds it. Where a tokenizer
  changes earlier text, the parts are as near as can be.
  """
  pieces, shown = [], ""
  for end in range(1, len(tokens) + 1):
    text = vocabulary.decode(list(tokens[:end]))
    stable = text if end == len(tokens) else text.rstrip("\ufffd")
    if stable.startswith(shown):
      pieces.append(stable[len(shown) :])
      shown = stable
    else:
      pieces.append("")
  return pieces


def output_lines(
    examples: EvalSet, vocabulary: seqio.Vocabulary, measurement: Measurement, texts: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
  """Give outputs.jsonl's objects, one a prompt."""
  rows = measurement.speculative
  for index, text in enumerate(examples.texts):
    length = int(rows.lengths[index])
    tokens = rows.tokens[index, :length].tolist()
    yield {
        "index": index,
        "inputs": text["inputs"],
        "reference": text["targets"],
        "target_output": texts["autoregressive"][index],
        "speculative_output": texts["speculative"][index],
        "tokens": tokens,
        "pieces": token_pieces(vocabulary, tokens),
        "origins": None if rows.origins is None else rows.origins[index, :length].tolist(),
        "blocks": int(rows.blocks[index]),
        "accepted": int(rows.accepted[index]),
    }


def _check_ids(pair: Pair, examples: EvalSet, vocabulary: seqio.Vocabulary) -> None:
  highest = int(examples.encoder_input_tokens.max())
  if highest >= pair.target.vocab_size:
    raise ConfigError(
        f"the prompts hold token id {highest}, the target has {pair.target.vocab_size} ids: the vocabulary "
        f"({vocabulary.vocab_size} ids) is not the models' own; name theirs with --vocabulary"
    )


def _finite(value):
  """Replace what JSON has no word for (NaN, infinity) by None, all the way down."""
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value, indent: int | None = None) -> str:
  return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


def batch_progress(label: str) -> Callable[[Iterable, str], Iterable]:
  """Make what shows progress over batches."""

  def track(items, what):
    return item_progress.track(items, f"{label}: {what}" if label else what, "batch", "batches")

  return track


def summary_line(metrics: Mapping[str, Any], folder: pathlib.Path | str) -> str:
  """Say the result in a few lines."""
  value = lambda key, form: "-" if metrics.get(key) is None else form.format(metrics[key])
  interval = metrics.get("alpha_ci") or [math.nan, math.nan]
  lines = [
      f"acceptance {value('alpha', '{:.3f}')} [{interval[0]:.3f}, {interval[1]:.3f}]"
      f"  block efficiency {value('block_efficiency', '{:.2f}')} tokens a target call",
      f"speed-up {value('speedup', '{:.2f}')} measured, {value('predicted_speedup', '{:.2f}')} predicted"
      f"  (c {value('cost_ratio', '{:.3f}')}, v {value('verify_cost', '{:.2f}')},"
      f" break-even acceptance {value('break_even_alpha', '{:.3f}')}, best gamma {value('best_gamma', '{}')})",
  ]
  if metrics.get("greedy_identical"):
    same, total = metrics["greedy_identical"]
    lines.append(f"greedy texts identical: {same} of {total}")
  if table := task_results.table(metrics):
    lines.append(table)
  else:
    lines += [f"{way}: {said}" for way, said in map(_metric_line, metrics["task_metrics"].items()) if said]
  return "\n".join([*lines, f"wrote {pathlib.Path(folder) / 'metrics.json'} and outputs.jsonl"])


def _metric_line(way: tuple[str, Mapping[str, Any]]) -> tuple[str, str]:
  name, figures = way
  said = []
  for key, value in figures.items():
    if isinstance(value, str):
      said.append(f"{key} {value}")
    elif value is not None and not key.endswith("_ci"):
      low, high = (math.nan if end is None else end for end in figures[f"{key}_ci"])
      said.append(f"{key} {value:.2f} [{low:.2f}, {high:.2f}]")
  return name, ", ".join(said)


def data_lines(examples: EvalSet) -> list[str]:
  """Say of each task how many examples there are and which surprises: texts cut, tokens that are <unk>."""
  lines = []
  for name, facts in examples.facts.items():
    noted = [f"{name}: {facts['examples']} examples, checksum {facts['checksum'][:12]}"]
    for key in ("inputs", "targets"):
      if facts.get(f"{key}_cut"):
        noted.append(f"{100 * facts[f'{key}_cut']:.0f}% of {key} cut")
      if facts.get(f"{key}_unknown"):
        noted.append(f"{100 * facts[f'{key}_unknown']:.2g}% of the {key}' tokens <unk>")
    lines.append(", ".join(noted))
  return lines
