"""Settings of the process: which compiled programs are kept."""

import jax
import pytest

from jaxlm import host

FORCED = "--xla_force_host_platform_device_count"
SETTINGS = (
  "jax_enable_compilation_cache",
  "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def settings():
  """What these tests change is put back."""
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize(
  ("flags", "kept"),
  [
    ("", True),
    (f"{FORCED}=1", True),
    (f"--xla_dump_to=x {FORCED}=8", False),
    (f"{FORCED}=8 {FORCED}=1", True),  # the last counts, as in XLA
  ],
)
def test_collectives_are_not_read_from_a_file(flags, kept, monkeypatch):
  """Read back, they deadlock: 8 devices, a mixture of experts, preset dp."""
  monkeypatch.setenv("XLA_FLAGS", flags)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unchanged")
  host.compile_cache()
  assert jax.config.jax_enable_compilation_cache == kept
