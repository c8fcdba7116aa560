"""Settings of the process that make JAX quicker on a CPU.

Programs call `prepare` once, before anything is compiled. A notebook or a
script of your own may do the same.
"""

import ctypes
import os
import sys

from jaxlm.data.cache import cache_dir

# Parameters of mallopt(3), from glibc's <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def prepare() -> None:
  """Keeps compiled programs between runs, and memory between steps."""
  compile_cache()
  keep_freed_memory()


def compile_cache() -> None:
  """Lets compiled programs outlive the process, so that the next starts fast.

  They lie beside jaxlm's other caches, unless JAX_COMPILATION_CACHE_DIR says
  where.
  """
  import jax  # here, so that --help need not wait for it

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def keep_freed_memory() -> bool:
  """Asks the C library to keep freed memory in the process.

  XLA's CPU client allocates all temporaries of a program anew at each call,
  and glibc gives such large blocks back to the system at once, so every step
  would fault in every page of them again: a third of the time of a small
  training step (docs/performance.md). One arena, because the blocks are too
  large for those of XLA's threads.

  Returns:
    True if the C library took the settings (glibc: Linux, not macOS or musl).
  """
  if sys.platform != "linux":
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    return False
  settings = (
    (_ARENA_MAX, 1),
    (_MMAP_MAX, 0),
    (_TRIM_THRESHOLD, 2**31 - 1),
    (_TOP_PAD, 64 << 20),
  )
  return all(libc.mallopt(*setting) for setting in settings)
