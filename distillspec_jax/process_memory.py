"""This process's memory, as the operating system sees it."""

from __future__ import annotations

import ctypes


def return_freed() -> None:
  """Give the system back what the C library keeps of freed memory: after compiling, some hundred megabytes.

  Only glibc keeps so much, and only it is asked; elsewhere nothing happens.
  """
  try:
    ctypes.CDLL(None).malloc_trim(0)
  except (OSError, AttributeError, TypeError):
    return
