"""`import distillspec_jax` is light, and the core runs where TensorFlow, seqio, gin and clu are not installed.

The package promises an import under 1.5 seconds. Time on a shared machine cannot be asserted; what makes the import
slow can: these modules. To measure: python -X importtime -c "import distillspec_jax" 2>&1 | tail -1
"""

import subprocess
import sys

import pytest

HEAVY = ("tensorflow", "seqio", "gin", "clu", "absl.flags", "matplotlib", "torch", "transformers", "keras", "scipy")
CORE = ("models", "parallel", "decoding", "analysis", "weights", "distillation", "planning")

BLOCK = """
import sys
class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {"tensorflow", "seqio", "gin", "clu", "torch", "transformers"}:
      raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
"""


def python(code):
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_importing_the_package_loads_nothing_heavy():
  loaded = python("import sys, distillspec_jax; print(*sys.modules)")
  assert not set(HEAVY) & set(loaded)
  assert "jax" not in loaded or "tensorflow" not in loaded
  assert [name for name in loaded if name.startswith("distillspec_jax.")] == ["distillspec_jax.lazy"]


CONTRACT = """
  ds.load_model ds.generate ds.speculative_generate ds.models.T5Config ds.models.T5Config.named ds.models.T5
  ds.distillation.divergences.forward_kl ds.distillation.divergences.reverse_kl
  ds.distillation.divergences.jensen_shannon ds.distillation.divergences.total_variation
  ds.analysis.acceptance.acceptance_rate ds.analysis.cost_model.block_efficiency ds.analysis.cost_model.speedup
  ds.analysis.cost_model.best_gamma ds.analysis.cost_model.break_even_alpha
""".split()


def test_what_others_call_is_reached_from_the_package_alone():
  fresh = "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('distillspec_jax')]"
  lines = ["import sys"]
  for name in CONTRACT:  # each is the first thing asked for: none leans on another's import
    lines += [fresh, "import distillspec_jax as ds", f"assert callable({name}), {name!r}"]
  python("\n".join(lines))



@pytest.mark.parametrize("door", ["convert", "report"])
def test_doors_without_data_start_without_tensorflow(door):
  loaded = python(f"import sys, distillspec_jax.{door}; print(*sys.modules)")
  assert "tensorflow" not in loaded and "seqio" not in loaded


def test_the_core_imports_without_the_data_rooms_packages():
  rooms = ", ".join(f"distillspec_jax.{room}" for room in CORE)
  code = f"""{BLOCK}
import importlib, pkgutil, {rooms}
for room in {CORE}:
  package = sys.modules["distillspec_jax." + room]
  for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(info.name)
print(*sys.modules)
"""
  loaded = python(code)
  assert not {"tensorflow", "seqio", "gin", "clu"} & set(loaded)
