"""Where built things are kept between runs, and how they get there whole.

The corpus, trained tokenizers and tokenised text are built once and kept
under `${XDG_CACHE_HOME:-~/.cache}/jaxlm`. Every name contains a hash of all
that the content depends on, so nothing there ever goes stale, and everything
may be deleted at any time. A thing appears under its name only when it is
complete: it is written beside it and then renamed, which is atomic, so a kill
in the middle and two runs at once are both harmless.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxlm.errors import UserError


def cache_dir() -> Path:
  """The folder of jaxlm's caches; it need not exist yet."""
  base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return Path(base) / "jaxlm"


def digest(*parts: str | bytes) -> str:
  """A short hash (128 bits, hex) of the parts; their borders count."""
  h = hashlib.blake2b(digest_size=16)
  for part in parts:
    raw = part.encode("utf-8") if isinstance(part, str) else part
    h.update(len(raw).to_bytes(8, "little"))
    h.update(raw)
  return h.hexdigest()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
  """Yields a new folder to fill, which becomes `path` if the body succeeds.

  If another process has made `path` meanwhile, theirs (equal by
  construction) stays and ours is dropped.

  Raises:
    UserError: when the place cannot be written or the disk is full.
  """
  temp = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    yield temp
    with contextlib.suppress(FileExistsError):
      _rename(temp, path)
  except OSError as error:
    raise UserError(
      f"cannot write {path}: {error.strerror or error}; free some space or "
      "point XDG_CACHE_HOME at a folder that can be written"
    ) from error
  finally:
    if temp is not None:
      shutil.rmtree(temp, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
  """Writes a file so that `path` holds either the old or the new content."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temp = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(content)
    os.chmod(temp, 0o666 & ~_umask())
    os.replace(temp, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temp)
    raise


def _rename(temp: Path, path: Path) -> None:
  """Renames a folder; an existing target is a FileExistsError everywhere."""
  try:
    os.rename(temp, path)
  except OSError as error:
    if path.is_dir():
      raise FileExistsError(path) from error
    raise


def _umask() -> int:
  """The process's umask, which can only be read by setting it."""
  mask = os.umask(0)
  os.umask(mask)
  return mask
