"""What the networks' configurations have in common: checks, JSON, named sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from distillspec_jax.models.layers import ACTIVATIONS
from distillspec_jax.parallel.partitioning import TABLES
from distillspec_jax.types import ConfigError

DTYPES = ("float32", "bfloat16")


class ModelConfig:
  """Base of the frozen dataclasses that describe networks; they have the fields named in `check`."""

  sizes: ClassVar[Mapping[str, Mapping[str, Any]]]

  def check(self, counts: Sequence[str], choices: Mapping[str, Sequence[str]]) -> None:
    """Validate fields.

    Args:
      counts: names of fields that are whole numbers of at least 1.
      choices: field -> what it may be; dtypes, activations and the dropout rate are checked always.

    Raises:
      ConfigError: a field out of its range.
    """
    object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
    name_of = lambda field: f"{type(self).__name__}.{field}={getattr(self, field)!r}"
    for field in counts:
      value = getattr(self, field)
      if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name_of(field)}: must be a whole number of at least 1.")
    unknown = [name for name in self.mlp_activations if name not in ACTIVATIONS]
    if unknown or not self.mlp_activations:
      raise ConfigError(f"{name_of('mlp_activations')}: choose from {sorted(ACTIVATIONS)}.")
    for field, allowed in {**choices, "dtype": DTYPES, "param_dtype": DTYPES, "partitioning": TABLES}.items():
      if getattr(self, field) not in allowed:
        raise ConfigError(f"{name_of(field)}: choose from {tuple(allowed)}.")
    if not 0.0 <= self.dropout_rate < 1.0:
      raise ConfigError(f"{name_of('dropout_rate')}: must be in [0, 1).")

  def as_dict(self) -> dict[str, Any]:
    """Give the fields in JSON's terms; how it is computed and where it lies is no part of what a network is."""
    fields = {**dataclasses.asdict(self), "mlp_activations": list(self.mlp_activations)}
    del fields["remat"], fields["partitioning"]
    return fields

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Self:
    """Make a configuration from `as_dict`'s output; an unknown or missing field is a ConfigError."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(known))
    missing = sorted(n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields)
    if unknown or missing:
      raise ConfigError(
          f"a {cls.__name__} was given unknown fields {unknown} and lacks {missing}; it knows {sorted(known)}."
      )
    return cls(**fields)

  @classmethod
  def named(cls, name: str, **overrides) -> Self:
    """Give a known size, e.g. `T5Config.named("t5_1_1_small", dtype="bfloat16")`.

    Raises:
      ConfigError: no such name (the message lists the names).
    """
    if name not in cls.sizes:
      raise ConfigError(f"no {cls.__name__} is named {name!r}; there are {', '.join(cls.sizes)}.")
    return cls.from_dict({**cls.sizes[name], **overrides})
