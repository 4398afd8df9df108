"""Times at full rates: arithmetic by hand."""

import collections

import pytest

from distillspec_jax.planning import roofline
from distillspec_jax.planning.chips import CHIPS, Chip, peak_flops
from distillspec_jax.planning.work import Message, Work

CHIP = Chip("made up", 100, flops=1000.0, flops_float32=100.0, bandwidth=50.0, wire=20.0, latency=0.5)


def test_which_part_binds():
  messages = collections.Counter({Message("all-reduce", 4, 40): 2, Message("all-gather", 2, 40): 1})
  bound = roofline.bound(Work(4000.0, 300.0, messages), CHIP)
  sent = 2 * (2 * 3 / 4 * 40) + 40 / 2
  assert (bound.compute, bound.memory, bound.interconnect) == (4.0, 6.0, sent / 20 + 3 * 0.5)
  assert (bound.binds, bound.least, bound.most) == ("interconnect", 8.5, 18.5)
  assert bound.to_dict() == {
    "compute": 4.0, "memory": 6.0, "interconnect": 8.5, "least": 8.5, "most": 18.5, "binds": "interconnect"
  }  # fmt: skip


def test_float32_has_its_own_peak():
  slow = roofline.bound(Work(4000.0, 300.0), CHIP, "float32")
  assert (slow.compute, slow.binds) == (40.0, "compute")
  assert roofline.bound(Work(4000.0, 300.0), CHIP).binds == "memory"


def test_the_table_of_chips():
  for chip in CHIPS.values():
    assert chip.flops >= chip.flops_float32 > 0 and chip.memory > 2**30 and chip.bandwidth > chip.wire
  assert peak_flops("NVIDIA H100 PCIe") == CHIPS["h100-pcie"].flops == 756e12
  assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
  assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5") == 459e12
  assert peak_flops("cpu") is None and peak_flops("NVIDIA GeForce RTX 3090") is None


@pytest.mark.parametrize("name", ["v5e", "v6e"])
def test_a_chips_own_rates(name):
  """A product of two square bfloat16 matrices is bound by its memory below the size where 2n³/flops = 3·2n²/bytes."""
  chip = CHIPS[name]
  turn = 3 * chip.flops / chip.bandwidth
  for size, binds in ((int(0.9 * turn), "memory"), (int(1.1 * turn), "compute")):
    assert roofline.bound(Work(2.0 * size**3, 3.0 * 2 * size**2), chip).binds == binds
