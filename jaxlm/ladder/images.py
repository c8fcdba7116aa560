"""Images of digits: from an .npz, from MNIST's own files, or scikit-learn's."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError

NAMES = (
  ("x_train", "y_train", "x_test", "y_test"),
  ("train_images", "train_labels", "test_images", "test_labels"),
)
IDX = ("train-images-idx3", "train-labels-idx1") + (
  "t10k-images-idx3",
  "t10k-labels-idx1",
)


@dataclass(frozen=True)
class Images:
  """Pixels float32 [n, pixels] with mean zero, and labels [n].

  Attributes:
    x, y: to train on.
    x_test, y_test: to judge by.
    name: where they come from.
  """

  x: np.ndarray
  y: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  name: str


def load(path: Path | None) -> Images:
  """Reads images; None means the 1,797 small digits of scikit-learn.

  Args:
    path: an .npz with arrays named as in `NAMES`, or a folder of the
      four idx files (http://yann.lecun.com/exdb/mnist), plain or .gz.
  """
  if path is None:
    parts, name = small_digits(), "scikit-learn's digits"
  elif path.is_dir():
    parts, name = [read_idx(path, stem) for stem in IDX], path.name
  else:
    parts, name = read_npz(path), path.name
  for x, y in (parts[:2], parts[2:]):
    if (
      x.ndim < 2
      or y.shape != x.shape[:1]
      or not len(y)
      or y.dtype.kind not in "iu"
    ):
      raise UserError(
        f"{path} holds images {x.shape} with labels {y.shape} of type "
        f"{y.dtype}; there must be one integer for each image"
      )
  x, x_test = (p.reshape(len(p), -1).astype(np.float32) for p in parts[::2])
  if x.shape[1] != x_test.shape[1]:
    raise UserError(
      f"{path} trains on {x.shape[1]} pixels and tests on {x_test.shape[1]}; "
      "the images must have one size"
    )
  mean, size = x.mean(), x.std() or 1
  y, y_test = (p.astype(np.int64) for p in parts[1::2])
  return Images((x - mean) / size, y, (x_test - mean) / size, y_test, name)


def read_npz(path: Path) -> list[np.ndarray]:
  """The four arrays of an .npz."""
  try:
    with np.load(path) as file:
      for names in NAMES:
        if set(names) <= set(file):
          return [file[name] for name in names]
      held = ", ".join(file)
  except (OSError, ValueError, EOFError, AttributeError, TypeError) as error:
    raise UserError(
      f"{path} cannot be read as an .npz ({error}); give such a file, or a "
      "folder of MNIST's idx files"
    ) from None
  raise UserError(
    f"{path} holds {held or 'nothing'}; it must hold {', '.join(NAMES[0])}"
  )


def read_idx(folder: Path, stem: str) -> np.ndarray:
  """One array of the idx format: two zeros, type, rank, sizes, bytes."""
  found = sorted(
    p for p in folder.iterdir() if p.name.replace(".", "-").startswith(stem)
  )
  if not found:
    raise UserError(f"{folder} has no file {stem}-ubyte or {stem}-ubyte.gz")
  data = found[0].read_bytes()
  try:
    data = gzip.decompress(data) if found[0].suffix == ".gz" else data
    rank = data[3]
    sizes = np.frombuffer(data, ">i4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(sizes)
  except (OSError, EOFError, ValueError, IndexError) as error:
    raise UserError(
      f"{found[0]} is no whole idx file ({error}); fetch it again"
    ) from None


def small_digits() -> list[np.ndarray]:
  """Digits of 8 x 8 pixels, every fifth to test with."""
  try:
    from sklearn.datasets import load_digits
  except ImportError:
    raise UserError(
      "there is no data: give --data=FILE.npz, or install scikit-learn for its "
      "small digits"
    ) from None
  digits = load_digits()
  test = np.arange(len(digits.target)) % 5 == 0
  return [
    a[rows] for rows in (~test, test) for a in (digits.data, digits.target)
  ]
