"""Parameter trees as flat dicts, and the one comparison that every format goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from distillspec_jax.types import ConfigError, Params

_NAMED = 4  # how many parameters an error names before it counts the rest


def flatten(tree: Params) -> dict[str, Any]:
  """Turn any pytree into {"encoder/layers_0/mlp/wo/kernel": leaf}; list positions and field names count as names."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict:
  """Turn {"a/b": leaf} into {"a": {"b": leaf}}."""
  tree: dict = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def require_same(
  expected: Mapping[str, Any],
  found: Mapping[str, Any],
  where: str,
  check_dtype: bool = False,
  also: Sequence[str] = (),
  advice: str = "",
) -> None:
  """Compare names and shapes of two flat trees.

  Args:
    expected: name -> anything with .shape (and .dtype), what the model needs.
    found: the same for what the checkpoint holds.
    where: the checkpoint, as the message should name it.
    check_dtype: also compare dtypes (a resumed run must go on with the numbers it had).
    also: what else is wrong with what was found, to be said in the same message.
    advice: what to do, where more is known than that the configuration should be checked.

  Raises:
    ConfigError: a key is missing or left over, or a shape differs; the message names the first few of each.
  """
  problems = list(also)
  if missing := sorted(set(expected) - set(found)):
    problems.append(f"lacks {few(missing)}")
  if leftover := sorted(set(found) - set(expected)):
    problems.append(f"holds {few(leftover)}, which the model has no place for")
  both = [name for name in sorted(expected) if name in found]
  if wrong := [name for name in both if tuple(expected[name].shape) != tuple(found[name].shape)]:
    shapes = [f"{n} {tuple(found[n].shape)} where the model has {tuple(expected[n].shape)}" for n in wrong]
    problems.append(f"holds {few(shapes)}")
  elif check_dtype and (wrong := [name for name in both if str(expected[name].dtype) != str(found[name].dtype)]):
    dtypes = [f"{n} as {found[n].dtype} where the model has {expected[n].dtype}" for n in wrong]
    problems.append(f"holds {few(dtypes)}")
  if problems:
    advice = advice or "Check the model's configuration."
    raise ConfigError(f"{where} does not fit the model: it {'; it '.join(problems)}. {advice}")


def few(names: Sequence[str]) -> str:
  """Name the first few and count the rest."""
  more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
  return ", ".join(names[:_NAMED]) + more
