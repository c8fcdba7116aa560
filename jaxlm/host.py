"""Settings of the process that make JAX quicker on a CPU.

Programs call `prepare` once, before anything is compiled. A notebook or a
script of your own may do the same.
"""

import ctypes
import os
import re
import sys

from jaxlm.data.cache import cache_dir

# Parameters of mallopt(3), from glibc's <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_MADV_HUGEPAGE = 14  # of madvise(2)


def prepare() -> None:
  """Keeps compiled programs between runs, and memory between steps."""
  compile_cache()
  keep_freed_memory()


def compile_cache() -> None:
  """Lets compiled programs outlive the process, so that the next starts fast.

  They lie beside jaxlm's other caches, unless JAX_COMPILATION_CACHE_DIR says
  where. A CPU that plays several devices keeps none: XLA's collectives run in
  their program's order only in the process that compiled it (seen in jaxlib
  0.10). Read back from a file they run in any order, and two devices that wait
  for each other in different collectives wait for ever.
  """
  import jax  # here, so that --help need not wait for it

  if _cpu_devices() > 1:
    jax.config.update("jax_enable_compilation_cache", False)
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cpu_devices() -> int:
  """How many devices the CPU will play, before JAX is asked for them."""
  import jax

  flag = r"--xla_force_host_platform_device_count=(\d+)"
  forced = re.findall(flag, os.environ.get("XLA_FLAGS", ""))
  return max(jax.config.jax_num_cpu_devices, *map(int, forced[-1:] or [1]))


def keep_freed_memory() -> bool:
  """Asks the C library to keep freed memory in the process, in large pages.

  XLA's CPU client allocates all temporaries of a program anew at each call,
  and glibc gives such large blocks back to the system at once, so every step
  would fault in every page of them again: half the time of a small training
  step (docs/performance.md). One arena, because the blocks are too large for
  those of XLA's threads; never trimmed; and a stretch of addresses (not of
  memory: nothing is touched) for which the kernel may use huge pages.

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
    (_TRIM_THRESHOLD, -1),
    (_TOP_PAD, 64 << 20),
  )
  taken = all(libc.mallopt(*setting) for setting in settings)
  if taken:
    _want_huge_pages(libc)
  return taken


def _want_huge_pages(libc: ctypes.CDLL) -> None:
  """Marks part of the heap for huge pages, where the kernel has them."""
  pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  size = min(4 << 30, pages // 2)
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = (ctypes.c_size_t,)
  libc.free.argtypes = (ctypes.c_void_p,)
  libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
  start = libc.malloc(size)
  if start:
    aligned = -(-start // 4096) * 4096
    libc.madvise(aligned, size - 4096, _MADV_HUGEPAGE)
    libc.free(start)
