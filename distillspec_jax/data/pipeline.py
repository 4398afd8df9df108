"""Batches for training, from any seqio task or mixture.

    batches = train_batches(DataConfig("pydoc_summary", batch_size=32, input_length=64, target_length=32))
    batch = next(batches)          # numpy int32, seqio's feature names
    place = batches.state()        # JSON-able; train_batches(config, place=place) goes on with the next batch

seqio turns text into features (`EncDecFeatureConverter`); padding is 0 on the right. A sequence that is too long is
cut, and a cut target has no EOS. `DataConfig.pack` puts as many examples into a row of training as fit; evaluation sets
have one example a row always.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from distillspec_jax.data import streams, vocabularies
from distillspec_jax.data.host_tensorflow import seqio
from distillspec_jax.data.lookup import Changes, find_tasks, refuse_training
from distillspec_jax.types import ConfigError

_log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

_SAMPLE = 1000  # examples looked at to say how many are cut


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to train on.

  Attributes:
    task: name of a registered seqio task or mixture with the features `inputs` and `targets`.
    batch_size: rows of one step, all hosts together; a row is one example, if not packed.
    input_length, target_length: S and T, in tokens; longer sequences are cut.
    split: of the task.
    seed: decides the order, together with the epoch.
    shuffle: False keeps the task's own order in every epoch.
    prompt: a template with {inputs}, such as "summarize: {inputs}", in place of the task's own.
    vocabulary: a vocabulary folder or SentencePiece file for a new model, in place of the task's own.
    data_dir: TFDS's folder, for tasks over TFDS; None is TFDS's default.
    cache_dir: a folder of tasks that seqio_cache_tasks has cached, to read them from.
    train_on_evaluation_data: allows tasks that are for evaluation only.
    pack: whether a row holds the next examples of its task, as many as fit, so that less of it is padding. A mixture's
      rates are then of rows. For methods that learn from the data alone.
    host_shards: with several hosts, whether each reads its shard of the examples only. False: each goes through the
      whole order and keeps its rows of every batch, so that batches, and places in checkpoints, are those of one host
      with however many. True reads less; which examples share a batch then depends on the number of hosts.
  """

  task: str
  batch_size: int
  input_length: int
  target_length: int
  split: str = "train"
  seed: int = 0
  shuffle: bool = True
  prompt: str | None = None
  vocabulary: str | None = None
  data_dir: str | None = None
  cache_dir: str | None = None
  train_on_evaluation_data: bool = False
  pack: bool = False
  host_shards: bool = False

  def __post_init__(self):
    for name in ("batch_size", "input_length", "target_length"):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
    if not isinstance(self.seed, int) or self.seed < 0:
      raise ConfigError(f"the data's seed must be a whole number of at least 0, not {self.seed!r}")

  def changes(self, vocabulary_dir: str | None = None) -> Changes:
    """What this asks of a task; `vocabulary_dir`, a models' own, counts before `vocabulary`."""
    if vocabulary_dir:
      vocabulary = vocabularies.load(vocabulary_dir)
    else:
      vocabulary = vocabularies.given(self.vocabulary) if self.vocabulary else None
    return Changes(vocabulary, self.prompt, self.data_dir, self.cache_dir)

  @property
  def lengths(self) -> dict[str, int]:
    """S and T under seqio's names."""
    return {"inputs": self.input_length, "targets": self.target_length}


class BatchIterator(Iterator[Arrays]):
  """An endless iterator of one host's batches, with a place that can be kept and returned to."""

  def __init__(self, mixer: streams.Mixer, identity: Mapping[str, Any], rows: np.ndarray | None = None):
    self._mixer, self._rows = mixer, rows
    self._identity = dict(identity)

  def __next__(self) -> Arrays:
    batch = self._mixer.next_batch()
    return batch if self._rows is None else {name: value[self._rows] for name, value in batch.items()}

  def state(self) -> dict[str, Any]:
    """Return the place before the next batch, JSON-able; any host's place serves every host (see `host_shards`)."""
    return {**self._identity, **self._mixer.state()}


def train_batches(
  config: DataConfig,
  vocabulary_dir: str | None = None,
  host_index: int = 0,
  host_count: int = 1,
  place: Mapping[str, Any] | None = None,
  packed_rows: str | None = "pairs",
  rows: np.ndarray | None = None,
) -> BatchIterator:
  """Return an endless iterator of batches, the same for the same arguments.

  Epoch after epoch the split is gone through in an order drawn from (seed, epoch); a batch may hold the end of one
  epoch and the beginning of the next, so that nothing is left out. A mixture draws each row's task by its rate.

  Args:
    config: what to train on.
    vocabulary_dir: a vocabulary folder to use in place of the task's own vocabulary.
    host_index, host_count: this host and how many share the batches.
    place: a `state()` to go on from; costs at most going through one epoch of each task (with `config.host_shards`,
      packed, and saved by another host: through all epochs up to it).
    packed_rows: with `config.pack`, what the model reads (`LanguageModel.packed_rows`): "pairs", each with inputs, or
      "texts", of a task whose inputs are all empty.
    rows: which rows of each batch are this host's; by default the host_index-th part. Not with `config.host_shards`.

  Returns:
    Iterator of dicts, b = batch_size / host_count: encoder_input_tokens [b, S], decoder_target_tokens,
    decoder_input_tokens, decoder_loss_weights [b, T], all int32; loss weights are 1 up to and with the EOS.
    Packed, also encoder_segment_ids, encoder_positions [b, S], decoder_segment_ids, decoder_positions [b, T] (see
    `streams.packed_features`); packed "texts" have no features of an encoder.

  Raises:
    ConfigError: unknown task or split, empty split, batch not divisible among hosts, a place of other data, examples
      that cannot be used or packed (known of the first rows when this is called, of the others when they come).
  """
  if config.pack and packed_rows not in ("pairs", "texts"):
    raise ConfigError(f"rows can be packed of 'pairs' or 'texts', not {packed_rows!r}: set DataConfig.pack to False")
  if not 0 <= host_index < host_count:
    raise ConfigError(f"host {host_index} is not one of {host_count} hosts")
  if config.batch_size % host_count:
    raise ConfigError(f"batch_size {config.batch_size} cannot be divided among {host_count} hosts: choose a multiple")
  if not config.train_on_evaluation_data:
    refuse_training(config.task)
  first = host_index == 0
  tasks = find_tasks(config.task, config.split, config.changes(vocabulary_dir))
  settings = dataclasses.asdict(config)
  for name in ("data_dir", "cache_dir", "vocabulary", "train_on_evaluation_data"):  # where things lie may change
    del settings[name]
  own = config.batch_size // host_count
  if host_count > 1 and not config.host_shards:
    rows = np.arange(host_index * own, (host_index + 1) * own) if rows is None else rows
    host_index, host_count, own = 0, 1, config.batch_size  # of the reading
  else:
    rows = None
  identity = {"version": 1, **settings, "host_count": host_count}
  _check_place(place, identity)
  shard = seqio.ShardInfo(index=host_index, num_shards=host_count)
  seed = config.seed if config.shuffle else None
  readers = {
    name: streams.Epochs(task, config.split, config.lengths, seed, shard, own, packed_rows if config.pack else None)
    for name, (task, _) in tasks.items()
  }
  rates = {name: rate for name, (_, rate) in tasks.items()}
  mixer = streams.Mixer(readers, rates, own, config.seed, host_index, packed=config.pack)
  if place is not None:
    mixer.restore(place)
    return BatchIterator(mixer, identity, rows)
  for name, (task, _) in tasks.items() if first else ():
    _log_cut(name, task, config)
  for reader in readers.values():
    reader.look_ahead()
  return BatchIterator(mixer, identity, rows)


def write_tokens(
  path: str,
  task: str,
  split: str,
  input_length: int,
  target_length: int,
  changes: Changes = Changes(),
) -> int:
  """Write a split, in its own order, to an .npz of encoder_input_tokens [N, S] and decoder_target_tokens [N, T].

  What the core needs to work on a machine without TensorFlow. Returns N.

  Raises:
    ConfigError: unknown task or split, empty split, a place that cannot be written.
  """
  config = DataConfig(task, 256, input_length, target_length, split)
  parts = []
  for one, _ in find_tasks(task, split, changes).values():
    dataset = streams.epoch_dataset(one, split, config.lengths, seed=None)
    parts.extend(streams.model_features(dataset, config.lengths).batch(config.batch_size).as_numpy_iterator())
  if not parts:
    raise ConfigError(f"the split {split!r} of {task!r} is empty")
  arrays = {key: np.concatenate([part[key] for part in parts]) for key in ("encoder_input_tokens", "decoder_target_tokens")}
  try:
    with open(path, "wb") as file:
      np.savez_compressed(file, **arrays)
  except OSError as error:
    raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
  return len(arrays["encoder_input_tokens"])


def cut_shares(task: seqio.Task, config: DataConfig) -> dict[str, float]:
  """Return which share of the first thousand examples is longer than the lengths: {"inputs", "targets"}."""
  dataset = streams.epoch_dataset(task, config.split, None, None).take(_SAMPLE)
  limits = {"inputs": config.input_length, "targets": config.target_length}
  long = [[len(example[key]) > limit for key, limit in limits.items()] for example in dataset.as_numpy_iterator()]
  if not long:
    raise ConfigError(f"the split {config.split!r} of {task.name!r} is empty")
  return dict(zip(limits, np.mean(long, axis=0).tolist(), strict=True))


def _log_cut(name: str, task: seqio.Task, config: DataConfig) -> None:
  shares = cut_shares(task, config)
  _log.info(
    "%s: %.0f%% of inputs are cut at %d tokens, %.0f%% of targets at %d",
    name,
    100 * shares["inputs"],
    config.input_length,
    100 * shares["targets"],
    config.target_length,
  )


def _check_place(place: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> None:
  if place is None:
    return
  defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}  # of a place from before a field
  for name, value in identity.items():
    if place.get(name, defaults.get(name)) != value:
      raise ConfigError(
        f"the saved place in the data is of {name}={place.get(name)!r}, this run has {name}={value!r}: go on with the"
        " same data settings, or begin in a new directory"
      )
