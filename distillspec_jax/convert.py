"""Convert a model directory of any known form into a native one, Hugging Face's or T5X's.

    python -m distillspec_jax.convert --source=DIR --output_dir=DIR --format=orbax|huggingface|t5x
        [--dtype=float32|bfloat16|float16] [--verify] [--vocabulary=spiece.model]

Hugging Face's and T5X's forms are written tensor by tensor, so no model need fit into memory. The output appears only
when it is complete (and, with --verify, right); when anything fails nothing is left.
"""

from __future__ import annotations

import collections
import math
import pathlib
import re
import shutil
import sys
import time
import uuid
from collections.abc import Sequence

from absl import flags

from distillspec_jax import cli
from distillspec_jax.types import ConfigError

_SOURCE = flags.DEFINE_string("source", None, "Native, T5X or Hugging Face model directory (detected).", required=True)
_OUTPUT = flags.DEFINE_string("output_dir", None, "Where the converted model goes; absent or empty.", required=True)
_FORMAT = flags.DEFINE_enum(
  "format", "orbax", ["orbax", "huggingface", "t5x"], "Native, Hugging Face's (safetensors) or T5X's (msgpack, zarr)."
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of the source; by default the newest.")
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16", "float16"],
  "What parameters are written as; by default float32, or as a native source has them. Numbers that do not fit are an "
  "error.",
)  # fmt: skip
_VERIFY = flags.DEFINE_boolean("verify", False, "Open what was written and compare every bit with the source.")
_VOCABULARY = flags.DEFINE_string(
  "vocabulary", None, "SentencePiece file or vocabulary folder to put beside the weights; by default the source's own."
)
_EXTRA_IDS = flags.DEFINE_integer("extra_ids", 100, "Sentinel ids that a SentencePiece file given is extended by.")

_LAST = re.compile(r"config\.json|model\.json|checkpoint_\d+")  # what makes a folder a model directory comes last


def main(argv: Sequence[str]) -> None:
  """Open, check, write, verify, and say what was written."""
  del argv
  import numpy as np  # noqa: PLC0415  (after the flags, so that a wrong one is answered at once)

  from distillspec_jax import models, weights  # noqa: PLC0415
  from distillspec_jax.weights import huggingface, integrity, lazy_tensors, sources, t5x_config  # noqa: PLC0415

  directory, step, form = sources.find(_SOURCE.value, _STEP.value)
  output = _empty_output(pathlib.Path(_OUTPUT.value).expanduser().absolute(), directory)
  vocabulary = _find_vocabulary(directory)
  source = sources.open_source(directory, step)
  described = source.model.describe()
  dtype = np.dtype(_DTYPE.value or described["config"]["param_dtype"])
  model = source.model
  if _FORMAT.value == "orbax":
    if dtype == np.float16:
      raise ConfigError("--dtype=float16: native models are float32 or bfloat16; --format=huggingface and t5x take it")
    described["config"] = {**described["config"], "param_dtype": dtype.name}
    model = models.from_description(described)
  else:  # refuse before anything is written
    (huggingface.config_to if _FORMAT.value == "huggingface" else t5x_config.write_gin)(model)
  tensors = {name: lazy_tensors.as_dtype(tensor, dtype) for name, tensor in source.tensors.items()}
  mark = f".{uuid.uuid4().hex[:8]}.tmp"
  with integrity.undone_on_error(output.parent):
    # Beside a folder that is to be made, inside one that is there (it may be all that can be written).
    temporary = output / mark if output.is_dir() else output.with_name(f".{output.name}{mark}")
    try:
      weights.ensure_writable(temporary)
      if vocabulary is not None:
        _bring_vocabulary(vocabulary, temporary)
      _write(temporary, model, tensors, source.step)
      kept = weights.vocabulary_dir(temporary)
      if _VERIFY.value:
        _verify(temporary, tensors, dtype)
      _move(temporary, output)
    except BaseException as error:
      shutil.rmtree(temporary, ignore_errors=True)
      if isinstance(error, OSError):  # a full disk, say
        raise ConfigError(f"cannot write {output}: {error.strerror or error}; nothing was kept") from error
      raise
  print(_summary(source.tensors, tensors, form))
  count = sum(math.prod(tensor.shape) for tensor in tensors.values())
  verified = ", verified" if _VERIFY.value else ""
  print(
    f"{form} -> {_FORMAT.value}: {count:,} parameters{verified}, {'with its' if kept else 'WITHOUT a'} vocabulary: "
    f"{output}"
  )


def _write(directory: pathlib.Path, model, tensors, step: int | None) -> None:
  from distillspec_jax import weights  # noqa: PLC0415
  from distillspec_jax.weights import (  # noqa: PLC0415
    huggingface,
    loading,
    t5x,
    tokenizer_files,
    trees,
    vocabulary_files,
  )

  if _FORMAT.value == "orbax":
    params = loading.place(model, {name: tensors[name] for name in track(list(tensors), "reading")})
    weights.save_model(directory, model, params)
  elif _FORMAT.value == "huggingface":
    huggingface.export(directory, model, trees.unflatten(tensors), track=track)
    if (folder := directory / vocabulary_files.VOCABULARY).is_dir():
      tokenizer_files.write_tokenizer(folder, directory)
  else:
    t5x.export(directory, model, trees.unflatten(tensors), step or 0, track=track)


def _verify(directory: pathlib.Path, tensors, dtype) -> None:
  from distillspec_jax.weights import comparison, sources  # noqa: PLC0415

  written = sources.open_source(directory)
  if difference := comparison.first_difference(tensors, written.tensors, dtype, track):
    raise ConfigError(f"--verify: what was written is not what the source has: {difference}; nothing was kept")


def _move(temporary: pathlib.Path, output: pathlib.Path) -> None:
  if not output.is_dir():
    temporary.rename(output)
    return
  for path in sorted(temporary.iterdir(), key=lambda path: bool(_LAST.fullmatch(path.name))):
    path.rename(output / path.name)
  temporary.rmdir()


def _summary(read, written, form: str) -> str:
  """Say how many tensors, parameters and bytes there were by dtype, as read and as written."""
  lines = [f"{'':<24}{'tensors':>9}{'parameters':>18}{'bytes':>20}"]
  for title, tensors in ((f"read ({form})", read), (f"written ({_FORMAT.value})", written)):
    sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for tensor in tensors.values():
      for i, value in enumerate((1, math.prod(tensor.shape), tensor.nbytes)):
        sums[str(tensor.dtype)][i] += value
    for name, (count, parameters, size) in sorted(sums.items()):
      lines.append(f"{title:<24}{count:>9,}{parameters:>18,}{size:>20,}  {name}")
  return "\n".join(lines)


def track(items, what):
  """Show progress over tensors: a bar on a terminal, a few lines elsewhere."""
  items = list(items)
  if sys.stderr.isatty():
    import tqdm  # noqa: PLC0415  (only for a person at a terminal)

    yield from tqdm.tqdm(items, desc=what, unit="tensor", dynamic_ncols=True, leave=False, file=sys.stderr)
    return
  begin = last = time.monotonic()
  for number, item in enumerate(items):
    if time.monotonic() - last >= 20:
      last = time.monotonic()
      print(f"{what}: tensor {number} of {len(items)}, {last - begin:.0f} s", file=sys.stderr, flush=True)
    yield item
  print(f"{what}: {len(items)} tensors, {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)


def _empty_output(output: pathlib.Path, source: pathlib.Path) -> pathlib.Path:
  if output == source:
    raise ConfigError(f"--output_dir is --source ({source}): choose another folder")
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ConfigError(f"--output_dir {output} is {'not empty' if output.is_dir() else 'a file'}: choose another folder")
  return output


def _find_vocabulary(source: pathlib.Path) -> pathlib.Path | None:
  """Choose the vocabulary: the flag's, else the source's own."""
  from distillspec_jax import weights  # noqa: PLC0415

  if _VOCABULARY.value is not None:
    given = pathlib.Path(_VOCABULARY.value).expanduser()
    if not given.exists():
      raise ConfigError(f"--vocabulary={given} does not exist: give a SentencePiece file or a vocabulary folder")
    folder = weights.vocabulary_dir(given) if given.is_dir() else given
    if folder is None:
      raise ConfigError(f"--vocabulary={given} is no vocabulary folder: it has no vocabulary.json")
    return folder
  return weights.vocabulary_dir(source)


def _bring_vocabulary(vocabulary: pathlib.Path, output: pathlib.Path) -> None:
  """Copy a folder as bytes; make one from a SentencePiece file, which needs the data room."""
  from distillspec_jax.weights import vocabulary_files  # noqa: PLC0415

  if vocabulary.is_dir():
    vocabulary_files.copy(vocabulary, output)
    return
  try:
    from distillspec_jax.data import vocabularies  # noqa: PLC0415
    from distillspec_jax.data.host_tensorflow import seqio  # noqa: PLC0415
  except ImportError as error:
    raise ConfigError(f"--vocabulary={vocabulary} needs seqio, which is not installed ({error})") from error
  made = seqio.SentencePieceVocabulary(str(vocabulary), extra_ids=_EXTRA_IDS.value)
  try:
    made.vocab_size  # noqa: B018  (reads the file)
  except Exception as error:  # protobuf's DecodeError, SentencePiece's RuntimeError
    raise ConfigError(f"{vocabulary} is no SentencePiece model ({type(error).__name__})") from error
  vocabularies.save(made, output / vocabulary_files.VOCABULARY)


if __name__ == "__main__":
  cli.run(main)
