"""Plan a training run: does it fit a machine, how long does a step take there at least, and what would make it fit.

    python -m distillspec_jax.plan --gin_file=runs/distill_xxl.gin --topology=v5e-64
    python -m distillspec_jax.plan --gin_file=runs/distill.gin --topology=8xh200 --target_model=t5_1_1_xl \\
        --draft_model=t5_1_1_small --output_dir=plans/xl

The step is compiled ahead of time from shapes alone: no weights, no data, no accelerator. TPUs are compiled for by
their own compiler where libtpu is installed (`pip install distillspec_jax[plan]`); everything else is compiled for
virtual CPU devices, and its figures are estimates. --output_dir gets plan.json, stdout the same as tables.

A model directory that is not there is planned for by its name: .../t5_1_1_xxl is models/t5_1_1_xxl.gin.
"""

from __future__ import annotations

from distillspec_jax import cli  # first: it quietens TensorFlow before it loads

# isort: split
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from distillspec_jax import gin_binding, models
from distillspec_jax.planning import page, planner, topologies
from distillspec_jax.planning.request import Request
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import integrity, sources

_NO_MODEL_DIR = "MODEL_DIR has no value"

log = logging.getLogger("distillspec_jax.plan")  # also where it runs as __main__


def main(argv: Sequence[str]) -> None:
  """Read the flags, plan, write plan.json, print the tables."""
  del argv
  given = flags.FLAGS
  topology = topologies.named(given.topology)
  if given.memory_gib is not None:
    topology = topology.with_memory(given.memory_gib)
  files, bindings = gin_binding.from_flags(given)
  wanted = request_from_gin(files, bindings, given.target_model, given.draft_model, given.gamma)
  folder = _writable(given.output_dir) if given.output_dir else None
  jax.config.update("jax_enable_compilation_cache", False)  # a program from a cache does not tell its memory
  run = " ".join(files)
  found = planner.plan(run, wanted, topology, decoding=given.decoding, tries=given.tries)
  if folder is not None:
    integrity.write_atomically(folder / "plan.json", json.dumps(found, indent=2).encode() + b"\n")
  print(page.page(found), flush=True)


def request_from_gin(
  files: Sequence[str], bindings: Sequence[str], target_model: str = "", draft_model: str = "", gamma: int = 5
) -> Request:
  """Read what `train` would run, with models by description instead of by weights.

  Args:
    files: gin files, as --gin_file takes them.
    bindings: "NAME = VALUE".
    target_model: a gin file of a model, or the name of one in models/; "": what train.target says.
    draft_model: the same of the model that is trained; "": train.initial_checkpoint, else train.model.
    gamma: of speculative decoding.

  Raises:
    ConfigError: what gin says, or a model that can neither be found nor guessed.
  """
  arguments, bindings = _arguments(files, bindings)
  data, step_config = arguments["data"], arguments["step_config"]
  if data.pack:
    raise ConfigError("packed rows are not planned for: give --gin.DataConfig.pack=False")
  if gamma < 1:
    raise ConfigError(f"--gamma={gamma}: at least one token is drafted a block")
  described = lambda role, name, flag: _described(role, name, flag, files, bindings)
  student = described("draft", arguments.get("initial_checkpoint"), draft_model)
  if student is None and arguments.get("model") is not None:
    student = models.from_config(arguments["model"])
  if student is None:
    raise ConfigError("nothing to train: give --draft_model, train.model or train.initial_checkpoint")
  teacher = described("target", arguments.get("target"), target_model)
  if step_config.method.needs_target and teacher is None:
    raise ConfigError(f"method {step_config.method.name!r} needs a target: give --target_model or train.target")
  return Request(
    student=student,
    teacher=teacher,
    step_config=step_config,
    optimizer=arguments["optimizer"],
    steps=arguments["loop_config"].steps,
    mesh_config=arguments["mesh_config"],
    batch_size=data.batch_size,
    input_length=data.input_length,
    teacher_dtype=arguments.get("target_dtype"),
    gamma=gamma,
  )


def _arguments(files: Sequence[str], bindings: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
  """Bind what `train` would be called with; a plan writes no model, so MODEL_DIR may stay open."""
  # After the flags, so that a wrong one is answered at once.
  from distillspec_jax import train  # noqa: PLC0415

  try:
    return train.arguments_from_gin(files, bindings), list(bindings)
  except ConfigError as error:
    if _NO_MODEL_DIR not in str(error):
      raise
  bindings = [*bindings, "MODEL_DIR = 'none'"]
  return train.arguments_from_gin(files, bindings), bindings


def _described(
  role: str, directory: str | None, flag: str, files: Sequence[str], bindings: Sequence[str]
) -> models.LanguageModel | None:
  """Find a model: the flag's, the directory's own, or that of the size which the directory is named for."""
  if flag:
    return _from_gin_file(flag if flag.endswith(".gin") else f"models/{flag}.gin", files, bindings)
  if not directory:
    return None
  if pathlib.Path(directory).expanduser().exists():
    return sources.open_source(directory).model
  name = f"models/{pathlib.PurePath(directory).name}.gin"
  known = gin_binding.shipped_files("models")
  if name not in known:
    raise ConfigError(
      f"the {role} {directory} is not here, and its name is no model's: give --{role}_model, one of"
      f" {', '.join(pathlib.PurePath(file).stem for file in known)}, or a gin file"
    )
  log.info("the %s %s is not here: planning with %s", role, directory, name)
  return _from_gin_file(name, files, bindings)


def _from_gin_file(name: str, files: Sequence[str], bindings: Sequence[str]) -> models.LanguageModel:
  config = _arguments([*files, name], bindings)[0].get("model")
  if config is None:
    raise ConfigError(f"{name} binds no train.model: give a file such as models/t5_1_1_small.gin")
  return models.from_config(config)


def _writable(name: str) -> pathlib.Path:
  folder = pathlib.Path(name).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"--output_dir={name} cannot be made: {error.strerror or error}") from None
  return folder


def define_flags() -> None:
  """Define the flags."""
  gin_binding.define_flags()
  machine = "The machine: v5e-64, v4-128, 8xh200, cpu-8, ...; a wrong one lists all."
  flags.DEFINE_string("topology", None, machine, required=True)
  flags.DEFINE_string("target_model", "", "A size such as t5_1_1_xxl, or a gin file; empty: what train.target says.")
  flags.DEFINE_string("draft_model", "", "The same of the model that is trained.")
  flags.DEFINE_integer("gamma", 5, "Tokens drafted a block, where decoding is planned.")
  flags.DEFINE_bool("decoding", True, "Plan decoding at batch 1, too.")
  flags.DEFINE_integer("tries", 6, "Compilations at most in the search for a change that fits; 0: no search.")
  flags.DEFINE_float("memory_gib", None, "Memory of a device, in place of what the topology says.")
  flags.DEFINE_string("output_dir", "", "Folder for plan.json.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
