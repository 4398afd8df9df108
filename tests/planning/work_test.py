"""Operations, bytes and messages of programs: by hand, and of compiled programs whose work is known."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distillspec_jax.parallel.mesh import MeshConfig, make_mesh
from distillspec_jax.planning.work import Message, Work, bytes_of_inputs, work_of

HEAD = "HloModule jit_f\n\n"


def entry(*lines):
  return HEAD + "ENTRY %main (p: f32[8]) -> f32[8] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"


def test_operations_of_products():
  work = work_of(
    entry(
      "%a = f32[3,8,16]{2,1,0} parameter(0)",
      "%b = f32[3,16,5]{2,1,0} parameter(1)",
      "ROOT %c = f32[3,8,5]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0},"
      " rhs_contracting_dims={1}",
    ),
    rounds=1,
  )
  assert work.flops == 3 * 8 * 5 * 16 * 2
  assert work.bytes == 4 * (3 * 8 * 16 + 3 * 16 * 5 + 3 * 8 * 5)


@pytest.mark.parametrize(
  ("window", "labels", "left", "right", "out", "products"),
  [
    ("size=1", "0bf_io0->0bf", (4, 10, 8), (8, 6, 1), (4, 10, 6), 4 * 10 * 6 * 8),
    # A product with batch axes as TPUs write it: dilated so that each meets its own kernel alone: 4 * 6 * 8 * 7 * 16.
    ("size=4x6 stride=3x5 lhs_dilate=4x6", "0b1f_01oi->01bf", (4, 8, 6, 16), (4, 6, 7, 16), (4, 6, 8, 7), 21504),
    ("size=3 pad=1_1", "b0f_0io->b0f", (2, 5, 4), (3, 4, 6), (2, 5, 6), 2 * 6 * 4 * 13),
    ("size=2 stride=2 rhs_dilate=3", "b0f_0io->b0f", (1, 8, 1), (2, 1, 1), (1, 3, 1), 6),
  ],
)
def test_operations_of_convolutions(window, labels, left, right, out, products):
  shape = lambda sizes: ",".join(map(str, sizes))
  work = work_of(
    entry(
      f"%a = bf16[{shape(left)}] parameter(0)",
      f"%b = bf16[{shape(right)}] parameter(1)",
      f"ROOT %c = f32[{shape(out)}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}",
    ),
    rounds=1,
  )
  assert work.flops == 2 * products


FUSIONS = HEAD + """%looks_up (table: f32[1000,8], rows: s32[2]) -> f32[2,8] {
  %table = f32[1000,8]{1,0} parameter(0)
  %flat = f32[1000,8]{1,0} bitcast(%table)
  %rows = s32[2]{0} parameter(1)
  ROOT %found = f32[2,8]{1,0} gather(%flat, %rows), offset_dims={1}
}

%puts (cache: f32[100,8], new: f32[1,8], at: s32[]) -> f32[100,8] {
  %cache = f32[100,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %twice = f32[1,8]{1,0} add(%new, %new)
  ROOT %put = f32[100,8]{1,0} dynamic-update-slice(%cache, %twice, %at, %at)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %table = f32[1000,8]{1,0} parameter(0)
  %rows = s32[2]{0} parameter(1)
  %cache = f32[100,8]{1,0} parameter(2)
  %at = s32[] parameter(3)
  %row = f32[1,8]{1,0:S(1)} parameter(4)
  %a = f32[2,8]{1,0} fusion(%table, %rows), kind=kLoop, calls=%looks_up
  %b = f32[100,8]{1,0} fusion(%cache, %row, %at), kind=kLoop, calls=%puts
  %there-start = (f32[2,8]{1,0:S(1)}, f32[2,8]{1,0}, u32[]) copy-start(%a)
  %there = f32[2,8]{1,0:S(1)} copy-done(%there-start)
  %c = f32[2,8]{1,0:S(1)} add(%there, %there)
  ROOT %d = f32[2,8]{1,0} negate(%c)
}
"""


def test_bytes_that_move():
  looked_up = 64 + 2 * 4 + 64  # the rows found, their numbers, the result
  put = 2 * 32 + 4  # one row read and written, where to
  copied, added, negated = 64, 0, 64  # what lies in the fast memory is not read from the device's
  assert work_of(FUSIONS, rounds=1).bytes == looked_up + put + copied + added + negated


def test_inputs_are_read_once():
  """The two rows looked up and their numbers; a cache that is only written into; a row that lies in fast memory."""
  assert bytes_of_inputs(FUSIONS) == 64 + 8 + 0 + 4 + 0
  text = compiled_text(lambda w, table, at: (w @ w) @ w + table[at.astype(int)], (16, 16), (1000, 16), (16,))
  assert bytes_of_inputs(text) == 4 * (16 * 16 + 16 * 16 + 16)


def test_branches_and_calls():
  text = HEAD + """%small (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %x = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%large (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  %x = f32[4,4]{1,0} call(%p), to_apply=%small
  ROOT %y = f32[4,4]{1,0} fusion(%x), kind=kOutput, calls=%small
}

ENTRY %main (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %c = f32[4,4]{1,0} conditional(%i, %p, %p), branch_computations={%small, %large}
}
"""
  assert work_of(text, rounds=1).flops == 2 * (2 * 4 * 4 * 4)


def compiled_text(f, *shapes, mesh=None, specs=()):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  if mesh is None:
    return jax.jit(f).lower(*arguments).compile().as_text()
  shardings = tuple(NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs)
  return jax.jit(f, in_shardings=shardings).lower(*arguments).compile().as_text()


def test_a_compiled_scan_counts_every_round():
  text = compiled_text(lambda x, w: jax.lax.scan(lambda h, _: (h @ w, None), x, length=5)[0], (8, 16), (16, 16))
  assert work_of(text, rounds=1).flops == work_of(text, rounds=99).flops == 5 * 2 * 8 * 16 * 16


def test_a_compiled_loop_without_a_bound_is_counted_as_told():
  def f(x, w):
    return jax.lax.while_loop(lambda h: jnp.sum(h) < 1e9, lambda h: h @ w, x)

  found = [work_of(compiled_text(f, (8, 16), (16, 16)), rounds=rounds) for rounds in (1, 7)]
  assert [work.unbounded for work in found] == [1, 1]
  assert [work.flops for work in found] == [2 * 8 * 16 * 16, 7 * 2 * 8 * 16 * 16]


def test_messages_of_a_split_product():
  """x [16, 64] @ w [64, 32], the sum over 64 split over 4 devices, three times: each has a quarter of the products."""
  mesh = make_mesh(MeshConfig(2, 1, 4))

  def f(x, w):
    def body(total, _):
      y = jax.lax.with_sharding_constraint((x + total[0, 0]) @ w, NamedSharding(mesh, PartitionSpec()))
      return total + y, None

    return jax.lax.scan(body, jnp.zeros((16, 32)), length=3)[0]

  work = work_of(compiled_text(f, (16, 64), (64, 32), mesh=mesh, specs=[(None, "model"), ("model", None)]), rounds=1)
  assert work.messages == {Message("all-reduce", 4, 16 * 32 * 4): 3}
  assert work.flops == 3 * 2 * 16 * 32 * 64 / 4
  assert work.by_kind() == {"all-reduce": {"count": 3, "bytes": 3 * 2048, "sent": 3 * 2048 * 1.5}}


def ring(kind, devices, parts):
  """Send parts around a ring, step by step; count what one device sends: all parts are of one size."""
  sent = np.zeros(devices, int)
  held = np.zeros((devices, devices), int)  # how many devices' numbers device d has in part p
  if kind == "all-gather":
    np.fill_diagonal(held, devices)
  else:
    held[:] = 1
  rounds = []
  if kind in ("reduce-scatter", "all-reduce"):
    rounds += [("sum", step) for step in range(devices - 1)]
  if kind in ("all-gather", "all-reduce"):
    rounds += [("copy", step) for step in range(devices - 1)]
  for what, step in rounds:
    before = held.copy()
    for device in range(devices):
      part = (device - step + (1 if what == "copy" and kind == "all-reduce" else 0)) % devices
      to = (device + 1) % devices
      held[to, part] = before[device, part] + (before[to, part] if what == "sum" else 0)
      sent[device] += parts
  return held, sent


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_what_a_ring_sends(devices):
  part = 96
  held, sent = ring("all-reduce", devices, part)
  assert np.all(held == devices)
  assert set(sent) == {Message("all-reduce", devices, part * devices).wire_bytes}
  held, sent = ring("all-gather", devices, part)
  assert np.all(held == devices)
  assert set(sent) == {Message("all-gather", devices, part * devices).wire_bytes}
  held, sent = ring("reduce-scatter", devices, part)
  assert np.all(held.max(1) == devices)
  assert set(sent) == {Message("reduce-scatter", devices, part).wire_bytes}
  assert Message("collective-permute", 2, part).wire_bytes == part
  assert Message("all-to-all", devices, part * devices).wire_bytes == part * (devices - 1)


def test_sums():
  message = Message("all-gather", 2, 10)
  one = Work(1.0, 2.0, collections.Counter({message: 3}), 1)
  assert (one + one.times(4)).messages == {message: 15}
  assert (one + one.times(4)).flops == 5.0 and one.times(4).unbounded == 1
