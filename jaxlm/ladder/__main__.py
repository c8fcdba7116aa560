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
  "depth",
  "recurrent",
  "charrnn",
  "memory",
  "word2vec",
  "attention",
  "copying",
  "largest",
  "bpe",
  "babygpt",
  "topk",
  "dijkstra",
  "kernels",
  "parallel",
  "quiz",
)

QUICK = {  # far too short to learn anything, to see that all of it runs
  "depth": ["--seeds=1"],
  "charrnn": ["--windows=30", "--hidden=16"],
  "memory": ["--steps=20", "--updates=20"],
  "word2vec": ["--steps=50"],
  "copying": ["--steps=30"],
  "largest": ["--steps=50"],
  "babygpt": ["--steps=20"],
}


def main(argv: list[str] | None = None) -> None:
  """Runs each rung at its defaults and prints what it took."""
  flags = rung.parser(f"{__doc__}\n\n{' '.join(RUNGS)}")
  flags.add_argument("--quick", action="store_true", help="learn little")
  args = flags.parse_args(argv)
  for name in RUNGS:
    print(f"\n--- {name}")
    begin = time.perf_counter()
    module = importlib.import_module(f"jaxlm.ladder.{name}")
    more = QUICK.get(name, []) if args.quick else []
    module.main([f"--out={args.out}", f"--seed={args.seed}", *more])
    print(f"--- {name}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
  rung.run(main)
