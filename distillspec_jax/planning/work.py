"""What one device does in a compiled program: operations, bytes of its memory, messages; loops counted as they run.

XLA's own `cost_analysis` counts a loop's body once, and says nothing of messages.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

from distillspec_jax.parallel import collectives, program_text
from distillspec_jax.parallel.program_text import Computation, Instruction, Program

# What moves nothing: names for what is there, or waiting for what `-start` has counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "conditional", "call", "opt-barrier", "domain", "add-dependency", "async-update", "iota",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}  # they read what they give, not all that they take
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written into the first, in its place
_CALLS = {"call": "to_apply", "async-start": "calls", "fusion": "calls", "custom-call": "calls"}


@dataclasses.dataclass(frozen=True)
class Message:
  """Messages of one kind among as many devices: `kind`, `group`, and the `bytes` that one gives on a device."""

  kind: str
  group: int
  bytes: int

  @property
  def wire_bytes(self) -> float:
    """Bytes that a device sends, by the usual algorithms around a ring."""
    others = self.group - 1
    share = others / self.group
    factor = {"all-reduce": 2 * share, "reduce-scatter": others, "collective-permute": 1.0}.get(self.kind, share)
    return factor * self.bytes


@dataclasses.dataclass(frozen=True)
class Work:
  """Sums of one device.

  Attributes:
    flops: of matrix products and convolutions; a multiplication and an addition are two.
    bytes: read from and written to the device's memory, what fused programs keep in registers not counted.
    messages: how often each is sent.
    unbounded: loops whose number of rounds was assumed.
  """

  flops: float = 0.0
  bytes: float = 0.0
  messages: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  unbounded: int = 0

  def __add__(self, other: Work) -> Work:
    return Work(
        self.flops + other.flops,
        self.bytes + other.bytes,
        self.messages + other.messages,
        self.unbounded + other.unbounded,
    )

  def times(self, number: int) -> Work:
    """Do it this often."""
    messages = collections.Counter({message: count * number for message, count in self.messages.items()})
    return Work(self.flops * number, self.bytes * number, messages, self.unbounded)

  @property
  def wire_bytes(self) -> float:
    """Bytes that one device sends to others."""
    return sum(message.wire_bytes * count for message, count in self.messages.items())

  def by_kind(self) -> dict[str, dict[str, float]]:
    """Give each kind of message's number, and the bytes that a device gets and sends: {"count", "bytes", "sent"}."""
    kinds: dict[str, dict[str, float]] = {}
    for message, count in self.messages.items():
      sums = kinds.setdefault(message.kind, {"count": 0, "bytes": 0, "sent": 0.0})
      sums["count"] += count
      sums["bytes"] += count * message.bytes
      sums["sent"] += count * message.wire_bytes
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["sent"]))


def work_of(text: str, rounds: int) -> Work:
  """Add up a compiled program.

  Of a conditional's branches the one that does most counts, figure by figure.

  Args:
    text: `compiled.as_text()`.
    rounds: how often a loop runs that does not say it.
  """
  program = program_text.read(text)
  return _Adder(program, rounds).run(program.entry)


def bytes_of_inputs(text: str) -> int:
  """Count the bytes that a program must read of its inputs, each once: of a table that it looks rows up in the rows.

  Args:
    text: `compiled.as_text()`.
  """
  program = program_text.read(text)
  entry = program.computations[program.entry]
  total = 0
  for parameter in entry.parameters.values():
    users = [user for name in _same(entry, parameter.name) for user in entry.users.get(name, ())]
    read = [_read_by(program, user, parameter.name) for user in users if user.opcode != "bitcast"]
    total += min(parameter.bytes, sum(read))
  return int(total)


class _Adder:
  """Adds up computations, each once."""

  def __init__(self, program: Program, rounds: int):
    self._program, self._rounds = program, rounds
    self._done: dict[tuple[str, bool], Work] = {}

  def run(self, name: str, fused: bool = False) -> Work:
    """Add a computation up; inside a fusion nothing touches the device's memory."""
    if (name, fused) not in self._done:
      self._done[name, fused] = self._add_up(self._program.computations[name], fused)
    return self._done[name, fused]

  def _add_up(self, computation: Computation, fused: bool) -> Work:
    found = filter(None, map(collectives.message_of, computation.instructions.values()))
    messages = collections.Counter(Message(one.kind, one.group, one.bytes) for one in found if one.group > 1)
    flops, moved, called = 0.0, 0.0, Work()
    for line in computation.instructions.values():
      flops += _flops(computation, line)
      moved += 0 if fused else self._bytes(computation, line)
      called += self._called(line, fused)
    return Work(flops, moved, messages) + called

  def _called(self, line: Instruction, fused: bool) -> Work:
    if line.opcode == "while":
      known = program_text.trips(self._program, line)
      rounds = self._rounds if known is None else known
      body = self.run(line.called("body")).times(rounds) + self.run(line.called("condition")).times(rounds + 1)
      return body + Work(unbounded=int(known is None))
    if line.opcode == "conditional":
      return functools.reduce(_most, [self.run(name) for name in line.branches()])
    name = line.called(_CALLS[line.opcode]) if line.opcode in _CALLS else None
    return self.run(name, fused or line.opcode == "fusion") if name else Work()

  def _bytes(self, computation: Computation, line: Instruction) -> int:
    """Count what an instruction reads and writes."""
    if line.opcode in _FREE or line.opcode.endswith("-done"):
      return 0
    if line.opcode.endswith("-start"):
      if line.opcode not in ("copy-start", "slice-start"):
        return 0  # messages have their own sum
      moved = line.arrays[:2] if line.opcode == "copy-start" else (line.arrays[1], line.arrays[1])
      spaces = [computation.operand(line, 0).space, next((a.space for a in line.arrays if a.space), 0)]
      return sum(array.bytes for array, space in zip(moved, spaces, strict=True) if not space)
    if line.opcode in collectives.KINDS:
      return 0
    if line.opcode == "fusion":
      return self._bytes_of_fusion(computation, line)
    if line.opcode in _SLICES:
      return 2 * line.bytes
    if line.opcode in _UPDATES:
      return 2 * _in_memory(computation, line, _UPDATES[line.opcode])
    return line.bytes + sum(_in_memory(computation, line, index) for index in range(len(line.operands)))

  def _bytes_of_fusion(self, computation: Computation, line: Instruction) -> int:
    inside = self._program.computations[line.called("calls")]
    total = 0
    for index in range(len(line.operands)):
      total += min(_in_memory(computation, line, index), _read_of_parameter(inside, index))
    return total + min(line.bytes, _written(inside))


def _in_memory(computation: Computation, line: Instruction, index: int) -> int:
  """Count the bytes of an operand that lie in the device's memory."""
  given = computation.instructions.get(line.operands[index])
  return given.bytes if given is not None and given.opcode != "tuple" else 0


def _read_by(program: Program, user: Instruction, name: str) -> float:
  if user.opcode == "fusion" and user.operands.count(name) == 1:
    return _read_of_parameter(program.computations[user.called("calls")], user.operands.index(name))
  return sum(array.bytes for array in user.arrays) if user.opcode in _SLICES and user.operands[0] == name else math.inf


def _read_of_parameter(inside: Computation, index: int) -> float:
  """Count what a fusion reads of a parameter: of a sliced one the slices, of one updated in place nothing."""
  parameter = inside.parameters.get(index)
  if parameter is None:
    return math.inf
  total = 0
  for name in _same(inside, parameter.name):
    for user in inside.users.get(name, ()):
      if user.opcode in _SLICES and user.operands[0] == name:
        total += sum(array.bytes for array in user.arrays)
      elif user.opcode in _UPDATES and user.operands[0] == name:
        continue
      elif user.opcode != "bitcast":
        return math.inf
  return total


def _same(inside: Computation, name: str) -> list[str]:
  """Name an instruction and the bitcasts of it."""
  names = [name]
  for known in names:
    names += [user.name for user in inside.users.get(known, ()) if user.opcode == "bitcast"]
  return names


def _written(inside: Computation) -> float:
  """Count what a fusion writes: of a result that is an update in place the update, read and written."""
  root = inside.root
  while root.opcode == "bitcast" and root.operands[0] in inside.instructions:
    root = inside.instructions[root.operands[0]]
  if root.opcode not in _UPDATES:
    return math.inf
  return 2 * inside.operand(root, _UPDATES[root.opcode]).bytes


def _flops(computation: Computation, line: Instruction) -> float:
  if line.opcode == "dot":
    left = computation.operand(line, 0).shape
    return 2.0 * line.arrays[0].elements * math.prod(left[axis] for axis in line.numbers("lhs_contracting_dims"))
  return _convolution_flops(computation, line) if line.opcode == "convolution" else 0.0


def _convolution_flops(computation: Computation, line: Instruction) -> float:
  """Count a convolution's operations, those with padding left out: TPUs write every matrix product as one."""
  left, right, result = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", line.attributes).groups()
  data, kernel, out = computation.operand(line, 0).shape, computation.operand(line, 1).shape, line.arrays[0].shape
  total = 2.0 * out[result.index("b")] * out[result.index("f")] * kernel[right.index("i")]
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", line.attributes) or [""] * 2)[1]))
  places = sorted(letter for letter in result if letter.isdigit())
  settings = {name: window[name].split("x") if name in window else None for name in _WINDOW}
  for place in places:
    at = int(place)
    stride, before, dilate, kernel_dilate = (
        default if settings[name] is None else int(settings[name][at].split("_")[0])
        for name, default in _WINDOW.items()
    )
    total *= _products(
        data[left.index(place)], kernel[right.index(place)], out[result.index(place)],
        stride, before, dilate, kernel_dilate,
    )  # fmt: skip
  return total


_WINDOW = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}


def _products(size: int, kernel: int, out: int, stride: int, before: int, dilate: int, kernel_dilate: int) -> int:
  """Count the pairs (place of the result, place of the kernel) along one axis that meet a number, not padding."""
  count = 0
  for place in range(out):
    for tap in range(kernel):
      at = place * stride + tap * kernel_dilate - before
      count += 0 <= at <= (size - 1) * dilate and at % dilate == 0
  return count


def _most(one: Work, other: Work) -> Work:
  return Work(
      max(one.flops, other.flops),
      max(one.bytes, other.bytes),
      one.messages if one.wire_bytes >= other.wire_bytes else other.messages,
      max(one.unbounded, other.unbounded),
  )
