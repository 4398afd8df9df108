"""A run's figures on disk: train_log.jsonl, one object a line, and TensorBoard events beside it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

from distillspec_jax.parallel import multihost

NAME = "train_log.jsonl"


class RunLog:
  """Writes scalars of a run; a run that goes on drops what it wrote after the step it goes on from."""

  def __init__(self, directory: str | pathlib.Path, step: int):
    """Open the log of MODEL_DIR for a run that stands at `step`; only the first host writes."""
    self._writes = multihost.is_first()
    if not self._writes:
      return
    from distillspec_jax.data.host_tensorflow import tf  # noqa: PLC0415  (4 seconds; the doors that train have it already)

    directory = pathlib.Path(directory)
    self._path = directory / NAME
    kept = [json.dumps(line) for line in self._lines() if line["step"] <= step] if step else []
    self._path.write_text("".join(f"{line}\n" for line in kept))
    self._kept = set(kept)
    self._summary = tf.summary
    self._events = tf.summary.create_file_writer(str(directory))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Append one line and the same scalars as TensorBoard events."""
    if not self._writes:
      return
    line = json.dumps({"step": step, **{name: float(value) for name, value in scalars.items()}})
    if line in self._kept:  # a validation that is made again where the run goes on
      return
    with self._path.open("a") as file:
      file.write(f"{line}\n")
    with self._events.as_default():
      for name, value in scalars.items():
        self._summary.scalar(name, value, step=step)
    self._events.flush()

  def close(self) -> None:
    """Close the events file."""
    if self._writes:
      self._events.close()

  def _lines(self):
    if not self._path.is_file():
      return
    for line in self._path.read_text().splitlines():
      try:
        yield json.loads(line)
      except ValueError:  # cut when the run was killed
        continue
