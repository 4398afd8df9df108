"""Conversion of a model directory of any known form into a native one, Hugging Face's or T5X's, without flags.

Hugging Face's and T5X's forms are written tensor by tensor, so no model need fit into memory. The output appears only
when it is complete (and, where asked, verified); when anything fails nothing is left.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
import shutil
import uuid

import numpy as np

from distillspec_jax import item_progress, models, weights
from distillspec_jax.types import ConfigError
from distillspec_jax.weights import (
  comparison,
  huggingface,
  integrity,
  lazy_tensors,
  loading,
  sources,
  t5x,
  t5x_config,
  tokenizer_files,
  trees,
  vocabulary_files,
)

FORMS = ("orbax", "huggingface", "t5x")
DTYPES = ("float32", "bfloat16", "float16")
_LAST = re.compile(r"config\.json|model\.json|checkpoint_\d+")  # what makes a folder a model directory comes last


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be converted.

  Attributes:
    source: a model directory of any known form.
    output_dir: where the converted model goes; absent or empty.
    format: one of FORMS.
    step: which checkpoint of the source; None is the newest.
    dtype: what parameters are written as, one of DTYPES; None is float32, or what a native source has.
    verify: whether what was written is opened and compared with the source, bit by bit.
    vocabulary: a SentencePiece file or vocabulary folder to put beside the weights; None is the source's own.
    extra_ids: sentinels that a SentencePiece file is extended by.
  """

  source: str
  output_dir: str
  format: str = "orbax"
  step: int | None = None
  dtype: str | None = None
  verify: bool = False
  vocabulary: str | None = None
  extra_ids: int = 100


def run(request: Request) -> None:
  """Open, check, write, verify, and say what was written.

  Raises:
    ConfigError: the source cannot be read, the form cannot hold it, the output cannot be written or is not the source.
  """
  if not request.source or not request.output_dir:
    raise ConfigError("--source and --output_dir need names ('.' is the current folder)")
  for name, given, possible in (("format", request.format, FORMS), ("dtype", request.dtype or DTYPES[0], DTYPES)):
    if given not in possible:
      raise ConfigError(f"--{name}={given}: there are {', '.join(possible)}")
  directory, step, form = sources.find(request.source, request.step)
  try:
    output = _empty_output(integrity.user_path(request.output_dir).absolute(), directory)
    vocabulary = _find_vocabulary(request, directory)
  except OSError as error:  # no permission, say
    raise ConfigError(f"{error.filename} cannot be opened: {error.strerror or error}") from error
  source = sources.open_source(directory, step)
  described = source.model.describe()
  dtype = np.dtype(request.dtype or described["config"]["param_dtype"])
  model = source.model
  if request.format == "orbax":
    if dtype == np.float16:
      raise ConfigError("--dtype=float16: native models are float32 or bfloat16; --format=huggingface and t5x take it")
    described["config"] = {**described["config"], "param_dtype": dtype.name}
    model = models.from_description(described)
  else:  # refuse before anything is written
    (huggingface.config_to if request.format == "huggingface" else t5x_config.write_gin)(model)
  tensors = {name: lazy_tensors.as_dtype(tensor, dtype) for name, tensor in source.tensors.items()}
  mark = f".{uuid.uuid4().hex[:8]}.tmp"
  try:
    with integrity.undone_on_error(output.parent):
      # Beside a folder that is to be made, inside one that is there (it may be all that can be written).
      temporary = output / mark if output.is_dir() else output.with_name(f".{output.name}{mark}")
      try:
        weights.ensure_writable(temporary)
        if vocabulary is not None:
          _bring_vocabulary(vocabulary, temporary, request.extra_ids)
          _check_ids(vocabulary, temporary, model.vocab_size)
        _write(temporary, request.format, model, tensors, source.step)
        kept = weights.vocabulary_dir(temporary)
        if request.verify:
          _verify(temporary, tensors, dtype)
        _move(temporary, output)
      except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
  except OSError as error:  # a full disk, say
    raise ConfigError(f"cannot write {output}: {error.strerror or error}; nothing was kept") from error
  print(_summary({f"read ({form})": source.tensors, f"written ({request.format})": tensors}))
  count = sum(math.prod(tensor.shape) for tensor in tensors.values())
  verified = ", verified" if request.verify else ""
  print(
    f"{form} -> {request.format}: {count:,} parameters{verified}, {'with its' if kept else 'WITHOUT a'} vocabulary: "
    f"{output}"
  )


def _write(directory: pathlib.Path, form: str, model, tensors, step: int | None) -> None:
  if form == "orbax":
    params = loading.place(model, {name: tensors[name] for name in track(list(tensors), "reading")})
    weights.save_model(directory, model, params)
  elif form == "huggingface":
    huggingface.export(directory, model, trees.unflatten(tensors), track=track)
    if (folder := directory / vocabulary_files.VOCABULARY).is_dir():
      tokenizer_files.write_tokenizer(folder, directory)
  else:
    t5x.export(directory, model, trees.unflatten(tensors), step or 0, track=track)


def _verify(directory: pathlib.Path, tensors, dtype) -> None:
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


def _summary(sides) -> str:
  """Say how many tensors, parameters and bytes there were by dtype, as read and as written."""
  lines = [f"{'':<24}{'tensors':>9}{'parameters':>18}{'bytes':>20}"]
  for title, tensors in sides.items():
    sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for tensor in tensors.values():
      for i, value in enumerate((1, math.prod(tensor.shape), tensor.nbytes)):
        sums[str(tensor.dtype)][i] += value
    for name, (count, parameters, size) in sorted(sums.items()):
      lines.append(f"{title:<24}{count:>9,}{parameters:>18,}{size:>20,}  {name}")
  return "\n".join(lines)


def track(items, what):
  """Show progress over tensors."""
  return item_progress.track(items, what, "tensor", "tensors")


def _empty_output(output: pathlib.Path, source: pathlib.Path) -> pathlib.Path:
  above = next(path for path in output.parents if path.exists())
  if not above.is_dir():
    raise ConfigError(f"--output_dir {output}: {above} is a file, no folder; choose another folder")
  if output == source:
    raise ConfigError(f"--output_dir is --source ({source}): choose another folder")
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ConfigError(f"--output_dir {output} is {'not empty' if output.is_dir() else 'a file'}: choose another folder")
  return output


def _find_vocabulary(request: Request, source: pathlib.Path) -> pathlib.Path | None:
  """Choose the vocabulary: the flag's, else the source's own."""
  if request.vocabulary is not None:
    given = integrity.user_path(request.vocabulary)
    if not given.exists():
      raise ConfigError(f"--vocabulary={given} does not exist: give a SentencePiece file or a vocabulary folder")
    folder = weights.vocabulary_dir(given) if given.is_dir() else given
    if folder is None:
      raise ConfigError(f"--vocabulary={given} is no vocabulary folder: it has no vocabulary.json")
    return folder
  return weights.vocabulary_dir(source)


def _check_ids(vocabulary: pathlib.Path, output: pathlib.Path, most: int) -> None:
  size = vocabulary_files.size(output)
  if size is not None and size > most:
    own = ", which may be among its pieces (--extra_ids=0)" if vocabulary.is_file() else ""
    extra_ids = vocabulary_files.describe(output / vocabulary_files.VOCABULARY).get("extra_ids")
    raise ConfigError(
      f"the vocabulary {vocabulary} has {size:,} ids, {extra_ids} of them sentinels{own}; the model has {most:,}: "
      "name its own vocabulary with --vocabulary"
    )


def _bring_vocabulary(vocabulary: pathlib.Path, output: pathlib.Path, extra_ids: int) -> None:
  """Copy a folder as bytes; make one from a SentencePiece file, which needs the data room."""
  if vocabulary.is_dir():
    vocabulary_files.copy(vocabulary, output)
    return
  if extra_ids < 0:
    raise ConfigError(f"--extra_ids={extra_ids}: a whole number of at least 0")
  try:
    from distillspec_jax.data import vocabularies  # noqa: PLC0415
    from distillspec_jax.data.host_tensorflow import seqio  # noqa: PLC0415
  except ImportError as error:
    raise ConfigError(f"--vocabulary={vocabulary} needs seqio, which is not installed ({error})") from error
  made = seqio.SentencePieceVocabulary(str(vocabulary), extra_ids=extra_ids)
  try:
    made.vocab_size  # noqa: B018  (reads the file)
  except Exception as error:  # protobuf's DecodeError, SentencePiece's RuntimeError
    raise ConfigError(f"{vocabulary} is no SentencePiece model ({type(error).__name__})") from error
  vocabularies.save(made, output / vocabulary_files.VOCABULARY)
