"""The doctor finds every seeded mistake, and nothing where there is none.

A check that passes whatever it is shown is worse than none, so each is proved
by mistakes it must find; a healthy model keeps it from crying wolf.
"""

from dataclasses import replace

import jax
import pytest
from tiny_models import MODELS

from jaxlm.doctor.__main__ import main
from jaxlm.doctor.bugs import BUGS, healthy
from jaxlm.doctor.checks import CHECKS, examine
from jaxlm.doctor.plain import Plain
from jaxlm.doctor.structure import by_definition, causality
from jaxlm.errors import UserError

FAST = [name for name in CHECKS if name != "overfit"]


def wrong(subject, names=tuple(CHECKS)) -> dict[str, str]:
  """What is found, by check."""
  return {
    name: f"{found.seen}; {found.advice}"
    for name, found in examine(subject, names)
    if found.ok is False
  }


def test_nothing_is_wrong_with_a_healthy_model():
  """All checks, on a model in which every mistake could sit."""
  assert wrong(healthy()) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modern", "local"])
def test_nothing_is_wrong_with_other_models(name):
  """Windows, sandwich norms, soft caps, projections that start at zero."""
  assert wrong(healthy(MODELS[name]), FAST) == {}


@pytest.mark.parametrize("name", BUGS)
def test_the_named_check_finds_the_mistake(name):
  """And says so by a measurement, not by falling over."""
  bug = BUGS[name]
  found = wrong(bug.make(healthy()), (bug.check,))
  assert list(found) == [bug.check]
  assert "it raised" not in found[bug.check]


def test_there_are_enough_mistakes_and_every_check_finds_one():
  """No check is there for show."""
  assert len(BUGS) >= 25
  assert {bug.check for bug in BUGS.values()} == set(CHECKS) - {"gradient flow"}


def test_gradient_flow_sees_vanishing_gradients():
  """Three blocks without residuals, each of which passes a tenth on."""
  s = BUGS["residual missing"].make(healthy())

  def smaller(path, x):
    return 0.01 * x if path[-1].key == "down" else x

  s.__dict__["lively"] = jax.tree_util.tree_map_with_path(smaller, s.lively)
  layers = (((replace(s.model.blocks[0], norm=None),), 3),)
  s2 = replace(s, model=replace(s.model, layers=layers))
  s2.__dict__["lively"] = s.lively
  assert list(wrong(s2, ("gradient flow",))) == ["gradient flow"]


def test_plain_attention_without_a_mistake_is_right():
  """Otherwise its mistakes would prove nothing."""
  s = healthy()
  block = s.model.blocks[0]
  m = block.mixer
  plain = Plain(m.dim, m.heads, m.kv_heads, m.head_dim, position=m.position)
  layers = (((replace(block, mixer=plain),), 3),)
  s = replace(s, model=replace(s.model, layers=layers))
  assert by_definition(s).ok
  assert causality(s).ok


def test_what_raises_is_a_finding():
  """The examined code is allowed to be broken in any way."""

  def broken(*_args, **_options):
    raise ValueError("shapes (2, 3) and (4, 5)")

  found = wrong(replace(healthy(), objective=broken), ("initial loss",))
  assert "shapes (2, 3) and (4, 5)" in found["initial loss"]


def test_the_program(capsys):
  """Lists mistakes, examines one, ends with status 1, and knows its names."""
  main(["--bugs"])
  assert "rope twice" in capsys.readouterr().out
  with pytest.raises(SystemExit) as stop:
    main(["--bug=labels not shifted", "--checks=vocabulary, labels"])
  assert stop.value.code == 1
  out = capsys.readouterr().out
  assert "FAIL labels" in out
  assert "1 of 2 checks found nothing" in out
  with pytest.raises(UserError, match="did you mean rope twice"):
    main(["--bug=rope twise"])
  with pytest.raises(UserError, match="did you mean causality"):
    main(["--bug=rope twice", "--checks=causalty"])
