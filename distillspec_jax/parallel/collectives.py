"""What a compiled program sends between devices, read off its text."""

from __future__ import annotations

import dataclasses
import math
import re

from distillspec_jax.parallel import program_text
from distillspec_jax.parallel.program_text import Array, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_CALLS = ("body", "condition", "to_apply", "calls")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One message of a program.

  Attributes:
    kind: one of KINDS.
    arrays: what it gives on one device.
    group: how many devices take part together.
    in_loop: whether a loop runs it.
    source: where in the traced program it comes from; "" where the text does not say.
  """

  kind: str
  arrays: tuple[Array, ...]
  group: int
  in_loop: bool
  source: str

  @property
  def elements(self) -> int:
    """Count the elements that it gives on one device."""
    return sum(array.elements for array in self.arrays)

  @property
  def bytes(self) -> int:
    """Count the bytes that it gives on one device."""
    return sum(array.bytes for array in self.arrays)

  def __str__(self) -> str:
    arrays = ", ".join(f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in self.arrays)
    return f"{self.kind} {arrays} over {self.group}{' in a loop' if self.in_loop else ''} ({self.source})"


def collectives(text: str) -> list[Collective]:
  """List the messages of a compiled program, in the order of its text.

  Args:
    text: `compiled.as_text()`.

  Raises:
    ValueError: it is no program's text.
  """
  program = program_text.read(text)
  looped = _looped(program)
  lines = [(line, name in looped) for name, part in program.computations.items() for line in part.instructions.values()]
  return [message for line, in_loop in lines if (message := message_of(line, in_loop))]


def message_of(line: Instruction, in_loop: bool = False) -> Collective | None:
  """Read what an instruction sends; None where it sends nothing, or ends what another began."""
  kind = line.opcode.removesuffix("-start")
  if kind not in KINDS:
    return None
  arrays = line.arrays
  if kind != line.opcode and kind != "all-reduce":  # operands come before results, on some machines two counters after
    arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
  source = re.search(r'op_name="([^"]*)"', line.attributes)
  return Collective(kind, arrays, _group(line.attributes), in_loop, source[1] if source else "")


def _looped(program: Program) -> set[str]:
  """Name the computations that loops run, called ones among them."""
  lines = [line for part in program.computations.values() for line in part.instructions.values()]
  found, todo = set(), [line.called(key) for line in lines if line.opcode == "while" for key in ("body", "condition")]
  while todo:
    name = todo.pop()
    if name is None or name in found or name not in program.computations:
      continue
    found.add(name)
    for line in program.computations[name].instructions.values():
      todo += [*(line.called(key) for key in _CALLS), *line.branches()]
  return found


def _group(attributes: str) -> int:
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
    # An axis may take part with some of its devices: 'axis':(devices before)devices.
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2]))
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(match[1])
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(match[1].split(","))
  return 2 if "source_target_pairs" in attributes else 1
