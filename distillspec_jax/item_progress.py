"""Progress over items of one kind, for commands that go through a known number of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")
_EVERY = 20  # seconds between lines


def track(items: Iterable[_Item], what: str, unit: str, units: str) -> Iterator[_Item]:
  """Give the items one by one, showing progress on stderr: a bar on a terminal, a few lines elsewhere.

  Args:
    items: finitely many.
    what: is done with them.
    unit, units: what one and several of them are called.
  """
  items = list(items)
  if sys.stderr.isatty():
    import tqdm  # noqa: PLC0415  (only for a person at a terminal)

    yield from tqdm.tqdm(items, desc=what, unit=unit, dynamic_ncols=True, leave=False, file=sys.stderr)
    return
  begin = last = time.monotonic()
  for number, item in enumerate(items):
    if time.monotonic() - last >= _EVERY:
      last = time.monotonic()
      print(f"{what}: {unit} {number} of {len(items)}, {last - begin:.0f} s", file=sys.stderr, flush=True)
    yield item
  print(f"{what}: {len(items)} {units}, {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
