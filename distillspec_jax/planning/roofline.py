"""How fast a device could do its work at best: arithmetic on what it can do and what it has to do."""

from __future__ import annotations

import dataclasses

from distillspec_jax.planning.chips import Chip
from distillspec_jax.planning.work import Work


@dataclasses.dataclass(frozen=True)
class Bound:
  """Seconds that each part of the work takes at the device's full rate.

  Attributes:
    compute: operations.
    memory: bytes of the device's own memory.
    interconnect: bytes between devices, and each message's own latency.
  """

  compute: float
  memory: float
  interconnect: float

  @property
  def least(self) -> float:
    """Seconds where everything overlaps."""
    return max(dataclasses.astuple(self))

  @property
  def most(self) -> float:
    """Seconds where nothing overlaps; still at full rates."""
    return sum(dataclasses.astuple(self))

  @property
  def binds(self) -> str:
    """Name the part that takes longest."""
    return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]

  def to_dict(self) -> dict[str, float | str]:
    """Give it in JSON's terms, times in seconds."""
    return dataclasses.asdict(self) | {"least": self.least, "most": self.most, "binds": self.binds}


def bound(work: Work, chip: Chip, dtype: str = "bfloat16") -> Bound:
  """Say how long some work takes at least.

  Args:
    work: of one device.
    chip: what it can do.
    dtype: "bfloat16" or "float32", of the matrix products.
  """
  peak = chip.flops_float32 if dtype == "float32" else chip.flops
  wire = work.wire_bytes / chip.wire + sum(work.messages.values()) * chip.latency
  return Bound(work.flops / peak, work.bytes / chip.bandwidth, wire)
