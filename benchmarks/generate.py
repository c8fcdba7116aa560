"""Tokens a second of decoding, one stream, float32.

    python benchmarks/generate.py [--tokens=500]

Random weights: the speed does not depend on what was learned. Each figure is
the best of three whole calls of `jaxlm.generate`, prompt included, after one
that compiles.
"""

import argparse
import time

import numpy as np

from jaxlm import host
from jaxlm.generate.samplers import Greedy, Sample

SAMPLERS = {
  "greedy": Greedy(),
  "T=0.8": Sample(temperature=0.8),
  "top-k 40": Sample(top_k=40),
  "top-p 0.9": Sample(top_p=0.9),
}


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument("--tokens", type=int, default=500)
  n = flags.parse_args().tokens
  host.prepare()
  import jax

  import jaxlm
  from jaxlm.generate.decode import ready
  from jaxlm.layers import param
  from jaxlm.models.families import gpt2

  prompt = np.ones((1, 8), np.int32)
  sizes = {
    "4 x 128, 65 characters": gpt2.decoder(65, 128, 4, 4, 1024),
    "4 x 128, vocabulary 4,096": gpt2.decoder(4096, 128, 4, 4, 1024),
  }
  print(f"{'tokens a second':28}" + "".join(f"{s:>11}" for s in SAMPLERS))
  for name, model in sizes.items():
    params = param.init(model.params(), jax.random.key(0))
    params = ready(model, params)
    row = []
    for sampler in SAMPLERS.values():
      took = []
      for _ in range(4):
        start = time.perf_counter()
        jaxlm.generate(model, params, prompt, n, sampler).block_until_ready()
        took.append(time.perf_counter() - start)
      row.append(n / min(took[1:]))
    print(f"{name:28}" + "".join(f"{rate:11,.0f}" for rate in row), flush=True)


if __name__ == "__main__":
  main()
