"""Imports point downward between the rooms, and the core never touches what belongs to the doors and the data room.

Rows and rules are those of the table of rooms in the design: a file may import its own row and the rows below.
"""

import ast
import pathlib
import sys

import pytest

import distillspec_jax

PACKAGE = pathlib.Path(distillspec_jax.__file__).parent
# From the top down; rooms of one row do not import each other.
ROWS = [
  {"doors"}, {"planning"}, {"distillation"}, {"analysis"}, {"decoding"}, {"data"}, {"weights"}, {"models"},
  {"parallel"}, {"ground"},
]  # fmt: skip
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
CORE = {"models", "decoding", "analysis", "distillation", "planning", "weights", "parallel", "ground"}
GROUND = {"lazy", "process_memory", "tokens", "types"}
OUTSIDE_CORE = {"seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "gin", "absl", "clu", "t5x", "torch"}
ONLY_AT_THE_DOORS = {"gin", "absl.flags", "absl.app", "clu"}
# absl.logging is no flag and no TensorFlow: anybody may use it.
HARMLESS = {"absl.logging"}

FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(parts):
  """Say which room a module of the package belongs to; () is the package root, which only loads lazily."""
  if not parts or parts[0] in GROUND:
    return "ground"
  return parts[0] if parts[0] in RANK else "doors"


def imports(path):
  """Yield (line, module) for every import in a file, wherever it stands; relative ones made absolute."""
  here = ("distillspec_jax", *path.parts[:-1])
  for node in ast.walk(ast.parse((PACKAGE / path).read_text(), str(path))):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
      module = ".".join(part for part in (base, node.module) if part)
      yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def starts_with(module, prefixes):
  return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downward(path):
  own = room_of(path.with_suffix("").parts) if path.name != "__init__.py" else room_of(path.parts[:-1])
  for line, module in imports(path):
    if not starts_with(module, ["distillspec_jax"]):
      continue
    other = room_of(tuple(module.split(".")[1:]))
    if module.split(".")[1:2] == ["ConfigError"]:
      other = "ground"
    assert RANK[other] >= RANK[own], f"{path}:{line} ({own}) imports {module} ({other}), which is higher up"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p.with_suffix("").parts) in CORE], ids=str)
def test_the_core_stays_free(path):
  for line, module in imports(path):
    if not starts_with(module, HARMLESS):
      assert not starts_with(module, OUTSIDE_CORE), f"{path}:{line} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p.with_suffix("").parts) == "data"], ids=str)
def test_gin_and_flags_stay_at_the_doors(path):
  for line, module in imports(path):
    assert not starts_with(module, ONLY_AT_THE_DOORS), f"{path}:{line} imports {module}"


def test_the_walk_sees_what_it_should(tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
  (tmp_path / "models").mkdir()
  (tmp_path / "models" / "x.py").write_text("from ..decoding import speculative\ndef f():\n  import seqio.utils\n")
  found = dict((module, line) for line, module in imports(pathlib.Path("models/x.py")))
  assert found == {"distillspec_jax.decoding.speculative": 1, "seqio.utils": 3}
  assert room_of(("decoding", "speculative")) == "decoding" and RANK["decoding"] < RANK["models"]
  assert room_of(("train",)) == "doors" and room_of(("tokens",)) == "ground"
