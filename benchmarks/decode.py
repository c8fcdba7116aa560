"""Tokens a second of jaxlm, transformers and llama.cpp on the same weights.

    python benchmarks/decode.py --model=SmolLM2-135M-Instruct.Q4_1.gguf

It needs `torch`, `transformers` and `llama-cpp-python` beside jaxlm; those that
are missing are left out. The model is read once and written for each of them
in the precision that is compared, so all have the same numbers. All are
greedy, and tell how many of their tokens are those of jaxlm.

Prompts are pieces of the README. The programs take turns: round after round,
each makes one token (prefill) and then all of them. What decoding costs is the
difference, so reading the prompt is not part of it. The memory's bandwidth is
measured in the same rounds. A figure is the median of the rounds; the last
column is decoding in the fastest one.
"""

import argparse
import gc
import importlib.util
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxlm import host

# (prompts [batch, seq], how many new tokens) -> new tokens [batch, new]
Engine = Callable[[np.ndarray, int], np.ndarray]


# --- The engines ------------------------------------------------------------


def ours(model, params, dtype: str) -> Engine:
  """`jaxlm.generate`."""
  import jaxlm
  from jaxlm.generate import decode

  compute = jaxlm.Compute(dtype=dtype, unroll=True)
  params = decode.ready(model, params, compute)

  def run(prompts: np.ndarray, n: int) -> np.ndarray:
    tokens = jaxlm.generate(model, params, prompts, n, compute=compute)
    return np.asarray(tokens)[:, prompts.shape[1] :]

  return run


def transformers_engine(path: Path, dtype: str, compiled: bool) -> Engine:
  """`generate` of transformers with a static cache."""
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=getattr(torch, dtype)
  ).eval()
  if compiled:
    model.forward = torch.compile(model.forward)

  @torch.inference_mode()
  def run(prompts: np.ndarray, n: int) -> np.ndarray:
    ids = torch.from_numpy(prompts.astype(np.int64))
    tokens = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=n,
      min_new_tokens=n,
      do_sample=False,
      cache_implementation="static",
      pad_token_id=0,
      disable_compile=True,  # of its own; `compiled` is ours
    )
    return tokens.numpy()[:, prompts.shape[1] :]

  return run


def llama_engine(path: Path, threads: int, room: int, batch: int) -> Engine:
  """llama.cpp by its C functions: one batch a step, tokens by `argmax`."""
  import llama_cpp as c

  log = c.llama_log_callback(lambda *_: None)
  c.llama_log_set(log, None)
  model = c.llama_model_load_from_file(
    str(path).encode(), c.llama_model_default_params()
  )
  params = c.llama_context_default_params()
  params.n_ctx = params.n_batch = batch * room
  params.n_seq_max = batch
  params.n_threads = params.n_threads_batch = threads
  context = c.llama_init_from_model(model, params)
  vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
  space = c.llama_batch_init(batch * room, 0, 1)

  def read(tokens: np.ndarray, position: int) -> np.ndarray:
    """Reads `[batch, some]` tokens; logits [batch, vocab] after the last."""
    rows, seq = tokens.shape
    space.n_tokens = rows * seq
    for i in range(rows * seq):
      row, place = divmod(i, seq)
      space.token[i] = int(tokens[row, place])
      space.pos[i] = position + place
      space.n_seq_id[i], space.seq_id[i][0] = 1, row
      space.logits[i] = place == seq - 1
    if c.llama_decode(context, space):
      raise RuntimeError("llama_decode failed")
    last = [
      np.ctypeslib.as_array(
        c.llama_get_logits_ith(context, row * seq + seq - 1), (vocab,)
      )
      for row in range(rows)
    ]
    return np.stack(last)

  def run(prompts: np.ndarray, n: int) -> np.ndarray:
    c.llama_memory_clear(c.llama_get_memory(context), False)
    new = [read(prompts, 0).argmax(-1)]
    for i in range(n - 1):
      new.append(read(new[-1][:, None], prompts.shape[1] + i).argmax(-1))
    return np.stack(new, axis=1)

  run.keep = log  # a callback that C holds, and Python must not free
  return run


# --- Measuring --------------------------------------------------------------


def bandwidth(array: np.ndarray, pool: ThreadPoolExecutor) -> float:
  """Bytes a second that all cores can read: a sum of squares over an array."""
  parts = np.array_split(array, pool._max_workers)
  start = time.perf_counter()
  list(pool.map(lambda x: np.dot(x, x), parts))
  return array.nbytes / (time.perf_counter() - start)


def seconds(run: Engine, prompts: np.ndarray, n: int) -> float:
  """How long a call takes."""
  start = time.perf_counter()
  run(prompts, n)
  return time.perf_counter() - start


def compare(
  engines: dict[str, Engine],
  prompts: np.ndarray,
  n: int,
  rounds: int,
  pool: ThreadPoolExecutor,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float], list[float]]:
  """Seconds of prefill and of `n - 1` further tokens, by engine and round.

  Also the share of tokens that equal the first engine's, and bandwidths.
  """
  large = np.ones(1 << 27, np.float32)
  said = {name: run(prompts, n) for name, run in engines.items()}  # compiles
  first = next(iter(said.values()))
  same = {name: float(np.mean(new == first)) for name, new in said.items()}
  took = {name: [] for name in engines}
  speeds = []
  for run in engines.values():
    run(prompts, 1)  # compiles
  for _ in range(rounds):
    for name, run in engines.items():
      time.sleep(0.3)  # threads of the one before still spin
      one = seconds(run, prompts, 1)
      took[name].append((one, seconds(run, prompts, n) - one))
    time.sleep(0.3)
    speeds.append(max(bandwidth(large, pool) for _ in range(3)))
  return took, same, speeds


# --- The table --------------------------------------------------------------


def rates(
  took: list[tuple[float, float]], batch: int, seq: int, n: int
) -> tuple[float, float, float]:
  """Tokens a second: prefill, decoding (medians), decoding at its fastest."""
  prefill = batch * seq / statistics.median(one for one, _ in took)
  steps = [rest for _, rest in took]
  decode = batch * (n - 1) / statistics.median(steps)
  return prefill, decode, batch * (n - 1) / min(steps)


def table(
  title: str,
  took: dict[str, list[tuple[float, float]]],
  same: dict[str, float],
  batch: int,
  seq: int,
  n: int,
) -> dict[str, tuple[float, float, float]]:
  """Prints tokens a second and jaxlm's ratio to each; returns the rates."""
  found = {name: rates(x, batch, seq, n) for name, x in took.items()}
  mine = found["jaxlm"]
  print(f"\n{title}")
  heads = ("prefill", "decode", "ratio", "ratio", "same", "fastest")
  print(f"{'tokens/s':24}" + "".join(f"{head:>9}" for head in heads))
  for name, (prefill, decode, fastest) in found.items():
    print(
      f"{name:24}{prefill:9,.0f}{decode:9,.1f}{mine[0] / prefill:9.2f}"
      f"{mine[1] / decode:9.2f}{same[name]:9.0%}{fastest:9,.1f}"
    )
  return found


def share(rate: float, speeds: list[float], size: int) -> None:
  """Prints what the memory allows one stream, and how much of it is used."""
  speed = statistics.median(speeds)
  limit = speed / size
  print(
    f"memory {speed / 1e9:.1f} GB/s, {size / 1e6:,.0f} MB of weights a token: "
    f"{limit:.1f} tokens/s at most; jaxlm reaches {rate / limit:.0%}"
  )


# --- The program ------------------------------------------------------------


def has(*modules: str) -> bool:
  """Whether all of these can be imported."""
  return all(importlib.util.find_spec(module) for module in modules)


def engines_of(
  flags: argparse.Namespace, work: Path, model, params, tokenizer, dtype, batch
) -> Iterator[tuple[str, Engine]]:
  """The programs that are compared in one precision, jaxlm first."""
  import jaxlm

  yield "jaxlm", ours(model, params, dtype)
  if has("torch", "transformers"):
    path = work / f"hf-{dtype}"
    if not path.exists():
      jaxlm.save(path, model, params, tokenizer, format="hf", dtype=dtype)
    yield "transformers eager", transformers_engine(path, dtype, False)
    if flags.compile:
      yield "transformers compiled", transformers_engine(path, dtype, True)
  if has("llama_cpp"):
    room = flags.prompt + flags.new
    for kind in (dtype, "q8_0"):
      path = work / f"{kind}.gguf"
      if not path.exists():
        jaxlm.save(path, model, params, tokenizer, format="gguf", dtype=kind)
      name = f"llama.cpp {kind}"
      yield name, llama_engine(path, flags.threads, room, batch)


def parse() -> argparse.Namespace:
  """The flags."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = flags.add_argument
  add("--model", required=True, help="a .gguf file or a model's directory")
  add("--dtypes", default="float32,bfloat16")
  add("--batches", default="1,8")
  add("--prompt", type=int, default=128, help="tokens of a prompt")
  add("--new", type=int, default=128, help="tokens that are made")
  add("--rounds", type=int, default=5)
  add("--threads", type=int, default=os.cpu_count())
  add("--no-compile", dest="compile", action="store_false")
  add("--work", help="where exported weights are kept; else they are not")
  return flags.parse_args()


def main() -> None:
  flags = parse()
  warnings.filterwarnings("ignore")
  logging.getLogger("torch").setLevel(logging.ERROR)
  host.prepare()
  import jaxlm

  if has("torch"):
    import torch

    torch.set_num_threads(flags.threads)
  temporary = tempfile.TemporaryDirectory()
  work = Path(flags.work or temporary.name)
  work.mkdir(parents=True, exist_ok=True)
  model, params = jaxlm.load(flags.model, dtype="float32")
  tokenizer = jaxlm.load_tokenizer(flags.model)
  readme = Path(__file__).parents[1] / "README.md"
  text = np.array(tokenizer.encode(readme.read_text("utf-8")), np.int32)
  pool = ThreadPoolExecutor(flags.threads)
  print(f"{model.n_params() / 1e6:.0f}M parameters, {flags.threads} threads")
  for dtype in flags.dtypes.split(","):
    for batch in map(int, flags.batches.split(",")):
      prompts = np.resize(text, (batch, flags.prompt))
      load = os.getloadavg()[0]
      engines = dict(
        engines_of(flags, work, model, params, tokenizer, dtype, batch)
      )
      took, same, speeds = compare(
        engines, prompts, flags.new, flags.rounds, pool
      )
      title = (
        f"{dtype}, batch {batch}, prompt {flags.prompt}, {flags.new} new "
        f"(load {load:.1f} to {os.getloadavg()[0]:.1f})"
      )
      found = table(title, took, same, batch, flags.prompt, flags.new)
      if batch == 1:
        size = model.n_params() * (2 if "16" in dtype else 4)
        share(found["jaxlm"][1], speeds, size)
      sys.stdout.flush()
      del engines
      gc.collect()


if __name__ == "__main__":
  main()
