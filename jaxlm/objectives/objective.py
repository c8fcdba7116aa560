"""An objective is three values: data, loss, and what of a model is trained.

Pretraining, fine-tuning, preferences, reward models and adapters differ in
these three and in nothing else, so `jaxlm.train` is one program for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.layers import param
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder

Array = jax.Array
Tree = Any
Batch = dict[str, np.ndarray]  # leaves [rows, ...]


class Corpus(Protocol):
  """What `Data.read` found.

  Attributes:
    tokenizer: what made the ids; the run keeps it.
    counts: at least `vocab`, `train_tokens`, `val_tokens` and
      `bytes_per_token`. With `val_bytes`, too, the validation loss is also
      told in bits per byte.
  """

  tokenizer: Tokenizer
  counts: dict[str, int | float]

  def describe(self) -> str:
    """One line for the log; equal in all processes that read the same."""


class Batches(Protocol):
  """Endless: batch number `step` is a function of (seed, step) alone."""

  def stream(self, start: int = 0) -> Iterator[Batch]:
    """Batches from step `start` on: this process's rows of each."""


class Data(Protocol):
  """From files to batches.

  Attributes:
    sequences: how many of `seq_len` tokens one row of a batch is: 1, or 2
      where rows are pairs.
  """

  sequences: int

  def read(self, **arguments: Any) -> Corpus:
    """Reads and tokenises; `recipe.data_arguments` says with what."""

  def batches(
    self, corpus: Any, config: FrozenConfigDict, rows: np.ndarray
  ) -> Batches:
    """For training: `rows` of the `config.batch_size` of every batch."""

  def held_out(
    self, corpus: Any, config: FrozenConfigDict, size: int, rows: np.ndarray
  ) -> Sequence[Batch]:
    """What is not trained on, once: `rows` of batches of `size`; may be ()."""


class Loss(Protocol):
  """(model, params, batch, key, compute, frozen) -> loss, metrics.

  `metrics['weight']` says over how many things the loss and the other metrics
  are means, and `metrics['loss']` what is to be logged; `frozen` is what
  `Trained.frozen` gave. The key is None in evaluation.
  """

  def __call__(
    self,
    model: Decoder,
    params: Tree,
    batch: dict[str, Array],
    key: Array | None,
    compute: Compute,
    frozen: Tree = None,
  ) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch, and metrics."""


class Trained(Protocol):
  """Which arrays are trained, and which only looked at.

  Attributes:
    needs_base: whether `frozen` needs the model at `model.path` also when a
      run goes on; `start` has it only when a run begins.
    fresh: names at the top of the tree that are in no base, but new.
    partial: whether the tree says nothing without the base.
  """

  needs_base: bool
  fresh: tuple[str, ...]
  partial: bool

  def params(self, model: Decoder) -> Tree:
    """`Param` declarations of what is trained."""

  def around(self, base: Tree) -> Tree:
    """The base's own arrays as they lie in the tree, without what is fresh."""

  def start(self, model: Decoder, key: Array, base: Tree | None) -> Tree:
    """Arrays of step 0; under jit. `base` is the loaded model, if one is."""

  def frozen(self, model: Decoder, base: Tree | None) -> Tree:
    """What `Loss` sees beside them; shares no buffer with `start`'s."""

  def policy(self, params: Tree, frozen: Tree) -> Tree | None:
    """The model's own parameters, to sample from; None if it does not talk."""

  def model(self, model: Decoder) -> Any:
    """What has been trained when the run is over, around the run's model."""

  def whole(self, params: Tree, base: Tree | None) -> Tree:
    """The parameters of that; `base` is there if they are `partial`."""


@dataclass(frozen=True)
class Whole:
  """All parameters of the model are trained, and nothing else is needed."""

  needs_base = False
  fresh = ()
  partial = False

  def params(self, model: Decoder) -> Tree:
    """Those of the model."""
    return model.params()

  def around(self, base: Tree) -> Tree:
    """All of it."""
    return base

  def start(self, model: Decoder, key: Array, base: Tree | None) -> Tree:
    """As they were loaded; or made new."""
    return param.init(model.params(), key) if base is None else base

  def frozen(self, model: Decoder, base: Tree | None) -> Tree:
    """Nothing."""
    return None

  def policy(self, params: Tree, frozen: Tree) -> Tree:
    """They are it."""
    return params

  def model(self, model: Decoder) -> Decoder:
    """The model itself."""
    return model

  def whole(self, params: Tree, base: Tree | None) -> Tree:
    """They are whole."""
    return params


@dataclass(frozen=True)
class Objective:
  """What a run minimises.

  Attributes:
    data: how its batches are made.
    loss: what is said of a batch.
    trained: which parameters that is minimised in.
  """

  data: Data
  loss: Loss
  trained: Trained = Whole()
