"""Endless, exactly resumable streams of examples: one task's epochs, and several tasks mixed by rate.

An epoch's order depends on (seed, epoch) alone, so that a place is only (epoch, rows taken of it): going on means
opening that epoch again and leaving out what was taken. A row is one example or, packed, as many as fit; packing looks
at nothing but the order, so it changes none of this, except that no two epochs have as many rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from distillspec_jax.data import tfds_store
from distillspec_jax.data.host_tensorflow import seqio, tf
from distillspec_jax.types import ConfigError

Arrays = dict[str, np.ndarray]


def epoch_dataset(
  task: seqio.Task,
  split: str,
  lengths: Mapping[str, int] | None,
  seed: int | None,
  epoch: int = 0,
  shard: seqio.ShardInfo | None = None,
) -> tf.data.Dataset:
  """Return a task's examples, gone through once, cut to the lengths; in the task's own order without a seed.

  They come from seqio's cache where there is one (`lookup.Changes.cache_dir`, or folders that seqio knows).
  """
  for feature in task.output_features.values():
    feature.vocabulary.vocab_size  # noqa: B018  (reads its file now: an error from inside TensorFlow is unreadable)
  dataset = task.get_dataset(
    sequence_length=lengths,
    split=split,
    shuffle=seed is not None,
    seed=None if seed is None else _epoch_seed(seed, epoch),
    shard_info=shard,
    num_epochs=1,
    use_cached=bool(task.cache_dir),
    try_in_mem_cache=False,  # each epoch is another data set, a cache would only cost memory
  )
  options = tf.data.Options()
  # TensorFlow's tuning thread sleeps for up to a minute, and an iterator that goes may wait for it: three of 39 epochs'
  # ends took 9 to 21 s. Without it reading is also 3 to 23% faster (docs/benchmarks.md).
  options.autotune.enabled = False
  return dataset.with_options(options)


def model_features(dataset: tf.data.Dataset, lengths: Mapping[str, int]) -> tf.data.Dataset:
  """Turn a task's examples, cut to the lengths before, into an encoder-decoder's features, padded to the lengths."""
  converter = seqio.EncDecFeatureConverter(pack=False, apply_length_check=False)  # the check doubles the cost
  return converter(dataset, task_feature_lengths=lengths)


def packed_features(dataset: tf.data.Dataset, lengths: Mapping[str, int]) -> tf.data.Dataset:
  """Like `model_features`, but each row holds the next examples, as many as fit; those without targets are left out.

  The features of `model_features` and, both for `encoder` and `decoder`, `_segment_ids` (1, 2, ... by example, 0 at
  padding) and `_positions` (from 0 in each example).
  """
  dataset = dataset.map(lambda example: {key: example[key] for key in lengths})
  dataset = dataset.filter(lambda example: tf.size(example["targets"]) > 0)  # would shift the decoder's segment ids
  return seqio.EncDecFeatureConverter(pack=True, apply_length_check=False)(dataset, task_feature_lengths=lengths)


class Epochs:
  """A task's rows, or one host's shard of them, epoch after epoch, from any place.

  With `packed_rows` rows are packed and looked through: each example of "pairs" must have inputs, none of "texts" may,
  and rows of "texts" have no features of an encoder.
  """

  def __init__(
    self,
    task: seqio.Task,
    split: str,
    lengths: Mapping[str, int],
    seed: int | None,
    shard: seqio.ShardInfo,
    chunk: int,
    packed_rows: str | None = None,
  ):
    self._task, self._split, self._lengths, self._seed = task, split, dict(lengths), seed
    self._shard = shard if shard.num_shards > 1 else None
    self._chunk = chunk  # rows read at a time; no influence on what comes
    self._packed_rows = packed_rows
    self.seek(0, 0)

  @property
  def place(self) -> tuple[int, int]:
    """The epoch of the next row and how many of that epoch were taken; past an epoch's end is the next one's begin."""
    return self._epoch, self._taken

  def seek(self, epoch: int, taken: int) -> None:
    """Go to a place; nothing is read yet."""
    self._epoch, self._taken = epoch, taken
    self._chunks: Iterator[Arrays] | None = None
    self._rest: Arrays | None = None

  def size(self, epoch: int = 0) -> int:
    """Count the rows of one epoch by going through it; unpacked, all epochs have as many."""
    return int(self._open(epoch, 0).reduce(np.int64(0), lambda n, _: n + 1).numpy())

  def find(self, rows: int) -> tuple[int, int]:
    """Turn rows taken since the very beginning into a place, by going through every epoch up to it."""
    epoch, left = 0, rows
    while left >= (size := self.size(epoch)) > 0:
      epoch, left = epoch + 1, left - size
    return epoch, left

  def look_ahead(self) -> None:
    """Read the next rows, so that what is wrong with them shows now."""
    if self._rest is None:
      self._rest = self._next_chunk()

  def take(self, count: int) -> Arrays:
    """Return the next `count` rows, at least one, across an epoch's end where need be."""
    parts, missing = [], count
    while missing:
      part = self._read(missing)
      parts.append(part)
      missing -= _rows(part)
    return parts[0] if len(parts) == 1 else _concatenate(parts)

  def _read(self, limit: int) -> Arrays:
    """Return 1 ... `limit` rows of one epoch."""
    if self._rest is None:
      self._rest = self._next_chunk()
    rows = min(limit, _rows(self._rest))
    part = {key: value[:rows] for key, value in self._rest.items()}
    rest = {key: value[rows:] for key, value in self._rest.items()}
    self._rest = rest if _rows(rest) else None
    self._taken += rows
    return part

  def _next_chunk(self) -> Arrays:
    with tfds_store.readable(self._task):
      if self._chunks is None:
        self._chunks = self._iterate()
      chunk = next(self._chunks, None)
      if chunk is None:  # the epoch is over
        self._epoch, self._taken = self._epoch + 1, 0
        self._chunks = self._iterate()
        chunk = next(self._chunks, None)
    if chunk is None:
      raise ConfigError(f"the split {self._split!r} of {self._task.name!r} is empty on this host")
    return self._checked(chunk) if self._packed_rows else chunk

  def _checked(self, chunk: Arrays) -> Arrays:
    """Refuse packed rows whose prompts and outputs seqio may have paired wrongly: it numbers only what is not empty."""
    prompts, outputs = (chunk[f"{side}_segment_ids"].max(axis=1) for side in ("encoder", "decoder"))
    fault = None
    if self._packed_rows == "pairs" and np.any(prompts != outputs):
      fault = "an encoder-decoder: some of its examples have no inputs"
    if self._packed_rows == "texts" and np.any(prompts):
      fault = "a decoder-only model: its examples have inputs"
    if fault:
      raise ConfigError(f"the task {self._task.name!r} cannot be packed for {fault}; set DataConfig.pack to False")
    return chunk if self._packed_rows == "pairs" else {k: v for k, v in chunk.items() if not k.startswith("encoder_")}

  def _iterate(self) -> Iterator[Arrays]:
    dataset = self._open(self._epoch, self._taken)
    return dataset.batch(self._chunk).prefetch(4).as_numpy_iterator()

  def _open(self, epoch: int, taken: int) -> tf.data.Dataset:
    dataset = epoch_dataset(self._task, self._split, self._lengths, self._seed, epoch, self._shard)
    if self._packed_rows:
      dataset = packed_features(dataset, self._lengths)
      return dataset.skip(taken) if taken else dataset
    return model_features(dataset.skip(taken) if taken else dataset, self._lengths)


class Mixer:
  """Batches of rows from several tasks, each row's task drawn by its rate from (seed, batch)."""

  def __init__(
    self,
    readers: Mapping[str, Epochs],
    rates: Mapping[str, float],
    batch_size: int,
    seed: int,
    host: int,
    packed: bool = False,
  ):
    self._packed = packed
    self._readers = dict(readers)
    total = sum(rates.values())
    self._shares = [rates[name] / total for name in self._readers]
    self._batch_size, self._seed, self._host = batch_size, seed, host
    self._batch = 0
    self._consumed = dict.fromkeys(self._readers, 0)

  def next_batch(self) -> Arrays:
    """Return the next batch, rows in the order in which their tasks were drawn."""
    drawn = self._draw()
    parts, order = [], []
    for index, (name, reader) in enumerate(self._readers.items()):
      places = np.flatnonzero(drawn == index)
      if len(places):
        parts.append(reader.take(len(places)))
        order.append(places)
        self._consumed[name] += len(places)
    self._batch += 1
    if len(parts) == 1:
      return parts[0]
    back = np.argsort(np.concatenate(order))
    return {key: value[back] for key, value in _concatenate(parts).items()}

  def state(self) -> dict[str, Any]:
    """Return the place before the next batch; `consumed` is the same on every host, `places` are this host's."""
    return {
      "batch": self._batch,
      "consumed": dict(self._consumed),
      "host_index": self._host,
      "places": {name: list(reader.place) for name, reader in self._readers.items()},
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Go to a place. Another host's is turned into this one's by counting an epoch of this host's rows, packed all."""
    self._batch = int(state["batch"])
    self._consumed = {name: int(state["consumed"][name]) for name in self._readers}
    for name, reader in self._readers.items():
      if state["host_index"] == self._host:
        epoch, taken = state["places"][name]
      elif self._packed:
        epoch, taken = reader.find(self._consumed[name])
      else:
        epoch, taken = divmod(self._consumed[name], max(reader.size(), 1))
      reader.seek(int(epoch), int(taken))

  def _draw(self) -> np.ndarray:
    if len(self._readers) == 1:
      return np.zeros(self._batch_size, np.int64)
    rng = np.random.default_rng([self._seed, self._batch])
    return rng.choice(len(self._readers), size=self._batch_size, p=self._shares)


def _epoch_seed(seed: int, epoch: int) -> int:
  return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0] & 0x7FFFFFFF)


def _rows(arrays: Arrays) -> int:
  return len(next(iter(arrays.values())))


def _concatenate(parts: list[Arrays]) -> Arrays:
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
