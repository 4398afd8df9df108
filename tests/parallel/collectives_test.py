"""Reading messages off a program's text: by hand-written lines, and off programs whose messages are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distillspec_jax.parallel.collectives import KINDS, collectives
from distillspec_jax.parallel.mesh import MeshConfig, make_mesh
from distillspec_jax.parallel.program_text import Array

TEXT = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%called (p: f32[4]) -> f32[4] {
  ROOT %all-reduce.1 = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%body.7 (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = f32[4]{0} call(%x), to_apply=%called
  %ag = bf16[2,4,16]{2,1,0} all-gather(%c), replica_groups=[2,4]<=[8], dimensions={2}, metadata={op_name="jit(f)/dot"}
}

%cond.8 (s: (s32[], f32[4])) -> pred[] {
  %all-reduce.9 = pred[] all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main.9 (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[4]) while(%t), condition=%cond.8, body=%body.7
  %two = (f32[3]{0}, s8[5]{0}) all-reduce(%a, %b), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %start = (f32[2]{0}, f32[16]{0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  %cp = (f32[7]{0}, f32[7]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %named = s32[2]{0} all-reduce(%a), replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a','c'}, to_apply=%add
  %part = s32[3]{0} all-to-all(%a), replica_groups=mesh['a'=8] {'a':(2)4}, dimensions={0}
  %not_one = f32[9]{0} fusion(%all-gather.3), kind=kLoop, calls=%called
}
"""


def test_a_text_written_by_hand():
  found = collectives(TEXT)
  want = [
    ("all-reduce", (Array("f32", (4,)),), 2, True, ""),
    ("all-gather", (Array("bf16", (2, 4, 16)),), 4, True, "jit(f)/dot"),
    ("all-reduce", (Array("pred", ()),), 8, True, ""),
    ("all-reduce", (Array("f32", (3,)), Array("s8", (5,))), 2, False, ""),
    ("all-gather", (Array("f32", (16,)),), 8, False, ""),
    ("collective-permute", (Array("f32", (7,)),), 2, False, ""),
    ("all-reduce", (Array("s32", (2,)),), 8, False, ""),
    ("all-to-all", (Array("s32", (3,)),), 4, False, ""),
  ]
  assert [(c.kind, c.arrays, c.group, c.in_loop, c.source) for c in found] == want
  assert [c.elements for c in found] == [4, 128, 1, 8, 16, 7, 2, 3]
  assert [c.bytes for c in found] == [16, 256, 1, 17, 64, 28, 8, 12]
  assert str(found[1]) == "all-gather bf16[2,4,16] over 4 in a loop (jit(f)/dot)"
  assert {c.kind for c in found} <= set(KINDS)


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_program_that_gathers(in_loop):
  """Rows split over data, gathered whole: as many elements as the whole has, over the two devices of data."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

  def gather(x):
    return jax.lax.with_sharding_constraint(x * 2, whole)

  def loop(x):
    body = lambda _, y: jax.lax.with_sharding_constraint(gather(y), split)
    return jax.lax.fori_loop(0, 3, body, x)

  x = jax.ShapeDtypeStruct((6, 5), np.float32, sharding=split)
  found = collectives(jax.jit(loop if in_loop else gather).lower(x).compile().as_text())
  gathers = [c for c in found if c.kind == "all-gather"]
  assert len(gathers) == 1 and gathers[0].elements == 30 and gathers[0].group == 2 and gathers[0].in_loop == in_loop


def test_a_program_of_one_device_sends_nothing():
  assert collectives(jax.jit(jnp.sum).lower(np.ones(4, np.float32)).compile().as_text()) == []
