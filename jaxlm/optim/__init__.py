"""Optimizers: everything optax has, Muon, schedules and tables by path."""

from jaxlm.optim.guards import balance_experts, qk_clip, skip_spikes
from jaxlm.optim.muon import Muon
from jaxlm.optim.optimizer import RULES, Optimizer, make
from jaxlm.optim.schedules import SCHEDULES, Schedule, make_schedule

__all__ = [
  "Muon",
  "Optimizer",
  "RULES",
  "SCHEDULES",
  "Schedule",
  "balance_experts",
  "make",
  "make_schedule",
  "qk_clip",
  "skip_spikes",
]
