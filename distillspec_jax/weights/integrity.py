"""A manifest of sizes and checksums beside each checkpoint, so that no damage to a file goes unseen.

Orbax notices damage to its index blocks, which carry a CRC, but not to array data: of 41 single flipped bits in a
400 kB array 39 were restored as other numbers without a word (Orbax 0.12.8). The manifest is written
once the checkpoint stands complete, and looked at before anything is restored.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator

from distillspec_jax.types import ConfigError

MANIFEST = "MANIFEST.json"
_BLOCK = 1 << 22  # bytes read at a time


def user_path(given: str | pathlib.Path) -> pathlib.Path:
  """Make a path of what a user wrote, `~` expanded.

  Raises:
    ConfigError: there is no such home, or it is an address: pathlib would make a local folder of it without a word.
  """
  if "://" in str(given):
    raise ConfigError(
      f"{given} is an address and no folder: mount the bucket or file store (gcsfuse, NFS) and give the folder"
    )
  try:
    return pathlib.Path(given).expanduser()
  except RuntimeError as error:
    raise ConfigError(f"{given}: there is no such home directory") from error


def write_manifest(directory: pathlib.Path) -> None:
  """Record size and CRC-32 of every file under `directory` in its MANIFEST.json, atomically."""
  files = {name: [path.stat().st_size, _crc32(path)] for name, path in _files(directory)}
  write_atomically(directory / MANIFEST, json.dumps({"files": files}, indent=0, sort_keys=True).encode())


def has_manifest(directory: pathlib.Path) -> bool:
  """Say whether `directory` can be checked at all."""
  return (directory / MANIFEST).exists()


def find_damage(directory: pathlib.Path) -> str | None:
  """Return what is wrong with the files of a checkpoint, or None.

  None also where there is no manifest: another program wrote the checkpoint, or a kill fell between Orbax's commit
  and the manifest.
  """
  if not has_manifest(directory):
    return None
  try:
    expected = json.loads((directory / MANIFEST).read_bytes())["files"]
    expected = {str(name): (int(size), int(checksum)) for name, (size, checksum) in expected.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return f"{MANIFEST} cannot be read"
  present = dict(_files(directory))
  for name, (size, _) in expected.items():
    if name not in present:
      return f"{name} is missing"
    actual = present[name].stat().st_size
    if actual != size:
      return f"{name} has {actual} bytes instead of {size}"
  for name, (_, checksum) in expected.items():  # the dear check last
    if _crc32(present[name]) != checksum:
      return f"{name} has other bytes than were written"
  return None


def write_atomically(path: pathlib.Path, data: bytes) -> None:
  """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with open(temporary, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


@contextlib.contextmanager
def undone_on_error(directory: pathlib.Path) -> Iterator[None]:
  """Make a folder; where the block fails, folders that were made for it go again, unless something lies in them."""
  made = [path for path in (directory, *directory.parents) if not path.exists()]
  directory.mkdir(parents=True, exist_ok=True)
  try:
    yield
  except BaseException:
    for path in made:
      if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    raise


def _files(directory: pathlib.Path):
  for path in sorted(directory.rglob("*")):
    if path.is_file() and path.name != MANIFEST and not path.name.endswith(".tmp"):
      yield path.relative_to(directory).as_posix(), path


def _crc32(path: pathlib.Path) -> int:
  checksum = 0
  with open(path, "rb") as file:
    while block := file.read(_BLOCK):
      checksum = zlib.crc32(block, checksum)
  return checksum
