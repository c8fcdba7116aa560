"""Generation: caches, samplers, the decoding loop, and a program to try them.

    tokens = jaxlm.generate(model, params, tokens, max_new_tokens=100)

This package has the name of its main function, and importing a package puts
it where `jaxlm.generate` is looked up. So the package itself can be called.
"""

import importlib
import inspect
import sys
import types


class _Callable(types.ModuleType):
  """A module that is `decode.generate` when called."""

  @property
  def _function(self):
    # Imported when needed: JAX takes its time, and --help need not wait.
    return importlib.import_module(f"{__name__}.decode").generate

  @property
  def __signature__(self):
    return inspect.signature(self._function)

  def __call__(self, *args, **kwargs):
    return self._function(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
