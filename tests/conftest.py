"""Strict numerics, eight CPU devices, and a compile cache for every test.

The order matters: JAX reads XLA_FLAGS when its backend starts, so they are set
before the first import of JAX in the process.
"""

import gc
import os
import sys
from pathlib import Path

DEVICES = 8

# Not tests: they wrote the files that tests compare with, and need the
# libraries that are the judges.
collect_ignore = ["golden"]

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"  # plots go to files
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} "
  f"--xla_force_host_platform_device_count={DEVICES}"
).strip()
if "jax" in sys.modules:
  raise RuntimeError("JAX was imported before tests/conftest.py")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

from jaxlm import host  # noqa: E402

host.prepare()
# Tests compile many small programs, and each is worth keeping, but for those of
# several devices (`host.compile_cache` says why).
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
_read, _write = compiler._cache_read, compiler._cache_write


def _read_alone(name, key, options, backend, devices):
  if len(devices) > 1:
    return None, None
  return _read(name, key, options, backend, devices)


def _write_alone(key, seconds, name, backend, executable, callbacks):
  if len(executable.local_devices()) == 1:
    _write(key, seconds, name, backend, executable, callbacks)


compiler._cache_read, compiler._cache_write = _read_alone, _write_alone

# A silent widening or broadcast is an error: write the cast, write the axis.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow; a busy machine makes any slow. The
# examples are the same in every run, so that a failure can be seen again.
hypothesis.settings.register_profile(
  "jaxlm", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("jaxlm")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
  """A worker per core for the whole suite, none for files that are named."""
  whole = config.args_source is not pytest.Config.ArgsSource.ARGS
  return min(os.cpu_count() or 1, 8) if whole else 0


TEXT = """\
The quick brown fox jumps over the lazy dog. A list is a mutable sequence,
typically used to store collections of homogeneous items.

Größe, naïve café, Ελλάδα, 日本語 and 🙂: text is more than ASCII.
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
  """The path of a UTF-8 text file of about 12,000 characters."""
  path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
  lines = [f"{number}. {TEXT}" for number in range(50)]
  path.write_text("\n".join(lines), encoding="utf-8")
  return str(path)


MAPPED = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
  """Forgets compiled programs before they fill the process's address map.

  Each keeps a few mappings, Linux allows 65,530, and one more is a crash.
  """
  yield
  if MAPPED.exists() and len(MAPPED.read_bytes().splitlines()) > 20_000:
    jax.clear_caches()
    gc.collect()


def pytest_make_parametrize_id(val):
  """A name without addresses, so that all workers collect the same tests."""
  return type(val).__name__ if " at 0x" in repr(val) else None
