"""Checks losses of preferences and distillation against TRL's own.

Needs torch 2.13, transformers 5, trl 1.16 and datasets beside jaxlm's own
requirements: `python tests/golden/check_trl.py`.

First the functions that TRL has as functions: its CPO trainer's (conservative
DPO and SimPO are among its kinds), ORPO's odds ratio, and the generalised
Jensen-Shannon divergence, on random numbers. Then whole trainers: DPO, IPO, KTO
and the reward trainer make their batches from texts and run a tiny model and
its reference; the losses that they report are compared with those of
`jaxlm.objectives` on the same tokens and weights. Bounds are relative: 1e-6 for
functions in float32, 1e-5 for models. Printed are both losses and their
difference.
"""

import json
import os
import pathlib
import sys
import tempfile
import types

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
  AutoConfig,
  AutoModelForCausalLM,
  AutoModelForSequenceClassification,
  PreTrainedTokenizerFast,
)
from trl import (
  DPOConfig,
  DPOTrainer,
  KTOConfig,
  KTOTrainer,
  RewardConfig,
  RewardTrainer,
)
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer

from jaxlm import losses
from jaxlm import preference_losses as pref
from jaxlm.layers.compute import DEFAULT
from jaxlm.models import hub
from jaxlm.objectives import preference
from jaxlm.objectives.reward import Compare

HERE = pathlib.Path(__file__).parent
VOCAB = 67  # of the tiny Llama
WORDS = "abcdefghijklmnopqrstuvwxyz0123456789"
PAIRS = [
  ("ab", "cde", "xyz01"),
  ("hello", "w0rld", "no"),
  ("123", "6", "77"),
  ("q", "zzzz", "y"),
]


def told(name: str, theirs: float, ours: float, bound: float) -> None:
  """Prints a line; the program ends with an error if it is too far off."""
  away = abs(theirs - ours) / max(abs(theirs), 1e-12)
  print(f"{name:34} {theirs:14.8f} {float(ours):14.8f} {away:9.1e}")
  if away > bound:
    sys.exit(f"{name}: {away} is more than {bound}")


# --- Functions --------------------------------------------------------------


def functions() -> None:
  """Formulas on random log-probabilities and logits."""
  draw = np.random.default_rng(0)
  good, bad = draw.normal(size=(2, 64)).astype(np.float32)
  torches = torch.tensor(good), torch.tensor(bad)

  def cpo(**fields):
    base = {"alpha": 0.0, "label_smoothing": 0.0, "beta": 0.3, "simpo_gamma": 0}
    fake = types.SimpleNamespace(**base | fields)
    fake.accelerator = types.SimpleNamespace(device="cpu")
    return float(CPOTrainer.cpo_loss(fake, *torches)[0].mean())

  theirs = cpo(loss_type="sigmoid", label_smoothing=0.1)
  told("dpo, smoothing 0.1", theirs, pref.dpo(good, bad, 0.3, 0.1).mean(), 1e-6)
  theirs = cpo(loss_type="ipo")
  told("ipo", theirs, pref.ipo(good, bad, 0.3).mean(), 1e-6)
  theirs = cpo(loss_type="hinge")
  told("hinge", theirs, pref.hinge(0.3 * good, 0.3 * bad).mean(), 1e-6)
  theirs = cpo(loss_type="simpo", simpo_gamma=0.7)
  told("simpo", theirs, pref.simpo(good, bad, 0.3, 0.7).mean(), 1e-6)

  good, bad = -np.exp(good), -np.exp(bad)  # logarithms of probabilities
  fake = types.SimpleNamespace(beta=0.2)
  fake.accelerator = types.SimpleNamespace(device="cpu")
  torches = torch.tensor(good), torch.tensor(bad)
  theirs = -float(ORPOTrainer.odds_ratio_loss(fake, *torches)[0].mean())
  told("orpo, odds ratio", theirs, pref.orpo(good, bad, 0.2).mean(), 1e-6)

  teacher, student = draw.normal(size=(2, 6, 5, 31)).astype(np.float32) * 2
  for name, beta, fn in (
    ("forward KL", 0, losses.forward_kl),
    ("reverse KL", 1, losses.reverse_kl),
    ("Jensen-Shannon, 0.3", 0.3, lambda t, s: losses.jensen_shannon(t, s, 0.3)),
  ):
    both = torch.tensor(student), torch.tensor(teacher)
    theirs = GKDTrainer.generalized_jsd_loss(*both, beta=beta, reduction="sum")
    told(name, float(theirs), fn(teacher, student).sum(), 1e-6)


# --- Trainers ---------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
  """One token for each character."""
  ids = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
  ids |= {c: i + 3 for i, c in enumerate(WORDS)}
  made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
  made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  return PreTrainedTokenizerFast(
    tokenizer_object=made,
    pad_token="<pad>",
    eos_token="<eos>",
    unk_token="<unk>",
  )


class Base:
  """The tiny Llama of a golden file, there and here."""

  def __init__(self, seed: int):
    with np.load(HERE / "families_llama.npz") as file:
      arrays = dict(file)
    said = json.loads(str(arrays["config"]))
    draw = np.random.default_rng(seed)
    weights = {
      k.removeprefix("weight/"): v.astype(np.float32)
      + 0.02 * draw.normal(size=v.shape).astype(np.float32)
      for k, v in arrays.items()
      if k.startswith("weight/")
    }
    self.config = AutoConfig.for_model(**said)
    self.config.pad_token_id, self.config.eos_token_id = 0, 1
    self.weights = {k: torch.tensor(v) for k, v in weights.items()}
    found = hub.find(said)
    self.model = found.read(said)
    params = found.names.load(self.model, weights)
    self.params = jax.tree.map(jnp.asarray, params)

  def torch(self, kind=AutoModelForCausalLM) -> torch.nn.Module:
    """The model of transformers, in float32."""
    model = kind.from_config(self.config).float()
    model.load_state_dict(self.weights, strict=False)
    return model


def ours(tokens: list[list[list[int]]], prompts: list[int]) -> dict:
  """A batch of ours from the tokens of each side of each pair."""
  seq = max(len(side) for sides in tokens for side in sides)
  shape = (len(tokens), len(tokens[0]), seq)
  batch = {"tokens": np.zeros(shape, np.int32)}
  batch |= {name: np.zeros(shape, bool) for name in ("mask", "text")}
  for i, sides in enumerate(tokens):
    for j, side in enumerate(sides):
      batch["tokens"][i, j, : len(side)] = side
      batch["text"][i, j, : len(side)] = True
      batch["mask"][i, j, prompts[i] : len(side)] = True
  return {k: jnp.asarray(v) for k, v in batch.items()}


def rows(encode) -> tuple[list, list[int]]:
  """Tokens of prompt, response and end, by pair and side."""
  out = [
    [[*encode(prompt + side), 1] for side in sides] for prompt, *sides in PAIRS
  ]
  return out, [len(prompt) for prompt, *_ in PAIRS]


def loss_of(trainer, model) -> float:
  """What a trainer says of its first batch."""
  batch = next(iter(trainer.get_train_dataloader()))
  with torch.no_grad():
    return float(trainer.compute_loss(model, batch))


def kto(made: dict, policy: Base, reference: Base):
  """Our loss of a batch of the KTO trainer's, its mismatched pairs included."""

  def ratio(prefix: str):
    batch = {
      name: jnp.asarray(made[f"{prefix}{key}"].numpy())[:, None]
      for name, key in (("tokens", "input_ids"), ("mask", "completion_mask"))
    }
    batch["mask"] = batch["mask"].astype(bool)
    sides = [
      preference.likelihoods(b.model, b.params, batch, None, DEFAULT).logp[:, 0]
      for b in (policy, reference)
    ]
    return sides[0] - sides[1]

  good = jnp.asarray(np.array(made["label"], bool))
  z = pref.kl_baseline(ratio("KL_"))
  print(f"{'':34} (its baseline is {float(z):.4f})")
  return pref.kto(ratio(""), good, z, 0.3, (1.5, 0.5)).mean()


def trainers() -> None:
  """Whole trainers on four pairs."""
  tok, policy, reference = tokenizer(), Base(2), Base(1)
  encode = lambda text: tok(text)["input_ids"]  # noqa: E731
  batch = ours(*rows(encode))
  data = Dataset.from_list(
    [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
  )
  folder = tempfile.mkdtemp()
  common = {
    "output_dir": folder,
    "per_device_train_batch_size": len(PAIRS),
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
    "seed": 0,
  }
  for kind, form in (("sigmoid", preference.DPO), ("ipo", preference.IPO)):
    model = policy.torch()
    trainer = DPOTrainer(
      model=model,
      ref_model=reference.torch(),
      args=DPOConfig(loss_type=[kind], beta=0.3, **common),
      train_dataset=data,
      processing_class=tok,
    )
    loss, _ = preference.Preference(form(0.3))(
      policy.model, policy.params, batch, None, DEFAULT, reference.params
    )
    told(f"DPOTrainer, {kind}", loss_of(trainer, model), loss, 1e-5)

  unpaired = [
    {"prompt": p, "completion": text, "label": label}
    for p, good, bad in PAIRS
    for text, label in ((good, True), (bad, False))
  ]
  options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
  model = policy.torch()
  trainer = KTOTrainer(
    model=model,
    ref_model=reference.torch(),
    args=KTOConfig(**options, **common | {"per_device_train_batch_size": 8}),
    train_dataset=Dataset.from_list(unpaired),
    processing_class=tok,
  )
  made = next(iter(trainer.get_train_dataloader()))
  told(
    "KTOTrainer", loss_of(trainer, model), kto(made, policy, reference), 1e-5
  )

  model = AutoModelForSequenceClassification
  policy.config.num_labels = 1
  scorer = policy.torch(model)
  torch.manual_seed(0)
  torch.nn.init.normal_(scorer.score.weight)
  trainer = RewardTrainer(
    model=scorer,
    args=RewardConfig(center_rewards_coefficient=0.1, **common),
    train_dataset=data,
    processing_class=tok,
  )
  head = scorer.score.weight.detach().numpy()[0]
  trunk = {k: v for k, v in policy.params.items() if k != "head"}
  loss, _ = Compare(centre=0.1)(
    policy.model, {"trunk": trunk, "head": {"w": head}}, batch, None, DEFAULT
  )
  told("RewardTrainer, centred", loss_of(trainer, scorer), loss, 1e-5)


if __name__ == "__main__":
  print(f"{'':34} {'TRL':>14} {'jaxlm':>14} {'relative':>9}")
  functions()
  trainers()
