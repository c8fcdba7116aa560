"""A program that is killed: it trains, saves, and is shot while it does so.

    python tests/saver.py DIRECTORY SIDE KILLS SEED

A parent forks a child, waits until the child says that it is saving, sleeps a
random moment and sends signal 9; then the next child. Each child continues
from what the one before left behind and checks it: the restored step is at
least the last that was known to be finished, and every bit of the state is
what that step must have. The parent imports JAX but never starts it, so that
forking is safe and a child costs little.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint  # noqa: F401, so that the children need not import it

from jaxlm.checkpoint import Checkpoints


def state_at(step: int, side: int) -> dict[str, np.ndarray]:
  """The state after some steps of a random number generator mod 2³²."""
  a, c, m = 1664525, 1013904223, 2**32
  scale = pow(a, step, m)
  shift = c * sum(pow(a, i, m) for i in range(step)) % m
  x = np.arange(side * side, dtype=np.uint32).reshape(side, side)
  x = x * np.uint32(scale) + np.uint32(shift)
  return {"step": np.int32(step), "x": x, "y": x[0].view(np.float32)}


@jax.jit
def advance(state: dict) -> dict:
  """The next state."""
  x = state["x"] * jnp.uint32(1664525) + jnp.uint32(1013904223)
  y = jax.lax.bitcast_convert_type(x[0], jnp.float32)
  return {"step": state["step"] + jnp.int32(1), "x": x, "y": y}


def equal(state: dict, side: int) -> bool:
  """Whether every bit is what its step must have."""
  want = state_at(int(state["step"]), side)
  return all(np.asarray(state[k]).tobytes() == want[k].tobytes() for k in want)


def child(directory: Path, side: int, tell: int) -> None:
  """Continues, checks, and saves every step until it is killed."""
  step = jax.jit(advance, donate_argnums=0)
  finished = directory / "finished"
  with Checkpoints(directory / "checkpoints", keep=2) as checkpoints:
    state = jax.tree.map(jnp.asarray, state_at(0, side))
    if checkpoints.latest() is not None:
      known = max(map(int, finished.read_text().split()), default=0)
      state, data, _, at = checkpoints.restore(state)
      assert data == {"seen": at}
      assert int(state["step"]) == at >= known
      assert equal(state, side)
      os.write(tell, b"r")
    while True:
      state = step(state)
      at = int(state["step"])
      os.write(tell, b"s")
      checkpoints.save(at, state, data={"seen": at})
      state = step(state)  # donates what is being written
      checkpoints.wait()
      with open(finished, "a") as file:
        file.write(f"{at}\n")


def main(directory: Path, side: int, kills: int, seed: int) -> None:
  """Forks and kills; prints how many children found something to restore."""
  (directory / "finished").touch()
  chance, restored = random.Random(seed), 0
  for _ in range(kills):
    listen, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
      try:
        child(directory, side, tell)
      finally:
        sys.stdout.flush()
        os._exit(1)  # only an error gets here
    os.close(tell)
    for _ in range(chance.randint(1, 4)):  # the n-th save of this child
      while (word := os.read(listen, 1)) == b"r":
        restored += 1
      if word == b"":
        raise SystemExit("a child failed; see above")
    time.sleep(chance.uniform(0, 0.12))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(listen)
  print(restored)


if __name__ == "__main__":
  main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
