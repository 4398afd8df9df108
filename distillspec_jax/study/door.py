"""The study's door: gin in, files and tables out."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from distillspec_jax import gin_binding  # imports cli, which quietens TensorFlow before it loads
from distillspec_jax.study import plots, runs, tables
from distillspec_jax.study.config import StudyConfig
from distillspec_jax.weights import integrity


def _collect(config: StudyConfig) -> StudyConfig:
  return config


_config = gin_binding.register(_collect, name="study")
gin_binding.register(StudyConfig)
define_flags = gin_binding.define_flags


def config_from_gin(files: Sequence[str], bindings: Sequence[str] = ()) -> StudyConfig:
  """Bind the study's settings; arguments as `train.run_from_gin`'s."""
  return gin_binding.bound(_config, files, bindings)[0]


def main(argv: Sequence[str]) -> None:
  """Read gin, run what is missing, write the tables and the plots."""
  del argv
  config = config_from_gin(*gin_binding.from_flags(flags.FLAGS))
  found = runs.run(config)
  text = tables.as_markdown(found)
  results = pathlib.Path(config.results_dir)
  integrity.write_atomically(results / "tables.md", text.encode())
  for name, png in plots.draw(found).items():
    integrity.write_atomically(results / f"{name}.png", png)
  print(text)
