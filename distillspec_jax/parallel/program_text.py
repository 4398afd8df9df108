"""A compiled program's text, read into computations and instructions."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

_HEADER = re.compile(r"(?:(ENTRY) )?%?([\w.\-]+) .*\{\s*$")
_START = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%?([\w.\-]+)$")
_INTEGER = re.compile(r"-?\d+$")
_BITS = re.compile(r"\d+")
_SPACE = re.compile(r"S\((\d+)\)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a program: dtype in XLA's name, shape, and the number of the memory it lies in (0: the device's)."""

  dtype: str
  shape: tuple[int, ...]
  space: int = 0

  @property
  def elements(self) -> int:
    """Count its elements."""
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    """Count its bytes, without what a machine's tiles pad it with."""
    if self.dtype == "token":
      return 0
    bits = 8 if self.dtype == "pred" else int(_BITS.search(self.dtype)[0])
    return self.elements * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program.

  Attributes:
    name: as the others call it.
    opcode: "fusion", "dot", ...
    arrays: what it gives, a tuple's parts one after the other.
    operands: names of what it takes; of a parameter its number, of a constant its value.
    attributes: the rest of the line.
    root: whether it is its computation's result.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  root: bool

  def called(self, key: str) -> str | None:
    """Name the computation that an attribute (`calls`, `body`, `to_apply`, ...) names; None where it has none."""
    match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
    return match[1] if match else None

  def branches(self) -> list[str]:
    """Name the computations of a conditional."""
    if match := re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes):
      return [name.strip().lstrip("%") for name in match[1].split(",")]
    return [name for key in ("true_computation", "false_computation") if (name := self.called(key))]

  def numbers(self, key: str) -> tuple[int, ...]:
    """Read an attribute `key={1,2}`; () where it has none."""
    match = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
    return tuple(int(number) for number in match[1].split(",") if number) if match else ()

  @property
  def bytes(self) -> int:
    """Count the bytes that it gives to the device's memory."""
    return sum(array.bytes for array in self.arrays if not array.space)


@dataclasses.dataclass(frozen=True)
class Computation:
  """Some instructions by name, in the program's order."""

  name: str
  instructions: Mapping[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    """The instruction that gives the result."""
    return next(line for line in self.instructions.values() if line.root)

  def operand(self, instruction: Instruction, index: int) -> Array:
    """Give the array that an instruction takes at this place."""
    return self.instructions[instruction.operands[index]].arrays[0]

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Its parameters by number."""
    found = (line for line in self.instructions.values() if line.opcode == "parameter")
    return {int(line.operands[0]): line for line in found}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Who takes what an instruction gives, by name."""
    found: dict[str, list[Instruction]] = {}
    for line in self.instructions.values():
      for name in line.operands:
        found.setdefault(name, []).append(line)
    return found


@dataclasses.dataclass(frozen=True)
class Program:
  """All computations by name, and which is run."""

  computations: Mapping[str, Computation]
  entry: str


def read(text: str) -> Program:
  """Read a compiled program.

  Args:
    text: `compiled.as_text()`.

  Raises:
    ValueError: there is no ENTRY computation in it.
  """
  computations, entry = {}, None
  for block in re.split(r"\n(?=\S)", text):
    first, _, rest = block.partition("\n")
    if match := _HEADER.match(first):
      lines = (_instruction(line) for line in rest.splitlines())
      computations[match[2]] = Computation(match[2], {line.name: line for line in lines if line})
      entry = match[2] if match[1] else entry
  if entry is None:
    raise ValueError("the text of a program has no ENTRY computation")
  return Program(computations, entry)


def trips(program: Program, loop: Instruction) -> int | None:
  """Say how often a `while` goes round at most: what the compiler found, or the bound that its condition compares with.

  None where neither says it. A loop may end sooner: one that also stops when all rows have ended, say.
  """
  if match := _KNOWN_TRIPS.search(loop.attributes):
    return int(match[1])
  condition = program.computations[loop.called("condition")]
  lines = list(condition.instructions.values())
  for line in tuple(lines):
    if line.opcode == "fusion":
      lines += program.computations[line.called("calls")].instructions.values()
  if not any(line.opcode == "compare" and "direction=LT" in line.attributes for line in lines):
    return None
  bounds = {
      int(line.operands[0])
      for line in lines
      if line.opcode == "constant" and line.arrays[0] == Array("s32", ()) and _INTEGER.match(line.operands[0])
  }
  return bounds.pop() if len(bounds) == 1 else None


def _instruction(line: str) -> Instruction | None:
  match = _START.match(line)
  if not match:
    return None
  rest = line[match.end() :]
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  opcode, _, after = rest[end:].lstrip().partition("(")
  close = _closing("(" + after) - 1
  operands = tuple(_operand(part) for part in _split(after[:close]))
  return Instruction(match[2], opcode, _arrays(rest[:end]), operands, after[close + 1 :], bool(match[1]))


def _closing(text: str) -> int:
  """Find where the bracket that a text begins with ends."""
  depth = 0
  for index, letter in enumerate(text):
    depth += (letter in "({[") - (letter in ")}]")
    if not depth:
      return index
  raise ValueError(f"no closing bracket in {text[:80]!r}")


def _split(text: str) -> list[str]:
  """Cut at commas outside brackets."""
  if not any(letter in text for letter in "({["):
    return [part.strip() for part in text.split(",") if part.strip()]
  parts, depth, start = [], 0, 0
  for index, letter in enumerate(text):
    depth += (letter in "({[") - (letter in ")}]")
    if letter == "," and not depth:
      parts.append(text[start:index].strip())
      start = index + 1
  return [part for part in [*parts, text[start:].strip()] if part]


def _operand(text: str) -> str:
  """Give the name of an operand, which older texts print with its type."""
  match = _NAME.search(text)
  return match[1] if match else text


def _arrays(text: str) -> tuple[Array, ...]:
  found = []
  for dtype, dims, layout in _ARRAY.findall(text):
    space = _SPACE.search(layout)
    shape = tuple(int(size) for size in dims.split(",") if size)
    found.append(Array(dtype, shape, int(space[1]) if space else 0))
  return tuple(found)
