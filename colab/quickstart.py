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
# # jaxlm in ten minutes
#
# Train a language model on real text, look at what it learned, and let it
# write. Works on a TPU, a GPU or a CPU runtime; nothing but packages is
# downloaded: the text is Python's own documentation.
#
# On Colab, upload or clone the repository and run the next cell from its root.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxlm") is None:
  # On a TPU or GPU runtime use ".[tpu]" or ".[cuda12]" instead of ".".
  pip = [sys.executable, "-m", "pip", "install", "-e", "."]
  subprocess.run(pip, check=True)

# %%
import os
from pathlib import Path

import jax

import jaxlm
from jaxlm import host

host.prepare()
print(jax.devices())

# %% [markdown]
# ## A run is a config
#
# `configs/tiny.py` starts from the defaults and changes about twenty keys. A
# key on the command line, or in this list, overrides the file.

# %%
from jaxlm import program
from jaxlm.explain import explain
from jaxlm.train import train

places = [Path.cwd(), Path.cwd().parent]
root = next(p for p in places if (p / "configs").is_dir())
steps = int(os.environ.get("QUICKSTART_STEPS", "600"))
run = program.load(
  [
    f"--config={root / 'configs' / 'tiny.py'}",
    f"--workdir={os.environ.get('QUICKSTART_DIR', 'runs/quickstart')}",
    f"--config.steps={steps}",
    f"--config.optimizer.warmup={min(40, steps // 4)}",
    f"--config.eval_every={max(steps // 4, 1)}",
  ]
)
print(explain(run.config)[-3000:])

# %% [markdown]
# ## Train
#
# The same function that `python -m jaxlm.train` calls. Interrupt it if you
# like: running the cell again continues where it stopped.

# %%
state = train(run.config, run.workdir)
print("steps done:", int(state.step))

# %%
from IPython.display import Image

Image(run.workdir / "loss.png")

# %% [markdown]
# ## Use it
#
# A model is a frozen value, its parameters a tree of arrays, and the forward
# pass a function of both.

# %%
model, params = jaxlm.load(run.workdir)
tokenizer = jaxlm.load_tokenizer(run.workdir)
tokens = tokenizer.encode("The list type")[None]
logits = jaxlm.forward(model, params, tokens)
print(logits.shape, logits.dtype)
assert logits.shape == (1, tokens.shape[1], model.vocab)

# %%
sampler = jaxlm.Sample(temperature=0.8, top_k=50)
more = jaxlm.generate(model, params, tokens, 60, sampler=sampler)
print(tokenizer.decode(more[0]))
assert more.shape == (1, tokens.shape[1] + 60)

# %% [markdown]
# ## Look inside
#
# Every parameter is declared once: shape, logical axes, initializer. The table
# below, the shardings, the weight-decay mask and Muon's matrices are views of
# that declaration.

# %%
from jaxlm.layers.param import describe

print(describe(model.params()))
