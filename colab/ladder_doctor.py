# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Rung 14: the doctor
#
# A transformer with a mistake still trains. Find it.
#
# On Colab, clone the repository and run this from its root.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxlm") is None:
  subprocess.run(
    [sys.executable, "-m", "pip", "install", "-e", "."], check=True
  )

# %%
from jaxlm.doctor.bugs import BUGS, healthy
from jaxlm.doctor.checks import examine
from jaxlm.ladder.exercise import check

# %%
names = ("labels", "norms", "residual", "attention")
for name, found in examine(healthy(), names):
  print(name, found.ok, found.seen)

# %% [markdown]
# ## Three patients
#
# Each has one of the forty mistakes.

# %%
patients = [
  BUGS[name].make(healthy())
  for name in ("norm without root", "residual missing", "labels not shifted")
]
for i, patient in enumerate(patients):
  print(i, [n for n, found in examine(patient, names) if found.ok is False])

# %% [markdown]
# ## Exercise
#
# Which check finds a mistake? Return the number in `names` of the first one
# that fails.


# %%
def diagnosis(patient): ...


# %%
check(diagnosis, [((patients[0],), 1), ((patients[1],), 2)])
