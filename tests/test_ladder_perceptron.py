"""One neuron: the theorem holds on 1,000 sets, and XOR has no neuron."""

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.ladder import perceptron, rung


def test_a_thousand_sets_keep_the_bound():
  """Novikoff's theorem, and not vacuously: some come near to it."""
  mistakes, bounds = perceptron.bound_test(1000, 0)
  assert len(mistakes) == 1000
  assert np.all(mistakes <= bounds)
  assert np.max(mistakes / bounds) > 0.1
  assert np.max(mistakes) > 50


@pytest.mark.parametrize("d", [1, 3, 16])
def test_the_bound_is_reached(d):
  """Orthogonal examples: R = 1, gamma = 1 / sqrt(d), and d mistakes."""
  w, mistakes, done = perceptron.train(np.eye(d), np.ones(d))
  assert done
  assert mistakes == d
  np.testing.assert_array_equal(w, np.ones(d))


def test_xor_is_a_cycle():
  """The cycle is a proof: from the same weights follow the same steps."""
  x = perceptron.with_bias(perceptron.XOR_X)
  _, mistakes, done = perceptron.train(x, perceptron.XOR_Y)
  assert not done
  assert mistakes < 100


@pytest.mark.parametrize("flip", [[1, 1, 1, -1], [-1, 1, 1, 1], [1, -1, 1, 1]])
def test_other_tables_of_two_inputs_are_learned(flip):
  """NAND, OR and an implication are separable."""
  x = perceptron.with_bias(perceptron.XOR_X)
  w, _, done = perceptron.train(x, np.array(flip))
  assert done
  np.testing.assert_array_equal(np.sign(x @ w), flip)


def test_three_neurons_do_xor():
  """The four corners, exactly."""
  got = perceptron.two_layers(perceptron.XOR_X)
  np.testing.assert_array_equal(got, [0, 1, 1, 0])


def test_the_program_prints_and_draws(tmp_path, capsys):
  """What the docs page shows."""
  perceptron.main([f"--out={tmp_path}", "--sets=20"])
  said = capsys.readouterr().out
  assert "mistakes over the bound (R/gamma)^2: 0" in said
  assert "2-2-1 network: 4 of 4" in said
  assert (tmp_path / "perceptron.png").stat().st_size > 10_000


def test_wrong_input_is_one_sentence(tmp_path, capsys):
  """An unknown flag, and a folder that is a file."""
  with pytest.raises(UserError, match="--help"):
    perceptron.main(["--steps=3"])
  (tmp_path / "file").touch()
  with pytest.raises(SystemExit) as stop:
    rung.run(lambda: perceptron.main([f"--out={tmp_path}/file", "--sets=2"]))
  assert stop.value.code == 2
  assert "give a folder with --out" in capsys.readouterr().err
