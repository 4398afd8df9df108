"""Damaged checkpoints: 640 mutations of the four golden ones either load unchanged or are a ConfigError.

A mutation may load as another model only where the format cannot tell, and those are counted apart:

* raw numbers without a checksum: tensors in a safetensors file, and zarr chunks that are compressed with zstd without
  one (T5X through Orbax). Chunks in gzip (T5X's own form) and OCDBT's index carry checksums: there every flipped bit
  must be seen;
* a configuration file that still is one: another number that no shape contradicts (the maximum distance, say).

Native checkpoints have a manifest of checksums (checkpoints_test.py).
"""

import collections
import dataclasses
import json
import pathlib
import random
import re
import shutil
import signal

import numpy as np
import pytest

from distillspec_jax.types import ConfigError
from distillspec_jax.weights import lazy_tensors, sources

FORMS = ("huggingface", "t5x_native", "t5x_scanned", "t5x_orbax")
# The optimizer's folders, and what Orbax writes beside the tree: no loader opens these.
UNREAD = re.compile("state.param|_sharding|array_metadatas|commit_success|_CHECKPOINT_METADATA|ocdbt.process_0/m")
CASES = 160  # a form
SECONDS = 20  # one case may take; they take milliseconds


class Hang(BaseException):
  """A case took too long."""


def on_alarm(number, frame):
  raise Hang


@pytest.fixture
def limited():
  old = signal.signal(signal.SIGALRM, on_alarm)
  yield lambda: signal.alarm(SECONDS)
  signal.alarm(0)
  signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="module")
def copies(shared_dir, tmp_path_factory):
  """Writable copies without the golden logits, which no loader reads."""
  folder = tmp_path_factory.mktemp("fuzz")
  for form in FORMS:
    shutil.copytree(shared_dir / "fixtures" / form, folder / form, ignore=shutil.ignore_patterns("golden.npz"))
    for path in (folder / form).rglob("*"):
      path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / form).chmod(0o755)
  return folder


def loaded(directory):
  source = sources.open_source(directory)
  return source.model.config, lazy_tensors.read_all(source.tensors, np.float32)


def same(a, b):
  return a[0] == b[0] and set(a[1]) == set(b[1]) and all(np.array_equal(a[1][n], b[1][n], equal_nan=True) for n in a[1])


@dataclasses.dataclass
class Mutation:
  """What was done, and how it is undone."""

  kind: str
  path: pathlib.Path
  before: bytes | None
  place: int = -1


def files_of(directory):
  """List what is worth breaking: everything that is read, and a few files of the optimizer, which are not."""
  paths = sorted(path for path in directory.rglob("*") if path.is_file())
  kept = [path for path in paths if not UNREAD.search(str(path.relative_to(directory)))]
  return kept + [path for path in paths if path not in kept][:4]


def mutate(rng, path):
  """Break one file in one of the ways that files break."""
  data = path.read_bytes()
  kind = rng.choice(["truncate", "flip", "flip", "flip", "drop", "rename", "reshape", "zero", "append", "empty"])
  place = rng.randrange(len(data)) if data else 0
  if kind == "truncate":
    path.write_bytes(data[:place])
  elif kind == "flip":
    changed = bytearray(data or b"?")
    changed[place] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
  elif kind == "zero":
    path.write_bytes(data[:place] + bytes(len(data[place : place + 16])) + data[place + 16 :])
  elif kind == "append":
    path.write_bytes(data + rng.randbytes(rng.randrange(1, 40)))
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "drop":
    path.unlink()
  elif kind == "rename":  # a name, a key or a word in a text or a header
    words = list(re.finditer(rb"[a-z_]{4,}", data[:200_000]))
    if words:
      word = rng.choice(words)
      path.write_bytes(data[: word.start()] + b"x" + data[word.start() + 1 :])
      place = word.start()
  else:  # another number in a text or a header, often a shape
    numbers = list(re.finditer(rb"(?<=[\[,: ])\d{1,6}(?=[\],} ])", data[:200_000]))
    if numbers:
      number = rng.choice(numbers)
      other = rng.choice([b"0", b"1", b"33", b"64", b"-1", b"99999999999", b"[]", b"null"])
      path.write_bytes(data[: number.start()] + other + data[number.end() :])
      place = number.start()
  return Mutation(kind, path, data, place)


def cannot_be_seen(form, mutation):
  """Say whether the mutated bytes are of those that the format has no means to check; see above."""
  name = mutation.path.name
  if name == "config.json":
    if form != "huggingface" and mutation.kind == "rename":
      return False  # of T5X's every name and word is known
    try:
      return isinstance(json.loads(mutation.path.read_bytes()), dict)  # still a description, of something else
    except (OSError, ValueError):
      return False
  if mutation.kind not in ("flip", "zero", "rename", "reshape"):
    return False  # another length is always seen
  if name == "model.safetensors":
    return mutation.place >= 8 + int.from_bytes(mutation.before[:8], "little")
  return form == "t5x_orbax" and mutation.path.parent.name == "d"


@pytest.mark.parametrize("form", FORMS)
def test_no_mutation_loads_as_another_model_without_a_word(copies, form, limited):
  directory = copies / form
  whole = loaded(directory)
  paths = files_of(directory)
  rng = random.Random(f"{form} 1")
  counts = collections.Counter()
  for case in range(CASES):
    mutation = mutate(rng, rng.choice(paths))
    about = f"{form}, case {case}: {mutation.kind} at {mutation.place} of {mutation.path.relative_to(directory)}"
    limited()
    try:
      unchanged = same(loaded(directory), whole)
    except ConfigError as error:
      assert str(error) and "\n" not in str(error), about
      counts["error"] += 1
    except Hang:
      pytest.fail(f"{about}: took more than {SECONDS} s")
    except BaseException as error:
      raise AssertionError(f"{about}: {type(error).__name__} is no ConfigError") from error
    else:
      if unchanged:
        counts["unchanged"] += 1
      else:
        assert cannot_be_seen(form, mutation), f"{about}: loaded as another model"
        counts["cannot be seen"] += 1
    finally:
      signal.alarm(0)
      mutation.path.write_bytes(mutation.before)
  assert same(loaded(directory), whole)  # every mutation was undone
  assert counts["error"] > CASES // 10, counts
  assert sum(counts.values()) == CASES
  if form in ("t5x_native", "t5x_scanned"):
    assert counts["cannot be seen"] <= 3, counts  # config.json alone


@pytest.mark.parametrize("form", ["t5x_native", "t5x_scanned"])
def test_every_flipped_bit_of_a_gzip_chunk_is_seen_or_changes_nothing(copies, form, limited):
  directory = copies / form
  whole = loaded(directory)
  paths = [path for path in sorted(directory.rglob("*")) if "target." in path.parent.name and path.name[0].isdecimal()]
  rng, seen = random.Random(form), 0
  for _ in range(40):
    path = rng.choice(paths)
    before = path.read_bytes()
    changed = bytearray(before)
    changed[rng.randrange(len(before))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    limited()
    try:
      assert same(loaded(directory), whole), path  # a bit in the time stamp, say
    except ConfigError:
      seen += 1
    finally:
      signal.alarm(0)
      path.write_bytes(before)
  assert seen > 30


def test_a_flipped_bit_in_raw_numbers_cannot_be_seen(copies):
  """The limit, stated: safetensors has no checksum, so such a file is another model, and loads."""
  path = copies / "huggingface" / "model.safetensors"
  whole, before = loaded(path.parent), path.read_bytes()
  changed = bytearray(before)
  changed[-1] ^= 1
  path.write_bytes(changed)
  try:
    assert not same(loaded(path.parent), whole)
  finally:
    path.write_bytes(before)


def test_dropped_tensors_and_exchanged_shards(copies, limited):
  """Tensors and folders that go missing or come twice, one by one: every one is named."""
  directory = copies / "t5x_native" / "checkpoint_3"
  folders = sorted(directory.glob("target.*"))
  for folder in folders[::4]:
    aside = directory.parent / "aside"
    folder.rename(aside)
    limited()
    try:
      with pytest.raises(ConfigError, match=re.escape(folder.name.removeprefix("target.").replace(".", "/"))):
        loaded(directory.parent)
    finally:
      signal.alarm(0)
      aside.rename(folder)
