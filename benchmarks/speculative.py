"""Speculative decoding: tokens per step of the target, and the time it saves.

    python benchmarks/speculative.py --model=SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/speculative.py [--steps=400]

With a chat model: greedy answers to three requests, plainly and with lookup,
in turns; ratios are those of the median and of the least times, prompt
included. Without: a small model is trained on the documentation inside Python,
then Medusa heads on it and a smaller draft, and their proposals are judged on
held-out text; greedy, and at temperature 1.
"""

import argparse
import statistics
import time

import numpy as np

from jaxlm import host

CODE = """\
class Account:
  def __init__(self, owner, balance):
    self.owner = owner
    self.balance = balance

  def deposit(self, amount):
    self.balance = self.balance + amount
    return self.balance

  def withdraw(self, amount):
    if amount > self.balance:
      raise ValueError("not enough money")
    self.balance = self.balance - amount
    return self.balance
"""

REQUESTS = {
  "copy": f"Repeat this code twice, word for word, and nothing else:\n\n{CODE}",
  "edit": f"Rename `balance` to `money` in this code:\n\n{CODE}",
  "story": "Tell a story about a lighthouse keeper and a storm.",
}


def seconds(run, *args) -> float:
  """How long a call takes."""
  start = time.perf_counter()
  run(*args)
  return time.perf_counter() - start


def answers(
  path: str,
  names: list[str],
  min_n: int,
  gammas: list[int],
  n: int,
  rounds: int,
) -> None:
  """Lookup against plain decoding, for each request."""
  from jaxlm.data.chat import encode
  from jaxlm.generate.decode import generate, ready
  from jaxlm.generate.drafts import Lookup
  from jaxlm.generate.speculative import speculate
  from jaxlm.interop import pretrained

  found = pretrained.read(path, "float32")
  model = found.model
  params = ready(model, found.params)

  def plain(prompt):
    return np.asarray(generate(model, params, prompt, n))

  def quick(prompt, gamma):
    text, figures = speculate(
      model, params, prompt, n, Lookup(3, min_n), gamma=gamma
    )
    return np.asarray(text), figures

  print(f"{model.n_params():,} parameters, float32, {n} new tokens, greedy")
  head = (
    "gamma",
    "acceptance",
    "tokens/call",
    "tokens/s",
    "plain",
    "ratio",
    "least",
  )
  print(f"{'':8}" + "".join(f"{x:>12}" for x in head) + "   same text")
  for name in names:
    turn = [{"role": "user", "content": REQUESTS[name]}]
    prompt = np.array(encode(found.template, found.tokenizer, turn))[None]
    want, slow = plain(prompt), []
    texts = {gamma: quick(prompt, gamma) for gamma in gammas}  # compiles
    fast = {gamma: [] for gamma in gammas}
    for _ in range(rounds):
      slow.append(seconds(plain, prompt))
      for gamma in gammas:
        fast[gamma].append(seconds(quick, prompt, gamma))
    before = statistics.median(slow)
    for gamma, (text, figures) in texts.items():
      after = statistics.median(fast[gamma])
      print(
        f"{name:8}{gamma:12}{figures.acceptance:12.2f}"
        f"{figures.tokens_per_call:12.2f}{n / after:12.1f}{n / before:12.1f}"
        f"{before / after:12.2f}{min(slow) / min(fast[gamma]):12.2f}"
        f"   {np.array_equal(text, want)}",
        flush=True,
      )


def train(objective, params, tree, batches, steps: int, freeze=()):
  """Parameters after so many steps of AdamW, and the last metrics."""
  import jax

  from jaxlm import optim
  from jaxlm.optim.schedules import cosine
  from jaxlm.state import create, make_step

  how = optim.Optimizer(freeze_table=freeze)
  tx = optim.make(tree, cosine(3e-3, steps, warmup=steps // 10), how)
  state = create(params, tx)
  step = make_step(objective, tx)
  for i in range(steps):
    batch = jax.tree.map(lambda x: x[None, None], batches[i])
    state, metrics = step(state, batch)
  return state.params, jax.tree.map(lambda x: np.asarray(x[-1]), metrics)


def heads_and_drafts(steps: int, gamma: int) -> None:
  """Heads and a draft model, trained here, on a trunk trained here."""
  import functools

  import jax

  from jaxlm import data
  from jaxlm.generate.drafts import DraftModel, Lookup, Medusa
  from jaxlm.generate.samplers import Greedy, Sample
  from jaxlm.generate.speculative import speculate
  from jaxlm.layers.param import init
  from jaxlm.models.families import llama
  from jaxlm.models.medusa import Heads
  from jaxlm.objectives import next_token, tokens_ahead

  corpus = data.prepare(vocab=1024)
  batches = data.batches(corpus.train, 128, 16)
  vocab = corpus.tokenizer.vocab_size

  def trained(dim: int, layers: int, seed: int):
    model = llama.decoder(
      vocab,
      dim,
      layers,
      dim // 32,
      dim // 32,
      mlp_dim=3 * dim,
      max_positions=512,
    )
    tree = model.params()
    params = init(tree, jax.random.key(seed))
    loss = functools.partial(next_token, model)
    params, metrics = train(loss, params, tree, batches, steps)
    print(f"{layers} x {dim}: loss {metrics['loss']:.2f} after {steps} steps")
    return model, params

  model, params = trained(128, 4, 0)
  small, small_params = trained(64, 1, 1)
  heads = Heads.on(model, gamma)
  fresh = heads.start(model, params)
  both, metrics = train(
    functools.partial(tokens_ahead, model, heads),
    {"trunk": params, "heads": fresh},
    {"trunk": model.params(), "heads": heads.params()},
    batches,
    steps,
    freeze=(("trunk/.*", True), (".*", False)),
  )
  print("heads are right in", np.round(metrics["right"], 3), "of all places")
  held = np.asarray(corpus.val[0].ids, np.int32)
  prompts = np.stack([held[i * 1000 : i * 1000 + 32] for i in range(16)])
  drafts = {
    "lookup": (Lookup(), None),
    "heads, untrained": (Medusa(heads), fresh),
    "heads, trained": (Medusa(heads), both["heads"]),
    "draft model": (DraftModel(small), small_params),
  }
  print(f"{'':20}{'':>10}{'acceptance':>12}{'tokens/call':>13}")
  for name, (draft, p) in drafts.items():
    for how, sampler in (("greedy", Greedy()), ("T = 1", Sample())):
      _, s = speculate(
        model, params, prompts, 200, draft, p, sampler, gamma=gamma
      )
      print(
        f"{name:20}{how:>10}{s.acceptance:12.2f}{s.tokens_per_call:13.2f}",
        flush=True,
      )


def main() -> None:
  """Runs one of the two."""
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument("--model", help="a chat model's .gguf file or directory")
  flags.add_argument("--gammas", default="4", help="e.g. 2,4,8")
  flags.add_argument("--requests", default=",".join(REQUESTS))
  flags.add_argument("--min_n", type=int, default=1, help="of the lookup")
  flags.add_argument("--new", type=int, default=128)
  flags.add_argument("--rounds", type=int, default=3)
  flags.add_argument("--steps", type=int, default=400)
  args = flags.parse_args()
  host.prepare()
  gammas = [int(g) for g in args.gammas.split(",")]
  if args.model:
    names = args.requests.split(",")
    answers(args.model, names, args.min_n, gammas, args.new, args.rounds)
  else:
    heads_and_drafts(args.steps, gammas[0])


if __name__ == "__main__":
  main()
