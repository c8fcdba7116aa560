"""Messages between chips, and how long they take.

A collective over n chips that leaves b bytes on each (all-gather) or takes b
bytes from each (reduce-scatter) passes b (n - 1) / n over a chip's links, an
all-reduce twice that, since it is one after the other (Patarasuk and Yuan,
2009). The rate depends on which links the mesh axis lies along: `rate`. An
all-to-all has no such detour to share, and every part of it goes all the way:
`Network.spread`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.plan.chips import Chip

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)


@dataclass(frozen=True)
class Message:
  """A collective.

  Attributes:
    kind: one of `KINDS`.
    axes: mesh axes it goes along.
    bytes: its largest side on one chip: what is gathered, reduced or sent.
    times: how often it happens in one run of the program.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: int
  times: int = 1

  def sent(self, n: int) -> float:
    """Bytes over one chip's links, among `n`, in all its times."""
    share = 1.0 if self.kind == "collective-permute" else (n - 1) / n
    twice = 2 if self.kind == "all-reduce" else 1
    return self.times * twice * share * self.bytes


@dataclass(frozen=True)
class Network:
  """A mesh on chips: how fast each of its axes is.

  Attributes:
    chip: what it is made of.
    names: of the mesh axes.
    sizes: of the mesh axes.
    coords: `[*sizes, dims]`, where each device of the mesh stands.
  """

  chip: Chip
  names: tuple[str, ...]
  sizes: tuple[int, ...]
  coords: Any

  def n(self, axes: Sequence[str]) -> int:
    """Chips along these axes together."""
    return math.prod(self.sizes[self.names.index(a)] for a in axes)

  def rate(self, axes: Sequence[str]) -> float:
    """Bytes a second over one chip's links along these axes.

    In a torus, as many of its dimensions as the group spans: all their links,
    or half where a dimension does not close to a ring. Among GPUs, the fast
    links where the group is within a node; else a node's adapters, as many as
    the group has chips in it.
    """
    group, chip = self._group(tuple(axes)), self.chip
    if chip.torus:
      rates = [rate for _, rate in self._dimensions(group)]
      return sum(rates) or chip.links / chip.torus / 2
    nodes = len(set(group[:, 0].tolist()))
    if nodes == 1:
      return chip.links
    return min(chip.links, chip.network * len(group) / nodes)

  def spread(self, axes: Sequence[str]) -> float:
    """Seconds for each byte of a chip that goes to all others in equal parts.

    In a torus, of each half of a dimension's chips a half crosses its middle.
    Among GPUs, what is for another node takes the chip's own adapter.
    """
    group, chip = self._group(tuple(axes)), self.chip
    if chip.torus:
      middles = [n / 4 / rate for n, rate in self._dimensions(group)]
      return max(middles, default=0.0)
    n, nodes = len(group), len(set(group[:, 0].tolist()))
    beside, beyond = n / nodes - 1, n - n / nodes
    return max(beside / n / chip.links, beyond / n / chip.network)

  def seconds(self, message: Message) -> float:
    """How long it takes, all its times, with nothing else under way."""
    n = self.n(message.axes)
    if n == 1:
      return 0.0
    if message.kind == "all-to-all":
      return message.times * message.bytes * self.spread(message.axes)
    return message.sent(n) / self.rate(message.axes)

  def _dimensions(self, group: np.ndarray) -> list[tuple[int, float]]:
    """A torus' dimensions that a group spans: (chips, bytes a second)."""
    spans = (group.max(0) - group.min(0) + 1).tolist()
    each = self.chip.links / self.chip.torus
    closed = (n > 2 and n % self.chip.around == 0 for n in spans)
    rates = (each if ring else each / 2 for ring in closed)
    return [(n, r) for n, r in zip(spans, rates, strict=True) if n > 1]

  def _group(self, axes: tuple[str, ...]) -> np.ndarray:
    """Where the chips stand that talk to the first one, `[n, dims]`."""
    places = [slice(None) if name in axes else 0 for name in self.names]
    return self.coords[tuple(places)].reshape(-1, self.coords.shape[-1])

  def axes_of(self, group: Sequence[int]) -> tuple[str, ...]:
    """The mesh axes along which devices of these numbers differ."""
    where = np.stack(np.unravel_index(np.asarray(group), self.sizes), -1)
    differ = (where != where[:1]).any(0)
    return tuple(itertools.compress(self.names, differ))


def network(chip: Chip, mesh: Any, coords: np.ndarray) -> Network:
  """The network under a mesh.

  Args:
    chip: what it is made of.
    mesh: `jax.sharding.Mesh`.
    coords: of the mesh's devices in their order, `[devices, dims]`.
  """
  sizes = tuple(mesh.shape.values())
  return Network(
    chip, tuple(mesh.shape), sizes, coords.reshape(*sizes, coords.shape[-1])
  )
