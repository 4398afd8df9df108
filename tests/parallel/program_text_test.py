"""Reading compiled programs: lines written by hand, and how often their loops go round."""

import jax
import jax.numpy as jnp
import pytest

from distillspec_jax.parallel import program_text
from distillspec_jax.parallel.program_text import Array

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%inside (param_0: f32[4,8]) -> f32[8,4] {
  %param_0 = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %turned = f32[8,4]{1,0} transpose(%param_0), dimensions={1,0}, metadata={op_name="jit(f)/turn (a, b)"}
}

%limit (s: (s32[], f32[4,8])) -> pred[] {
  %s = (s32[], /*index=1*/f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %end = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %same = (s32[], f32[4,8]{1,0}) tuple(%s)
}

ENTRY %main.9 (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0), sharding={replicated}
  %tuple.1 = (s32[], f32[4,8]{1,0}) tuple(f32[] %zero, f32[4,8]{1,0} %p)
  %loop = (s32[], f32[4,8]{1,0}) while(%tuple.1), condition=%limit, body=%body
  %known = (s32[], f32[4,8]) while(%tuple.1), condition=%body, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %choice = f32[8]{0} conditional(%i, %a, %b), branch_computations={%inside, %body}
  %two = f32[8]{0} conditional(%c, %a, %b), true_computation=%inside, false_computation=%body
  ROOT %fused = bf16[8,4]{1,0} fusion(%p), kind=kLoop, calls=%inside
}
"""


def test_a_text_written_by_hand():
  program = program_text.read(TEXT)
  assert program.entry == "main.9" and set(program.computations) == {"inside", "limit", "body", "main.9"}
  main, inside = program.computations["main.9"], program.computations["inside"]
  fused = main.root
  assert (fused.name, fused.opcode, fused.operands, fused.called("calls")) == ("fused", "fusion", ("p",), "inside")
  assert fused.arrays == (Array("bf16", (8, 4)),) and fused.bytes == 64
  assert main.operand(fused, 0) == Array("f32", (4, 8)) and main.operand(fused, 0).bytes == 128
  assert main.instructions["tuple.1"].operands == ("zero", "p")
  assert main.instructions["choice"].branches() == main.instructions["two"].branches() == ["inside", "body"]
  assert inside.parameters[0].arrays == (Array("f32", (4, 8), space=1),) and inside.parameters[0].bytes == 0
  assert inside.root.numbers("dimensions") == (1, 0) and inside.root.numbers("other") == ()
  assert [line.name for line in inside.users["param_0"]] == ["turned"]
  state = program.computations["limit"].instructions["s"]
  assert state.arrays == (Array("s32", ()), Array("f32", (4, 8)))


def test_rounds_of_loops():
  program = program_text.read(TEXT)
  main = program.computations["main.9"].instructions
  assert program_text.trips(program, main["loop"]) == 12
  assert program_text.trips(program, main["known"]) == 7
  unknown = program_text.read(TEXT.replace("s32[] constant(12)", "s32[] constant(-)"))
  assert program_text.trips(unknown, unknown.computations["main.9"].instructions["loop"]) is None
  two = program_text.read(TEXT.replace("  %end =", "  %other = s32[] constant(3)\n  %end ="))
  assert program_text.trips(two, two.computations["main.9"].instructions["loop"]) is None


def test_sizes_of_dtypes():
  sizes = {"pred": 1, "s4": 0.5, "s8": 1, "u32": 4, "bf16": 2, "f8e4m3fn": 1, "f64": 8, "c64": 8, "token": 0}
  assert {dtype: Array(dtype, (2,)).bytes / 2 for dtype in sizes} == sizes


def test_no_entry():
  with pytest.raises(ValueError, match="no ENTRY"):
    program_text.read("%f (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n")


def test_what_xla_writes_here():
  def f(x):
    def more(state):
      return (state[0] < 9) & ~jnp.all(state[1] > 1e6)

    return jax.lax.while_loop(more, lambda state: (state[0] + 1, state[1] * 1.5 @ jnp.ones((4, 4))), (0, x))

  program = program_text.read(jax.jit(f).lower(jnp.ones((4, 4))).compile().as_text())
  lines = [line for part in program.computations.values() for line in part.instructions.values()]
  loops = [line for line in lines if line.opcode == "while"]
  assert [program_text.trips(program, loop) for loop in loops] == [9]
