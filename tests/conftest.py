"""Set up every test: CPU with eight virtual devices, strict ranks, the optional folder of golden data.

Nearly all of the tests' time is tracing and compilation, so XLA optimises less here than for users: a third of the
processor time; and garbage is looked for less often, and not among what the imports made.
`DISTILLSPEC_TEST_AS_USERS=1` compiles as users' programs are compiled; launch/test.sh runs the tests that are marked
`as_users` that way.
"""

import gc
import os
import pathlib

from processes import LESS_OPTIMISED

AS_USERS = os.environ.get("DISTILLSPEC_TEST_AS_USERS") == "1"
_FLAGS = "--xla_force_host_platform_device_count=8"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), _FLAGS, "" if AS_USERS else LESS_OPTIMISED])
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nobody reads where an operation was written
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")


def pytest_collection_finish():
  gc.collect()
  gc.freeze()
  gc.set_threshold(200_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_freed():
  """Forget each file's compiled programs: one takes some 300 memory maps, and Linux ends a process that has 65,530."""
  yield
  jax.clear_caches()
  gc.collect()


REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
  """The folder with golden checkpoints and real data; tests that need it skip where it is absent."""
  folder = pathlib.Path(os.environ.get("DISTILLSPEC_SHARED", REPOSITORY.parent / "shared"))
  if not (folder / "fixtures").is_dir():
    pytest.skip(f"no golden data at {folder}; set DISTILLSPEC_SHARED to the folder that holds fixtures/ and data/")
  return folder
