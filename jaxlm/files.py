"""Files that are whole or absent: atomic writes and manifests.

A kill, a full disk or a power cut must never leave half of something that
looks like all of it. Two tools: write under another name and rename, which a
file system does at once or not at all; and a manifest of sizes and checksums,
which finds what was cut off or lost afterwards.
"""

import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import TextIO

MANIFEST = "manifest.json"

_CHUNK = 1 << 22  # bytes read at a time for a checksum
_SMALL = 1 << 20  # files up to here are always checksummed


def write(path: Path, text: str) -> None:
  """Writes a text file through to the disk."""
  with open(path, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def replace(path: Path, text: str) -> None:
  """Replaces a text file at once or not at all.

  Raises:
    OSError: it could not be written; the old file is as it was.
  """
  temporary = path.with_name(path.name + ".new")
  try:
    write(temporary, text)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def sync(folder: Path) -> None:
  """Makes the names inside a folder survive a power cut."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def lock(path: Path) -> TextIO:
  """Takes the lock of a file; closing it, or dying in any way, gives it back.

  Where the file system has no locks, the file is opened and nothing is held.

  Raises:
    BlockingIOError: another process, or this one, holds it.
    OSError: the file cannot be opened for writing.
  """
  file = open(path, "w")  # noqa: SIM115, it is the caller's to close
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise
  except OSError:
    pass
  return file


def write_manifest(folder: Path, checksums: bool = True, **extra) -> None:
  """Writes folder/manifest.json: [size, CRC-32] of every file there.

  Args:
    folder: everything below it is listed; call this last.
    checksums: False lists sizes only (null for the checksum).
    extra: further keys of the manifest, JSON values.
  """
  files = {
    path.relative_to(folder).as_posix(): [
      path.stat().st_size,
      _crc32(path) if checksums else None,
    ]
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }
  manifest = {"files": files} | extra
  manifest["crc32"] = _seal(manifest)
  write(folder / MANIFEST, json.dumps(manifest))
  for inner in {path.parent for path in folder.rglob("*")}:
    sync(inner)


def read_manifest(folder: Path) -> dict:
  """The manifest; raises FileNotFoundError or ValueError if it is not whole."""
  manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
  if not isinstance(manifest, dict):
    raise ValueError(f"{MANIFEST} is not a JSON object")
  if manifest.pop("crc32", None) != _seal(manifest):
    raise ValueError(f"{MANIFEST} has changed")
  return manifest


def damage(folder: Path, thorough: bool = True) -> str | None:
  """What differs from the manifest, in a few words; None if nothing does.

  Sizes are always compared; checksums of large files only if `thorough`.
  """
  try:
    files = read_manifest(folder)["files"]
  except FileNotFoundError:
    return f"{MANIFEST} is missing"
  except (OSError, ValueError):
    return f"{MANIFEST} cannot be read"
  for name, (size, crc) in files.items():
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    check = crc is not None and (thorough or size <= _SMALL)
    if check and _crc32(path) != crc:
      return f"the content of {name} has changed"
  return None


def from_disk(error: BaseException) -> bool:
  """Whether an exception, ours or tensorstore's, came from the file system."""
  return isinstance(error, OSError) or "os_error_code" in str(error)


def reason(error: BaseException) -> str:
  """One short line from an exception, for the middle of a sentence."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error)
  for known in ("No space left on device", "File too large"):
    if known in text:
      return known
  lines = text.splitlines()
  return lines[0][:200] if lines else type(error).__name__


def _seal(manifest: dict) -> int:
  """The checksum that a manifest carries of itself."""
  return zlib.crc32(json.dumps(manifest).encode())


def _crc32(path: Path) -> int:
  crc = 0
  with open(path, "rb") as file:
    while chunk := file.read(_CHUNK):
      crc = zlib.crc32(chunk, crc)
  return crc
