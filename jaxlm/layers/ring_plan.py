"""Which pieces of a row that is split over devices meet, and when.

Read from the mask's value when the program is traced: a device's tokens are cut
into pieces, and at each step of a ring a device meets some pieces of a guest.
Steps that no device needs are not taken, and steps that are alike become one
loop.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxlm.layers.kernels import visits
from jaxlm.layers.mask import Mask

PIECE = 512  # queries or keys of a piece, where there are that many
PIECES = 256  # of a whole row, at most: a plan is a table of their pairs


@dataclass(frozen=True)
class Setting:
  """What is known of a row when the program is traced.

  Attributes:
    mask: who sees whom.
    axis: the mesh axis that a row is split over.
    ways: devices along it.
    queries: of each device.
    keys: of each device.
    order: how a row lies on the devices, 'plain' or 'zigzag' (`Zigzag`), or
      None: positions come with the data, and any pair may meet.
    checks: whether it pays to ask each pair if anything is seen.
    gather: all keys come at once instead of one part after the other.
    scale: of the products.
    softcap: of the scores, or None.
    chip: whose kernel does it, or None; it cuts rows into pieces itself.
  """

  mask: Mask
  axis: str
  ways: int
  queries: int
  keys: int
  order: str | None
  checks: bool
  gather: bool
  scale: float
  softcap: float | None
  chip: Any = None

  def cut(self, n: int) -> int:
    """Into how many pieces a device's `n` tokens are cut: even, or one."""
    if self.chip is not None:
      return 1
    most = max(2, min(PIECES // self.ways, n // PIECE))
    return max(m for m in range(1, most + 1) if n % m == 0 and (m & 1) < m)


class Run(NamedTuple):
  """Steps that follow each other and are alike.

  At step s a device meets the part of the device s places before it.

  Attributes:
    first: number of the first step.
    pairs: int32 `[steps, ways, pairs, 3]`: for each device the piece of
      queries, the piece of keys, and 1, or 0 for a device that has fewer.
  """

  first: int
  pairs: np.ndarray


def stand(order: str, ways: int, each: int) -> np.ndarray:
  """Positions of the tokens of each device, int `[ways, each]`."""
  row = np.arange(ways * each, dtype=np.int32)
  if order == "plain":
    return row.reshape(ways, each)
  first, last = np.split(row.reshape(2 * ways, -1), 2)
  return np.concatenate([first, last[::-1]], axis=1)


def _needed(setting: Setting) -> np.ndarray:
  """Which pieces meet: bool [device, its pieces, device, its pieces]."""
  counts = setting.cut(setting.queries), setting.cut(setting.keys)
  ways = setting.ways
  if setting.order is None:
    return np.ones((ways, counts[0], ways, counts[1]), bool)
  sizes, bounds = (setting.queries, setting.keys), []
  for each, n in zip(sizes, counts, strict=True):
    x = stand(setting.order, ways, each).reshape(ways, n, -1)
    bounds.append(visits.Bounds(x.min(-1), x.max(-1)))
  q, k = bounds
  q = visits.Bounds(*(x[:, :, None, None] for x in q))
  k = visits.Bounds(*(x[None, None] for x in k))
  return visits.meets(setting.mask, q, k)


def _listed(needed: np.ndarray) -> np.ndarray:
  """Pairs of each device, `[ways, most, 3]`, of a table [ways, n, m]."""
  found = [np.argwhere(table) for table in needed]
  pairs = np.zeros((len(found), max(map(len, found)), 3), np.int32)
  for mine, pair in zip(pairs, found, strict=True):
    mine[: len(pair), :2], mine[: len(pair), 2] = pair, 1
  return pairs


@functools.lru_cache(maxsize=256)
def plan(setting: Setting) -> tuple[Run, ...]:
  """The steps to take, in order, and what each device does in them."""
  needed, ways = _needed(setting), setting.ways
  if setting.gather:
    return (Run(0, _listed(needed.reshape(*needed.shape[:2], -1))[None]),)
  devices = np.arange(ways)
  steps = [
    _listed(needed[devices, :, (devices - step) % ways]) for step in devices
  ]
  runs: list[Run] = []
  for step, pairs in enumerate(steps):
    if not pairs.shape[1]:
      continue
    last = runs[-1] if runs else None
    if (
      last
      and last.first + len(last.pairs) == step
      and (last.pairs.shape[1:] == pairs.shape)
    ):
      joined = np.concatenate([last.pairs, pairs[None]])
      runs[-1] = Run(last.first, joined)
    else:
      runs.append(Run(step, pairs[None]))
  return tuple(runs)
