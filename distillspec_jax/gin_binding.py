"""Gin for the entry points: T5X's calling style, strict keys, one-line errors.

    --gin_file=runs/distill.gin --gin.MODEL_DIR="'runs/distill'" --gin.TrainConfig.steps=700

Files are looked for as given, then in the gin_configs/ that is shipped with the package. A key that nothing reads
is an error, a macro (upper-case name) that nothing reads too; and so is a binding of the command line that the run
would not come to read. The core never imports this module.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gin
from absl import flags
from gin import config_parser

from distillspec_jax.cli import near, one_line
from distillspec_jax.types import ConfigError

_PLAIN = (int, float, str, bool, tuple, types.NoneType)
_MODULE = "distillspec_jax"
_PARAMETERS: dict[str, list[str]] = {}  # everything gin may bind: name -> its parameters
# Gin also looks for files inside Python packages, and fails where a folder models/ stands on the path: files only.
gin.config._FILE_READERS[1:] = []
_MACRO_USE = re.compile(r"%([A-Za-z_][\w./]*)")


def define_flags() -> None:
  """Define --gin_file (repeatable), --gin_bindings (what --gin.NAME=VALUE becomes) and --gin_search_paths."""
  flags.DEFINE_multi_string("gin_file", [], "A gin file, looked for as given and in gin_configs/; repeatable.")
  flags.DEFINE_multi_string("gin_bindings", [], "One binding, NAME = VALUE; --gin.NAME=VALUE is the short form.")
  flags.DEFINE_list("gin_search_paths", [], "More folders to look for gin files in.")


def from_flags(flag_values: flags.FlagValues) -> tuple[list[str], list[str]]:
  """Return the gin files and bindings that the command line gave, for `parse`.

  Raises:
    ConfigError: no --gin_file.
  """
  for folder in flag_values.gin_search_paths:
    add_search_path(folder)
  if not flag_values.gin_file:
    raise ConfigError(f"no --gin_file given; shipped are {', '.join(shipped_files())}")
  return flag_values.gin_file, flag_values.gin_bindings


def parse(files: Sequence[str], bindings: Sequence[str] = ()) -> list[str]:
  """Read gin files, then bindings ("NAME = VALUE"), into a fresh configuration and lock it.

  Returns:
    The texts that were read.

  Raises:
    ConfigError: a missing file, a key or macro that nothing reads, a value that cannot be read, a macro without
      a value; the text says where it stands and what is near.
  """
  gin.clear_config()
  add_search_path(str(shipped_folder()))
  texts = list(bindings)
  for name in files:
    texts += _parse_file(name)
  for binding in bindings:
    with _clear_errors(f"--gin.{binding}"):
      gin.parse_config(binding)
  _check_macros(texts)
  with _clear_errors("the gin configuration"):
    gin.finalize()
  return texts


def bound(configurable: Callable, files: Sequence[str], bindings: Sequence[str] = ()) -> tuple[Any, str]:
  """Call what `register` gave under the configuration of gin files and bindings, and forget that again.

  Returns:
    What it returns, and the operative configuration as text.

  Raises:
    ConfigError: what `parse` says, or the configurable itself; or a binding that it did not come to read, such as a
      macro whose reader another file has set otherwise.
  """
  try:
    texts = parse(files, bindings)
    try:
      result = configurable()
    except ConfigError as error:
      raise ConfigError(one_line(error)) from None  # gin adds where it was called from
    for binding in bindings:
      _check_was_read(binding, texts)
    return result, gin.operative_config_str()
  finally:
    gin.clear_config()


def register(configurable: Callable, name: str | None = None) -> Callable:
  """Let gin bind the arguments of a function or dataclass; types are checked, errors name the gin key.

  Args:
    configurable: a function or (frozen) dataclass with annotated scalar arguments.
    name: gin's name for it; its own name by default.

  Returns:
    What to call instead of it, so that bound values arrive.
  """
  name = name or configurable.__name__
  signature = inspect.signature(configurable)
  hints = typing.get_type_hints(configurable if not inspect.isclass(configurable) else configurable.__init__)
  if dataclasses.is_dataclass(configurable):
    hints = typing.get_type_hints(configurable)

  @functools.wraps(configurable, updated=())
  def checked(*args, **kwargs):
    missing = [
      key
      for key, parameter in signature.parameters.items()
      if parameter.default is inspect.Parameter.empty and key not in kwargs
    ][len(args) :]
    if missing:
      raise ConfigError(f"{name}.{missing[0]} has no value: bind it in a gin file or with --gin.{name}.{missing[0]}=...")
    kwargs = {key: _check_type(f"{name}.{key}", value, hints.get(key)) for key, value in kwargs.items()}
    return configurable(*args, **kwargs)

  checked.__signature__ = signature
  if name in _PARAMETERS:  # the module runs a second time, as __main__
    return gin.get_configurable(f"{_MODULE}.{name}")
  _PARAMETERS[name] = list(signature.parameters)
  return gin.external_configurable(checked, name=name, module=_MODULE)


def shipped_folder() -> pathlib.Path:
  """Return gin_configs/: inside an installed package, or beside the package in a checkout."""
  package = pathlib.Path(__file__).resolve().parent
  inside = package / "gin_configs"
  return inside if inside.is_dir() else package.parent / "gin_configs"


def shipped_files(folder: str = "runs") -> list[str]:
  """List the shipped files of a folder, as --gin_file takes them; those of runs/ where there is no such folder."""
  found = shipped_folder().glob("**/*.gin")
  files = sorted(path.relative_to(shipped_folder()).as_posix() for path in found)
  return [name for name in files if name.startswith(f"{folder}/")] or shipped_files()


def add_search_path(folder: str) -> None:
  """Look for gin files in one more folder."""
  if folder not in gin.config._LOCATION_PREFIXES:  # gin offers no way to ask
    gin.add_config_file_search_path(folder)


def _parse_file(name: str) -> list[str]:
  """Parse a file with its includes; return the text of each."""
  path = _find(name)
  if path is None:
    there = shipped_files(pathlib.PurePath(name).parts[0])
    raise ConfigError(
      f"no gin file {name!r} here or in {shipped_folder()}{near(name, there)} (shipped: {', '.join(there)})"
    )
  with _clear_errors(f"{name}"):
    parsed = gin.parse_config_file(str(path))
  return [_find(part).read_text() for part in _names(parsed)]


def _names(parsed) -> Iterable[str]:
  yield parsed.filename
  for include in parsed.includes:
    yield from _names(include)


def _find(name: str) -> pathlib.Path | None:
  folders = ["", *gin.config._LOCATION_PREFIXES]
  return next((path for path in (pathlib.Path(folder, name).expanduser() for folder in folders) if path.is_file()), None)


def _check_macros(texts: Iterable[str]) -> None:
  """Refuse macros that nothing reads: a typing error in one would otherwise change nothing, silently."""
  used = {name for text in texts for name in _MACRO_USE.findall(_without_comments(text))} - {"gin.REQUIRED"}
  set_ = [scope for (scope, selector) in gin.config._CONFIG if selector == "gin.macro"]
  for name in set_:
    if name not in used:
      raise ConfigError(f"unknown gin key {name!r}: nothing reads it{near(name, sorted(used))} (macros: {_list(used)})")


def _check_was_read(binding: str, texts: Iterable[str]) -> None:
  """Refuse a binding of the command line that changed nothing."""
  read = gin.config._OPERATIVE_CONFIG  # gin offers it as text only
  for statement in config_parser.ConfigParser(binding, gin.config.ParserDelegate()):
    if not isinstance(statement, config_parser.BindingStatement):
      continue
    scope, selector, parameter = statement.scope, statement.selector, statement.arg_name
    if not parameter:
      name = f"{scope}/{selector}" if scope else selector
      if (name, "gin.macro") in read:
        continue
      reader = re.compile(rf"^\s*([\w./]+)\s*=.*%{re.escape(name)}\b", re.MULTILINE)
      for_ = dict.fromkeys(key for text in texts for key in reader.findall(_without_comments(text)))
      why = f"{' and '.join(for_) or 'what would read it'} is set otherwise"
    else:
      kind = selector.rpartition(".")[2]
      name = f"{scope}/{kind}.{parameter}" if scope else f"{kind}.{parameter}"
      of_kind = {where: values for (where, used), values in read.items() if used.rpartition(".")[2] == kind}
      if any(parameter in values for where, values in of_kind.items() if not scope or where == scope):
        continue
      why = f"nothing in these gin files uses @{scope}/{kind}" if scope else f"nothing in these gin files uses @{kind}"
    raise ConfigError(f"--gin.{name} changes nothing: {why}; leave it out, or give other gin files")


def _without_comments(text: str) -> str:
  return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


class _clear_errors:  # noqa: N801  used like a function
  """Turn what gin raises inside the block into a ConfigError of one line."""

  def __init__(self, where: str):
    self.where = where

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if isinstance(error, ConfigError) or not isinstance(error, (ValueError, SyntaxError, ImportError, OSError)):
      return False
    raise ConfigError(_explain(error, self.where)) from None


def _explain(error: Exception, where: str) -> str:
  """Say in one line what gin found wrong, where, and what is near."""
  text = str(error)
  if place := re.search(r'In file "([^"]+)", line (\d+)\n\s*(.*)', text):
    where = f"{place[1]} line {place[2]}, {place[3]!r}"
  elif isinstance(error, SyntaxError) and error.filename:
    where = f"{error.filename} line {error.lineno}, {(error.text or '').strip()!r}"
  names = sorted(_PARAMETERS)
  if found := re.search(r"No configurable matching (?:reference )?'@?([^'()]*)", text):
    return f"unknown gin key {found[1]!r} in {where}{near(found[1], names)} (known: {_list(names)})"
  if found := re.search(r"Configurable '([^']*)' doesn't have a parameter named '([^']*)'", text):
    parameters = _PARAMETERS.get(found[1].split(".")[-1], [])
    return f"unknown gin key '{found[1]}.{found[2]}' in {where}{near(found[2], parameters)} (known: {_list(parameters)})"
  if found := re.search(r"No bindings specified for '([^']*)/gin.macro'", text):
    return f"%{found[1]} is used but has no value: give --gin.{found[1]}=..."
  if found := re.search(r"(\S+?)(?:/(?:gin\.)?macro\.value)? set to `%gin.REQUIRED`", text):
    return f"{found[1]} has no value: give --gin.{found[1]}=... (text in quotes: --gin.{found[1]}=\"'text'\")"
  if isinstance(error, SyntaxError):
    return f"cannot read {where}: a binding is NAME = VALUE with a Python value, text in quotes ('text')"
  return f"{where}: {one_line(error)}"


def _check_type(key: str, value: Any, hint: Any) -> Any:
  """Return the value, a list as a tuple; refuse one of another type than annotated."""
  allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
  plain = [getattr(kind, "__origin__", kind) for kind in allowed]
  if not all(isinstance(kind, type) for kind in plain):
    return value
  if isinstance(value, list) and tuple in plain:
    value = tuple(value)
  if float in plain and isinstance(value, int) and not isinstance(value, bool):
    return value if int in plain else float(value)
  if any(type(value) is kind if kind in _PLAIN else isinstance(value, kind) for kind in plain):
    return value
  raise ConfigError(f"{key} = {value!r}: expected {' or '.join(map(_wanted, plain))}")


def _wanted(kind: type) -> str:
  if kind is types.NoneType:
    return "None"
  return kind.__name__ if kind in _PLAIN else f"@{kind.__name__}()"


def _list(names: Iterable[str]) -> str:
  return ", ".join(sorted(names))
