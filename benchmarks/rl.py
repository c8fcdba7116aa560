"""Speed of a whole step of GRPO and PPO, beside TRL on this machine.

    pip install torch trl datasets          # the judge; jaxlm never needs it
    python benchmarks/rl.py [--seconds=60] [--sizes=large,small]
    pip install --no-deps --target=old trl==1.8.0      # the last with PPO
    python benchmarks/rl.py --what=ppo --trl=old

The same GPT-2, untrained, answers two-digit sums: 8 prompts x 8 samples x 48
new tokens (PPO: 64 prompts), no response ends before, float32 in both. A step
is everything: sampling, texts, rewards, advantages, all updates. GRPO makes one
update of a rollout; PPO makes four, has a critic of its own, a reference, and
a reward model of the same size. Each library runs in a process of its own and
the two take turns, step by step, so that a change in the machine's speed meets
both. Printed are medians: milliseconds a step, samples/s, updates/s, and how
often jaxlm is as fast. `--python` names the interpreter of TRL, if another.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SIZES = {"large": (4, 256), "small": (2, 64)}  # layers, width
PROMPTS, SAMPLES, NEW, EPOCHS = 8, 8, 48, 4
ROWS = PROMPTS * SAMPLES
LETTERS = "0123456789+="
VOCAB = len(LETTERS) + 1  # and the end
UPDATES = {"grpo": 1, "ppo": EPOCHS}


def sums(n: int) -> list[str]:
  """Two-digit sums, all of one length."""
  return [f"{10 + i % 90}+{10 + 7 * i % 90}=" for i in range(n)]


def reward(texts: list[str]) -> list[float]:
  """Any number that depends on the text."""
  return [text.count("7") / len(text) for text in texts]


# --- jaxlm ------------------------------------------------------------------


def jaxlm_step(what: str, size: str, precision: str) -> Callable[[], None]:
  """A step, put together as `jaxlm.rl.grpo` and `jaxlm.rl.ppo` do."""
  from jaxlm import host

  host.prepare()
  import jax
  import numpy as np

  from jaxlm.data.tokenizers import Chars
  from jaxlm.layers import param
  from jaxlm.layers.compute import Compute
  from jaxlm.models.families import gpt2
  from jaxlm.models.heads import ScalarHead
  from jaxlm.models.reward import RewardModel
  from jaxlm.optim import Optimizer, make
  from jaxlm.rl import begin, collect, grpo, ppo
  from jaxlm.rl.begin import Base, Memory
  from jaxlm.rl.options import GRPO, PPO
  from jaxlm.rl.questions import encoded
  from jaxlm.rl.rewards import Learned
  from jaxlm.rl.rollout import Actor, scored
  from jaxlm.state import make_step
  from jaxlm.tasks import Example

  layers, dim = SIZES[size]
  tokenizer = Chars(LETTERS, ["<|endoftext|>"])
  model = gpt2.decoder(VOCAB, dim, layers, 4, 64)
  params = jax.jit(lambda: param.init(model.params(), jax.random.key(0)))()
  base, compute = (
    Base(model, params, tokenizer, tokenizer.eot),
    Compute(precision, unroll=True),
  )
  asked = encoded(
    [Example(s, "", "", "", "add", 2) for s in sums(90)], tokenizer.encode, 8
  )
  shape = {"prompts": PROMPTS, "samples": SAMPLES}
  if what == "ppo":
    shape = {"prompts": ROWS, "samples": 1, "critic": "separate"}
  o = (GRPO if what == "grpo" else PPO)(tokens=NEW, **shape)
  separate = what == "ppo"
  actor = Actor(model, ScalarHead(dim), model) if separate else Actor(model)
  tx = make(actor.params(), 1e-6, Optimizer(weight_decay=0.0))
  config = argparse.Namespace(seed=0, ema=0.0)
  state, memory = begin.fresh(actor, params, tx, config), Memory(beta=o.kl)
  of = (grpo if what == "grpo" else ppo).objective(actor, o, compute)
  update = make_step(of, tx, steps=1)
  draw, step, earn = o.draw(None), 0, lambda e, texts: reward(texts)
  if what == "ppo":
    judge = RewardModel.on(model)
    own = jax.jit(lambda: param.init(judge.params(), jax.random.key(1)))()
    earn = Learned(judge, own, tokenizer, ROWS)

  def run() -> None:
    nonlocal state, step, memory
    some = asked.of_step(o.prompts, 0, step)
    r, texts = collect.respond(
      base, draw, state.params, some, compute, 0, step, 0
    )
    if what == "ppo":
      said = scored(actor, state.params, r, draw, compute)
      theirs = scored(Actor(model), params, r, draw, compute)
    got = collect.judge(earn, some, r, texts, o, base.eos)
    r = got.rollout
    if what == "grpo":
      a = grpo.advantage(o, r.rewards, memory.rewards)
      batch = {"rollout": r, "advantages": a}
    else:
      r = got.against(theirs).rollout.replace(values=np.asarray(said.values))
      beta = np.float32(memory.beta)
      batch = {"rollout": r} | ppo.advantage(o, r, r.rewards, beta)
    for epoch in range(UPDATES[what]):
      order = collect.order(ROWS, 0, step, epoch)
      state, told = update(state, collect.cut(batch, order, 1, 1))
    now = {k: float(np.asarray(x)[-1]) for k, x in told.items()}
    now |= collect.numbers(got)
    memory = memory.after(now, r.rewards)
    step += 1

  return run


# --- TRL --------------------------------------------------------------------


def trl_parts(size: str):
  """TRL's model and tokenizer: the same shapes, from transformers."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import GPT2Config, PreTrainedTokenizerFast

  layers, dim = SIZES[size]
  letters = {c: i for i, c in enumerate([*LETTERS, "<|end|>"])}
  inner = Tokenizer(models.WordLevel(letters, unk_token="<|end|>"))
  inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=inner,
    eos_token="<|end|>",
    pad_token="<|end|>",
    padding_side="left",
  )
  shape = GPT2Config(
    vocab_size=VOCAB,
    n_embd=dim,
    n_layer=layers,
    n_head=4,
    n_positions=64,
    bos_token_id=VOCAB - 1,
    eos_token_id=VOCAB - 1,
    pad_token_id=VOCAB - 1,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    num_labels=1,
  )
  return tokenizer, shape


def trl_run(what: str, size: str, turn: Callable[[], None]) -> None:
  """TRL's own loop, with `turn` called after every step."""
  os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
  import tempfile

  from datasets import Dataset
  from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    TrainerCallback,
  )

  class Turns(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
      turn()

  tokenizer, shape = trl_parts(size)
  model = GPT2LMHeadModel(shape)
  common = {
    "output_dir": tempfile.mkdtemp(),
    "learning_rate": 1e-6,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 10**6,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
  }
  if what == "grpo":
    from trl import GRPOConfig, GRPOTrainer

    GRPOTrainer(
      model,
      lambda completions, **_: reward(completions),
      GRPOConfig(
        per_device_train_batch_size=ROWS,
        num_generations=SAMPLES,
        max_completion_length=NEW,
        generation_kwargs={"min_new_tokens": NEW},
        max_steps=10**6,
        **common,
      ),
      Dataset.from_dict({"prompt": sums(9000)}),
      processing_class=tokenizer,
      callbacks=[Turns()],
    ).train()
    return
  from trl.experimental.ppo import PPOConfig, PPOTrainer

  critic, judge = (GPT2ForSequenceClassification(shape) for _ in range(2))
  rows = [{"input_ids": tokenizer(s)["input_ids"]} for s in sums(9000)]
  model.generation_config.min_new_tokens = NEW
  PPOTrainer(
    PPOConfig(
      per_device_train_batch_size=ROWS,
      local_rollout_forward_batch_size=ROWS,
      num_mini_batches=1,
      num_ppo_epochs=EPOCHS,
      num_sample_generations=0,
      response_length=NEW,
      total_episodes=10**7,
      **common,
    ),
    tokenizer,
    model,
    GPT2LMHeadModel(shape),
    judge,
    Dataset.from_list(rows),
    critic,
    eval_dataset=Dataset.from_list(rows[:ROWS]),
    callbacks=[Turns()],
  ).train()


# --- In turns ---------------------------------------------------------------


def work(side: str, what: str, size: str) -> None:
  """Makes a step whenever the parent writes a line, and says how long."""
  out, sys.stdout = sys.stdout, sys.stderr
  begun = time.perf_counter()

  def turn() -> None:
    nonlocal begun
    print(json.dumps(time.perf_counter() - begun), file=out, flush=True)
    if not sys.stdin.readline():
      os._exit(0)
    begun = time.perf_counter()

  if side == "trl":
    sys.path.pop(0)  # this folder has files called like libraries
    trl_run(what, size, turn)
  run = jaxlm_step(what, size, side.split()[1])
  while True:
    run()
    turn()


def compare(what: str, size: str, flags: argparse.Namespace) -> None:
  """Both sides in turns for some seconds; a table."""
  sides = ["jaxlm float32", "jaxlm bfloat16"] + ["trl"] * (not flags.alone)
  root = str(Path(__file__).parent.parent)
  workers = {}
  for side in sides:
    paths = [flags.trl] if side == "trl" and flags.trl else [root]
    workers[side] = subprocess.Popen(
      [flags.python if side == "trl" else sys.executable, __file__]
      + ["--worker", side, "--what", what, "--sizes", size],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
  times = {side: [] for side in sides}
  for worker in workers.values():  # the first compiles
    json.loads(worker.stdout.readline())
  end = time.perf_counter() + flags.seconds
  while time.perf_counter() < end or len(times[sides[0]]) < 4:
    for side, worker in workers.items():
      worker.stdin.write("\n")
      worker.stdin.flush()
      times[side].append(json.loads(worker.stdout.readline()))
  for worker in workers.values():
    worker.stdin.close()
  middle = {k: statistics.median(x[1:]) for k, x in times.items()}
  layers, dim = SIZES[size]
  print(f"{what}, {layers} x {dim}, {len(times[sides[0]]) - 1} steps of each")
  for side, seconds in middle.items():
    line = (
      f"  {side:15} {1000 * seconds:8.1f} ms {ROWS / seconds:8.1f} samples/s"
    )
    line += f" {UPDATES[what] / seconds:7.2f} updates/s"
    if "trl" in middle:
      line += f"  {middle['trl'] / seconds:5.2f} x"
    print(line, flush=True)


def main() -> None:
  """Parses flags and compares; or is one side."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument("--worker")
  flags.add_argument("--what", default="grpo")
  flags.add_argument("--sizes", default="large,small")
  flags.add_argument("--seconds", type=float, default=60.0)
  flags.add_argument("--python", default=sys.executable)
  flags.add_argument("--trl", help="folder with the TRL to import")
  flags.add_argument("--alone", action="store_true", help="without TRL")
  flags = flags.parse_args()
  for what in flags.what.split(","):
    for size in flags.sizes.split(","):
      if flags.worker:
        work(flags.worker, what, size)
      compare(what, size, flags)


if __name__ == "__main__":
  main()
