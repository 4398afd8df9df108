"""What a compiled program sends between devices, read off its text."""

from __future__ import annotations

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"\b(?:body|condition)=%?([\w.\-]+)")
_BITS = {"pred": 8, "token": 0}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One message of a program.

  Attributes:
    kind: one of KINDS.
    arrays: what it gives on one device: (dtype in XLA's name, shape) of each array.
    group: how many devices take part together.
    in_loop: whether a loop runs it.
    source: where in the traced program it comes from; "" where the text does not say.
  """

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  group: int
  in_loop: bool
  source: str

  @property
  def elements(self) -> int:
    """Count the elements that it gives on one device."""
    return sum(math.prod(shape) for _, shape in self.arrays)

  @property
  def bytes(self) -> int:
    """Count the bytes that it gives on one device."""
    return sum(_bits(dtype) * math.prod(shape) for dtype, shape in self.arrays) // 8

  def __str__(self) -> str:
    arrays = ", ".join(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in self.arrays)
    return f"{self.kind} {arrays} over {self.group}{' in a loop' if self.in_loop else ''} ({self.source})"


def collectives(text: str) -> list[Collective]:
  """List the messages of a compiled program, in the order of its text.

  Args:
    text: `compiled.as_text()`.
  """
  computations = _computations(text)
  looped = _looped(computations)
  found = []
  for name, block in computations.items():
    for line in block.splitlines():
      if match := _INSTRUCTION.match(line):
        result, kind, start = match.groups()
        arrays = [(dtype, _shape(dims)) for dtype, dims in _ARRAY.findall(result)]
        if start and kind != "all-reduce":  # the operands come first, then the results, on some machines two counters
          arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
        source = re.search(r'op_name="([^"]*)"', line)
        found.append(Collective(kind, tuple(arrays), _group(line), name in looped, source[1] if source else ""))
  return found


def _computations(text: str) -> dict[str, str]:
  """Cut a program's text into its computations, by name."""
  found = {}
  for block in re.split(r"\n(?=\S)", text):
    if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{", block):
      found[match[1]] = block
  return found


def _looped(computations: dict[str, str]) -> set[str]:
  """Name the computations that loops run, called ones among them."""
  found, todo = set(), [name for block in computations.values() for name in _LOOP.findall(block)]
  while todo:
    name = todo.pop()
    if name in found or name not in computations:
      continue
    found.add(name)
    todo += _CALLED.findall(computations[name])
    todo += [part.strip().lstrip("%") for group in _BRANCHES.findall(computations[name]) for part in group.split(",")]
  return found


def _group(line: str) -> int:
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
    # An axis may take part with some of its devices: 'axis':(devices before)devices.
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2]))
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
    return int(match[1])
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(match[1].split(","))
  return 2 if "source_target_pairs" in line else 1


def _shape(dims: str) -> tuple[int, ...]:
  return tuple(int(size) for size in dims.split(",") if size)


def _bits(dtype: str) -> int:
  return _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
