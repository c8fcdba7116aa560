"""Conversations with a model: history, ends, and what the terminal shows."""

import io
import json

import jax
import pytest

import jaxlm
from jaxlm.data import Bytes
from jaxlm.data.chat import CHATML, ChatTemplate, encode
from jaxlm.errors import UserError
from jaxlm.generate import batch
from jaxlm.generate.__main__ import main
from jaxlm.generate.chat import COMMANDS, Chat
from jaxlm.generate.methods import Draw
from jaxlm.generate.samplers import Greedy, make_sampler
from jaxlm.generate.text import Writer
from jaxlm.layers.param import init
from jaxlm.models.families import modern

TOKENIZER = Bytes(("<|im_start|>", "<|im_end|>"))
MODEL = modern.decoder(TOKENIZER.vocab_size, 16, 1, 2, max_positions=256)
PARAMS = init(MODEL.params(), jax.random.key(0))


KEY = jax.random.key(0)


def writer(sampler=Greedy(), ends=(), **options) -> Writer:
  method = Draw(sampler)
  return Writer(MODEL, PARAMS, TOKENIZER, method, 6, KEY, ends=ends, **options)


def test_history_is_read_and_kept():
  """The second answer is what follows both turns, written by the template."""
  template = ChatTemplate(CHATML)
  chat = Chat(writer(), template)
  first = "".join(chat.reply("Hi"))
  second = "".join(chat.reply("And?"))
  roles = [message["role"] for message in chat.messages]
  assert roles == ["user", "assistant"] * 2
  assert chat.messages[1]["content"] == first.strip()
  ids = encode(template, TOKENIZER, chat.messages[:3])
  assert second == "".join(writer().following(ids, 2))


def test_any_of_the_ends_ends_a_turn():
  """Whichever comes first; it is not shown."""
  ids = encode(
    ChatTemplate(CHATML), TOKENIZER, [{"role": "user", "content": ""}]
  )
  sampler, keys = make_sampler(1.0), jax.random.fold_in(KEY, 0)[None]
  made = jaxlm.generate(MODEL, PARAMS, ids[None], 6, sampler, keys)
  tokens = made[0, len(ids) :].tolist()
  at = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
  ended = "".join(writer(sampler, ends=(257, tokens[at])).following(ids))
  assert ended == TOKENIZER.decode(tokens[:at])


def test_a_turn_that_cannot_begin_is_forgotten():
  """A refused one leaves the conversation as it was."""
  chat = Chat(writer(), ChatTemplate("{{ raise_exception('no') }}"))
  with pytest.raises(UserError, match="no"):
    "".join(chat.reply("Hi"))
  assert chat.messages == []


def test_in_the_terminal(tmp_path, capsys, monkeypatch):
  """One turn with --prompt; a run of ours needs a template by name."""
  path = tmp_path / "run"
  jaxlm.save(path, MODEL, PARAMS, TOKENIZER)
  flags = [f"--workdir={path}", "--chat", "--max_new_tokens=6"]
  flags += ["--system=Be brief.", "--prompt=Hi"]
  with pytest.raises(UserError, match="choose one of --template=chatml"):
    main(flags)
  main([*flags, "--template=chatml"])
  talk = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
  ]
  ids = encode(ChatTemplate(CHATML), TOKENIZER, talk)
  want = "".join(writer().following(ids, 1))
  assert capsys.readouterr().out == want + "\n"


# --- Commands ---------------------------------------------------------------


def talk(*turns: str, system: str = "") -> list[dict[str, str]]:
  """Messages of turns by the user and the assistant, one after the other."""
  roles = ("user", "assistant")
  said = [{"role": "system", "content": system}] if system else []
  return said + [
    {"role": roles[i % 2], "content": text} for i, text in enumerate(turns)
  ]


def test_commands_change_the_conversation(tmp_path):
  """What is not a command is none; each does what /help says."""
  chat = Chat(writer(), ChatTemplate(CHATML), talk("a", "b", "c", "d"))
  assert chat.command("hello /reset") is None
  for name in COMMANDS:
    assert name in chat.command("/help")
  chat.command("/system Be kind.")
  assert chat.messages == talk("a", "b", "c", "d", system="Be kind.")
  chat.command("/system Be brief.")
  chat.command("/undo")
  assert chat.messages == talk("a", "b", system="Be brief.")
  file = tmp_path / "talk.jsonl"
  assert "3 messages" in chat.command(f"/save {file}")
  assert json.loads(file.read_text()) == {"messages": chat.messages}
  assert batch.read(file)[0].prompt == chat.messages
  chat.command("/reset")
  assert chat.messages == talk(system="Be brief.")
  chat.command("/system")
  assert chat.messages == []


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("/rest", "unknown command /rest; did you mean /reset"),
    ("/undo", "no turn to undo"),
    ("/reset all", "stands alone"),
    ("/save", "say where"),
    ("/save none/x", "cannot write none/x"),
  ],
)
def test_commands_that_cannot_be_obeyed(line: str, words: str):
  """Each in a sentence; the conversation stays."""
  chat = Chat(writer(), ChatTemplate(CHATML), talk(system="Be brief."))
  with pytest.raises(UserError, match=words):
    chat.command(line)
  assert chat.messages == talk(system="Be brief.")


# --- A context that is full -------------------------------------------------


def test_a_full_context_says_by_how_much():
  """In tokens; the turn is forgotten, so that a command can help."""
  template = ChatTemplate(CHATML)
  chat = Chat(writer(), template, talk("x" * 200, "y" * 30))
  messages = [*chat.messages, *talk("more")]
  over = len(encode(template, TOKENIZER, messages)) - MODEL.max_positions
  assert over > 0
  with pytest.raises(UserError, match=f"the context is full.* {over} more "):
    "".join(chat.reply("more"))
  assert chat.messages == messages[:-1]
  chat.command("/reset")
  assert "".join(chat.reply("more"))


def test_truncation_leaves_the_oldest_turns_out():
  """Whole turns; the system prompt stays, and /save still has them all."""
  template = ChatTemplate(CHATML)
  told = talk("x" * 150, "y" * 40, "second", "answer", system="Be brief.")
  chat = Chat(writer(long="truncate"), template, [*told])
  said = "".join(chat.reply("third"))
  read = talk("second", "answer", "third", system="Be brief.")
  ids = encode(template, TOKENIZER, read)
  assert said == "".join(writer().following(ids, len(told)))
  assert chat.messages[:-1] == [*told, *talk("third")]


def test_a_single_turn_that_is_too_long():
  """There is no older one to leave out: its beginning is."""
  chat = Chat(writer(long="truncate"), ChatTemplate(CHATML))
  assert len("".join(chat.reply("x" * 400))) > 0


def test_sliding_reads_the_end():
  """The last half of a context, whatever turn it cuts."""
  template = ChatTemplate(CHATML)
  told = talk("x" * 300, "y" * 40)
  chat = Chat(writer(long="slide"), template, [*told])
  said = "".join(chat.reply("more"))
  ids = encode(template, TOKENIZER, [*told, *talk("more")])
  half = MODEL.max_positions // 2
  assert said == "".join(writer().following(ids[-half:], len(told)))


def test_lines_that_are_piped_in(tmp_path, capsys, monkeypatch):
  """Turns and commands, one a line, and what they say in between."""
  path, file = tmp_path / "run", tmp_path / "talk.jsonl"
  jaxlm.save(path, MODEL, PARAMS, TOKENIZER)
  lines = f"Hi\n/system Be brief.\nHi\n/save {file}\n"
  monkeypatch.setattr("sys.stdin", io.StringIO(lines))
  flags = [f"--workdir={path}", "--chat", "--template=chatml"]
  main([*flags, "--max_new_tokens=6"])
  shown = capsys.readouterr().out
  assert "a new system prompt\n" in shown
  assert "5 messages in " in shown
  said = json.loads(file.read_text())["messages"]
  assert [m["role"] for m in said] == ["system", *["user", "assistant"] * 2]
