"""jaxlm: language models in JAX, from one parameter to a training run.

    import jaxlm

    model, params = jaxlm.load("runs/tiny")
    tokenizer = jaxlm.load_tokenizer("runs/tiny")
    tokens = tokenizer.encode("A list is")[None]
    logits = jaxlm.forward(model, params, tokens)         # [B, T, V] float32
    tokens = jaxlm.generate(model, params, tokens, 50)    # [B, T + 50]
    print(tokenizer.decode(tokens[0]))

These names are stable. Each is imported when it is first used, so that
`import jaxlm` itself costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
  "At": "jaxlm.layers.at",
  "Compute": "jaxlm.layers.compute",
  "Decoder": "jaxlm.models.decoder",
  "Greedy": "jaxlm.generate.samplers",
  "Sample": "jaxlm.generate.samplers",
  "UserError": "jaxlm.errors",
  "forward": "jaxlm.models.decoder",
  "load": "jaxlm.interop.load",
  "load_tokenizer": "jaxlm.interop.load",
  "save": "jaxlm.interop.save",
  "stream": "jaxlm.generate.decode",
}

# `generate` is a package that can be called: see its docstring.
__all__ = ["__version__", "generate", *_HOMES]


def __getattr__(name: str) -> Any:
  """Imports a public name at its first use (PEP 562)."""
  if name == "generate":
    return importlib.import_module("jaxlm.generate")
  if name not in _HOMES:
    raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
  value = getattr(importlib.import_module(_HOMES[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
