"""Meshes, the table of logical axes, and where arrays lie on a mesh."""

from distillspec_jax.lazy import attach

__getattr__, __dir__, __all__ = attach(
  __name__,
  modules=(
    "cluster",
    "collectives",
    "mesh",
    "multihost",
    "partitioning",
    "preemption",
    "program_text",
    "roll_call",
    "watch",
  ),
)
