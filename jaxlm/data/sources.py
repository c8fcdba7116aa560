"""Documents from files: text, JSON lines, parquet, Arrow, ArrayRecord.

A path is a file, a folder or a glob pattern; `Documents` iterates over the
texts found there as often as it is asked to and keeps none of them in memory.
Bad input ends in a UserError that names the file and the place in it.
"""

import contextlib
import dataclasses
import glob
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxlm.errors import UserError

_JSON = (".jsonl", ".ndjson")
_TABLE = (".parquet", ".arrow")
_RECORD = (".array_record", ".arrayrecord")
_KNOWN = (".txt", ".md", *_JSON, *_TABLE, *_RECORD)


@dataclasses.dataclass(frozen=True)
class Documents:
  """The documents of some files, in the order of the files' names.

  A text file is one document; JSON lines, tables and ArrayRecords hold one
  per line, row or record. Empty documents are left out. With `raw`, text
  files give `bytes`, whatever their encoding.
  """

  files: tuple[Path, ...]
  text_key: str = "text"
  raw: bool = False

  def __iter__(self) -> Iterator[str | bytes]:
    for file in self.files:
      yield from (d for d in self._read(file) if d)

  def _read(self, file: Path) -> Iterator[str | bytes]:
    kind = _kind(file)
    if kind in _JSON:
      return _json_lines(file, self.text_key)
    if kind == ".parquet":
      return _parquet(file, self.text_key)
    if kind == ".arrow":
      return _arrow(file, self.text_key)
    if kind in _RECORD:
      return _array_record(file)
    content = _content(file)
    return iter([content if self.raw else _decode(content, file)])


def read(
  path: str | Path | Sequence[str | Path],
  text_key: str = "text",
  raw: bool = False,
) -> Documents:
  """The documents under one or several paths.

  Args:
    path: files, folders or glob patterns; a folder stands for all files in it
      whose type is known, also in its subfolders.
    text_key: key or column of the text in JSON lines, parquet and Arrow.
    raw: read text files as bytes (for the byte tokenizer).

  Raises:
    UserError: if nothing is there, or a file is empty. Errors inside the
      files are raised when they are iterated over.
  """
  paths = [path] if isinstance(path, str | Path) else list(path)
  files = tuple(file for p in paths for file in _expand(str(p)))
  for file in files:
    if file.stat().st_size == 0:
      raise UserError(f"{file} is empty; give a file with text in it")
  return Documents(files, text_key, raw)


def _expand(path: str) -> list[Path]:
  """The files that a path, folder or pattern stands for, sorted."""
  name = Path(path).expanduser()
  if name.is_file():
    return [name]
  if name.is_dir():
    inside = [f for f in name.rglob("*") if f.is_file()]
    shown = [
      f
      for f in inside
      if not any(p.startswith(".") for p in f.relative_to(name).parts)
    ]
    files = sorted(f for f in shown if _kind(f) in _KNOWN)
    if not files:
      raise UserError(f"no {', '.join(_KNOWN)} file in the folder {path}")
    return files
  if not glob.has_magic(path):
    raise UserError(f"no such data file: {path}; check data.path")
  found = glob.glob(str(name), recursive=True)
  files = sorted(Path(f) for f in found if Path(f).is_file())
  if not files:
    raise UserError(f"no file matches the pattern {path}; check data.path")
  return files


def _kind(file: Path) -> str:
  """The suffix that tells the format: '.jsonl' of 'a.jsonl.gz' too."""
  return (Path(file.stem) if file.suffix == ".gz" else file).suffix.lower()


def _content(file: Path) -> bytes:
  try:
    if file.suffix == ".gz":
      with gzip.open(file) as stream:
        return stream.read()
    return file.read_bytes()
  except (OSError, EOFError) as error:
    raise UserError(f"cannot read {file}: {error}") from error


def _decode(content: bytes, file: Path) -> str:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{file} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset "
      f"{error.start}; convert it (iconv -t UTF-8), or train on its bytes as "
      "they are with tokenizer='bytes'"
    ) from error


def records(
  path: str | Path | Sequence[str | Path],
) -> Iterator[tuple[str, dict]]:
  """What the lines or rows under one or several paths say, each with its place.

  Args:
    path: files, folders or glob patterns, of JSON lines, parquet or Arrow.

  Raises:
    UserError: as `read`, or for a file of another kind.
  """
  for file in read(path).files:
    kind = _kind(file)
    if kind in _JSON:
      yield from _json_records(file)
    elif kind in _TABLE:
      yield from _table_records(file)
    else:
      raise UserError(
        f"{file} holds no records; give {', '.join((*_JSON, *_TABLE))}"
      )


def _json_lines(file: Path, key: str) -> Iterator[str]:
  for where, record in _json_records(file):
    yield _text(record.get(key), key, where, list(record))


def _json_records(file: Path) -> Iterator[tuple[str, dict]]:
  opener = gzip.open if file.suffix == ".gz" else open
  try:
    with opener(file, "rb") as stream:
      for number, line in enumerate(stream, 1):
        if line.strip():
          where = f"{file}, line {number}"
          yield where, _json_record(line, where)
  except (OSError, EOFError) as error:
    raise UserError(f"cannot read {file}: {error}") from error


def _json_record(line: bytes, where: str) -> dict:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise UserError(f"{where}: not a JSON value in UTF-8: {error}") from error
  if not isinstance(record, dict):
    raise UserError(f"{where}: expected a JSON object, as in {{...}}")
  return record


def _text(value: object, key: str, where: str, keys: list[str]) -> str:
  """The value if it is text, else an error that lists the keys there are."""
  if isinstance(value, str):
    return value
  found = "holds no text" if key in keys else "is missing"
  raise UserError(
    f"{where}: the key {key!r} {found}; set data.text_key to one of {keys}"
  )


def _pyarrow():
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(
      "reading parquet and Arrow files needs pyarrow: "
      "pip install 'jaxlm[parquet]'"
    ) from error
  return pyarrow


def _parquet(file: Path, key: str) -> Iterator[str]:
  pa = _pyarrow()
  try:
    table = pa.parquet.ParquetFile(file)
    names = table.schema_arrow.names
    if key not in names:
      _text(None, key, str(file), names)
    batches = table.iter_batches(columns=[key])
    yield from _column(batches, key, file, names)
  except (OSError, pa.ArrowException) as error:
    raise UserError(f"cannot read {file} as parquet: {error}") from error


def _arrow(file: Path, key: str) -> Iterator[str]:
  with _arrow_table(file) as table:
    if key not in table.column_names:
      _text(None, key, str(file), table.column_names)
    batches = table.select([key]).to_batches()
    yield from _column(batches, key, file, table.column_names)


@contextlib.contextmanager
def _arrow_table(file: Path) -> Iterator:
  """Arrow's stream format, as `datasets.save_to_disk` writes it, or file."""
  pa = _pyarrow()
  try:
    with pa.memory_map(str(file)) as source:
      try:
        table = pa.ipc.open_stream(source).read_all()
      except pa.ArrowInvalid:
        source.seek(0)
        table = pa.ipc.open_file(source).read_all()
      yield table
  except (OSError, pa.ArrowException) as error:
    raise UserError(f"cannot read {file} as Arrow: {error}") from error


def _table_records(file: Path) -> Iterator[tuple[str, dict]]:
  """The rows of a parquet or Arrow file."""
  if _kind(file) == ".arrow":
    with _arrow_table(file) as table:
      yield from _rows(table.to_batches(), file)
    return
  pa = _pyarrow()
  try:
    yield from _rows(pa.parquet.ParquetFile(file).iter_batches(), file)
  except (OSError, pa.ArrowException) as error:
    raise UserError(f"cannot read {file} as parquet: {error}") from error


def _rows(batches, file: Path) -> Iterator[tuple[str, dict]]:
  """Every row of some record batches, with its number."""
  number = 0
  for batch in batches:
    for row in batch.to_pylist():
      yield f"{file}, row {number}", row
      number += 1


def _column(batches, key: str, file: Path, names: list[str]) -> Iterator[str]:
  row = 0
  for batch in batches:
    for value in batch.column(0).to_pylist():
      yield _text(value, key, f"{file}, row {row}", names)
      row += 1


def _array_record(file: Path) -> Iterator[str]:
  """Records of UTF-8 text, read through grain one by one."""
  import grain

  try:
    source = grain.sources.ArrayRecordDataSource([str(file)])
    count = len(source)
  except Exception as error:  # the reader raises bare RuntimeErrors
    raise UserError(f"cannot read {file} as ArrayRecord: {error}") from error
  for i in range(count):
    record = source[i]
    try:
      yield record.decode("utf-8")
    except UnicodeDecodeError as error:
      raise UserError(
        f"{file}, record {i}: not UTF-8 text (offset {error.start}); store "
        "the text of one document in each record"
      ) from error
