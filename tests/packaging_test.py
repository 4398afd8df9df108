"""The wheel holds what an installed package needs, and setup.py names what the code imports."""

import ast
import pathlib
import subprocess
import sys
import zipfile

import pytest

from distillspec_jax import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Build the wheel from a copy of the sources, without network."""
  pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
  pytest.importorskip("wheel", reason="building a wheel needs wheel")
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  source.mkdir()
  for name in ("distillspec_jax", "gin_configs", "setup.py", "pyproject.toml", "MANIFEST.in"):
    subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
  command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
  done = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return next(folder.glob("*.whl"))


def test_wheel_holds_the_gin_files_and_every_room(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  shipped = {f"distillspec_jax/{path.relative_to(ROOT)}" for path in (ROOT / "gin_configs").rglob("*.gin")}
  sources = {str(path.relative_to(ROOT)) for path in (ROOT / "distillspec_jax").rglob("*.py")}
  assert shipped and shipped <= names
  assert sources <= names
  assert not any(name.startswith("tests/") for name in names)


def test_an_unpacked_wheel_finds_its_gin_files(wheel, tmp_path):
  zipfile.ZipFile(wheel).extractall(tmp_path)
  code = (
    "from distillspec_jax import gin_binding; print(gin_binding.shipped_folder()); print(*gin_binding.shipped_files())"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
  folder, files = done.stdout.splitlines()
  assert folder == str(tmp_path.resolve() / "distillspec_jax" / "gin_configs")
  assert "runs/distill.gin" in files.split()


def test_console_scripts_are_doors(wheel):
  archive = zipfile.ZipFile(wheel)
  name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
  scripts = dict(line.split(" = ") for line in archive.read(name).decode().splitlines() if " = " in line)
  expected = {"train", "evaluate", "transfer", "study", "generate-targets", "convert", "plan", "report", "prepare-data"}
  expected.add("quickstart")
  assert set(scripts) == {f"distillspec-{name}" for name in expected}
  for target in scripts.values():
    module, function = target.split(":")
    assert module == "distillspec_jax.cli"
    (name,) = getattr(cli, function).args
    door = ROOT / "distillspec_jax" / f"{name.replace('.', '/')}.py"
    functions = {node.name for node in ast.parse(door.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert "main" in functions, f"{door} has no main(argv)"
