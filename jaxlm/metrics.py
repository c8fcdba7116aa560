"""What a run says of itself: JSONL, TensorBoard, wandb, and the loss plot.

    log = Log(workdir, config=config, step=resumed_at)
    log.scalars(10, {"loss": 3.1, "lr": 1e-3})
    log.close()

`metrics.jsonl` is the record; everything else is a view of it. A line is one
JSON object with `step` and whatever applies of `loss`, `val_loss`,
`tokens_per_sec`, `grad_norm`, `lr`. JSON has no NaN: not-a-number and the
infinities are written as null. Every line reaches the operating system before
`scalars` returns, so a kill costs at most the line being written; a line torn
by a power cut is passed over by the reader.

A run continued from step s first drops what is recorded after s, so its file
ends up equal to an uninterrupted one's, timing apart.
"""

import importlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm import files
from jaxlm.errors import UserError

Array = Any


class Log:
  """Writes to every place that was asked for.

  Args:
    workdir: gets metrics.jsonl, and tb/ and wandb/ where those are on.
    tensorboard: whether to write TensorBoard events.
    wandb: whether to log to Weights & Biases (WANDB_MODE=offline works too).
    config: the run's configuration, JSON values; shown by both.
    step: the step the run continues from; later records are dropped.
    write: False for the processes of a pod that should stay silent.

  Raises:
    UserError: the workdir cannot be written, or wandb is not installed.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    tensorboard: bool = True,
    wandb: bool = False,
    config: Mapping | None = None,
    step: int = 0,
    write: bool = True,
  ):
    workdir = Path(workdir)
    self._workdir, self._sinks = workdir, []
    if not write:
      return
    try:
      with self._explained():
        workdir.mkdir(parents=True, exist_ok=True)
        self._sinks.append(_Lines(workdir / "metrics.jsonl", step))
        if tensorboard:
          self._sinks.append(_TensorBoard(workdir / "tb", config or {}, step))
        if wandb:
          self._sinks.append(_Wandb(workdir, config or {}))
    except BaseException:
      self.close()
      raise

  def last(self, name: str) -> int | None:
    """The last step at which `name` was recorded, also before a resume.

    A run killed between a checkpoint and its evaluation can so find out that
    the evaluation is still to be done.
    """
    steps = [r["step"] for r in read(self._workdir) if name in r]
    return max(steps, default=None)

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Records named numbers (or 0-d arrays) of one step."""
    plain = {name: _plain(value) for name, value in values.items()}
    self._each("scalars", step, plain)

  def histogram(self, step: int, name: str, array: Array) -> None:
    """Records the distribution of an array; what is not finite is left out."""
    flat = np.asarray(array, np.float64).ravel()
    flat = flat[np.isfinite(flat)]
    if flat.size:
      self._each("histogram", step, name, flat)

  def text(self, step: int, name: str, text: str) -> None:
    """Records a text, e.g. a sample."""
    self._each("text", step, name, text)

  def image(self, step: int, name: str, array: Array) -> None:
    """Records an image: [H, W] or [H, W, C], float in 0..1 or uint8."""
    pixels = np.asarray(array)
    if pixels.dtype != np.uint8:
      pixels = (np.clip(pixels.astype(np.float64), 0, 1) * 255).round()
    pixels = pixels.astype(np.uint8)
    self._each(
      "image", step, name, pixels[..., None] if pixels.ndim == 2 else pixels
    )

  def close(self) -> None:
    """Ends all records; calling it twice does no harm."""
    sinks, self._sinks = self._sinks, []
    for sink in sinks:
      with self._explained():
        sink.close()

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def _each(self, method: str, *args) -> None:
    for sink in self._sinks:
      with self._explained():
        getattr(sink, method)(*args)

  def _explained(self) -> "_Explained":
    return _Explained(self._workdir)


def read(workdir: str | os.PathLike) -> list[dict]:
  """The records of workdir/metrics.jsonl, in order; [] if there are none.

  A line that is not a JSON object (torn by a power cut) is passed over.
  """
  try:
    text = (Path(workdir) / "metrics.jsonl").read_text("utf-8", "replace")
  except FileNotFoundError:
    return []
  return [r for line in text.splitlines() if (r := _record(line)) is not None]


class Mean:
  """Weighted means by name: Σ wᵢ xᵢ / Σ wᵢ, summed in float64.

  Values may be arrays still being computed: nothing waits before `result`.

  Example:
    >>> mean = Mean()
    >>> mean.add(3, loss=1.0)
    >>> mean.add(1, loss=5.0)
    >>> mean.result()
    {'loss': 2.0}
  """

  def __init__(self):
    self._seen: dict[str, list[tuple[Any, Any]]] = {}

  def add(self, weight: Any, **values: Any) -> None:
    """Adds the means of one batch, `weight` (e.g. its tokens) of them."""
    for name, value in values.items():
      self._seen.setdefault(name, []).append((weight, value))

  def result(self) -> dict[str, float]:
    """The means; nan for a name whose weights sum to zero."""
    return {name: _weighted(pairs) for name, pairs in self._seen.items()}


def plot_loss(workdir: str | os.PathLike) -> Path:
  """Draws workdir/loss.png from metrics.jsonl and returns its path.

  Raises:
    UserError: no loss was recorded.
  """
  from matplotlib.figure import Figure  # no pyplot: no display, no state

  train = _curve(workdir, "loss")
  valid = _curve(workdir, "val_loss")
  if not len(train[0]) and not len(valid[0]):
    raise UserError(
      f"no loss in {Path(workdir) / 'metrics.jsonl'} to plot; train first"
    )
  figure = Figure(figsize=(7, 4.2), dpi=144, layout="constrained")
  axes = figure.add_subplot()
  if len(train[0]):
    steps, loss = train
    axes.plot(steps, loss, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(loss), color="C0", linewidth=1.6, label="training")
  if len(valid[0]):
    axes.plot(*valid, "o-", color="C1", markersize=4, label="validation")
  _dress(axes, train, valid)
  path = Path(workdir) / "loss.png"
  partial = path.with_name("loss.new.png")
  figure.savefig(partial)
  os.replace(partial, path)
  return path


# --- Where records go --------------------------------------------------------


class _Lines:
  """metrics.jsonl."""

  def __init__(self, path: Path, step: int):
    if path.exists():
      old = path.read_text("utf-8", "replace")
      kept = "".join(
        line + "\n"
        for line in old.splitlines()
        if (r := _record(line)) is not None and r["step"] <= step
      )
      if kept != old:
        files.replace(path, kept)
    # One write() for each line: a kill falls between lines, not within.
    self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._file.write(json.dumps({"step": step} | finite) + "\n")

  def close(self) -> None:
    self._file.close()

  def histogram(self, step, name, array) -> None:
    """Lines are for numbers."""

  text = image = histogram


class _TensorBoard:
  """Event files, written at once: no queue that a full disk could block."""

  def __init__(self, folder: Path, config: Mapping, step: int):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._summary, self._event = summary, event_pb2
    continues = folder.is_dir() and any(folder.iterdir())
    folder.mkdir(exist_ok=True)
    # Readers take files by name, and names are by the second: add the rest.
    suffix = f".{time.time_ns()}"
    prefix = str(folder / "events")
    self._writer = event_file_writer.EventsWriter(prefix, suffix)
    if continues:  # readers then purge what comes at or after this step
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._write(event_pb2.Event(step=step + 1, session_log=start))
    elif config:
      self.text(0, "config", _markdown(config))
    self._writer.flush()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    value = self._summary.Summary.Value
    points = [value(tag=n, simple_value=v) for n, v in values.items()]
    self._add(step, self._summary.Summary(value=points))
    self._writer.flush()

  def histogram(self, step: int, name: str, array: np.ndarray) -> None:
    self._add(step, self._summary.histogram(name, array, bins=64))
    self._writer.flush()

  def text(self, step: int, name: str, text: str) -> None:
    self._add(step, self._summary.text(name, text))
    self._writer.flush()

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    self._add(step, self._summary.image(name, pixels, dataformats="HWC"))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()

  def _add(self, step: int, summary) -> None:
    self._write(self._event.Event(step=step, summary=summary))

  def _write(self, event) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)


class _Wandb:
  """Weights & Biases; its run id is kept so that a run continues as itself."""

  def __init__(self, workdir: Path, config: Mapping):
    try:
      self._wandb = importlib.import_module("wandb")
    except ImportError as error:
      raise UserError(
        f"wandb cannot be imported ({error}); run "
        "pip install 'jaxlm[wandb]', or turn logging to it off"
      ) from error
    self._run = self._wandb.init(
      dir=str(workdir),
      name=workdir.name,
      project=os.environ.get("WANDB_PROJECT", "jaxlm"),
      id=self._id(workdir / "wandb_id"),
      resume="allow",
      config=dict(config),
    )

  def _id(self, path: Path) -> str:
    if not path.exists():
      files.replace(path, os.urandom(8).hex() + "\n")
    return path.read_text().strip()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def histogram(self, step: int, name: str, array: np.ndarray) -> None:
    self._run.log({name: self._wandb.Histogram(array)}, step=step)

  def text(self, step: int, name: str, text: str) -> None:
    table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
    self._run.log({name: table}, step=step)

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    self._run.log({name: self._wandb.Image(pixels)}, step=step)

  def close(self) -> None:
    self._run.finish()


class _Explained:
  """Turns a disk error into a sentence."""

  def __init__(self, workdir: Path):
    self._workdir = workdir

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind, error, traceback) -> None:
    if isinstance(error, OSError):
      raise UserError(
        f"metrics could not be written to {self._workdir} "
        f"({files.reason(error)}); free some space or choose another workdir"
      ) from error


# --- Small parts -------------------------------------------------------------


def _plain(value: Any) -> float | int:
  """A Python number; a float32 0.1 is 0.1, not 0.10000000149."""
  if isinstance(value, bool | int | float):
    return value
  array = np.asarray(value)
  if array.dtype == np.float32:
    return float(str(array[()]))
  return array.item() if array.dtype.kind in "iub" else float(array)


def _record(line: str) -> dict | None:
  try:
    record = json.loads(line)
  except ValueError:
    return None
  whole = isinstance(record, dict) and isinstance(record.get("step"), int)
  return record if whole else None


def _weighted(pairs: list[tuple[Any, Any]]) -> float:
  weights = np.asarray([float(w) for w, _ in pairs])
  values = np.asarray([float(v) for _, v in pairs])
  total = weights.sum()
  return float((weights * values).sum() / total) if total else math.nan


def _markdown(config: Mapping) -> str:
  return "```json\n" + json.dumps(config, indent=1, default=str) + "\n```"


def _curve(workdir, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of one metric, where it was finite."""
  points = [
    (r["step"], r[name]) for r in read(workdir) if r.get(name) is not None
  ]
  points = np.asarray(points, np.float64).reshape(-1, 2)
  return points[:, 0], points[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
  """A centred mean over 4 % of the run: no lag, unlike a running average."""
  at, last = np.arange(len(values)), len(values) - 1
  # At the steep start the window shrinks on both sides to stay centred; at
  # the flat end only ahead, so that the last value is a mean and no noise.
  left = np.minimum(max(1, len(values) // 50), at)
  right = np.minimum(left, last - at)
  total = np.cumsum(np.concatenate([[0.0], values]))
  return (total[at + right + 1] - total[at - left]) / (left + right + 1)


def _dress(axes, train, valid) -> None:
  """Labels, and a title with the numbers one looks for."""
  parts = []
  if len(valid[0]):
    best = int(np.argmin(valid[1]))
    parts.append(f"validation {valid[1][-1]:.3f}")
    if best != len(valid[1]) - 1:
      parts.append(f"best {valid[1][best]:.3f} at step {valid[0][best]:,.0f}")
  if len(train[0]):
    parts.append(f"training {_smooth(train[1])[-1]:.3f}")
  last = max(curve[0][-1] for curve in (train, valid) if len(curve[0]))
  title = f"Loss after {last:,.0f} steps: " + ", ".join(parts)
  axes.set_title(title, fontsize=11)
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats per token)")
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
