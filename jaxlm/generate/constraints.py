"""Constraints: what a generated text has to be, as values.

    constraint = compile(Regex("[0-9]{4}-[0-9]{2}"), tokenizer)
    tokens = jaxlm.generate(model, params, prompt, 20, constraint=constraint)

A regular expression, and a JSON schema that can be written as one, become an
automaton whose table the compiled decoding loop reads. A grammar, and any other
schema, is followed by the library llguidance on the host.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generate import dfa, regex, schema
from jaxlm.generate.automaton import (
  Automaton,
  Constraint,
  Library,
  llguidance,
  over_tokens,
)


@dataclass(frozen=True)
class Regex:
  """The whole text matches a regular expression, as `re.fullmatch` has it.

  Attributes:
    pattern: the expression; docs/constraints.md has the syntax. Classes by a
      letter (digits, words, spaces) are those of `re.ASCII`.
  """

  pattern: str


@dataclass(frozen=True)
class JsonSchema:
  """The text is JSON that satisfies a schema (https://json-schema.org).

  Attributes:
    schema: the schema, itself as JSON text.
  """

  schema: str


@dataclass(frozen=True)
class Grammar:
  """The text is of a context-free language.

  Attributes:
    text: the grammar as Lark writes it, with a rule named `start`; see
      https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
  """

  text: str


Spec = Regex | JsonSchema | Grammar


def compile(
  spec: Spec, tokenizer: Tokenizer, library: bool = False
) -> Constraint:
  """What `generate(..., constraint=)` takes.

  Args:
    spec: what the text has to be.
    tokenizer: that of the model.
    library: let llguidance follow also what could be an automaton: a larger
      part of the syntax, and no table, but work on the host for each token and
      no help to end in time.

  Raises:
    UserError: if the specification is malformed, no text or none of this
      tokenizer's satisfies it, or a library is needed that is not there.
  """
  words = text_of_tokens(tokenizer)
  ends = () if tokenizer.eot is None else (tokenizer.eot,)
  if isinstance(spec, Grammar) or library:
    return _library(spec, words, ends)
  if isinstance(spec, Regex):
    return _automaton(regex.parse(spec.pattern), words, ends)
  try:
    tree = schema.tree(schema.read(spec.schema))
  except schema.Irregular as beyond:
    return _library(spec, words, ends, f"the JSON schema has {beyond}, which")
  return _automaton(tree, words, ends)


def named(
  regex: str | None, json_schema: str | None, grammar: str | None
) -> Spec | None:
  """The specification of a command line, if it has one.

  Args:
    regex: an expression.
    json_schema: a schema as JSON, or the file that holds it.
    grammar: the file that holds a grammar.

  Raises:
    UserError: if there are several, or a file cannot be read.
  """
  given = [x for x in (regex, json_schema, grammar) if x is not None]
  if len(given) > 1:
    raise UserError(
      "a text follows one constraint; choose one of --regex, --json_schema and "
      "--grammar"
    )
  if regex is not None:
    return Regex(regex)
  if grammar is not None:
    return Grammar(_content(grammar))
  if json_schema is None:
    return None
  is_text = json_schema.lstrip().startswith("{")
  return JsonSchema(json_schema if is_text else _content(json_schema))


def _content(path: str) -> str:
  try:
    return Path(path).read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {path}: {error}") from error


def text_of_tokens(tokenizer: Tokenizer) -> tuple[bytes, ...]:
  """What each token stands for within a text; special ones for nothing."""
  special = {*tokenizer.specials.values(), *tokenizer.start}
  return tuple(
    b"" if i in special else tokenizer.decode_bytes([i], start=False)
    for i in range(tokenizer.vocab_size)
  )


def _automaton(
  tree: regex.Node, words: tuple[bytes, ...], ends: tuple[int, ...]
) -> Automaton:
  return over_tokens(dfa.automaton(tree), words, ends)


def _library(
  spec: Spec,
  words: tuple[bytes, ...],
  ends: tuple[int, ...],
  what: str = "this constraint",
) -> Library:
  """A specification for llguidance; one that it cannot use is an error."""
  match = llguidance(what).LLMatcher
  if isinstance(spec, Regex):
    grammar = match.grammar_from_regex(spec.pattern)
  elif isinstance(spec, Grammar):
    grammar = match.grammar_from_lark(spec.text)
  else:
    told = {"whitespace_flexible": False}
    told |= {"item_separator": ", ", "key_separator": ": "}
    wanted = schema.read(spec.schema)
    wanted = wanted if isinstance(wanted, dict) else {"allOf": [wanted]}
    grammar = match.grammar_from_json_schema(json.dumps(wanted), defaults=told)
  found = Library(grammar, words, ends)
  if ends:
    found.matcher(len(words), ends)  # is it well-formed?
  return found
