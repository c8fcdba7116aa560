"""Finite automata over bytes: from a tree to the smallest of them.

    tree --Thompson--> NFA --subsets--> DFA --Hopcroft--> smallest DFA

They read UTF-8 byte by byte, so that a token may end within a character.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxlm.errors import UserError
from jaxlm.generate.regex import Chars, Node, Repeat, Seq

MOST_STATES = 20_000  # of a DFA; what needs more is seldom meant
_MOST_PARTS = 150_000  # of an NFA


# --- Tree to NFA ------------------------------------------------------------


def utf8_ranges(low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
  """Sequences of byte ranges that spell the code points from `low` to `high`.

  A range of code points is split where the length of the spelling changes and
  where a continuation byte wraps (Russ Cox, "Regular expression matching in
  the wild", 2010). Surrogates have no spelling.

  >>> [*utf8_ranges(0x41, 0xFF)]
  [((65, 127),), ((194, 195), (128, 191))]
  """
  for last in (0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF):
    if low <= last < high:
      yield from utf8_ranges(low, last)
      yield from utf8_ranges(last + 1, high)
      return
  if 0xD800 <= low <= 0xDFFF:
    return
  for bits in (6, 12, 18) if high > 0x7F else ():
    tail = (1 << bits) - 1
    if low & ~tail == high & ~tail:
      continue
    cut = low | tail if low & tail else (high & ~tail) - 1
    if low & tail or high & tail != tail:
      yield from utf8_ranges(low, cut)
      yield from utf8_ranges(cut + 1, high)
      return
  yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))


class Nfa:
  """A non-deterministic automaton: where bytes lead, and where nothing does.

  Attributes:
    edges: for each state, (first byte, last byte, next state).
    free: for each state, those that are reached without reading.
  """

  def __init__(self):
    self.edges: list[list[tuple[int, int, int]]] = []
    self.free: list[list[int]] = []

  def state(self) -> int:
    """A new one."""
    if len(self.free) >= _MOST_PARTS:
      raise _too_large()
    self.edges.append([])
    self.free.append([])
    return len(self.free) - 1

  def add(self, node: Node, start: int) -> int:
    """Thompson's construction: the state in which `node` has been read."""
    if isinstance(node, Seq):
      for part in node.parts:
        start = self.add(part, start)
      return start
    if isinstance(node, Repeat):
      return self._add_repeat(node, start)
    end = self.state()
    if isinstance(node, Chars):
      self._add_chars(node, start, end)
      return end
    for option in node.options:
      begin = self.state()
      self.free[start].append(begin)
      self.free[self.add(option, begin)].append(end)
    return end

  def _add_repeat(self, node: Repeat, start: int) -> int:
    for _ in range(node.least):
      start = self.add(node.node, start)
    end = self.state()
    if node.most is None:
      again = self.state()
      self.free[start].append(again)
      self.free[self.add(node.node, again)].append(again)
      self.free[again].append(end)
      return end
    for _ in range(node.most - node.least):
      self.free[start].append(end)
      begin = self.state()  # of its own: a loop must not lead back to `start`
      self.free[start].append(begin)
      start = self.add(node.node, begin)
    self.free[start].append(end)
    return end

  def _add_chars(self, node: Chars, start: int, end: int) -> None:
    """Spellings that end alike share the states of that end."""
    behind = {(): end}
    for low, high in node.ranges:
      for bytes_ in utf8_ranges(low, high):
        for i in range(len(bytes_) - 1, 0, -1):
          if bytes_[i:] not in behind:
            behind[bytes_[i:]] = self.state()
            self.edges[behind[bytes_[i:]]].append(
              (*bytes_[i], behind[bytes_[i + 1 :]])
            )
        self.edges[start].append((*bytes_[0], behind[bytes_[1:]]))

  def closure(self, state: int) -> frozenset[int]:
    """What is reached from a state without reading, itself included."""
    found, todo = {state}, [state]
    while todo:
      for other in self.free[todo.pop()]:
        if other not in found:
          found.add(other)
          todo.append(other)
    return frozenset(found)


# --- NFA to DFA -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dfa:
  """A deterministic automaton over bytes; it starts in state 0.

  Attributes:
    next: the state that a class of bytes leads to, -1 for none, int32
      [states, classes].
    classes: the class of each byte, int [256].
    accept: whether a text may end here, bool [states].
  """

  next: np.ndarray
  classes: np.ndarray
  accept: np.ndarray

  def matches(self, text: bytes) -> bool:
    """Whether a text is of the language."""
    state = 0
    for byte in text:
      state = self.next[state, self.classes[byte]]
      if state < 0:
        return False
    return bool(self.accept[state])


def automaton(tree: Node) -> Dfa:
  """The smallest DFA of a tree; all of its states lead to an end.

  Raises:
    UserError: if no text matches, or the automaton would be very large.
  """
  nfa = Nfa()
  start = nfa.state()
  return minimised(_trimmed(_subsets(nfa, start, nfa.add(tree, start))))


def _subsets(nfa: Nfa, start: int, end: int) -> Dfa:
  """A state for every set of NFA states that some text leads to."""
  edges = [edge for edges in nfa.edges for edge in edges]
  cuts = {0} | {e[0] for e in edges} | {e[1] + 1 for e in edges}
  marks = np.isin(np.arange(256), sorted(cuts))
  classes = np.cumsum(marks) - 1
  closures: dict[int, frozenset[int]] = {}
  sets = [nfa.closure(start)]
  number, rows = {sets[0]: 0}, []
  for states in sets:  # which grows meanwhile
    moves = defaultdict(set)
    for low, high, target in (e for s in states for e in nfa.edges[s]):
      if target not in closures:
        closures[target] = nfa.closure(target)
      for c in range(classes[low], classes[high] + 1):
        moves[c] |= closures[target]
    row = np.full(classes[-1] + 1, -1, np.int32)
    for c, targets in moves.items():
      found = frozenset(targets)
      row[c] = number.setdefault(found, len(number))
      if len(number) > len(sets):
        sets.append(found)
    if len(sets) > MOST_STATES:
      raise _too_large()
    rows.append(row)
  return Dfa(np.stack(rows), classes, np.array([end in s for s in sets]))


def _too_large() -> UserError:
  return UserError(
    f"the constraint needs an automaton of more than {MOST_STATES:,} states; "
    "make its bounds ({m,n}, maxLength, maxItems, ...) smaller, or compile it "
    "with library=True"
  )


def _trimmed(dfa: Dfa) -> Dfa:
  """Without states from which there is no end."""
  alive = dfa.accept
  while True:
    more = alive | (alive[dfa.next] & (dfa.next >= 0)).any(axis=1)
    if (more == alive).all():
      break
    alive = more
  if not alive[0]:
    raise UserError("no text at all satisfies the constraint; widen it")
  number = np.where(alive, np.cumsum(alive) - 1, -1)
  next_ = np.where(dfa.next >= 0, number[dfa.next], -1)[alive]
  return Dfa(next_.astype(np.int32), dfa.classes, dfa.accept[alive])


def minimised(dfa: Dfa) -> Dfa:
  """The same language with the fewest states and byte classes.

  Hopcroft's refinement (1971): states are together until a byte leads some of
  them into a block and others not. A missing edge is as good as one into a
  block of its own, since every state leads to an end.
  """
  back = [defaultdict(list) for _ in range(dfa.next.shape[1])]
  for state, c in np.argwhere(dfa.next >= 0).tolist():
    back[c][int(dfa.next[state, c])].append(state)
  blocks = [set(np.flatnonzero(dfa.accept == a).tolist()) for a in (0, 1)]
  where = dfa.accept.astype(int).tolist()
  todo = {0, 1}
  while todo:
    splitter = [*blocks[todo.pop()]]
    for lead in back:
      inside = defaultdict(set)
      for state in (s for t in splitter for s in lead.get(t, ())):
        inside[where[state]].add(state)
      for block, part in inside.items():
        if len(part) == len(blocks[block]):
          continue
        blocks[block] -= part
        new, blocks = len(blocks), [*blocks, part]
        for state in part:
          where[state] = new
        smaller = new if len(part) <= len(blocks[block]) else block
        todo.add(new if block in todo else smaller)
  return _merged(dfa, np.array(where))


def _merged(dfa: Dfa, where: np.ndarray) -> Dfa:
  """One state for each block, numbered as they are first met from state 0."""
  _, first = np.unique(where, return_index=True)
  order = np.argsort(first)
  number = np.zeros(where.max() + 1, np.int32)
  number[where[first[order]]] = np.arange(len(order), dtype=np.int32)
  chosen = first[order]
  next_ = dfa.next[chosen]
  next_ = np.where(next_ >= 0, number[where[next_]], -1).astype(np.int32)
  next_, same = np.unique(next_, axis=1, return_inverse=True)
  return Dfa(next_, same.reshape(-1)[dfa.classes], dfa.accept[chosen])
