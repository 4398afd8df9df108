"""Whether two models on disk are the same, bit for bit; read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from distillspec_jax.weights import lazy_tensors, trees
from distillspec_jax.weights.lazy_tensors import LazyTensor


def first_difference(
  expected: Mapping[str, LazyTensor],
  found: Mapping[str, LazyTensor],
  dtype: Any,
  track: Callable[[Iterable, str], Iterable] = lambda items, what: items,
) -> str | None:
  """Name the first parameter that differs, or return None.

  Args:
    expected: name -> tensor; converted to `dtype` before it is compared.
    found: the same, which must be of `dtype` already.
    dtype: what the parameters were written as.
    track: what shows progress.

  Raises:
    ConfigError: a file is damaged, or names or shapes differ.
  """
  trees.require_same(expected, found, "what was written")
  dtype = np.dtype(dtype)
  for name in track(list(expected), "comparing"):
    if found[name].dtype != dtype:
      return f"{name} is {found[name].dtype}, not {dtype}"
    ours, theirs = lazy_tensors.as_dtype(expected[name], dtype).read(), found[name].read()
    bits = np.dtype(f"u{dtype.itemsize}")  # so that NaNs and signs of zeros count
    wrong = np.ascontiguousarray(ours).view(bits) != np.ascontiguousarray(theirs).view(bits)
    if wrong.any():
      at = tuple(int(i) for i in np.argwhere(wrong)[0])
      count = f"{int(wrong.sum()):,} of {wrong.size:,} differ"
      return f"{name}{list(at)} is {theirs[at]} where the source has {ours[at]} ({count})"
  return None
