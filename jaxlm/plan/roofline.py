"""How long a program takes: the roofline of its work, traffic and messages.

Work over peak, bytes over bandwidth, messages over links: each alone is a time
that cannot be undercut. If all three went on side by side, the longest would
be the time; one after the other, their sum. Between the two lies what a good
program reaches (Williams, Waterman and Patterson, Roofline, CACM 52(4), 2009).
"""

from dataclasses import dataclass
from typing import Any

from jaxlm.plan import traced
from jaxlm.plan.network import Network


@dataclass(frozen=True)
class Times:
  """Seconds of one run of a program.

  Attributes:
    compute: matmuls at the chip's peak.
    memory: traffic at its bandwidth; None where nothing was compiled.
    network: messages, one after another, at the rates of their mesh axes.
    compiler: what the compiler itself estimates for everything but messages;
      None where it does not say.
  """

  compute: float
  memory: float | None
  network: float
  compiler: float | None = None

  @property
  def chip(self) -> float:
    """On the chip: the compiler's figure, or else the roofline's."""
    return self.compiler or max(self.compute, self.memory or 0.0)

  @property
  def least(self) -> float:
    """If messages go on beside the work."""
    return max(self.chip, self.network)

  @property
  def most(self) -> float:
    """If they wait for each other."""
    return self.chip + self.network

  @property
  def bound(self) -> str:
    """What takes longest."""
    parts = {"compute": self.compute, "network": self.network}
    parts["memory"] = self.memory or 0.0
    return max(parts, key=parts.get)


def times(
  reading: traced.Reading, compiled: Any | None, network: Network
) -> Times:
  """The times of a program on a network.

  Args:
    reading: of the traced program.
    compiled: `hlo.Compiled`, or None for an estimate without a compiler.
    network: the mesh and its chips.
  """
  chip = network.chip
  compute = traced.seconds(reading.flops, chip.peak)
  if compiled is None:
    sent = sum(map(network.seconds, reading.messages))
    return Times(compute, None, sent)
  own = None
  if chip.clock and compiled.cycles:
    kernels = traced.seconds(reading.kernels, chip.peak)
    own = compiled.cycles / chip.clock + kernels
  sent = sum(map(network.seconds, compiled.messages))
  return Times(compute, compiled.traffic / chip.bandwidth, sent, own)


def mfu(model_flops: float, seconds: float, chips: int, peak: float) -> float:
  """Share of the chips' peak that goes into the model (arXiv:2204.02311)."""
  return model_flops / (seconds * chips * peak)
