"""Configs: files, overrides, JSON, and every error sentence."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxlm import config, keys, program
from jaxlm.errors import UserError

FILE = """
from jaxlm.config import default_config
from jaxlm.errors import UserError

def get_config(style: str = "gpt2", wide: bool = False):
  c = default_config()
  if style not in ("gpt2", "modern"):
    raise UserError(f"style {style!r} is unknown; choose gpt2 or modern")
  c.steps = 20
  c.model.family = style
  c.model.dim = 256 if wide else 128
  c.optimizer.lr = 1
  c.optimizer.lr_table = [["wte", 0.5]]
  return c
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
  path = tmp_path / "small.py"
  path.write_text(FILE)
  return path


def loaded(file: Path, *arguments: str):
  return program.load([f"--config={file}", *arguments]).config


def sentence(call, *arguments) -> str:
  with pytest.raises(UserError) as caught:
    call(*arguments)
  return str(caught.value)


def wrong(file: Path, *arguments: str) -> str:
  """The error that arguments after --config=FILE cause."""
  return sentence(program.load, [f"--config={file}", *arguments])


# --- Files and switches -----------------------------------------------------


def test_file_changes_defaults_and_is_normalised(file):
  """Numbers take their key's type and lists become tuples."""
  c = loaded(file)
  assert (c.steps, c.batch_size, c.model.dim) == (20, 16, 128)
  assert type(c.optimizer.lr) is float
  assert c.optimizer.lr_table == (("wte", 0.5),)


def test_config_is_frozen(file):
  """A program cannot change what the run was asked to be."""
  with pytest.raises(AttributeError):
    loaded(file).steps = 3


def test_switches_come_before_other_overrides(file):
  """A switch chooses the file's values; a key then changes one of them."""
  c = loaded(file, "--config.model.dim=96", "--config.style=modern")
  assert (c.model.family, c.model.dim) == ("modern", 96)
  assert loaded(file, "--config.wide=true").model.dim == 256


def test_workdir_is_named_after_file_and_switches(file):
  """Two styles of one file do not write into one directory."""
  run = program.load([f"--config={file}", "--config.style=modern"])
  assert run.workdir == Path("runs/small-modern")
  run = program.load([f"--config={file}", "--workdir=here", "--explain"])
  assert (run.workdir, run.explain) == (Path("here"), True)


def test_existing_run_needs_only_its_workdir(file, tmp_path):
  """Without --config, the config of the run is read, and may be overridden."""
  saved = loaded(file, "--config.model.window=[1, 2]")
  (tmp_path / "config.json").write_text(config.to_json(saved))
  run = program.load([f"--workdir={tmp_path}"])
  assert run.config == saved
  run = program.load([f"--workdir={tmp_path}", "--config.steps=9"])
  assert run.config.steps == 9


def test_program_flags_are_its_own(file):
  """A program adds flags to the common ones and reads them from the run."""
  flags = program.parser("Samples.")
  flags.add_argument("--prompt", default="")
  run = program.load([f"--config={file}", "--prompt=Once"], flags)
  assert run.flags.prompt == "Once"


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("def get_config(:", "bad.py line 1: invalid syntax"),
    ("x = 1", "has no function get_config"),
    ("def get_config(): return 3", "must return its config, not 3"),
    ("import nothing_here", "bad.py line 1: ModuleNotFoundError"),
    ("def get_config(steps=1): pass", "parameter steps is also a key"),
    ("def get_config(size): pass", "needs the switch --config.size=VALUE"),
  ],
)
def test_broken_files_are_named_with_their_line(tmp_path, body, message):
  """A mistake in a config file is the user's, and is told as such."""
  path = tmp_path / "bad.py"
  path.write_text(body)
  assert message in wrong(path)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("c.modle.dim = 1", "line 4: unknown key config.modle; did you mean"),
    ("c.bach_size = 1", "config.bach_size; did you mean config.batch_size?"),
    ("c.optimizer.beta1 = 1", "did you mean config.optimizer.b1?"),
    ("c.steps = 'many'", "config.steps takes a whole number, not 'many'"),
    ("c.model.dim = object", "config.model.dim takes texts, numbers"),
    ("c.data.val_fraction = 2", "config.data.val_fraction must be between"),
    ("c.model = 3", "config.model is a section; set its keys"),
    ("c.steps.more = 3", "line 4: AttributeError"),
  ],
)
def test_wrong_keys_in_files_are_named(tmp_path, line, message):
  """What the file sets is checked like what the command line sets."""
  path = tmp_path / "bad.py"
  path.write_text(
    "from jaxlm.config import default_config\n"
    f"def get_config():\n  c = default_config()\n  {line}\n  return c\n"
  )
  text = wrong(path)
  assert str(path) in text
  assert message in text


# --- The command line -------------------------------------------------------


@pytest.mark.parametrize(
  ("argument", "key", "value"),
  [
    ("steps=1e3", "steps", 1000),
    ("steps=1_000", "steps", 1000),
    ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
    ("optimizer.lr=2", "optimizer.lr", 2.0),
    ("optimizer.clip=inf", "optimizer.clip", math.inf),
    ("unroll=true", "unroll", True),
    ("checkpoint.best=False", "checkpoint.best", False),
    ("precision=bfloat16", "precision", "bfloat16"),
    ("sample.prompt=None", "sample.prompt", "None"),
    ("sample.prompt=", "sample.prompt", ""),
    ("sample.prompt=a=b, 'c'", "sample.prompt", "a=b, 'c'"),
    ("data.path=None", "data.path", None),
    ("data.path=1.txt", "data.path", "1.txt"),
    ("data.path=('a', 'b')", "data.path", ("a", "b")),
    ("data.weights=0.3,0.7", "data.weights", (0.3, 0.7)),
    ("data.weights=[1, 2]", "data.weights", (1, 2)),
    ("optimizer.freeze=wte,blocks", "optimizer.freeze", ("wte", "blocks")),
    ("optimizer.freeze=", "optimizer.freeze", ()),
    ("optimizer.lr_table=(('a', 2),)", "optimizer.lr_table", (("a", 2),)),
    ("parallel.mesh=fsdp:4,tensor:2", "parallel.mesh", "fsdp:4,tensor:2"),
    ("model.dim=None", "model.dim", None),
    ("model.theta=1e4", "model.theta", 1e4),
    ("model.bias=false", "model.bias", False),
    ("model.act=relu2", "model.act", "relu2"),
  ],
)
def test_overrides_are_read_as_their_keys_type(file, argument, key, value):
  """Each key's type decides how its text reads; both ways of writing work."""
  for arguments in ([f"--config.{argument}"], argument.split("=", 1)):
    first = arguments[0].removeprefix("--config.")
    if arguments[1:] == [""]:
      continue
    c = loaded(file, f"--config.{first}", *arguments[1:])
    got = keys.flatten(c)[key]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    (
      "--config.modle.dim=3",
      "unknown key config.modle.dim; did you mean config.model.dim?",
    ),
    (
      "--config.stlye=modern",
      "unknown key config.stlye; did you mean config.style?",
    ),
    (
      "--config.lr=1",
      "unknown key config.lr; did you mean config.optimizer.lr?",
    ),
    (
      "--config.xyzzyq=1",
      "unknown key config.xyzzyq; --help lists all keys",
    ),
    (
      "--config.data=x.txt",
      "config.data is a section; set its keys, as config.data.path",
    ),
    (
      "--config.steps=ten",
      "config.steps takes a whole number, not 'ten'; "
      "for example --config.steps=1000",
    ),
    (
      "--config.steps=1.5",
      "config.steps takes a whole number, not 1.5; "
      "for example --config.steps=1000",
    ),
    (
      "--config.steps=",
      "config.steps takes a whole number, not ''; "
      "for example --config.steps=1000",
    ),
    (
      "--config.optimizer.lr=fast",
      "config.optimizer.lr takes a number, not 'fast'; "
      "for example --config.optimizer.lr=0.001",
    ),
    (
      "--config.unroll=1",
      "config.unroll takes true or false, not 1; "
      "for example --config.unroll=false",
    ),
    (
      "--config.model.dim=wide",
      "config.model.dim takes a whole number, not 'wide'; "
      "for example --config.model.dim=100",
    ),
    ("--config.batch_size=0", "config.batch_size must be at least 1, not 0"),
    ("--config.optimizer.lr=nan", "config.optimizer.lr takes a number"),
    (
      "--config.sample.top_p=2",
      "config.sample.top_p must be between 0 and 1, not 2.0",
    ),
    (
      "--config.steps",
      "--config.steps needs a value, as in --config.steps=VALUE",
    ),
    ("--worker=x", "unknown flag --worker=x; did you mean --workdir?"),
    ("train", "unknown flag train; --help shows all flags"),
    ("--config.style=odd", "style 'odd' is unknown; choose gpt2 or modern"),
    (
      "--config.wide=maybe",
      "config.wide takes true or false, not 'maybe'; "
      "for example --config.wide=false",
    ),
    ("--workdir", "argument --workdir: expected one argument; --help shows"),
  ],
)
def test_wrong_arguments_get_one_sentence(file, argument, message):
  """The sentence says what is wrong and what would be right."""
  assert wrong(file, argument).startswith(message)


def test_missing_file_and_missing_run_are_named(file, tmp_path):
  """Nothing to run, a file that is not there, a directory without a run."""
  assert "name a config" in sentence(program.load, [])
  text = wrong(file.with_name("smal.py"))
  assert text.endswith(f"did you mean {file}?")
  text = sentence(program.load, [f"--workdir={tmp_path / 'none'}"])
  assert "holds no run" in text


# --- JSON -------------------------------------------------------------------


def nested(floats):
  """Plain values, and tuples of them in any depth."""
  plain = [st.none(), st.booleans(), st.integers(), st.text(max_size=8)]
  return st.recursive(
    st.one_of(*plain, floats),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
  )


NAMES = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)
OPEN_NAMES = NAMES.map("model.{}".format).filter(lambda n: n not in keys.KEYS)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = {
  bool: st.booleans(),
  int: st.integers(1, 10**12),
  float: st.floats(0, 1),
  str: st.text(max_size=8),
  tuple: st.lists(nested(FINITE), max_size=3).map(tuple),
}


def values_of(name: str):
  """Values that fit a key."""
  kinds = keys.KEYS[name].types
  return st.tuples(st.just(name), st.one_of(*(VALUES[t] for t in kinds)))


KEYED = st.sampled_from(sorted(keys.KEYS)).flatmap(values_of)
OPEN = st.tuples(OPEN_NAMES, nested(st.floats(allow_nan=False)))
CONFIGS = st.lists(KEYED | OPEN).map(lambda pairs: config.freeze(dict(pairs)))


def typed(value):
  """A value with its types, so that 1, 1.0 and True are three things."""
  if isinstance(value, tuple):
    return tuple(typed(v) for v in value)
  return (type(value), value)


@given(CONFIGS)
def test_json_round_trip_is_exact(c):
  """Values and types come back, tuples and infinities as well."""
  back = config.from_json(config.to_json(c))
  assert back == c
  assert hash(back) == hash(c)
  a, b = keys.flatten(c), keys.flatten(back)
  assert {k: typed(v) for k, v in a.items()} == {
    k: typed(v) for k, v in b.items()
  }


@given(KEYED)
def test_a_value_written_out_reads_as_itself(pair):
  """What Python prints for a value is what the command line reads."""
  name, value = pair
  text = value if isinstance(value, str) else repr(value)
  # A path may be several or none, so these two spellings are taken.
  assume(name != "data.path" or not text.startswith(("(", "[")))
  assume(not (isinstance(value, str) and text.lower() == "none"))
  got = config.parse_value(name, text, keys.KEYS[name])
  assert typed(got) == typed(value)


@given(nested(FINITE))
def test_an_open_value_written_out_reads_as_itself(value):
  """Open keys read as Python does, strings in quotes."""
  assert typed(config.parse_value("model.x", repr(value))) == typed(value)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "not a config in JSON"),
    ("[1]", "not a config in JSON"),
    ('{"stepz": 1}', "unknown key config.stepz; did you mean config.steps?"),
    ('{"steps": "1"}', "config.steps takes a whole number, not '1'"),
    ('{"model": 1}', "config.model is a section; set its keys"),
  ],
)
def test_damaged_json_is_one_sentence(tmp_path, text, message):
  """A config.json that was cut off or edited is named, with the reason."""
  (tmp_path / "config.json").write_text(text)
  got = sentence(config.read, tmp_path)
  assert "config.json is damaged" in got
  assert message in got


def test_json_of_an_older_version_takes_new_defaults():
  """A key that a config.json does not know yet has its default."""
  text = json.dumps({"steps": 5})
  assert config.from_json(text) == config.freeze({"steps": 5})


# --- Going on with a run ----------------------------------------------------


def test_differences_name_key_old_and_new():
  """Only what differs; an open key on one side is None on the other."""
  a = config.freeze({"steps": 1, "model.bias": True})
  b = config.freeze({"steps": 2})
  assert config.differences(a, b) == [
    ("steps", 1, 2),
    ("model.bias", True, None),
  ]
  assert config.differences(a, a) == []


def test_a_run_goes_on_under_the_same_config_only():
  """What changes learning is refused with key, old and new value."""
  old = config.freeze({})
  free = config.freeze({"steps": 9, "log.wandb": "x", "sample.top_k": 4})
  config.check_continues(old, free, "runs/a")
  new = config.freeze({"optimizer.lr": 0.5, "steps": 9, "seed": 2})
  assert sentence(config.check_continues, old, new, "runs/a") == (
    "runs/a was made by another config (seed was 0, now 2; optimizer.lr was "
    "0.001, now 0.5); choose another --workdir, or the old values"
  )


# --- From keys to values ----------------------------------------------------


def family(
  vocab: int,
  dim: int,
  layers: int = 2,
  theta: float = 1.0,
  kinds: tuple[str, ...] = (),
  width: int | None = None,
  other: object = None,
):
  """Stands for a model family: gives back what it was called with."""
  return vocab, dim, layers, theta, kinds, width, other


def called(**section):
  return config.call(family, ConfigDict(section), label="tiny", vocab=65)


def test_call_passes_what_is_set():
  """None leaves the function's default; numbers take the annotated type."""
  got = called(family="x", dim=8, layers=None, theta=2, kinds=["a"])
  assert got == (65, 8, 2, 2.0, ("a",), None, None)
  assert type(got[3]) is float
  assert called(dim=8, width=3, other="free")[5:] == (3, "free")


@pytest.mark.parametrize(
  ("section", "message"),
  [
    (
      {"dim": 8, "thata": 1},
      "tiny takes no config.model.thata; did you mean config.model.theta?",
    ),
    (
      {"dim": 8, "zzz": 1},
      "tiny takes no config.model.zzz; it takes dim, layers, theta",
    ),
    ({"dim": 8, "vocab": 1}, "tiny takes no config.model.vocab"),
    ({}, "tiny needs config.model.dim; set it, as in --config.model.dim"),
    (
      {"dim": 8, "theta": "x"},
      "config.model.theta takes a number, not 'x'",
    ),
    ({"dim": 8, "width": 1.5}, "config.model.width takes a whole number"),
  ],
)
def test_call_explains_what_does_not_fit(section, message):
  """Keys that the family does not take, or lacks, or gets in a wrong type."""
  assert sentence(lambda: called(**section)).startswith(message)
