"""A seqio task of a few short lines over bytes, so that entry points run without the prepared data set."""

import functools

import seqio
import tensorflow as tf

WORDS = ["ab", "ba", "abc", "cab", "bca", "aab", "bb", "cc", "acb", "cba"]
LINES = [f"{left}{right}" for left in WORDS for right in WORDS]
COUNTS = {"train": 80, "validation": 20, "empty": 0}


def _dataset(split, shuffle_files, seed=None):
  del shuffle_files, seed
  first = 0 if split == "train" else 80
  lines = LINES[first : first + COUNTS[split]]
  return tf.data.Dataset.from_tensor_slices(
    {"inputs": tf.constant(lines, tf.string, [len(lines)]), "targets": tf.constant([x[:2] for x in lines], tf.string, [len(lines)])}
  )


def equal(targets, predictions):
  """Percentage of equal texts."""
  return {"equal": 100.0 * sum(map(str.__eq__, targets, predictions)) / len(targets)}


def _add(name, vocabulary, metric_fns=()):
  if name not in seqio.TaskRegistry.names():
    feature = functools.partial(seqio.Feature, vocabulary=vocabulary, add_eos=True)
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(_dataset, splits=tuple(COUNTS)),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={"inputs": feature(), "targets": feature()},
      metric_fns=list(metric_fns),
    )


_add("tiny", seqio.ByteVocabulary())
_add("tiny_other_vocabulary", seqio.ByteVocabulary(extra_ids=7))
_add("tiny_judged", seqio.ByteVocabulary(), [equal])
