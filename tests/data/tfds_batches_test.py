"""Batches of tasks over TFDS, whose data lie in one file or in several: hosts, order, resumption."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from distillspec_jax.data import lookup, pipeline, streams
from distillspec_jax.data.host_tensorflow import seqio

COUNT = 50
FILES = {"one_file": 1, "many_files": 5}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Register `one_file` and `many_files`, records 0 ... 49 in one and in five files; returns TFDS's folder."""
  import tensorflow_datasets as tfds

  folder = tmp_path_factory.mktemp("tfds")
  for name, files in FILES.items():
    tfds.dataset_builders.store_as_tfds_dataset(
      name=name,
      version="1.0.0",
      data_dir=folder,
      features=tfds.features.FeaturesDict({"inputs": tfds.features.Text(), "targets": tfds.features.Text()}),
      split_datasets={"train": [(i, {"inputs": f"{i}", "targets": f"{i}"}) for i in range(COUNT)]},
      download_config=tfds.download.DownloadConfig(num_shards=files),
    )
    assert len(list((folder / name / "1.0.0").glob("*.tfrecord*"))) == files
  (folder / "file_tasks.py").write_text(TASKS)
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))
  for name in FILES:
    seqio.TaskRegistry.remove(name)


TASKS = """
import seqio

for name, buffer in (("one_file", 8), ("many_files", 8)):
  seqio.TaskRegistry.add(
    name,
    source=seqio.TfdsDataSource(f"{name}:1.0.0"),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={key: seqio.Feature(seqio.ByteVocabulary()) for key in ("inputs", "targets")},
    shuffle_buffer_size=buffer,
  )
"""


def make(data_dir, name, host=0, hosts=1, place=None, batch_size=24, **changes):
  config = pipeline.DataConfig(f"file_tasks:{name}", batch_size, 4, 4, data_dir=str(data_dir), **changes)
  return pipeline.train_batches(config, None, host, hosts, place)


def numbers_of(batches, count):
  rows = [row for batch in itertools.islice(batches, count) for row in batch["decoder_target_tokens"].tolist()]
  return [int("".join(chr(i - 3) for i in row if i > 2)) for row in rows]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
def test_hosts_share_without_doubles_or_losses(data_dir, name, hosts):
  """Each host reads its files where there are enough, else its part of the examples; two epochs are two splits."""
  by_file = FILES[name] >= hosts
  epochs = [[], []]
  for host in range(hosts):
    size = COUNT // FILES[name] * len(range(host, FILES[name], hosts)) if by_file else len(range(host, COUNT, hosts))
    seen = numbers_of(make(data_dir, name, host, hosts, host_shards=True), -(-2 * size * hosts // 24))
    epochs[0] += seen[:size]
    epochs[1] += seen[size : 2 * size]
  assert [sorted(epoch) for epoch in epochs] == [list(range(COUNT))] * 2


@pytest.mark.parametrize("name", FILES)
def test_the_order_is_of_the_seed_and_the_epoch(data_dir, name):
  order = lambda seed: numbers_of(make(data_dir, name, seed=seed, batch_size=COUNT), 2)
  first = order(3)
  assert first == order(3) != order(4)
  assert first[:COUNT] != first[COUNT:] and sorted(first[:COUNT]) == sorted(first[COUNT:]) == list(range(COUNT))
  unshuffled = numbers_of(make(data_dir, name, shuffle=False, batch_size=COUNT), 2)
  assert unshuffled[:COUNT] == unshuffled[COUNT:]


def test_the_order_is_the_same_in_another_process(data_dir, tmp_path):
  code = (
    "import sys, json; from distillspec_jax.data import pipeline\n"
    "for name in ('one_file', 'many_files'):\n"
    f"  config = pipeline.DataConfig('file_tasks:' + name, 24, 4, 4, data_dir={str(data_dir)!r}, seed=5)\n"
    "  batches = pipeline.train_batches(config)\n"
    "  print(json.dumps([next(batches)['decoder_target_tokens'].tolist() for _ in range(5)]))\n"
  )
  environment = {**os.environ, "PYTHONPATH": f"{os.getcwd()}:{data_dir}", "DISTILLSPEC_CACHE": str(tmp_path)}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  for name, line in zip(FILES, done.stdout.splitlines(), strict=True):
    batches = make(data_dir, name, seed=5)
    assert json.loads(line) == [next(batches)["decoder_target_tokens"].tolist() for _ in range(5)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("host", "hosts"), [(0, 1), (1, 2)])
def test_going_on_gives_exactly_the_next_batches(data_dir, name, host, hosts):
  whole = make(data_dir, name, host, hosts)
  batches, states = [], [whole.state()]
  for _ in range(6):
    batches.append(next(whole))
    states.append(json.loads(json.dumps(whole.state())))
  for at in (1, 4):
    resumed = make(data_dir, name, host, hosts, place=states[at])
    for batch in batches[at:]:
      assert all(np.array_equal(value, batch[key]) for key, value in next(resumed).items())


@pytest.mark.parametrize("name", FILES)
def test_one_hosts_place_serves_every_host(data_dir, name):
  """Hosts' epochs differ in length: with five files on two hosts by as much as a file."""
  zero, one = make(data_dir, name, 0, 2), make(data_dir, name, 1, 2)
  numbers_of(zero, 4), numbers_of(one, 4)
  place = json.loads(json.dumps(zero.state()))
  assert numbers_of(make(data_dir, name, 1, 2, place), 3) == numbers_of(one, 3)
  assert numbers_of(make(data_dir, name, 0, 2, place), 3) == numbers_of(zero, 3)


@pytest.mark.parametrize("packed", [None, "pairs"])
def test_no_iterator_has_a_thread_that_its_end_would_wait_for(data_dir, packed):
  """TensorFlow's tuning thread sleeps for up to a minute; the option must outlive what is done to the data set."""
  task = lookup.find_tasks("file_tasks:many_files", "train", lookup.Changes(data_dir=data_dir))["many_files"][0]
  assert task.get_dataset(None, "train").options().autotune.enabled is not False
  epochs = streams.Epochs(task, "train", {"inputs": 4, "targets": 4}, 0, seqio.ShardInfo(0, 1), 2, packed)
  assert epochs._open(0, 3).batch(2).prefetch(4).options().autotune.enabled is False
