"""Conversations as tokens: chat templates that user text cannot break.

A template is a Jinja program, published with a model, that writes a list of
messages as one text with special tokens between them:

    template = ChatTemplate(CHATML)
    template.render([{"role": "user", "content": "Hi"}])
    encode(template, tokenizer, [{"role": "user", "content": "Hi"}])

`render` gives the text that Hugging Face's `apply_chat_template` gives, and
`encode` its tokens, with one difference: only what the template itself writes
can become a special token. A user who types "<|im_end|>" has typed ten
characters.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError

Message = Mapping[str, Any]  # "role" and "content", and what a template knows

# --- Templates as data ------------------------------------------------------

CHATML = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
{{ "<|im_start|>assistant\\n" }}
{%- endif %}
"""

LLAMA2 = """\
{% set system = namespace(text="") %}
{% for message in messages %}
{% if message.role == "system" %}
{% set system.text = "<<SYS>>\\n" ~ message.content ~ "\\n<</SYS>>\\n\\n" %}
{% elif message.role == "user" %}
{{- bos_token }}[INST] {{ system.text ~ message.content }} [/INST]
{%- set system.text = "" %}
{% else %}
{{- " " ~ message.content ~ " " ~ eos_token }}
{%- endif %}
{% endfor %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- "<|start_header_id|>" ~ message.role ~ "<|end_header_id|>\\n\\n" }}
{{- message.content | trim ~ "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""

ALPACA = """\
{%- for message in messages %}
{%- if message.role == "system" %}
{{- message.content ~ "\\n\\n" }}
{%- elif message.role == "user" %}
{{- "### Instruction:\\n" ~ message.content ~ "\\n\\n" }}
{%- else %}
{{- "### Response:\\n" ~ message.content ~ eos_token ~ "\\n\\n" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "### Response:\\n" }}
{%- endif %}
"""

PLAIN = """\
{%- for message in messages %}
{{- message.role | capitalize ~ ": " ~ message.content }}
{%- if message.role == "assistant" %}
{{- eos_token }}
{%- endif %}
{{- "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "Assistant:" }}
{%- endif %}
"""

BARE = """\
{%- for message in messages %}
{{- message.content }}
{%- if message.role == "assistant" %}
{{- eos_token }}
{%- endif %}
{%- endfor %}
"""

TEMPLATES = {
  "chatml": CHATML,
  "llama2": LLAMA2,
  "llama3": LLAMA3,
  "alpaca": ALPACA,
  "plain": PLAIN,
  "bare": BARE,
}

ROLES = ("system", "user", "assistant", "tool", "developer", "model")

# Tokens that end a turn in the formats of today, where a file names no other.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
_TURN_ENDS += (
  "<|end|>",
  "<|eot|>",
  "<|return|>",
  "<|call|>",
  "<|assistant_end|>",
)


def turn_ends(tokenizer: Tokenizer) -> list[int]:
  """Ids of the special tokens that are known to end a turn."""
  return [tokenizer.specials[n] for n in _TURN_ENDS if n in tokenizer.specials]


# --- Rendering --------------------------------------------------------------


@dataclass(frozen=True)
class ChatTemplate:
  """How a conversation is written.

  Attributes:
    source: a Jinja template, for example one of `TEMPLATES`.
    bos: what it sees as `bos_token`.
    eos: what it sees as `eos_token`.
  """

  source: str
  bos: str = ""
  eos: str = ""

  def render(
    self,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    **more: Any,
  ) -> str:
    """The conversation as text.

    Args:
      messages: dicts of "role" (one of `ROLES`) and "content".
      add_generation_prompt: write the beginning of the assistant's turn, too.
      more: further variables of the template, such as `tools`.

    Raises:
      UserError: for a message without role or content, a role that is none,
        or a template that is faulty or refuses the conversation.
    """
    import jinja2

    _check(messages)
    try:
      return _compiled(self.source).render(
        messages=[dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        bos_token=self.bos,
        eos_token=self.eos,
        **more,
      )
    except jinja2.TemplateSyntaxError as error:
      raise UserError(
        f"the chat template is faulty in line {error.lineno}: {error.message}"
      ) from error
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise UserError(
        f"the chat template refuses this conversation: {error}"
      ) from error


def encode(
  template: ChatTemplate,
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  add_generation_prompt: bool = True,
  **more: Any,
) -> np.ndarray:
  """Token ids of a conversation, int32 [n].

  Special tokens are recognised in what the template writes and nowhere else:
  while the template runs, characters of the messages with which a special
  token's name could begin or end are replaced by private ones that occur
  nowhere, so that the names which are found are the template's.

  Args:
    template: how a conversation is written.
    tokenizer: its special tokens are those that can be recognised.
    messages: as for `ChatTemplate.render`; roles are taken at their word.
    add_generation_prompt: as for `render`.
    more: as for `render`; strings in it are text, like messages.

  Raises:
    UserError: as `render`, or for text that the tokenizer cannot express.
  """
  _check(messages)
  names = sorted(tokenizer.specials, key=len, reverse=True)
  guard = _Guard.make(names, template, [list(messages), more])
  messages, more = guard.strings([list(messages), more])
  text = template.render(messages, add_generation_prompt, **more)
  pieces = re.split(f"({_any(names)})", text)
  ids = tokenizer.encode_many([guard.undo(piece) for piece in pieces[::2]])
  for i, name in enumerate(pieces[1::2]):
    ids.insert(2 * i + 1, np.array([tokenizer.specials[name]], np.int32))
  return np.concatenate(ids)


def _check(messages: Sequence[Message]) -> None:
  """Raises for what is no conversation."""
  if not messages:
    raise UserError("the conversation is empty; give at least one message")
  for i, message in enumerate(messages):
    if message.get("role") not in ROLES:
      raise UserError(
        f"message {i} has role {message.get('role')!r}; use one of "
        f"{', '.join(ROLES)}"
      )
    if "content" not in message and "tool_calls" not in message:
      raise UserError(f"message {i} has no content")


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
  """The template, in a sandbox: it can neither call out nor change things."""
  import jinja2
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def tojson(x: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(x, ensure_ascii=False, indent=indent, **options)

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols"],
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: (
    datetime.datetime.now().strftime(form)
  )
  return environment.from_string(source)


# --- Keeping text text ------------------------------------------------------


@dataclass(frozen=True)
class _Guard:
  """Hides from the names of special tokens whatever could be part of one.

  Attributes:
    names: of the special tokens.
    twins: a private character for each that begins or ends a name.
    part: one more, which parts a text that could lie within a name.
    kept: finds strings the template itself looks for ("</think>"), as far as
      no name could begin, end or lie in them.
  """

  names: tuple[str, ...]
  twins: Mapping[str, str]
  part: str
  kept: str

  @classmethod
  def make(
    cls, names: Sequence[str], template: ChatTemplate, given: Any
  ) -> "_Guard":
    """A guard whose twins occur neither in the template nor in `given`."""
    edges = sorted({edge for name in names for edge in (name[0], name[-1])})
    texts = [given, template.source, template.bos, template.eos, list(names)]
    seen = set(json.dumps(texts, ensure_ascii=False, default=str))
    free = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in seen)
    literals = [x for x in _literals(template.source) if not _meets(x, names)]
    twins = {edge: next(free) for edge in edges}
    return cls(tuple(names), twins, next(free), _any(literals))

  def text(self, text: str) -> str:
    """Text of which no part can belong to a name."""
    hidden = self._edges(text)
    inner = text.strip()
    if hidden == text and inner and any(inner in name for name in self.names):
      # "im_end", which a template might complete to "<|im_end|>"
      return text.replace(inner, inner[0] + self.part + inner[1:], 1)
    return hidden

  def undo(self, text: str) -> str:
    """The text as it was."""
    back = {ord(twin): c for c, twin in self.twins.items()}
    return text.translate(back | {ord(self.part): ""})

  def strings(self, x: Any) -> Any:
    """The same lists and dicts with their strings hidden.

    Roles and types stay: they are the program's, and templates compare them.
    """
    if isinstance(x, str):
      return self.text(x)
    if isinstance(x, Mapping):
      return {
        self._edges(k): v if k in ("role", "type") else self.strings(v)
        for k, v in x.items()
      }
    if isinstance(x, list | tuple):
      return [self.strings(v) for v in x]
    return x

  def _edges(self, text: str) -> str:
    """Text with twins for the characters at the edges of names."""
    if not self.names:
      return text
    pattern = f"({self.kept})|[{re.escape(''.join(self.twins))}]"
    return re.sub(pattern, lambda m: m[1] or self.twins[m[0]], text)


def _any(texts: Iterable[str]) -> str:
  """A regular expression for any of some texts; of none it finds nothing."""
  return "|".join(map(re.escape, texts)) or "(?!)"


def _meets(literal: str, names: Sequence[str]) -> bool:
  """Whether a name could begin, end or lie in a text, or the text in it."""
  return any(
    literal in name
    or name in literal
    or any(
      literal.endswith(name[:n]) or literal.startswith(name[-n:])
      for n in range(1, min(len(name), len(literal)))
    )
    for name in names
  )


@functools.lru_cache(maxsize=16)
def _literals(source: str) -> tuple[str, ...]:
  """The strings in a template's expressions, the longest first."""
  import jinja2

  environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
  try:
    tree = environment.parse(source)
  except jinja2.TemplateSyntaxError:
    return ()  # rendering will say so
  found = {node.value for node in tree.find_all(jinja2.nodes.Const)}
  found = {x for x in found if isinstance(x, str) and x}
  return tuple(sorted(found, key=len, reverse=True))
