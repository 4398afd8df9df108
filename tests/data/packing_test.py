"""Packed rows: every example once an epoch and in the order of the unpacked stream; resumption, hosts, refusals."""

import itertools
import json

import numpy as np
import pytest

from distillspec_jax.data import pipeline
from distillspec_jax.types import ConfigError

S, T, SIZE = 24, 20, 40
TOKENS = ("encoder_input_tokens", "decoder_target_tokens")
LENGTHS = [(1 + 7 * i % 13, 1 + 5 * i % 11) for i in range(SIZE)]  # characters in and out of each example
PAIRS = [(chr(97 + i % 26) * n, chr(65 + i % 26) * m) for i, (n, m) in enumerate(LENGTHS)]
TASKS = {
  "pairs": PAIRS,
  "more": [(f"{i}?", f"{i}!") for i in range(17)],
  "texts": [("", text) for _, text in PAIRS],
  "some_without_inputs": [("" if i == 5 else text, out) for i, (text, out) in enumerate(PAIRS)],
  "some_without_targets": [(text, "" if i % 3 == 0 else out) for i, (text, out) in enumerate(PAIRS)],
  "long": [("a" * 50, "b" * 50), ("c", "d"), ("e", "f" * 19)],
}


@pytest.fixture(scope="module", autouse=True)
def tasks():
  """Register the tasks over bytes; no EOS where a text is empty."""
  from distillspec_jax.data.host_tensorflow import seqio, tf

  def source(pairs):
    inputs, targets = zip(*pairs, strict=True)
    return seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
        {"inputs": list(inputs), "targets": list(targets)}
      ),
      splits=("train",),
    )

  def end(dataset):
    grow = lambda ids: tf.concat([ids, tf.ones([tf.minimum(tf.size(ids), 1)], ids.dtype)], 0)
    return dataset.map(lambda x: {**x, "inputs": grow(x["inputs"]), "targets": grow(x["targets"])})

  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
  for name, pairs in TASKS.items():
    seqio.TaskRegistry.add(
      name,
      source=source(pairs),
      preprocessors=[seqio.preprocessors.tokenize, end],
      output_features={"inputs": feature, "targets": feature},
      metric_fns=[],
      shuffle_buffer_size=15,
    )
  seqio.MixtureRegistry.add("mixed", [("pairs", 2), ("more", 1)])
  yield
  seqio.MixtureRegistry.remove("mixed")
  for name in TASKS:
    seqio.TaskRegistry.remove(name)


def batches(task="pairs", batch_size=2, *, host=0, hosts=1, place=None, kind="pairs", **changes):
  config = pipeline.DataConfig(task, batch_size, S, T, **{"pack": True, **changes})
  return pipeline.train_batches(config, None, host, hosts, place, packed_rows=kind)


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def examples(batch):
  """Unpack: (inputs, targets) of each example, in order, as tuples of ids; `inputs` are empty in packed texts."""
  found = []
  for row in range(len(batch["decoder_target_tokens"])):
    part = {name: batch[name][row] for name in batch}
    if "decoder_segment_ids" not in part:
      found.append(tuple(tuple(part[name][part[name] > 0]) for name in TOKENS))
      continue
    for number in range(1, part["decoder_segment_ids"].max() + 1):
      pick = lambda side, tokens: tuple(part[tokens][part[f"{side}_segment_ids"] == number])  # noqa: B023
      inputs = pick("encoder", "encoder_input_tokens") if "encoder_input_tokens" in part else ()
      found.append((inputs, pick("decoder", "decoder_target_tokens")))
  return found


def taken(iterator, count):
  """The next `count` examples, which must end with a row of a batch of one row."""
  found = []
  while len(found) < count:
    found += examples(next(iterator))
  assert len(found) == count
  return found


def test_a_row_by_hand():
  batch = next(batches("more", shuffle=False))
  ids = lambda text: [ord(c) + 3 for c in text] + [1]
  # Three ids each side until "10": eight fit into 24 inputs, but six only into 20 targets.
  names = [str(i) for i in range(6)]
  assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}
  expected = {
    "encoder_input_tokens": [i for n in names for i in ids(n + "?")] + [0] * 6,
    "encoder_segment_ids": [k for k in range(1, 7) for _ in range(3)] + [0] * 6,
    "encoder_positions": [0, 1, 2] * 6 + [0] * 6,
    "decoder_target_tokens": [i for n in names for i in ids(n + "!")] + [0] * 2,
    "decoder_input_tokens": [i for n in names for i in [0, *ids(n + "!")[:-1]]] + [0] * 2,
    "decoder_loss_weights": [1] * 18 + [0] * 2,
    "decoder_segment_ids": [k for k in range(1, 7) for _ in range(3)] + [0] * 2,
    "decoder_positions": [0, 1, 2] * 6 + [0] * 2,
  }
  assert {name: batch[name][0].tolist() for name in batch} == expected
  assert examples({name: batch[name][1:] for name in batch})[0] == (tuple(ids("6?")), tuple(ids("6!")))


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_example_once_in_the_streams_order(shuffle):
  packed, plain = (batches(batch_size=1, shuffle=shuffle, pack=pack) for pack in (True, False))
  epochs = []
  for _ in range(2):
    epochs.append(taken(packed, SIZE))
    assert epochs[-1] == taken(plain, SIZE)
    assert len(set(epochs[-1])) == SIZE
  assert (epochs[0] != epochs[1]) == shuffle


def test_less_is_padding():
  filled = {}
  for pack in (True, False):
    rows = take(batches(batch_size=4, pack=pack), 5)
    filled[pack] = [np.mean([np.mean(b[name] > 0) for b in rows]) for name in TOKENS]
  assert all(packed > 1.8 * plain for packed, plain in zip(filled[True], filled[False], strict=True))


def test_what_is_too_long_is_cut_and_has_a_row():
  batch = next(batches("long", 2, shuffle=False))
  cut = (ord("a") + 3,) * S, (ord("b") + 3,) * T
  assert examples(batch)[0] == cut and examples({name: batch[name][:1] for name in batch}) == [cut]
  assert [len(targets) for _, targets in examples(batch)] == [T, 2]  # the third fits with neither


@pytest.mark.parametrize(
  ("task", "batch_size", "places"),
  [
    ("pairs", 8, (0, 1, 2, 3)),  # one of them holds the end of the first epoch
    ("pairs", 30, (1,)),  # every batch is more than an epoch
    ("mixed", 6, (4,)),
  ],
)
def test_going_on_gives_exactly_the_next_batches(task, batch_size, places):
  whole = batches(task, batch_size)
  rows, states = [], [whole.state()]
  for _ in range(max(places) + 1):
    rows.append(next(whole))
    states.append(json.loads(json.dumps(whole.state())))
  assert max(epoch for epoch, _ in states[-1]["places"].values()) > 0
  for at in places:
    resumed = batches(task, batch_size, place=states[at])
    assert resumed.state() == states[at]
    assert all(map(same, take(resumed, len(rows) - at), rows[at:]))


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_hosts_pack_their_own_shares(hosts):
  found = []
  for host in range(hosts):
    share = len(range(host, SIZE, hosts))
    mine = batches(batch_size=hosts, host=host, hosts=hosts, host_shards=True)
    found += taken(mine, share)
  assert len(found) == SIZE and len(set(found)) == SIZE


@pytest.mark.parametrize(("hosts", "count"), [(2, 13), (3, 9)])
def test_one_hosts_place_serves_every_host(hosts, count):
  """Epochs of different numbers of rows: of each host, and of each host from one epoch to the next."""
  shards = dict(batch_size=2 * hosts, hosts=hosts, host_shards=True)
  make = lambda host, place=None: batches(host=host, place=place, **shards)
  zero, last = make(0), make(hosts - 1)
  take(zero, count), take(last, count)
  place = json.loads(json.dumps(zero.state()))
  assert place["places"]["pairs"][0] == 2
  found = make(hosts - 1, place)
  assert found.state()["places"] == last.state()["places"]
  assert same(next(found), next(last))


def test_a_place_is_found_by_counting_every_epoch():
  reader = batches()._mixer._readers["pairs"]
  sizes = [reader.size(epoch) for epoch in range(2)]
  assert sizes[0] != sizes[1]  # else one epoch's size would do, as it does unpacked
  assert reader.find(sizes[0] - 1) == (0, sizes[0] - 1)
  assert reader.find(sum(sizes)) == (2, 0)


def test_texts_have_no_encoder():
  """Language modelling: inputs are empty; the same rows of targets, without the encoder's limit."""
  batch = next(batches("texts", kind="texts", shuffle=False))
  assert set(batch) == {
    f"decoder_{name}" for name in ("input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions")
  }
  texts = [targets for _, targets in taken(batches("texts", 1, kind="texts"), SIZE)]
  assert sorted(texts) == sorted(tuple(ord(c) + 3 for c in text) + (1,) for _, text in TASKS["texts"])


def test_examples_without_targets_are_left_out():
  """They would shift the decoder's numbers against the encoder's; they have no loss anyway."""
  kept = [pair for pair in TASKS["some_without_targets"] if pair[1]]
  found = taken(batches("some_without_targets", 1, shuffle=False), len(kept))
  encode = lambda text: tuple(ord(c) + 3 for c in text) + (1,)
  assert found == [(encode(inputs), encode(targets)) for inputs, targets in kept]


@pytest.mark.parametrize(
  ("task", "kind", "message"),
  [
    ("texts", "pairs", "'texts' cannot be packed for an encoder-decoder: some of its examples have no inputs"),
    ("some_without_inputs", "pairs", "cannot be packed for an encoder-decoder: some of its examples have no inputs"),
    ("pairs", "texts", "'pairs' cannot be packed for a decoder-only model: its examples have inputs"),
    ("some_without_inputs", "texts", "cannot be packed for a decoder-only model"),
    ("pairs", None, "rows can be packed of 'pairs' or 'texts', not None: set DataConfig.pack to False"),
  ],
)
def test_what_cannot_be_packed_is_refused_at_once(task, kind, message):
  with pytest.raises(ConfigError, match=message):
    batches(task, 6, kind=kind, shuffle=False)  # the sixth example has no inputs


def test_later_rows_are_looked_through_too():
  late = batches("some_without_inputs", 1, shuffle=False)
  with pytest.raises(ConfigError, match="some of its examples have no inputs"):
    take(late, 6)


def test_a_place_of_unpacked_rows_is_refused():
  place = batches(pack=False).state()
  with pytest.raises(ConfigError, match="pack=False, this run has pack=True"):
    batches(place=place)
