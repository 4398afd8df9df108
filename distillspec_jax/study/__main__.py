"""python -m distillspec_jax.study."""

from distillspec_jax import cli
from distillspec_jax.study import door

if __name__ == "__main__":
  door.define_flags()
  cli.run(door.main)
