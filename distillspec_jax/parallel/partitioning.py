"""One table from logical axis names to mesh axes, and what follows from it for parameters, states and batches.

Networks name their axes (`constrain(x, "batch", "length", "heads", "head_dim")`); only this module knows what a
name means on a mesh. Without a mesh, or on one device, nothing happens. An axis that a mesh axis does not divide
is left whole.

Two models on one mesh may follow different tables (`TABLES`): a target split over `model` is served by a small draft
that lies whole on every device. A model's configuration names its table, its methods and the decoders enter it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distillspec_jax.types import Batch, ConfigError

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "vocab": ("model",),
    "embed": ("fsdp",),
    "joined_kv": ("model",),  # heads and head width as one axis, as T5X stores its kernels
    "mlp": ("model",),
    "relpos_buckets": (),
    # activations and caches
    "batch": ("data", "fsdp"),
    "length": (),
    "activation_embed": (),
    "activation_mlp": ("model",),
    "activation_vocab": ("model",),
    "heads": ("model",),
    "head_dim": (),
    "cache": (),
}
SHARDED, REPLICATED = "sharded", "replicated"
# Of a replicated model nothing is split but the batch.
TABLES: dict[str, Mapping[str, tuple[str, ...]]] = {
    SHARDED: RULES,
    REPLICATED: {name: RULES[name] if name == "batch" else () for name in RULES},
}
_table = jax.make_user_context(SHARDED)  # jit's cache keys include it


def use_table(name: str) -> contextlib.AbstractContextManager:
  """Let `constrain` and `ways` follow another of the TABLES, for what is traced inside the block."""
  return contextlib.nullcontext() if name == _table.value else _table(name)


def check_table(name: str, whose: str) -> None:
  """Raise ConfigError unless there is a table of this name; `whose` says which setting gave it."""
  if name not in TABLES:
    raise ConfigError(f"{whose} is {name!r}; there are {', '.join(TABLES)}.")


def table_of(*models) -> str:
  """Name the table that LanguageModels follow; of several that differ the one that splits."""
  return SHARDED if any(model.partitioning == SHARDED for model in models) else REPLICATED


def use_mesh(mesh: Mesh):
  """Make `mesh` the one that `constrain` sees: a context manager; jit's cache keys include it."""
  return jax.set_mesh(mesh)


def _mesh_axes(size: int, name: str | None, mesh) -> tuple[str, ...]:
  """Say over which mesh axes a dimension is split; none where they do not divide it."""
  axes = tuple(a for a in TABLES[_table.value].get(name, ()) if mesh.shape[a] > 1)
  return axes if size % math.prod(mesh.shape[a] for a in axes) == 0 else ()


def _spec(shape: Sequence[int], names: Sequence[str | None], mesh) -> PartitionSpec:
  """Translate names into mesh axes, dropping those that do not divide the dimension."""
  unknown = [name for name in names if name is not None and name not in RULES]
  if unknown:
    raise ValueError(f"unknown logical axis {unknown}; the table has {sorted(RULES)}")
  entries, used = [], set()
  for size, name in zip(shape, names, strict=True):
    axes = _mesh_axes(size, name, mesh)
    if used & set(axes):
      raise ValueError(f"axes {tuple(names)} use a mesh axis twice")
    used |= set(axes)
    entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
  return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Ask for `x` to lie on the ambient mesh as its logical axes say; `x` itself where there is no mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, _spec(x.shape, names, mesh))


def constrain_rows(tree: Any) -> Any:
  """Ask for every array [B, ...] of a tree to be split by rows alone."""
  return jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), tree)


def constrain_vocabulary(x: jax.Array) -> jax.Array:
  """Ask for logits, or what is made of them, [B, ..., V] or [V], to be split by rows and by tokens."""
  names = ["batch", *[None] * (x.ndim - 2), "activation_vocab"] if x.ndim > 1 else ["activation_vocab"]
  return constrain(x, *names)


def constrain_logits(x: jax.Array) -> jax.Array:
  """Place a network's logits [B, ..., V]: as `constrain_vocabulary`, but a replicated model leaves the tokens free.

  A loss that holds them against a split teacher's then makes on each device the logits of its own tokens alone.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if _table.value != REPLICATED or mesh.empty or mesh.size == 1:
    return constrain_vocabulary(x)
  rows = _spec(x.shape[:-1], ["batch", *[None] * (x.ndim - 2)][: x.ndim - 1], mesh)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*rows, PartitionSpec.UNCONSTRAINED))


def ways(name: str, size: int) -> int:
  """Count the parts that an axis of this name and size is cut into on the ambient mesh; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return 1
  return math.prod(mesh.shape[a] for a in _mesh_axes(size, name, mesh))


def param_shardings(model, mesh: Mesh) -> Any:
  """Place each parameter of a LanguageModel by its table: a pytree of NamedSharding like its parameters."""
  with use_table(model.partitioning):
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, _spec(leaf.shape, names, mesh)),
        model.abstract_params(),
        model.param_axes(),
    )


def gathered(model, params: Any) -> Any:
  """Bring together what fsdp splits of a model's parameters: for a loop that reads all of them at every step.

  Layer by layer each step would otherwise gather them anew, unless XLA moves that out of the loop by itself.

  Args:
    model: a LanguageModel.
    params: its parameters, inside a traced function; given back as they are where no mesh with fsdp > 1 is in use.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape["fsdp"] == 1:
    return params
  whole = lambda name: name is None or "fsdp" in RULES[name]
  with use_table(model.partitioning):
    return jax.tree.map(
        lambda leaf, names: constrain(leaf, *[None if whole(name) else name for name in names]),
        params,
        model.param_axes(),
    )


def lay_out(model, params: Any, mesh: Mesh | None, table: str) -> tuple[Any, Any]:
  """Let a model follow another table, and bring its parameters to where that says.

  Args:
    model: a LanguageModel.
    params: its parameters, or None where there are none yet.
    mesh: None is one device: nothing changes.
    table: one of TABLES.

  Returns:
    The model and its parameters.

  Raises:
    ConfigError: no such table.
  """
  check_table(table, "a model's partitioning")
  if mesh is None or table == model.partitioning:
    return model, params
  model = type(model)(dataclasses.replace(model.config, partitioning=table))
  return model, None if params is None else jax.device_put(params, param_shardings(model, mesh))


def state_shardings(abstract_state: Any, model, mesh: Mesh) -> Any:
  """Place a whole training state.

  A leaf whose path ends in a parameter's path and has its shape lies where the parameter lies (the parameters
  themselves, Adam's moments); every other leaf (step, factored moments, counts) is replicated.
  """
  leaves = jax.tree_util.tree_leaves_with_path(model.abstract_params())
  shardings = jax.tree.leaves(param_shardings(model, mesh))
  by_path = {
      _names(path): (leaf.shape, sharding) for (path, leaf), sharding in zip(leaves, shardings, strict=True)
  }
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(path, leaf):
    names = _names(path)
    for start in range(len(names)):
      shape, sharding = by_path.get(names[start:], (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated

  return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
  """Split the first axis of a batch array over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"], *[None] * (ndim - 1)))


def check_batch(rows: int, mesh: Mesh) -> None:
  """Raise ConfigError unless this many rows, of all hosts together, split over data x fsdp."""
  _check_rows(rows, mesh.shape["data"] * mesh.shape["fsdp"], "data x fsdp")


def _check_rows(rows: int, ways: int, over: str) -> None:
  if rows % ways:
    raise ConfigError(
        f"a batch of {rows} rows does not split over {over} = {ways} devices: choose a batch size that {ways} divides."
    )


def put_batch(batch: Batch, mesh: Mesh | None) -> dict[str, jax.Array]:
  """Bring a host's rows onto the mesh; with several hosts each gives its own rows of the global batch.

  Raises:
    ConfigError: the batch does not split over data x fsdp.
  """
  if mesh is None:
    return {name: jax.numpy.asarray(value) for name, value in batch.items()}
  parts = batch_sharding(mesh, 1).addressable_devices_indices_map((mesh.shape["data"] * mesh.shape["fsdp"],))
  ways = len({part.indices(mesh.size)[0] for (part,) in parts.values()})
  over = "data x fsdp" if jax.process_count() == 1 else "this host's part of data x fsdp"
  placed = {}
  for name, value in batch.items():
    value = np.asarray(value)
    _check_rows(value.shape[0], ways, over)
    placed[name] = jax.make_array_from_process_local_data(batch_sharding(mesh, value.ndim), value)
  return placed


def _names(path) -> tuple[str, ...]:
  return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
