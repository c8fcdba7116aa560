"""Every kind of file gives its documents, and every mistake its sentence."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from jaxlm.data import sources
from jaxlm.errors import UserError

TEXTS = ["First document.", "Second: naïve 日本語.\nTwo lines.", "Third."]


def write(kind: str, folder: Path) -> Path:
  """A file of that kind with TEXTS under the key 'body'."""
  path = folder / f"file{kind}"
  lines = "".join(json.dumps({"body": t, "n": 1}) + "\n" for t in TEXTS)
  if kind == ".jsonl":
    path.write_text(lines)
  elif kind == ".jsonl.gz":
    path.write_bytes(gzip.compress(lines.encode()))
  elif kind == ".array_record":
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
      writer.write(text.encode())
    writer.close()
  else:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"n": [1, 2, 3], "body": TEXTS})
    if kind == ".parquet":
      pyarrow.parquet.write_table(table, path)
    else:
      opener = pa.ipc.new_stream if kind == ".s.arrow" else pa.ipc.new_file
      with opener(str(path), table.schema) as out:
        out.write_table(table)
  return path


KINDS = [".jsonl", ".jsonl.gz", ".parquet", ".s.arrow", ".f.arrow"]


@pytest.mark.parametrize("kind", [*KINDS, ".array_record"])
def test_formats(kind: str, tmp_path: Path) -> None:
  """The same documents from every format, each time they are asked for."""
  found = sources.read(write(kind, tmp_path), text_key="body")
  assert list(found) == TEXTS
  assert list(found) == TEXTS


@pytest.mark.parametrize("kind", KINDS)
def test_missing_key_names_those_there(kind: str, tmp_path: Path) -> None:
  found = sources.read(write(kind, tmp_path))
  with pytest.raises(UserError, match=r"'text' is missing.*\['(body|n)'"):
    list(found)


@pytest.mark.parametrize("kind", KINDS)
def test_key_without_text(kind: str, tmp_path: Path) -> None:
  found = sources.read(write(kind, tmp_path), text_key="n")
  with pytest.raises(UserError, match="'n' holds no text"):
    list(found)


@pytest.mark.parametrize("kind", [*KINDS[1:], ".array_record"])
def test_truncated_file(kind: str, tmp_path: Path) -> None:
  """A copy that broke off is one sentence with the file's name."""
  path = write(kind, tmp_path)
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(UserError, match=f"cannot read {path}"):
    list(sources.read(path, text_key="body"))


def test_text_file_is_one_document(tmp_path: Path) -> None:
  """Line ends stay as they are; .gz is unpacked; raw gives the bytes."""
  path = tmp_path / "a.txt"
  path.write_bytes("one\r\ntwo ä".encode())
  assert list(sources.read(path)) == ["one\r\ntwo ä"]
  assert list(sources.read(path, raw=True)) == ["one\r\ntwo ä".encode()]
  packed = tmp_path / "b.txt.gz"
  packed.write_bytes(gzip.compress(path.read_bytes()))
  assert list(sources.read(packed)) == ["one\r\ntwo ä"]


def test_folders_and_patterns(tmp_path: Path) -> None:
  """Sorted by name, hidden and unknown files left out of folders."""
  for name in ("b.txt", "a.txt", "sub/c.md", ".hidden/d.txt", "e.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  assert list(sources.read(tmp_path)) == ["a.txt", "b.txt", "sub/c.md"]
  assert list(sources.read(f"{tmp_path}/*.txt")) == ["a.txt", "b.txt"]
  assert list(sources.read(f"{tmp_path}/**/*.md")) == ["sub/c.md"]
  both = sources.read([tmp_path / "b.txt", tmp_path / "a.txt"])
  assert list(both) == ["b.txt", "a.txt"]


def test_not_utf8_says_where_and_what_to_do(tmp_path: Path) -> None:
  path = tmp_path / "latin.txt"
  path.write_bytes(b"Gr" + "öße".encode("latin-1"))
  with pytest.raises(
    UserError, match=r"byte 0xf6 at offset 2.*tokenizer='bytes'"
  ):
    list(sources.read(path))


def test_nothing_there(tmp_path: Path) -> None:
  with pytest.raises(UserError, match="no such data file"):
    sources.read(tmp_path / "absent.txt")
  with pytest.raises(UserError, match="no file matches"):
    sources.read(f"{tmp_path}/*.txt")
  with pytest.raises(UserError, match="in the folder"):
    sources.read(tmp_path)
  (tmp_path / "empty.txt").touch()
  with pytest.raises(UserError, match=r"empty\.txt is empty"):
    sources.read(tmp_path / "empty.txt")


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("not json", "line 2: not a JSON value"),
    ('["a list"]', "line 2: expected a JSON object"),
    ('{"text": null}', "line 2: the key 'text' holds no text"),
  ],
)
def test_bad_json_line(line: str, message: str, tmp_path: Path) -> None:
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "fine"}\n' + line)
  with pytest.raises(UserError, match=message):
    list(sources.read(path))


def test_pyarrow_is_asked_for(tmp_path: Path, monkeypatch) -> None:
  """Without the extra, the error says how to get it."""
  path = write(".parquet", tmp_path)
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(UserError, match=r"pip install 'jaxlm\[parquet\]'"):
    list(sources.read(path, text_key="body"))
