"""What a device of each kind can do at most, as its maker says it."""

from __future__ import annotations

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of a kind.

  Attributes:
    kind: a part of jax's `device_kind`.
    memory: bytes that programs can have.
    flops: bfloat16 products, operations a second.
    flops_float32: the same of true float32 products (`Precision.HIGHEST`).
    bandwidth: of its memory, bytes a second.
    wire: bytes a second that it sends to its neighbours along one axis of a mesh.
    latency: seconds that a message takes however small it is; an assumption.
  """

  kind: str
  memory: int
  flops: float
  flops_float32: float
  bandwidth: float
  wire: float
  latency: float


def _tpu(kind: str, gib: float, flops: float, bandwidth: float, wire: float) -> Chip:
  """TPUs make a float32 product of six bfloat16 ones; the memory is what their compiler lets programs have."""
  return Chip(kind, int(gib * GIB), flops, flops / 6, bandwidth, wire, 5e-6)


CHIPS: dict[str, Chip] = {
    "v4": _tpu("TPU v4", 30.75, 275e12, 1228e9, 90e9),
    "v5e": _tpu("TPU v5 lite", 15.75, 197e12, 819e9, 90e9),
    "v5p": _tpu("TPU v5", 95.73, 459e12, 2765e9, 180e9),
    "v6e": _tpu("TPU v6 lite", 31.24, 918e12, 1640e9, 180e9),
    "h200": Chip("H200", 139 * GIB, 989e12, 67e12, 4800e9, 450e9, 1e-5),
    "h100-pcie": Chip("H100 PCIe", 79 * GIB, 756e12, 51e12, 2000e9, 64e9, 2e-5),
    "h100": Chip("H100", 79 * GIB, 989e12, 67e12, 3350e9, 450e9, 1e-5),
    "a100-80g": Chip("A100", 79 * GIB, 312e12, 19.5e12, 2039e9, 300e9, 1e-5),
    # A round number each, of a virtual device: for trying things out.
    "cpu": Chip("cpu", 8 * GIB, 1e11, 1e11, 2e10, 1e10, 1e-5),
}


def peak_flops(device_kind: str) -> float | None:
  """Give what a device of jax's `device_kind` does at most in bfloat16, operations a second; None: not known."""
  chips = [chip for name, chip in CHIPS.items() if name != "cpu" and chip.kind in device_kind]
  return max(chips, key=lambda chip: len(chip.kind)).flops if chips else None
