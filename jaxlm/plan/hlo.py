"""Reading a compiled program's text: messages, memory traffic, cycles.

`cost_analysis` counts the body of a loop once. Here every instruction counts as
often as its computation runs: the trip counts of the loops around it, taken
from the text (`known_trip_count`, or the constant that the loop's condition
compares with).

On TPUs the parts of one collective may be spread over several fusions, to go
on beside their work; they share a channel, and count once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxlm.plan.network import KINDS, Message, Network

UNKNOWN = 1 << 62  # so many cycles say that the compiler does not know

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1}
_BYTES |= {f"{kind}{n}": n / 8 for kind in "suf" for n in (8, 16, 32, 64)}
_BYTES |= {"bf16": 2, "c64": 8, "c128": 16}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
  r"(?:calls|to_apply|body|condition|branch_computations|called_computations)="
  r"\{?(%[\w.\-]+(?:, *%[\w.\-]+)*)"
)
# No traffic of their own: names for what lies elsewhere, or done by others.
_NOTHING = frozenset(
  (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("while", "conditional", "call", "after-all", "partition-id"),
    *("replica-id", "add-dependency", "opt-barrier", "copy-done"),
    *("slice-done", "async-done", "async-update"),
  )
)


@dataclass(frozen=True)
class Instruction:
  """One line: `name = shape opcode(operands), rest`."""

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  rest: str
  root: bool


@dataclass
class Module:
  """Computations by name, each a dict of instructions by name."""

  computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
  entry: str = ""


@dataclass(frozen=True)
class Compiled:
  """What one device does in one run, as its compiler wrote it down.

  Attributes:
    messages: what travels.
    traffic: bytes read from and written to memory (an estimate: operands and
      results of each fusion, slices where only a slice is taken).
    cycles: the TPU compiler's own estimate of its fusions; 0 elsewhere.
    kernels: how many calls of kernels the cycles do not know.
  """

  messages: tuple[Message, ...]
  traffic: float
  cycles: float
  kernels: int


def read(text: str, network: Network, loops: int = 1) -> Compiled:
  """Reads `compiled.as_text()` of a program for the mesh of `network`.

  `loops` is how often a loop runs whose length is data.
  """
  module = parse(text)
  times, fused = runs(module, loops), _fused(module)
  traffic = cycles = kernels = 0
  for name, body in module.computations.items():
    if not times.get(name) or name in fused:
      continue
    for one in body.values():
      traffic += times[name] * _traffic(one, body, module)
      cycles += times[name] * _cycles(one)
      kernels += times[name] * ("tpu_custom_call" in one.rest)
  found = messages(module, times, network)
  return Compiled(tuple(found), traffic, cycles, int(kernels))


# --- The text ---------------------------------------------------------------


def parse(text: str) -> Module:
  """Computations and their instructions."""
  module, body = Module(), None
  for line in text.splitlines():
    if line.endswith("{") and (head := _HEAD.match(line)):
      body = module.computations.setdefault(head[2], {})
      if head[1]:
        module.entry = head[2]
    elif body is not None and (found := _LINE.match(line)):
      one = _instruction(found)
      if one is not None:
        body[one.name] = one
  return module


def _instruction(found: re.Match) -> Instruction | None:
  text = found[3]
  opcode = next(
    (m for m in _OPCODE.finditer(text) if _depth(text, m.start()) == 0), None
  )
  if opcode is None:
    return None
  end = _closing(text, opcode.end() - 1)
  inner, rest = text[opcode.end() : end], text[end + 1 :]
  return Instruction(
    found[2],
    opcode[1],
    text[: opcode.start()],
    (inner,)
    if opcode[1] in ("constant", "parameter")
    else tuple(_OPERAND.findall(inner)),
    rest,
    bool(found[1]),
  )


def _depth(text: str, end: int) -> int:
  """How many parentheses and braces are open before `end`."""
  before = text[:end]
  opened = before.count("(") + before.count("{")
  return opened - before.count(")") - before.count("}")


def _closing(text: str, start: int) -> int:
  """Where the parenthesis opened at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  return len(text)


def shapes(text: str) -> Iterator[tuple[float, bool]]:
  """`(bytes, in main memory)` of each array in a shape's text."""
  for dtype, dims, layout in _SHAPE.findall(text):
    if dtype in _BYTES:
      size = _BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
      yield size, not re.search(r"S\([1-9]", layout)


def size(text: str) -> float:
  """Bytes of all arrays in a shape's text."""
  return sum(n for n, _ in shapes(text))


# --- How often --------------------------------------------------------------


def runs(module: Module, loops: int = 1) -> dict[str, int]:
  """How often each computation runs in one run of the program."""
  times: dict[str, int] = defaultdict(int)

  def visit(name: str, n: int) -> None:
    times[name] += n
    for one in module.computations.get(name, {}).values():
      count = n * trips(one, module, loops) if one.opcode == "while" else n
      for called in _called(one):
        if one.opcode in _SCALAR:
          continue
        visit(called, count)

  visit(module.entry, 1)
  return dict(times)


_INTEGERS = ("s32[]", "u32[]", "s64[]")

# Their computations work on scalars, once for each element.
_SCALAR = frozenset(
  (
    *("reduce", "reduce-window", "scatter", "sort", "map"),
    *("select-and-scatter", "all-reduce", "all-reduce-start"),
    "reduce-scatter",
  )
)


def _called(one: Instruction) -> list[str]:
  return [
    n for names in _CALLS.findall(one.rest) for n in _OPERAND.findall(names)
  ]


def trips(loop: Instruction, module: Module, data: int = 1) -> int:
  """How often a loop's body runs; 1 where the text does not say.

  A loop that goes by more than a counter, as data has it, runs `data` times.
  """
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  name = re.search(r"condition=%([\w.\-]+)", loop.rest)
  body = module.computations.get(name[1], {}) if name else {}
  read = [one for one in body.values() if one.opcode == "get-tuple-element"]
  if any(not one.shape.startswith(_INTEGERS) for one in read):
    return data
  constants = [
    int(one.operands[0])
    for one in body.values()
    if one.opcode == "constant"
    and one.shape.startswith(_INTEGERS)
    and one.operands[0].lstrip("-").isdigit()
  ]
  return max(constants, default=1)


def _fused(module: Module) -> frozenset[str]:
  """Computations inside fusions: what they hold does not lie in memory."""
  return frozenset(
    called
    for body in module.computations.values()
    for one in body.values()
    if one.opcode == "fusion" or one.opcode in _SCALAR
    for called in _called(one)
  )


# --- What travels -----------------------------------------------------------


def messages(
  module: Module, times: dict[str, int], network: Network
) -> list[Message]:
  """All collectives, each channel once."""
  found: dict[tuple, Message] = {}
  for name, body in module.computations.items():
    for one in body.values():
      kind = one.opcode.removesuffix("-start").removeprefix("ragged-")
      if kind not in KINDS or not times.get(name):
        continue
      channel = re.search(r"channel_id=(\d+)", one.rest)
      if one.opcode.startswith("ragged-"):  # all of a program's share one
        channel = None
      key = (kind, channel[1]) if channel else (name, one.name)
      axes = _axes(one, network)
      if not axes:
        continue
      new = Message(kind, axes, int(_sent(one, kind, body)), times[name])
      old = found.get(key)
      if old is None or old.bytes * old.times < new.bytes * new.times:
        found[key] = new
  return list(found.values())


def _sent(one: Instruction, kind: str, body: dict[str, Instruction]) -> float:
  """The larger side: what is gathered, or what is reduced or sent."""
  if kind in ("all-gather", "reduce-scatter"):
    sides = [n for n, _ in shapes(one.shape)]
    given = sum(size(body[o].shape) for o in one.operands if o in body)
    whole = sum(sides)
    if one.opcode.endswith("-start"):  # operands and results, side by side
      return max(whole - given, given)
    return max(whole, given)
  whole = size(one.shape)
  if one.opcode == "collective-permute-start":
    return whole / 2
  if one.opcode.startswith("ragged-"):  # the rows; the larger is their room
    sides = [n for n, _ in shapes(one.shape)]
    given = sum(size(body[o].shape) for o in one.operands[:1] if o in body)
    return min(given or whole, sides[-1])
  return whole


def _axes(one: Instruction, network: Network) -> tuple[str, ...]:
  """The mesh axes that a collective goes along."""
  pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", one.rest)
  if pairs:
    every = re.search(r"source_target_pairs=\{(.*?)\}\}", one.rest)[1]
    axes = set()
    for a, b in re.findall(r"(\d+),(\d+)", every):
      axes |= set(network.axes_of([int(a), int(b)]))
    return tuple(n for n in network.names if n in axes)
  group = first_group(one.rest, math.prod(network.sizes))
  return network.axes_of(group) if group else ()


def first_group(text: str, devices: int) -> list[int]:
  """The devices that the first group of a collective joins.

  The three spellings: `{{0,1},{2,3}}`, `[groups,size]<=[dims]T(order)`, and
  `mesh['a'=2,'b'=4] {'b'}`. No groups at all means all devices.

  >>> first_group("replica_groups={{0,4},{1,5}}, x", 8)
  [0, 4]
  >>> first_group("replica_groups=[4,2]<=[2,4]T(1,0), x", 8)
  [0, 4]
  >>> first_group("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", 8)
  [0, 4]
  """
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return [int(n) for n in found[1].split(",")]
  form = r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
  if found := re.search(form, text):
    return _iota(found[3], found[4])[: int(found[2])]
  form = (
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
  )
  if found := re.search(form, text):
    return _mesh_group(found)
  return list(range(devices))


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",") if n]


def _iota(dims: str, order: str | None) -> list[int]:
  """Device numbers, laid out in a grid and read in another order."""
  sizes = _numbers(dims)
  order = _numbers(order) if order else list(range(len(sizes)))
  steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
  found = [0]
  for d in order:
    found = [a + steps[d] * i for a in found for i in range(sizes[d])]
  return found


def _mesh_group(found: re.Match) -> list[int]:
  sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", found[1])}
  ids = _iota(found[2], found[3]) if found[2] else None
  chosen = set(re.findall(r"'([^']+)'", found[4]))
  group, names = [0], list(sizes)
  for i, name in enumerate(names):
    step = math.prod(sizes[n] for n in names[i + 1 :])
    if name in chosen:
      group = [a + step * j for a in group for j in range(sizes[name])]
  return [ids[i] for i in group] if ids else group


# --- Memory and time --------------------------------------------------------


def _traffic(
  one: Instruction, body: dict[str, Instruction], module: Module
) -> float:
  """Bytes an instruction reads and writes, outside of on-chip memory."""
  if one.opcode in _NOTHING:
    return 0.0
  if one.opcode in ("dynamic-slice", "slice", "gather"):
    return 2 * _main(one.shape)
  if one.opcode == "dynamic-update-slice":
    update = body.get(one.operands[1]) if len(one.operands) > 1 else None
    return 2 * _main(update.shape) if update else 0.0
  if one.opcode.endswith("-start"):  # the shape names both sides
    return _main(one.shape)
  inner = module.computations.get((_called(one) or [""])[0], {})
  if one.opcode != "fusion" or not inner:
    given = sum(_main(body[o].shape) for o in one.operands if o in body)
    return _main(one.shape) + given
  return _written(one, inner) + _taken(one, body, inner)


def _main(shape: str) -> float:
  return sum(n for n, outside in shapes(shape) if outside)


# What writes a part of its first operand, and which operand that part is.
_WITHIN = {"dynamic-update-slice": 1, "scatter": 2}


def _written(one: Instruction, inner: dict[str, Instruction]) -> float:
  """What a fusion writes; of an array updated in place, the new part."""
  root = next((i for i in inner.values() if i.root), None)
  roots = [root]
  if root is not None and root.opcode == "tuple":
    roots = [inner.get(o) for o in root.operands]
  total = 0.0
  for r in roots:
    if r is None:
      return _main(one.shape)
    part = r.operands[_WITHIN[r.opcode]] if r.opcode in _WITHIN else None
    if part in inner:
      total += size(inner[part].shape)
    else:
      total += size(r.shape)
  return min(total, _main(one.shape))


def _taken(
  one: Instruction, body: dict[str, Instruction], inner: dict[str, Instruction]
) -> float:
  """What a fusion reads; of an array it only slices, the slices."""
  users = defaultdict(list)
  for i in inner.values():
    for o in i.operands:
      users[o].append(i)
  parameters = {
    i.operands[0]: i.name for i in inner.values() if i.opcode == "parameter"
  }
  total = 0.0
  for position, operand in enumerate(one.operands):
    if operand not in body:
      continue
    whole = _main(body[operand].shape)
    name = parameters.get(str(position))
    total += min(whole, _part(name, users, whole)) if whole else 0.0
  return total


def _part(name: str | None, users: dict, whole: float) -> float:
  """Bytes of a fusion's parameter that are read."""
  total = whole if name is None else 0.0
  for user in users[name]:
    if user.opcode == "bitcast":
      total += _part(user.name, users, whole)
    elif user.opcode in ("dynamic-slice", "slice", "gather"):
      total += size(user.shape)
    elif user.opcode in _WITHIN:
      if user.operands[0] != name:
        return whole
    else:
      return whole
  return total


def _cycles(one: Instruction) -> float:
  found = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
  cycles = int(found[1]) if found else 0
  return float(cycles) if cycles < UNKNOWN else 0.0
