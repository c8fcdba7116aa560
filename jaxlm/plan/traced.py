"""Reading a traced program: its work, its messages, its memory. No compiler.

With explicit mesh axes every array's placement is part of its type, so a traced
program says nearly all that a compiled one does: how large each device's part
of an array is, which matmuls it computes (those that are computed again
included), and where parts have to travel. `read` walks through it once, into
scans with their lengths, and adds up.

These are estimates. A compiler fuses, reorders and shares more than is assumed
here; benchmarks/plan.py says how far off they are.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxlm.plan.network import Message
from jaxlm.plan.ops import (
  COLLECTIVES,
  FREE,
  IN_PLACE,
  PLACES,
  REDUCTIONS,
  automatic,
  axes_of,
  dot_flops,
  flat,
  local_shape,
  n_bytes,
  ragged_flops,
  spec_text,
)

Jaxpr = Any
Var = Any


@dataclass(frozen=True)
class Live:
  """An array that lies in memory at the fullest moment.

  Attributes:
    name: its path, or where in the program it was made.
    kind: 'parameters', 'optimizer state', 'batch', 'cache', 'gradients',
      'saved activations', 'logits' or 'working memory'.
    shape: of the whole.
    dtype: of its numbers.
    spec: how it is cut over the mesh; '' where it is not.
    bytes: on one device.
  """

  name: str
  kind: str
  shape: tuple[int, ...]
  dtype: str
  spec: str
  bytes: int

  def __str__(self) -> str:
    shape = "x".join(map(str, self.shape)) or "scalar"
    return f"{self.name} {self.dtype}[{shape}]{self.spec and ' ' + self.spec}"


@dataclass
class Reading:
  """What one device does in one run of a program.

  Attributes:
    flops: of matmuls, by dtype of their operands.
    kernels: of those FLOPs, what is done inside Pallas kernels.
    messages: what travels.
    peak: bytes at the fullest moment, arguments included.
    live: what they are, the largest first.
    saved: bytes of what the forward pass of each scan keeps for the backward
      pass, by scan and array.
  """

  flops: Counter = field(default_factory=Counter)
  kernels: Counter = field(default_factory=Counter)
  messages: list[Message] = field(default_factory=list)
  peak: int = 0
  live: tuple[Live, ...] = ()
  saved: dict[str, int] = field(default_factory=dict)

  def parts(self) -> dict[str, int]:
    """Bytes at the fullest moment by kind, the largest first."""
    found: Counter = Counter()
    for array in self.live:
      found[array.kind] += array.bytes
    return dict(found.most_common())


def read(
  jaxpr: Jaxpr,
  names: Sequence[tuple[str, str]],
  vocab: int = 0,
  kept: str = "saved activations",
  narrow: bool = True,
  loops: int = 1,
) -> Reading:
  """Reads a closed jaxpr.

  Args:
    jaxpr: of the whole program, as `jax.jit(f).trace(...).jaxpr`.
    names: `(kind, path)` of each argument, in order.
    vocab: the size by which logits are known.
    kept: what scans collect: activations, or a cache where nothing is learned.
    narrow: partial sums travel in the dtype they are cast to right away, as
      the TPU's compiler has it, or else in their own.
    loops: how often a loop runs whose length is data.
  """
  return _Reader(vocab, kept, narrow, loops).program(jaxpr.jaxpr, names)


# --- The walk ---------------------------------------------------------------


class _Reader:
  """Walks through a program; `read` is its only use."""

  def __init__(self, vocab: int, kept: str, narrow: bool, loops: int):
    self._vocab, self._kept, self._narrow = vocab, kept, narrow
    self._loops = loops
    self._found = Reading()
    # Inside a part that is placed automatically the types say nothing; what
    # goes in cut is taken to stay cut, except by what sums over it.
    self._cut: dict[Var, set[str]] = {}

  def program(self, jaxpr: Jaxpr, names: Sequence[tuple[str, str]]) -> Reading:
    arguments = {
      v: _live(v.aval, kind, path)
      for v, (kind, path) in zip(jaxpr.invars, names, strict=True)
    }
    constants = {v: _live(v.aval, "constants", "") for v in jaxpr.constvars}
    peak, live = self._walk(jaxpr, 1, arguments | constants, "")
    self._found.peak = peak
    self._found.live = tuple(sorted(live, key=lambda x: -x.bytes))
    return self._found

  def _walk(
    self, jaxpr: Jaxpr, times: int, held: dict[Var, Live], scope: str
  ) -> tuple[int, list[Live]]:
    """Bytes and arrays at the fullest moment; what is `held` may be reused.

    Arrays that the caller holds are not in `held`, and count as nothing here.
    """
    last = _last_uses(jaxpr)
    unread = [v for v in held if last[v] < 0]  # and there all the same
    last |= dict.fromkeys(unread, len(jaxpr.eqns))
    wanted = _wanted(jaxpr)
    live, now = dict(held), sum(x.bytes for x in held.values())
    best, best_live = now, list(live.values())
    roots: dict[Var, set[Var]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
      here = f"{scope}/{eqn.source_info.name_stack}".strip("/")
      inside, more = self._one(eqn, times, here, wanted)
      dying = [v for v in _vars(eqn.invars) if last[v] == i and v in live]
      free = eqn.primitive.name in FREE or self._stays(eqn)
      made = {}
      for v in eqn.outvars:
        if free:  # lives in what it is made of
          roots[v] = set().union(
            *(roots.get(u, {u}) for u in _vars(eqn.invars))
          )
          for root in roots[v]:
            last[root] = max(last.get(root, -1), last.get(v, -1))
        else:
          made[v] = self._name(eqn, v, here)
      if free:
        continue
      if eqn.primitive.name in IN_PLACE:
        for v in [v for v in dying if v in _replaced(eqn)]:
          if last[v] == i:
            now -= live.pop(v).bytes
        dying = [v for v in dying if v in live]
      live |= made
      now += sum(x.bytes for x in made.values())
      if now + inside > best:
        best, best_live = now + inside, [*live.values(), *more]
      for v in [*dying, *made]:
        if last.get(v, -1) <= i and v in live:
          now -= live.pop(v).bytes
      for v in [v for v in live if last.get(v, -1) < i and v not in made]:
        now -= live.pop(v).bytes
    return best, best_live

  def _one(
    self, eqn: Any, times: int, scope: str, wanted: dict[Var, Any]
  ) -> tuple[int, list[Live]]:
    """Counts an operation; its own working memory beside what it returns."""
    name = eqn.primitive.name
    if name == "dot_general":
      self._count(eqn, times, dot_flops(eqn))
    elif name.startswith("ragged_dot"):
      self._count(eqn, times, ragged_flops(eqn))
    elif name == "scan":
      return self._scan(eqn, times, scope)
    elif name == "pallas_call":
      self._kernel(eqn, times)
      return 0, []
    elif name == "cond":
      return self._cond(eqn, times, scope)
    elif name == "while":  # how often is data
      return self._while(eqn, times, scope)
    else:
      inner = _inner(eqn)
      if inner is not None:
        return self._call(eqn, inner, times, scope)
    self._travel(eqn, times, wanted)
    self._follow(eqn)
    return 0, []

  def _follow(self, eqn: Any) -> None:
    """Remembers how arrays without explicit placement are cut."""
    if eqn.primitive.name == "scatter-add" or not automatic(eqn.outvars[0]):
      return
    cut = set()
    for v in _vars(eqn.invars):
      explicit = () if automatic(v) else flat(axes_of(v.aval))
      cut |= self._cut.get(v, set()) | set(explicit)
    self._cut |= dict.fromkeys(eqn.outvars, cut)

  def _stays(self, eqn: Any) -> bool:
    """True for a placement that changes nothing."""
    if eqn.primitive.name not in PLACES:
      return False
    return self._size(eqn.invars[0]) == self._size(eqn.outvars[0])

  def _size(self, v: Var) -> int:
    """Bytes on one device."""
    size = n_bytes(v.aval)
    if hasattr(v, "val") or v not in self._cut:
      return size
    mesh = v.aval.sharding.mesh.shape
    return size // math.prod(mesh[a] for a in self._cut[v])

  def _count(self, eqn: Any, times: int, flops: float) -> None:
    dtype = str(eqn.invars[0].aval.dtype)
    self._found.flops[dtype] += times * flops

  def _scan(self, eqn: Any, times: int, scope: str) -> tuple[int, list[Live]]:
    """Once through the body, which counts as often as the scan is long."""
    length, carry = eqn.params["length"], eqn.params["num_carry"]
    body = eqn.params["jaxpr"].jaxpr
    peak, live = self._walk(body, times * length, {}, scope)
    if "transpose" not in scope and self._kept != "cache":
      for v, out in zip(body.outvars[carry:], eqn.outvars[carry:], strict=True):
        name = f"{_made_by(body, v)} {_text(out.aval)}"
        if n_bytes(out.aval):
          saved = self._found.saved
          saved[name] = saved.get(name, 0) + n_bytes(out.aval)
    # What the body returns is written into the stacked results.
    made = sum(n_bytes(v.aval) for v in body.outvars)
    return max(0, peak - made), live

  def _while(self, eqn: Any, times: int, scope: str) -> tuple[int, list[Live]]:
    """Once through the body; what it returns lies where its carry lies."""
    body = eqn.params["body_jaxpr"].jaxpr
    peak, live = self._call(eqn, body, times * self._loops, scope)
    for v in body.outvars:
      like = (x for x in live if (x.shape, x.dtype) == _form(v.aval))
      if (one := next(like, None)) is not None:
        live.remove(one)
    return peak, live

  def _cond(self, eqn: Any, times: int, scope: str) -> tuple[int, list[Live]]:
    """The branch with the most work; of equal ones, where the least travels.

    Branches may be forms for other platforms: CPUs send more (`exchange`).
    """
    best, before = None, self._found
    for branch in eqn.params["branches"]:
      self._found = Reading()
      result = self._walk(branch.jaxpr, times, {}, scope)
      work = sum(self._found.flops.values())
      work = work, -sum(m.bytes * m.times for m in self._found.messages)
      if best is None or work > best[0]:
        best = work, self._found, result
    self._found = before
    before.flops.update(best[1].flops)
    before.kernels.update(best[1].kernels)
    before.messages += best[1].messages
    return best[2]

  def _call(
    self, eqn: Any, inner: Jaxpr, times: int, scope: str
  ) -> tuple[int, list[Live]]:
    """A function within the program: what it returns is counted outside."""
    peak, live = self._walk(inner, times, {}, scope)
    made = sum(n_bytes(v.aval) for v in inner.outvars if hasattr(v, "aval"))
    return max(0, peak - made), live

  def _kernel(self, eqn: Any, times: int) -> None:
    """A Pallas kernel: its body for each step of its grid."""
    if eqn.params.get("interpret"):
      return
    grid = eqn.params["grid_mapping"].grid
    steps = math.prod(n for n in grid if isinstance(n, int))
    outside, self._found = self._found, Reading()
    loops, self._loops = self._loops, 1  # of a kernel, its own
    self._walk(eqn.params["jaxpr"], 1, {}, "")
    inside, self._found, self._loops = self._found, outside, loops
    for dtype, flops in inside.flops.items():
      self._found.flops[dtype] += times * steps * flops
      self._found.kernels[dtype] += times * steps * flops

  # --- What travels ----------------------------------------------------------

  def _travel(self, eqn: Any, times: int, wanted: dict[Var, Any]) -> None:
    name = eqn.primitive.name
    if name in COLLECTIVES:
      self._collective(eqn, times)
    elif name in PLACES:
      self._reshard(eqn, times)
    elif name in REDUCTIONS:
      self._reduction(eqn, times, wanted)

  def _collective(self, eqn: Any, times: int) -> None:
    """One that was written out, inside a `shard_map`."""
    kind = COLLECTIVES[eqn.primitive.name]
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    mesh = eqn.outvars[0].aval.sharding.mesh.shape
    axes = tuple(a for a in axes if mesh.get(a, 1) > 1)
    side = eqn.invars if kind == "reduce-scatter" else eqn.outvars
    if eqn.primitive.name == "ragged_all_to_all":  # less than there is room for
      side = [min(eqn.invars[0], *eqn.outvars, key=self._size)]
    for v in side:
      self._send(kind, axes, n_bytes(v.aval), times)

  def _reshard(self, eqn: Any, times: int) -> None:
    """Cut less: an all-gather. Cut elsewhere: an all-to-all."""
    if automatic(eqn.outvars[0]) or automatic(eqn.invars[0]):
      return
    before, after = axes_of(eqn.invars[0].aval), axes_of(eqn.outvars[0].aval)
    gone = flat(before) - flat(after)
    moved = {
      a
      for old, new in zip(before, after, strict=True)
      for a in old
      if a not in new and a not in gone
    }
    size = n_bytes(eqn.outvars[0].aval)
    if gone:
      self._send("all-gather", tuple(sorted(gone)), size, times)
    if moved:
      self._send("all-to-all", tuple(sorted(moved)), size, times)

  def _reduction(self, eqn: Any, times: int, wanted: dict[Var, Any]) -> None:
    """A sum over a dimension that is cut: partial sums are joined."""
    out = eqn.outvars[0]
    inputs = list(_vars(eqn.invars))
    before = set().union(*(flat(axes_of(v.aval)) for v in inputs))
    before = before.union(*(self._cut.get(v, ()) for v in inputs))
    gone = before - flat(axes_of(out.aval))
    if gone:
      final = wanted.get(out, out.aval) if self._narrow else out.aval
      size = math.prod(local_shape(out.aval)) * final.dtype.itemsize
      self._send("all-reduce", tuple(sorted(gone)), size, times)

  def _send(
    self, kind: str, axes: tuple[str, ...], size: int, times: int
  ) -> None:
    if axes and size:
      self._found.messages.append(Message(kind, axes, size, times))

  # --- Names -----------------------------------------------------------------

  def _name(self, eqn: Any, v: Var, scope: str) -> Live:
    """What an array is called at the fullest moment, and how large it is."""
    if not hasattr(v.aval, "shape"):
      return Live("", "working memory", (), "", "", 0)
    label = _label(eqn, scope)
    if eqn.primitive.name == "scan":  # by what the body made it with
      body = eqn.params["jaxpr"].jaxpr
      inner = body.outvars[eqn.outvars.index(v)]
      label = f"{_label(None, scope)}/{_made_by(body, inner)}"
    made = _live(v.aval, self._kind(eqn, v, scope), label)
    return replace(made, bytes=self._size(v))

  def _kind(self, eqn: Any, v: Var, scope: str) -> str:
    backward = "transpose" in scope
    if self._vocab and v.aval.shape[-1:] == (self._vocab,) and v.aval.ndim > 2:
      return "logits"
    if "gathered" in scope.split("/"):
      return "gathered weights"
    if eqn.primitive.name == "while" and v.aval.ndim > 3:
      return self._kept
    if eqn.primitive.name == "scan":
      carry = eqn.outvars.index(v) < eqn.params["num_carry"]
      if not carry:
        return "gradients" if backward else self._kept
      return "gradients" if backward and v.aval.ndim < 3 else "working memory"
    if backward and eqn.primitive.name in ("reshard", "scatter-add"):
      return "gradients"
    return "working memory"


def _live(aval: Any, kind: str, name: str) -> Live:
  dtype = str(getattr(aval, "dtype", ""))
  return Live(
    name, kind, tuple(aval.shape), dtype, spec_text(aval), n_bytes(aval)
  )


def _form(aval: Any) -> tuple[tuple[int, ...], str]:
  return tuple(aval.shape), str(aval.dtype)


def _label(eqn: Any, scope: str) -> str:
  """Where it was made, in words of ours."""
  words = [
    w.replace("transpose(jvp())", "backward").replace("jvp()", "forward")
    for w in scope.split("/")
  ]
  last = [] if eqn is None else [eqn.primitive.name]
  return "/".join([*filter(None, words), *last])


def _text(aval: Any) -> str:
  return f"{aval.dtype}[{'x'.join(map(str, aval.shape))}]"


def _made_by(jaxpr: Jaxpr, v: Var) -> str:
  for eqn in jaxpr.eqns:
    if v in eqn.outvars:
      return _label(eqn, str(eqn.source_info.name_stack))
  return "input"


# --- Uses -------------------------------------------------------------------


def _vars(things: Iterable[Any]) -> Iterator[Var]:
  """Variables among atoms, which may be literals."""
  return (v for v in things if not hasattr(v, "val"))


def _last_uses(jaxpr: Jaxpr) -> dict[Var, int]:
  """The last operation that reads each variable."""
  last = dict.fromkeys([*jaxpr.invars, *jaxpr.constvars], -1)
  for i, eqn in enumerate(jaxpr.eqns):
    last |= dict.fromkeys(_vars(eqn.invars), i)
  return last | {v: len(jaxpr.eqns) for v in _vars(jaxpr.outvars)}


def _replaced(eqn: Any) -> set[Var]:
  """What the result may lie in: of a loop, not what it only reads."""
  p = eqn.params
  first = 0
  if eqn.primitive.name == "while":
    first = p["cond_nconsts"] + p["body_nconsts"]
  return set(_vars(eqn.invars[first:]))


def _wanted(jaxpr: Jaxpr) -> dict[Var, Any]:
  """What becomes of arrays that are only cast or turned."""
  uses: dict[Var, list[Any]] = {}
  for eqn in jaxpr.eqns:
    for v in _vars(eqn.invars):
      uses.setdefault(v, []).append(eqn)
  ends = set(_vars(jaxpr.outvars))
  found: dict[Var, Any] = {}
  passes = ("convert_element_type", "transpose", "reshape")
  for eqn in reversed(jaxpr.eqns):
    if eqn.primitive.name not in passes:
      continue
    v, out = eqn.invars[0], eqn.outvars[0]
    if not hasattr(v, "val") and len(uses[v]) == 1 and v not in ends:
      final = found.get(out, out.aval)
      if n_bytes(final) < n_bytes(v.aval):
        found[v] = final
  return found


def _inner(eqn: Any) -> Jaxpr | None:
  """The program inside a call, if the operation is one."""
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    inner = eqn.params.get(name)
    if inner is not None:
      return getattr(inner, "jaxpr", inner)
  return None


def seconds(flops: Counter, peak: Callable[[str], float]) -> float:
  """At the peak of each dtype; `peak(dtype)` is FLOP/s."""
  return float(sum(n / peak(dtype) for dtype, n in flops.items()))
