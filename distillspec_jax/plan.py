"""Plan a training run: does it fit a machine, how long does a step take there at least, and what would make it fit.

    python -m distillspec_jax.plan --gin_file=runs/distill_xxl.gin --topology=v5e-64
    python -m distillspec_jax.plan --gin_file=runs/distill.gin --topology=8xh200 --target_model=t5_1_1_xl \\
        --draft_model=t5_1_1_small --output_dir=plans/xl

The step is compiled ahead of time from shapes alone: no weights, no data, no accelerator. TPUs are compiled for by
their own compiler where libtpu is installed (`pip install -e '.[plan]'` in a checkout); everything else is compiled
for virtual CPU devices, and its figures are estimates. Stdout gets tables, --output_dir the same as plan.json.

A model directory that is not there is planned for by its name: .../t5_1_1_xxl is models/t5_1_1_xxl.gin.
"""

from __future__ import annotations

from distillspec_jax import cli  # first: it quietens TensorFlow before it loads

# isort: split
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from distillspec_jax import gin_binding, models, weights
from distillspec_jax.distillation import precision
from distillspec_jax.planning import page, planner, topologies
from distillspec_jax.planning.request import Request
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import integrity, sources

_NO_MODEL_DIR = "MODEL_DIR has no value"
_MOST_GAMMA = 1024  # more than any draft gets right; a pass over millions takes hours to compile

log = logging.getLogger("distillspec_jax.plan")  # also where it runs as __main__


def main(argv: Sequence[str]) -> None:
  """Read the flags, plan, print the tables, write plan.json."""
  del argv
  given = flags.FLAGS
  topology = topologies.named(given.topology)
  if given.memory_gib is not None:
    topology = topology.with_memory(given.memory_gib)
  if given.tries < 0:
    raise ConfigError(f"--tries={given.tries}: compilations at most, 0 or more")
  files, bindings = gin_binding.from_flags(given)
  wanted = request_from_gin(files, bindings, given.target_model, given.draft_model, given.gamma)
  folder = weights.ensure_writable(given.output_dir) if given.output_dir else None
  jax.config.update("jax_enable_compilation_cache", False)  # a program from a cache does not tell its memory
  jax.config.update("jax_platforms", "cpu")  # whatever accelerator is here stays free
  run = " ".join(files)
  try:
    found = planner.plan(run, wanted, topology, decoding=given.decoding, tries=given.tries)
  except MemoryError as error:
    raise ConfigError(f"too little memory here to plan for rows so long ({cli.one_line(error)})") from None
  try:
    print(page.page(found), flush=True)
  finally:  # also where nobody reads to the end
    if folder is not None:
      _write(folder / "plan.json", found)


def request_from_gin(
  files: Sequence[str], bindings: Sequence[str], target_model: str = "", draft_model: str = "", gamma: int = 5
) -> Request:
  """Read what `train` would run, with models by description instead of by weights.

  Args:
    files: gin files, as --gin_file takes them.
    bindings: "NAME = VALUE".
    target_model: a gin file of a model, the name of one in models/, or a directory, which has a /; "": what
      train.target says.
    draft_model: the same of the model that is trained; "": train.initial_checkpoint, else train.model.
    gamma: of speculative decoding.

  Raises:
    ConfigError: what gin says, or a model that can neither be found nor guessed.
  """
  arguments = _arguments(files, bindings)
  data, step_config = arguments["data"], arguments["step_config"]
  if data.pack:
    raise ConfigError("packed rows are not planned for: give --gin.DataConfig.pack=False")
  if not 1 <= gamma <= _MOST_GAMMA:
    raise ConfigError(f"--gamma={gamma}: 1 to {_MOST_GAMMA} tokens are drafted a block")
  method = step_config.method
  if method.needs_data and data.target_length != step_config.target_length:
    raise ConfigError(
      f"DataConfig.target_length is {data.target_length} and StepConfig.target_length {step_config.target_length}: they"
      " must be equal (TARGET_LENGTH sets both)"
    )
  if not method.needs_target and arguments.get("target"):
    raise ConfigError(
      f"method {method.name!r} learns from the data alone, but train.target is {arguments['target']!r}: choose another"
      " method, or give --target_model alone to plan decoding with a target"
    )
  student = _student(arguments, draft_model)
  teacher = _described("target", arguments.get("target"), target_model)
  if method.needs_target and teacher is None:
    raise ConfigError(f"method {method.name!r} needs a target: give --target_model or train.target")
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


def _arguments(files: Sequence[str], bindings: Sequence[str]) -> dict[str, Any]:
  """Bind what `train` would be called with; a plan writes no model, so MODEL_DIR may stay open."""
  # After the flags, so that a wrong one is answered at once.
  from distillspec_jax import train  # noqa: PLC0415

  try:
    return train.arguments_from_gin(files, bindings)
  except ConfigError as error:
    if _NO_MODEL_DIR not in str(error):
      raise
  return train.arguments_from_gin(files, [*bindings, "MODEL_DIR = 'none'"])


def _student(arguments: Mapping[str, Any], draft_model: str) -> models.LanguageModel:
  """Find the model that is trained, in the dtypes that `train` brings it to."""
  dtype = arguments.get("dtype")
  precision.check_dtype("train.dtype", dtype)
  loaded = _described("draft", arguments.get("initial_checkpoint"), draft_model)
  if loaded is not None:
    return precision.with_master_weights(loaded, dtype)
  if arguments.get("model") is None:
    raise ConfigError("nothing to train: give --draft_model, train.model or train.initial_checkpoint")
  model = models.from_config(arguments["model"])
  return precision.of_dtype(model, dtype, model.config.param_dtype) if dtype else model


def _described(role: str, directory: str | None, flag: str) -> models.LanguageModel | None:
  """Find a model: the flag's, that of the directory, or of the size which the directory is named for."""
  if "/" in flag and not flag.endswith(".gin"):
    directory = flag
  elif flag:
    return _from_gin_file(flag if flag.endswith(".gin") else f"models/{flag}.gin")
  if not directory:
    return None
  if integrity.user_path(directory).exists():
    return sources.open_source(directory).model
  name = f"models/{pathlib.PurePath(directory).name}.gin"
  known = gin_binding.shipped_files("models")
  if name not in known:
    raise ConfigError(
      f"the {role} {directory} is not here, and its name is no model's: give --{role}_model, one of"
      f" {', '.join(pathlib.PurePath(file).stem for file in known)}, or a gin file"
    )
  log.info("the %s %s is not here: planning with %s", role, directory, name)
  return _from_gin_file(name)


def _from_gin_file(name: str) -> models.LanguageModel:
  # The run's own settings of a network are of train.model, not of a model that it loads.
  config = _arguments(["runs/train.gin", "methods/sft.gin", name], []).get("model")
  if config is None:
    raise ConfigError(f"{name} binds no train.model: give a file such as models/t5_1_1_small.gin")
  return models.from_config(config)


def _write(path: pathlib.Path, found: dict[str, Any]) -> None:
  try:
    integrity.write_atomically(path, json.dumps(found, indent=2).encode() + b"\n")
  except OSError as error:
    raise ConfigError(f"{path} cannot be written: {error.strerror or error}; the tables are printed") from None


def define_flags() -> None:
  """Define the flags."""
  gin_binding.define_flags()
  machine = "The machine: v5e-64, v4-128, 8xh200, cpu-8, ...; a wrong one lists all."
  flags.DEFINE_string("topology", None, machine, required=True)
  model = "A size such as t5_1_1_xxl, a gin file, or a folder such as runs/target; empty: what train.target says."
  flags.DEFINE_string("target_model", "", model)
  flags.DEFINE_string("draft_model", "", "The same of the model that is trained.")
  flags.DEFINE_integer("gamma", 5, "Tokens drafted a block, where decoding is planned.")
  flags.DEFINE_bool("decoding", True, "Plan decoding at batch 1, too.")
  flags.DEFINE_integer("tries", 6, "Compilations at most in the search for a change that fits; 0: no search.")
  flags.DEFINE_float("memory_gib", None, "Memory of a device, in place of what the topology says.")
  flags.DEFINE_string("output_dir", "", "Folder for plan.json.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
