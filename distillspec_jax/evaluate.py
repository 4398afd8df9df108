"""Evaluate a draft for a target on a task: acceptance, block efficiency, measured and predicted speed-up, the texts.

    python -m distillspec_jax.evaluate --target=DIR --draft=DIR --task=pydoc_summary --split=test --gamma=5 \\
      --temperature=0 --num_examples=200 --output_dir=DIR

Writes metrics.json and outputs.jsonl, which `distillspec_jax.report` reads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from absl import flags

from distillspec_jax import cli
from distillspec_jax.types import ConfigError

_TARGET = flags.DEFINE_string("target", None, "The target's directory: native, T5X or Hugging Face.", required=True)
_DRAFT = flags.DEFINE_string("draft", None, "The draft's directory.", required=True)
_TASK = flags.DEFINE_string("task", None, "A seqio task or mixture with inputs and targets.", required=True)
_SPLIT = flags.DEFINE_string("split", "test", "Split of the task.")
_GAMMA = flags.DEFINE_string("gamma", "5", "Tokens drafted a block; auto measures a few prompts and chooses.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the most likely tokens up to this probability; 1 keeps all.")
_MIN_LENGTH = flags.DEFINE_integer("min_length", 0, "No text ends within its first this many tokens.")
_RULE = flags.DEFINE_string("rule", "token", "Acceptance rule: token, block, lossy_lin, lossy_sq or lossy_exp.")
_LENIENCE = flags.DEFINE_string("lenience", "", "Of the lossy rules, in (0, 1].")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Prompts decoded together where time is taken.")
_DECODE_BATCH_SIZE = flags.DEFINE_integer(
    "decode_batch_size", 0, "Prompts decoded together where only texts and counts are taken; 0: batch_size."
)
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 200, "Prompts; a smaller split gives what it has.")
_TIMING_EXAMPLES = flags.DEFINE_integer("timing_examples", 32, "Prompts that are timed; 0: all.")
_TIMING_REPEATS = flags.DEFINE_integer("timing_repeats", 3, "Timed runs of each batch, the two decoders in turns.")
_INPUT_LENGTH = flags.DEFINE_integer("input_length", 0, "Prompts are cut at this many tokens; 0: the task's usual.")
_TARGET_LENGTH = flags.DEFINE_integer("target_length", 0, "Outputs end at this many tokens; 0: the task's usual.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the choice of prompts, of sampling, of the bootstrap.")
_VOCABULARY = flags.DEFINE_string("vocabulary", "", "A vocabulary folder or .model file, for models that carry none.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "TFDS's folder, for tasks over TFDS; empty: TFDS's default.")
_PROMPT = flags.DEFINE_string("prompt", "", "In place of the task's own, with {inputs} where the inputs go.")
_MESH = flags.DEFINE_list("mesh", [], "Devices for data,fsdp,model, such as 1,1,8; empty: one, or all as data.")
_TARGET_PARTITIONING = flags.DEFINE_string("target_partitioning", "sharded", "On the mesh: sharded or replicated.")
_DRAFT_PARTITIONING = flags.DEFINE_string("draft_partitioning", "sharded", "The same of the draft.")
_PROFILE = flags.DEFINE_string("profile", "", "A folder for a JAX trace of one batch, which TensorBoard shows.")
_LABEL = flags.DEFINE_string("label", "", "The run's name in reports, such as before or after.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for metrics.json and outputs.jsonl.", required=True)
cli.define_process_flags()


def main(argv: Sequence[str]) -> None:
  """Read the flags and evaluate."""
  del argv
  logging.getLogger("absl").setLevel(logging.WARNING)  # what checkpoints and metrics say of themselves
  gamma, lenience, mesh = _gamma(_GAMMA.value), _lenience(_LENIENCE.value), _mesh(_MESH.value)
  # After the flags, so that a wrong one is answered at once.
  from distillspec_jax import evaluation_request  # noqa: PLC0415

  measuring = dict(
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      min_length=_MIN_LENGTH.value,
      rule=_RULE.value,
      lenience=lenience,
      batch_size=_BATCH_SIZE.value,
      decode_batch_size=_DECODE_BATCH_SIZE.value,
      timing_prompts=_TIMING_EXAMPLES.value,
      timing_repeats=_TIMING_REPEATS.value,
      seed=_SEED.value,
  )
  request = evaluation_request.Request(
      target=_TARGET.value,
      draft=_DRAFT.value,
      task=_TASK.value,
      output_dir=_OUTPUT_DIR.value,
      split=_SPLIT.value,
      gamma=gamma,
      measuring=measuring,
      input_length=_INPUT_LENGTH.value,
      target_length=_TARGET_LENGTH.value,
      num_examples=_NUM_EXAMPLES.value,
      vocabulary=_VOCABULARY.value or None,
      data_dir=_DATA_DIR.value or None,
      prompt=_PROMPT.value or None,
      mesh=mesh,
      target_partitioning=_TARGET_PARTITIONING.value,
      draft_partitioning=_DRAFT_PARTITIONING.value,
      profile=_PROFILE.value or None,
      label=_LABEL.value,
  )
  cli.join(takes_notice=False)
  cli.require_same_run(repr(request))
  evaluation_request.run(request)


def _gamma(text: str) -> int | str:
  try:
    return text if text == "auto" else int(text)
  except ValueError:
    raise ConfigError(f"--gamma={text}: give a whole number of at least 1, or auto") from None


def _lenience(text: str) -> float | None:
  try:
    return float(text) if text else None
  except ValueError:
    raise ConfigError(f"--lenience={text} is not a number: give one in (0, 1], or leave it out") from None


def _mesh(texts: Sequence[str]) -> tuple[int, ...]:
  try:
    sizes = tuple(int(size) for size in texts)
  except ValueError:
    sizes = (0,)
  if len(sizes) not in (0, 3):
    raise ConfigError(f"--mesh={','.join(texts)}: give three numbers, data,fsdp,model, such as 1,1,8")
  return sizes


if __name__ == "__main__":
  cli.run(main)
