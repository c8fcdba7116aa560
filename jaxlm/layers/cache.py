"""What attention remembers while generating, and how: kinds of caches.

A mixer declares what it remembers of one token; a kind, a frozen value, says
how many tokens are kept and in which form. `Full()` keeps all that the mask can
see, `Ring(window, sinks)` is for texts without an end, `Quantised` stores
numbers in a byte, and `paged.Paged` shares blocks between rows.

Every slot stores the position of its key, so that full caches, ring buffers,
padding and chunks of any size need no special case: a token of position m goes
to slot m mod length, and whether a slot is seen is the mask's decision. A
negative position marks an empty slot, or a padding token that is not written.

A cache is a dict of arrays. The kind of another than a full one lies beside
them as an entry without arrays, known when the program is traced.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.errors import UserError
from jaxlm.layers.compute import DEFAULT, Compute, active_mesh, platform
from jaxlm.layers.mask import Causal, Mask, PrefixLM, Sliding
from jaxlm.layers.param import ZEROS, Constant, Param, init, paths
from jaxlm.layers.position import Dynamic, LongRope, Rope
from jaxlm.layers.recurrent import place

Array = jax.Array
Cache = dict[str, Any]  # arrays (or their Params) by name, and the kind

NUMBER = Param((), (), 0, Constant(-1), jnp.int32)  # one integer a token


# --- What is remembered of a token ------------------------------------------


def heads(n: int, key_dim: int, value_dim: int, mask: Mask) -> Cache:
  """`k` [heads, key_dim] and `v` [heads, value_dim]; `blocks` if they count."""
  token = {
    "k": Param((n, key_dim), ("kv_heads", None), 0, ZEROS),
    "v": Param((n, value_dim), ("kv_heads", None), 0, ZEROS),
  }
  return token | ({"blocks": NUMBER} if isinstance(mask, PrefixLM) else {})


def latent(width: int) -> Cache:
  """`latent` [width], one for all heads."""
  return {"latent": Param((width,), (None,), 0, ZEROS)}


# --- Kinds ------------------------------------------------------------------


@jax.tree_util.register_static
@dataclass(frozen=True)
class Full:
  """Every position; of a mask that reaches less far, as many as it reaches."""

  endless: ClassVar[bool] = False

  def declare(self, token: Cache, batch: int, length: int, mask: Mask) -> Cache:
    """A cache of `length` positions for tokens declared like `token`."""
    return _slots(token, batch, min(length, mask.reach or length))

  def extend(
    self, cache: Cache, new: Cache, positions: Array, mask: Mask
  ) -> tuple[Cache, Cache]:
    """Adds tokens; see the function `extend`.

    A cache that holds all a chunk can see is written first and read once. A
    ring shorter than that would lose keys its own chunk still needs, so the
    chunk is read beside the old ring.
    """
    t, length = positions.shape[1], cache["positions"].shape[1]
    written = write(cache, new, positions)
    if t == 1 or (mask.reach is None and t <= length):
      return written, written
    return _beside(cache, new | {"positions": positions}), written

  def sees(self, mask: Mask) -> Mask:
    """The mask under which the cache is read."""
    return mask

  def near(self, positions: Array) -> Array | None:
    """Where queries stand for the sinks, if not at `positions`."""
    del positions
    return None


FULL = Full()


@jax.tree_util.register_static
@dataclass(frozen=True)
class Ring:
  """The last `window` positions and, for ever, the first `sinks`.

  So a text may go on without an end in constant memory (StreamingLLM,
  arXiv:2309.17453). It bounds causal attention that nothing else bounds;
  where a mask has a window or chunks of its own, those are kept.

  A model has never seen distances beyond its context. Therefore a query meets
  the sinks as if it stood at position window + sinks - 1, so that they seem to
  lie right before the window, as if what came between had never been. Queries
  are turned for it, not keys: what is stored stays as it is.

  Attributes:
    window: the positions that are kept last, the newest included.
    sinks: those that are kept for ever.
    move: whether sinks seem to lie before the window; else they stay where
      they were, which is `Sliding(window, sinks)`.
  """

  window: int
  sinks: int = 0
  move: bool = True
  endless: ClassVar[bool] = True

  def __post_init__(self):
    if self.window < 1 or self.sinks < 0:
      raise UserError(
        f"a ring of window={self.window} and sinks={self.sinks}; a window has "
        "at least 1 position, and there are 0 sinks or more"
      )

  @property
  def size(self) -> int:
    """Positions it holds."""
    return self.window + self.sinks

  def declare(self, token: Cache, batch: int, length: int, mask: Mask) -> Cache:
    """Slots for sinks, then those of the window; `length` does not matter."""
    if mask.reach is not None:
      return FULL.declare(token, batch, mask.reach, mask)
    if not isinstance(mask, Causal | Sliding):
      raise UserError(
        f"a ring keeps what causal attention sees, and {mask} sees more; use "
        "a full cache"
      )
    ring = self
    if isinstance(mask, Sliding):  # with sinks of its own, as it was trained
      ring = Ring(mask.window, mask.sinks, move=False)
    return _slots(token, batch, ring.size) | {"kind": ring}

  def extend(
    self, cache: Cache, new: Cache, positions: Array, mask: Mask
  ) -> tuple[Cache, Cache]:
    """As `Full.extend`; what is read begins with the sinks."""
    del mask
    n, written = self.sinks, write(cache, new, positions, self.sinks)
    if positions.shape[1] == 1:
      return written, written
    # The sinks of this very chunk are read from their slots alone.
    others = jnp.where(positions < n, -1, positions)
    window = {k: cache[k][:, n:] for k in (*new, "positions")}
    seen = _beside(window, new | {"positions": others})
    first = {k: written[k][:, :n].astype(x.dtype) for k, x in seen.items()}
    return _beside(first, seen), written

  def sees(self, mask: Mask) -> Mask:
    """A window with sinks."""
    del mask
    return Sliding(self.window, self.sinks)

  def near(self, positions: Array) -> Array | None:
    """Positions that no query exceeds, for the sinks alone."""
    if not self.move or not self.sinks:
      return None
    return jnp.minimum(positions, self.size - 1)


LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


@jax.tree_util.register_static
@dataclass(frozen=True)
class Quantised:
  """Numbers of one byte, with a float32 scale for each token and head.

  The largest of a head's numbers becomes the largest of the format, so the
  error of int8 is at most 1/254 of it. A token reads its own key rounded as
  well, so that chunks of any size give the same.

  Attributes:
    dtype: 'int8', 'float8_e4m3fn' or 'float8_e5m2'.
    inner: what is kept: `Full()`, a `Ring`, or `Paged`.
  """

  dtype: str = "int8"
  inner: Any = FULL

  def __post_init__(self):
    if self.dtype not in LARGEST:
      raise UserError(
        f"a cache of dtype {self.dtype!r}; known: {', '.join(LARGEST)}"
      )
    if isinstance(self.inner, Quantised):
      raise UserError("a cache that is quantised twice; once is enough")

  @property
  def endless(self) -> bool:
    """That of what is kept."""
    return self.inner.endless

  def declare(self, token: Cache, batch: int, length: int, mask: Mask) -> Cache:
    """Bytes and `<name>_scale` in the place of numbers."""
    small = {}
    for name, p in token.items():
      small[name] = p
      if p.compute is None:
        small[name] = replace(p, compute=jnp.dtype(self.dtype))
        scale = Param(p.shape[:-1], p.axes[:-1], 0, ZEROS, jnp.float32)
        small[name + "_scale"] = scale
    kept = self.inner.declare(small, batch, length, mask)
    return kept | {"kind": replace(self, inner=kept.get("kind", FULL))}

  def extend(
    self, cache: Cache, new: Cache, positions: Array, mask: Mask
  ) -> tuple[Cache, Cache]:
    """Rounds what comes, and gives back numbers."""
    small = {}
    for name, x in new.items():
      if name + "_scale" in cache:
        small[name], small[name + "_scale"] = self.encode(x)
      else:
        small[name] = x
    seen, cache = self.inner.extend(cache, small, positions, mask)
    wide = {
      name: seen[name].astype(jnp.float32) * seen[name + "_scale"][..., None]
      for name in new
      if name + "_scale" in seen
    }
    return seen | wide, cache

  def encode(self, x: Array) -> tuple[Array, Array]:
    """Codes `[..., dim]` and scales `[...]`, such that x ~ codes * scale."""
    largest = LARGEST[self.dtype]
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    x = x / jnp.where(scale == 0.0, 1.0, scale)[..., None]
    x = jnp.clip(x, -largest, largest)
    if self.dtype == "int8":
      x = jnp.round(x)
    return x.astype(self.dtype), scale

  def sees(self, mask: Mask) -> Mask:
    """That of what is kept."""
    return self.inner.sees(mask)

  def near(self, positions: Array) -> Array | None:
    """That of what is kept."""
    return self.inner.near(positions)


def kind_of(cache: Cache) -> Any:
  """How a cache remembers."""
  return cache.get("kind", FULL)


def window_of(kind: Any) -> Ring | None:
  """The ring within a kind, if there is one."""
  kind = getattr(kind, "inner", kind)
  return kind if isinstance(kind, Ring) else None


# --- Declaring --------------------------------------------------------------


def declare(
  kind: Any, token: Cache, batch: int, length: int, mask: Mask, position: Any
) -> Cache:
  """The cache of a mixer.

  Args:
    kind: how it remembers.
    token: what is remembered of a token, from `heads` or `latent`.
    batch: number of rows.
    length: positions it has room for.
    mask: of the mixer.
    position: that of the mixer.

  Returns:
    Params `[batch, slots, ...]`, `positions` [batch, slots] among them.

  Raises:
    UserError: where this kind cannot remember for such a mask or position.
  """
  scaling = position.scaling if isinstance(position, Rope) else None
  if kind.endless and isinstance(scaling, Dynamic | LongRope):
    raise UserError(
      f"the frequencies of {type(scaling).__name__} follow the length of the "
      "text, and a ring has none; fix them with `scaling.fixed(length)`"
    )
  return kind.declare(token, batch, length, mask)


def _slots(token: Cache, batch: int, length: int) -> Cache:
  """`length` slots for each row, and their positions."""
  return {
    name: replace(
      p, shape=(batch, length, *p.shape), axes=("batch", None, *p.axes)
    )
    for name, p in (token | {"positions": NUMBER}).items()
  }


def empty(
  tree: Any, dtype: Any = jnp.float32, compute: Compute = DEFAULT
) -> Any:
  """The arrays of a declared cache, nothing remembered yet.

  On a mesh they lie as `compute.rules` place activations of their axes.
  """

  def one(p: Param) -> Array:
    x = init(p, jax.random.key(0), p.compute or dtype)
    return place(x, p.axes, compute)

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Param))


def number(compute: Compute) -> Any:
  """The dtype of what is remembered, where nothing says another.

  That of the work; but float32 on a CPU, where XLA would widen all of a cache
  of short floats, and narrow it again, for every token that is written.
  """
  return jnp.float32 if platform() == "cpu" else compute.jnp_dtype


def n_bytes(tree: Any, dtype: Any = jnp.float32) -> int:
  """Bytes of a declared cache whose numbers are of `dtype`."""
  return sum(
    math.prod(p.shape) * jnp.dtype(p.compute or dtype).itemsize
    for p in paths(tree).values()
  )


# --- Writing and reading ----------------------------------------------------


def write(cache: Cache, new: Cache, positions: Array, sinks: int = 0) -> Cache:
  """Puts arrays `[batch, seq, ...]` at their positions `[batch, seq]`.

  The first `sinks` slots keep the first positions. Of a chunk longer than the
  others only their last positions are kept: the slots of more would be written
  twice, in no defined order.
  """
  length = cache["positions"].shape[1]
  window = length - sinks
  last = jnp.max(positions, axis=1, keepdims=True)
  kept = (positions >= 0) & ((positions > last - window) | (positions < sinks))
  slots = sinks + (positions - sinks) % window
  slots = jnp.where(positions < sinks, positions, slots)
  slots = jnp.where(kept, slots, length)
  rows = jnp.arange(positions.shape[0])[:, None]

  def put(old: Array, x: Array) -> Array:
    return old.at[rows, slots].set(x.astype(old.dtype), mode="drop")

  new = new | {"positions": positions}
  return cache | {name: put(cache[name], x) for name, x in new.items()}


def _beside(cache: Cache, new: Cache) -> Cache:
  """What was remembered and what is new, one after the other."""
  return {
    name: jnp.concatenate([cache[name].astype(x.dtype), x], axis=1)
    for name, x in new.items()
  }


def extend(
  cache: Cache,
  new: Cache,
  positions: Array,
  mask: Mask,
  compute: Compute = DEFAULT,
) -> tuple[Cache, Cache]:
  """Adds tokens, and says what they may read.

  On a mesh each device adds its own rows and heads.

  Args:
    cache: what is remembered.
    new: arrays `[batch, seq, ...]` of the new tokens.
    positions: theirs, `[batch, seq]`.
    mask: of the mixer.
    compute: how to run.

  Returns:
    The arrays to read, `positions` with them, and the new cache.
  """
  local = functools.partial(kind_of(cache).extend, mask=mask)
  if active_mesh() is None or compute.rules is None:
    return local(cache, new, positions)
  held = jax.tree.map(_spec, cache)
  row = held["table" if "table" in held else "positions"][0]
  read = {n: PartitionSpec(row, None, *held[n][2:]) for n in new}
  at = PartitionSpec(row, None)
  seen = read | {"positions": at}
  new = jax.tree.map(jax.sharding.reshard, new, read)
  return jax.shard_map(
    lambda *args: _only(seen, *local(*args)),
    in_specs=(held, read, at),
    out_specs=(seen, held),
    check_vma=False,
  )(cache, new, jax.sharding.reshard(positions, at))


def _spec(x: Array) -> PartitionSpec:
  """Where an array lies, with an entry for each of its axes."""
  spec = jax.typeof(x).sharding.spec
  return PartitionSpec(*spec, *[None] * (x.ndim - len(spec)))


def _only(names: Cache, seen: Cache, cache: Cache) -> tuple[Cache, Cache]:
  """Of what is read, what was asked for."""
  return {name: seen[name] for name in names}, cache
