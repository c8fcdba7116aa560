"""config.json as authors published it: older keys, and what is refused.

The values are facts of the files that came with the weights, in the spelling
of their year; golden files have transformers' own, newer one.
"""

import pytest

from jaxlm.errors import UserError
from jaxlm.models import hub

PUBLISHED = hub.published()

CONFIGS = {
  "mistral-7b-v0.1": {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
  },
  "mixtral-8x7b": {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "vocab_size": 32000,
  },
  "qwen2.5-0.5b": {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
  },
  "qwen3-30b-a3b": {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
  },
  "smollm3-3b": {
    "model_type": "smollm3",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 65536,
    "no_rope_layer_interval": 4,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000.0,
    "vocab_size": 128256,
  },
  "pythia-70m": {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "vocab_size": 50304,
  },
  "bloom-560m": {
    "model_type": "bloom",
    "apply_residual_connection_post_layernorm": False,
    "layer_norm_epsilon": 1e-05,
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "seq_length": 2048,
    "vocab_size": 250880,
  },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_older_spellings_are_read(name: str):
  """The file as published is the model as published."""
  config = CONFIGS[name]
  assert hub.find(config).read(config) == PUBLISHED[name]


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("mistral-7b-v0.1", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("mistral-7b-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_type"),
    ("mixtral-8x7b", {"num_experts_per_tok": 9}, "top_k=9 of 8 experts"),
    (
      "qwen2.5-0.5b",
      {"layer_types": ["sliding_attention"] * 24},
      "layer_types are sliding_attention; .* can be full_attention",
    ),
    (
      "qwen2.5-0.5b",
      {"layer_types": ["full_attention"] * 23},
      "23 entries for 24 layers",
    ),
    ("qwen3-30b-a3b", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3-30b-a3b", {"num_experts": 0}, "of 0 experts"),
    ("smollm3-3b", {"no_rope_layers": [1, 0]}, "2 entries for 36 layers"),
    ("smollm3-3b", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("pythia-70m", {"hidden_act": "relu"}, "hidden_act='relu'.*'gelu_fast'"),
    ("pythia-70m", {"num_key_value_heads": 2}, "num_key_value_heads=2.* be 8"),
    ("bloom-560m", {"n_layer": None}, "no 'n_layer' or 'num_hidden_layers'"),
    ("bloom-560m", {"n_inner": 512}, "n_inner=512.* can be 4096"),
  ],
)
def test_what_is_not_built_is_refused(name: str, change: dict, message: str):
  """Never read as another model: the key and what it can be are named."""
  config = CONFIGS[name] | change
  with pytest.raises(UserError, match=message):
    hub.find(config).read(config)


def test_balancing_counts_where_the_config_says_so():
  """As in transformers: their loss is added only where their output is on."""
  config = CONFIGS["mixtral-8x7b"] | {"output_router_logits": True}
  model = hub.find(config).read(config)
  assert model.blocks[0].ffn.router.balance == 0.02
  assert hub.find(config).config(model)["router_aux_loss_coef"] == 0.02
