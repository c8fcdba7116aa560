"""Checkpoints that survive anything but the loss of the disk.

`Checkpoints` writes {state, data, config} with orbax while training goes on,
keeps the newest few and the best one, and reads them back onto any mesh. A
directory of checkpoints looks like this:

    checkpoints/
      1200/           finished: a folder with a plain number is always whole
        state/        the arrays (orbax, OCDBT)
        data.json     where the data loader stood
        config.json   what was trained
        manifest.json size and CRC-32 of each file above, shape of each array
      1400.tmp/       being written, or left behind by a killed run
      metrics.json    what evaluation said of each step, written afterwards

The one rule behind all promises: a checkpoint is written under a temporary
name and *renamed* once it is complete, which a file system does at once or
not at all; and it is renamed back before it is deleted. So a kill at any
instant leaves finished folders and rubbish, never something in between. What
a rename cannot prevent (a file cut off or deleted later) the manifest finds
before orbax reads garbage.

Left out: remote paths such as gs:// (mount them: a rename must be atomic).
"""

import functools
import json
import math
import os
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax

from jaxlm import arrays, files
from jaxlm.errors import UserError
from jaxlm.parallel import distributed

PyTree = Any


class Restored(NamedTuple):
  """What `Checkpoints.restore` gives back."""

  state: PyTree
  data: dict
  config: dict
  step: int


class Checkpoints:
  """The checkpoints of one run, in one directory.

  Args:
    directory: made if missing (not when `read_only`).
    keep: how many of the newest to keep; None keeps all.
    best: name of a metric (lower is better); the checkpoint with the lowest
      is kept too. See `note`.
    read_only: for programs that only look (sampling, evaluation): nothing is
      created, swept or locked, so a run in progress is not disturbed.

  Raises:
    UserError: the directory cannot be written, or another run writes to it.

  Example:
    >>> import jax.numpy as jnp, tempfile
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...   checkpoints.save(10, {"w": jnp.ones((2,))}, data={"epoch": 1})
    ...   checkpoints.wait()
    ...   like = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    ...   checkpoints.restore(like).data
    {'epoch': 1}
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    keep: int | None = 3,
    best: str | None = None,
    read_only: bool = False,
  ):
    if "://" in str(directory):
      raise UserError(
        f"checkpoints need a file system, and {directory} is an address; "
        "mount the bucket and give the path of the mount"
      )
    if keep is not None and keep < 1:
      raise UserError(
        f"keep={keep} checkpoints would keep none; use 1 or more, or None"
      )
    self.directory = Path(directory).absolute()
    self._keep, self._metric, self._read_only = keep, best, read_only
    self._damaged: set[int] = set()
    self._writing: int | None = None
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None
    self._mutex = threading.Lock()  # metrics.json: the loop and the writer
    self._lock = None
    if not read_only and jax.process_index() == 0:
      self._open_for_writing()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      self.close()
    except UserError as problem:
      if error is None:
        raise
      _warn(str(problem))  # do not hide the exception that is on its way

  def __contains__(self, step: int) -> bool:
    """Whether `step` is saved, or being saved at this moment."""
    return step == self._writing or step in self.steps()

  # --- What is there ---------------------------------------------------------

  def steps(self) -> list[int]:
    """Steps of all finished checkpoints, ascending."""
    if not self.directory.is_dir():
      return []
    names = (p.name for p in self.directory.iterdir() if p.is_dir())
    return sorted(int(n) for n in names if re.fullmatch(r"\d+", n))

  def latest(self) -> int | None:
    """The newest finished step, or None where nothing was saved yet."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The finished step with the lowest metric, or None if none is known."""
    if self._metric is None:
      return None
    known = {
      int(step): values[self._metric]
      for step, values in self._notes().items()
      if values.get(self._metric) is not None
    }
    steps = [s for s in self.steps() if s in known and s not in self._damaged]
    return min(steps, key=lambda s: (known[s], s), default=None)

  def shapes(self, step: int | None = None) -> arrays.Shapes:
    """What a checkpoint (None: the newest) has: {name: [shape, dtype]}.

    Empty where there is none, or its manifest is damaged; `restore` explains.
    """
    step = self.latest() if step is None else step
    try:
      return files.read_manifest(self.directory / str(step))["leaves"]
    except (OSError, ValueError, KeyError):
      return {}

  # --- Saving ----------------------------------------------------------------

  def save(
    self,
    step: int,
    state: PyTree,
    data: Mapping | None = None,
    config: Mapping | None = None,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to write a checkpoint and returns; training may go on at once.

    The arrays have left the device (on CPU: are held fast) when this returns,
    so `state` may be donated to the next step. One save is under way at a
    time: a second one waits for the first.

    Args:
      step: the name of the checkpoint; at most one for each step.
      state: any pytree of arrays, sharded or not.
      data: small JSON dict, e.g. the position of the data loader.
      config: JSON dict of what is being trained.
      metrics: as in `note`, where they are known already.

    Raises:
      UserError: this step exists; or writing failed, now or in the background
        during the previous save (which then left no trace: nothing finished
        is harmed, and the next call tries afresh).
    """
    self.wait()
    step = int(step)
    if self._read_only:
      raise UserError(
        f"{self.directory} was opened read-only; open it without read_only "
        "to save"
      )
    if step in self.steps() and step not in self._damaged:
      raise UserError(
        f"a checkpoint at step {step} is already in {self.directory}; "
        "choose another workdir or remove it first"
      )
    notes = {"data.json": data or {}, "config.json": config or {}}
    texts = {n: json.dumps(v, indent=1) + "\n" for n, v in notes.items()}
    temporary = self.directory / f"{step}.tmp"
    try:
      if jax.process_index() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
      finish = arrays.start_write(temporary / "state", state)
    except Exception as error:
      self._fail(step, error)
    self._writing = step
    self._thread = threading.Thread(
      target=self._finish, args=(step, finish, texts, arrays.shapes(state))
    )
    self._thread.start()
    _unfinished.add(self)
    _wait_at_exit()
    if metrics:
      self.note(step, **metrics)

  def note(self, step: int, **metrics: float) -> None:
    """Attaches metrics to a saved step; `best` and keeping go by them.

    Checkpoints are saved before they are evaluated (the evaluation may be
    what fails), so what it says is kept beside them. NaN and infinities are
    kept as null and are never the best.
    """
    if self._read_only or jax.process_index() != 0:
      return
    clean = {
      k: float(v) if math.isfinite(v) else None for k, v in metrics.items()
    }
    with self._mutex:
      notes = self._notes()
      notes[str(step)] = notes.get(str(step), {}) | clean
      text = json.dumps(notes, indent=1) + "\n"
      try:
        files.replace(self.directory / "metrics.json", text)
      except OSError as error:
        raise UserError(
          f"the metrics of step {step} could not be written to "
          f"{self.directory} ({files.reason(error)}); free some space"
        ) from error

  def wait(self) -> None:
    """Waits for the save under way, if any; raises UserError if it failed."""
    together = self._thread is not None and jax.process_count() > 1
    try:
      self._join()
    finally:
      if together:  # the first process does the renaming
        distributed.wait_for_all()

  def close(self) -> None:
    """Waits for the save under way and lets another run write here."""
    try:
      self.wait()
    finally:
      if self._lock is not None:
        self._lock.close()
        self._lock = None

  # --- Restoring -------------------------------------------------------------

  def restore(
    self, like: PyTree, step: int | None = None, part: bool = False
  ) -> Restored:
    """Reads a checkpoint into the shapes and shardings of `like`.

    Without `step`, the newest good one: a damaged one is named in a warning
    and passed over for the one before it.

    Args:
      like: tree of `jax.ShapeDtypeStruct` (or arrays). Each leaf's `sharding`
        says where it goes, whatever mesh it was saved from; without one it
        goes to the first device.
      step: exactly this one, or UserError.
      part: `like` names a part of what was saved, e.g. {'params': ...} for
        sampling; nothing else is read (so large files are checked by size
        only), and dtypes are cast to those of `like`.

    Raises:
      UserError: no checkpoint, none undamaged, or `like` differs from what was
        saved; the message names the first leaf that does.
    """
    self.wait()
    first, many = distributed.is_first(), jax.process_count() > 1
    if step is None and many:  # one looks for all, so that all read the same
      step = distributed.from_first(self._newest_good() if first else None)
    steps = self.steps()[::-1]
    if step is not None and step not in steps:
      raise UserError(
        f"no checkpoint at step {step} in {self.directory}; "
        f"there are: {', '.join(map(str, steps[::-1])) or 'none'}"
      )
    if not steps:
      raise UserError(
        f"no checkpoint in {self.directory}; train first, or check the path"
      )
    for s in steps if step is None else [step]:
      problem = self._damage(s, thorough=not part and first)
      if problem is None:
        return self._read(s, like, part)
      self._damaged.add(s)
      if step is not None:
        break
      _warn(f"checkpoint {s} in {self.directory} is damaged: {problem}")
    good = [s for s in steps if self._damage(s, thorough=False) is None]
    which = f"checkpoint {step}" if step is not None else "every checkpoint"
    advice = f"try step {good[0]}" if good else "restore it from a backup"
    raise UserError(
      f"{which} in {self.directory} is damaged ({problem}); {advice} or start "
      "again in another workdir"
    )

  def _read(self, step: int, like: PyTree, part: bool) -> Restored:
    """Reads one checkpoint that is known to be whole."""
    folder = self.directory / str(step)
    saved = files.read_manifest(folder)["leaves"]
    difference = arrays.difference(saved, arrays.shapes(like), part)
    if difference:
      raise UserError(
        f"checkpoint {step} in {self.directory} does not fit this model: "
        f"{difference}; use the config it was trained with "
        f"({folder.name}/config.json) or another workdir"
      )
    state = arrays.read(folder / "state", like)
    data, config = (
      json.loads((folder / name).read_text())
      for name in ("data.json", "config.json")
    )
    return Restored(state, data, config, step)

  def _newest_good(self) -> int | None:
    """The newest step whose checkpoint is whole."""
    steps = self.steps()[::-1]
    problems = ((s, self._damage(s, thorough=True)) for s in steps)
    return next((s for s, problem in problems if problem is None), None)

  def _damage(self, step: int, thorough: bool) -> str | None:
    return files.damage(self.directory / str(step), thorough)

  # --- The writer's side -----------------------------------------------------

  def _open_for_writing(self) -> None:
    """Makes the directory, locks it, and sweeps what a kill left behind."""
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._lock = files.lock(self.directory / ".lock")
    except BlockingIOError:
      raise UserError(
        f"another run is writing to {self.directory}; wait for it to end, or "
        "choose another workdir"
      ) from None
    except OSError as error:
      reason = files.reason(error)
      raise UserError(
        f"cannot write checkpoints to {self.directory} ({reason}); choose a "
        "workdir you may write to"
      ) from error
    for rubbish in self.directory.glob("*.tmp"):
      shutil.rmtree(rubbish, ignore_errors=True)

  def _finish(
    self, step: int, finish: Callable, texts: dict, shapes: dict
  ) -> None:
    """Runs in a thread: waits for the arrays, completes, prunes."""
    try:
      finish()
      if jax.process_index() == 0:
        self._complete(step, texts, shapes)
        self._prune()
    except Exception as error:
      self._error = error

  def _join(self) -> None:
    """Waits for the thread and raises what went wrong in it."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    step, self._writing = self._writing, None
    error, self._error = self._error, None
    if error is not None:
      self._fail(step, error)

  def _complete(self, step: int, texts: dict, shapes: dict) -> None:
    """Writes the small files, the manifest last, and gives it its name."""
    temporary = self.directory / f"{step}.tmp"
    final = self.directory / str(step)
    for name, text in texts.items():
      files.write(temporary / name, text)
    # With several processes there are many files, and one would read them all.
    alone = jax.process_count() == 1
    files.write_manifest(temporary, checksums=alone, step=step, leaves=shapes)
    if step in self._damaged and final.exists():
      self._delete(step, aside=f"{step}.damaged.tmp")
    temporary.rename(final)
    files.sync(self.directory)
    self._damaged.discard(step)

  def _prune(self) -> None:
    """Deletes old checkpoints; runs only after a newer one is complete."""
    if self._keep is None:
      return
    good = [s for s in self.steps() if s not in self._damaged]
    with self._mutex:
      kept = {*good[-self._keep :], self.best()}
    try:
      for step in self.steps():
        if step not in kept and step < good[-1]:
          self._delete(step, aside=f"{step}.tmp")
    except OSError as error:  # the new checkpoint is safe all the same
      _warn(f"an old checkpoint stays: {files.reason(error)}")

  def _delete(self, step: int, aside: str) -> None:
    """Removes a checkpoint; its number is gone before its files are."""
    (self.directory / str(step)).rename(self.directory / aside)
    shutil.rmtree(self.directory / aside, ignore_errors=True)

  def _notes(self) -> dict[str, dict]:
    """The content of metrics.json, {} where there is none."""
    try:
      return json.loads((self.directory / "metrics.json").read_text())
    except (OSError, ValueError):
      return {}

  def _fail(self, step: int | None, error: Exception) -> NoReturn:
    """Clears away a failed save and says what happened."""
    temporary = self.directory / f"{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # gives back its space
    if not files.from_disk(error):
      raise error
    raise UserError(
      f"checkpoint {step} could not be written to {self.directory} "
      f"({files.reason(error)}); free some space or check the disk. The "
      "checkpoints before it are untouched"
    ) from error


# A program that ends, by an error of its own too, still finishes its save.
_unfinished: weakref.WeakSet[Checkpoints] = weakref.WeakSet()


@functools.cache
def _wait_at_exit() -> None:
  """Registers `_finish_all`, once and after all that orbax registers.

  The plain `atexit` would be too late: the executors that orbax writes with
  are shut down before it, by this same hook, last registered first called.
  """
  threading._register_atexit(_finish_all)


def _finish_all() -> None:
  for checkpoints in list(_unfinished):
    try:
      checkpoints._join()  # not `wait`: other processes may be gone
    except UserError as problem:
      _warn(str(problem))


def _warn(text: str) -> None:
  print(f"warning: {text}", file=sys.stderr, flush=True)
