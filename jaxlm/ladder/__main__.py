"""All rungs, one after another, with every plot in one folder."""

import importlib
import time

from jaxlm.ladder import rung

RUNGS = (
  "perceptron",
  "linear",
  "optimizers",
  "gradcheck",
  "einsum_grad",
  "autograd",
  "mlp",
  "mlp_jax",
  "bpe",
  "babygpt",
  "topk",
  "dijkstra",
  "kernels",
  "parallel",
  "quiz",
)


def main(argv: list[str] | None = None) -> None:
  """Runs each rung at its defaults and prints what it took."""
  flags = rung.parser(f"{__doc__}\n\n{' '.join(RUNGS)}")
  args = flags.parse_args(argv)
  for name in RUNGS:
    print(f"\n--- {name}")
    begin = time.perf_counter()
    module = importlib.import_module(f"jaxlm.ladder.{name}")
    module.main([f"--out={args.out}", f"--seed={args.seed}"])
    print(f"--- {name}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
  rung.run(main)
