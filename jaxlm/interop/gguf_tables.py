"""What GGUF calls things, per architecture: tables, and no code that asks.

A GGUF file names its architecture ('llama', 'gptneox', ...), its numbers
('llama.block_count') and its tensors ('blk.0.attn_q.weight') in a vocabulary
of its own, and llama.cpp stores some tensors otherwise than the Hugging Face
hub does. An `Arch` is the translation of one architecture. Sources: the name
map of the `gguf` package and llama.cpp's converter
(https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py).
"""

from jaxlm.interop.gguf_arch import Arch, lines
from jaxlm.interop.gguf_layouts import (
  GateUp,
  HeadsApart,
  LatentHeads,
  PairedRows,
  PlusOne,
  Same,
  Turned,
)
from jaxlm.interop.gguf_numbers import (
  Fraction,
  LatentSizes,
  QueryScale,
  Wide,
  Windows,
)

# --- Numbers ----------------------------------------------------------------

_SIZES = (
  ("context_length", "max_position_embeddings"),
  ("embedding_length", "hidden_size"),
  ("block_count", "num_hidden_layers"),
  ("attention.head_count", "num_attention_heads"),
)
_PLAIN = (
  *_SIZES,
  ("feed_forward_length", "intermediate_size"),
  ("attention.head_count_kv", "num_key_value_heads"),
  ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
)
_HEAD = (
  ("attention.key_length", "head_dim"),
  ("attention.value_length", "head_dim"),
)
_RMS = (*_PLAIN, *_HEAD)
_ROTATED = (("rope.dimension_count", "head_dim"), *_RMS)
_SOFTCAPS = (
  ("attn_logit_softcapping", "attn_logit_softcapping"),
  ("final_logit_softcapping", "final_logit_softcapping"),
)
_WINDOW = (("attention.sliding_window", "sliding_window"),)

# --- Tensors ----------------------------------------------------------------

_ENDS = lines(
  Same(),
  ("token_embd.weight", "model.embed_tokens.weight"),
  ("output_norm.weight", "model.norm.weight"),
  ("output.weight", "lm_head.weight"),
)
_L = "model.layers.{}"
_NORMS = lines(
  Same(),
  ("blk.{}.attn_norm.weight", f"{_L}.input_layernorm.weight"),
  ("blk.{}.ffn_norm.weight", f"{_L}.post_attention_layernorm.weight"),
)
_QK = (
  ("blk.{}.attn_q.*", f"{_L}.self_attn.q_proj.*"),
  ("blk.{}.attn_k.*", f"{_L}.self_attn.k_proj.*"),
)
_QUERIES = lines(Same(), *_QK)
_PAIRED = (
  *lines(PairedRows("num_attention_heads"), _QK[0]),
  *lines(PairedRows("num_key_value_heads"), _QK[1]),
)
_VALUES = lines(
  Same(),
  ("blk.{}.attn_v.*", f"{_L}.self_attn.v_proj.*"),
  ("blk.{}.attn_output.*", f"{_L}.self_attn.o_proj.*"),
)
_QK_NORM = (
  ("blk.{}.attn_q_norm.weight", f"{_L}.self_attn.q_norm.weight"),
  ("blk.{}.attn_k_norm.weight", f"{_L}.self_attn.k_norm.weight"),
)
_GLU = lines(
  Same(),
  ("blk.{}.ffn_gate.weight", f"{_L}.mlp.gate_proj.weight"),
  ("blk.{}.ffn_up.weight", f"{_L}.mlp.up_proj.weight"),
  ("blk.{}.ffn_down.weight", f"{_L}.mlp.down_proj.weight"),
)
_E = f"{_L}.mlp.experts.{{expert}}"
_EXPERTS = lines(
  Same(),
  ("blk.{}.ffn_gate_inp.weight", f"{_L}.mlp.gate.weight"),
  ("blk.{}.ffn_gate_exps.weight", f"{_E}.gate_proj.weight"),
  ("blk.{}.ffn_up_exps.weight", f"{_E}.up_proj.weight"),
  ("blk.{}.ffn_down_exps.weight", f"{_E}.down_proj.weight"),
)
_B = f"{_L}.block_sparse_moe"
_SPARSE = lines(
  Same(),
  ("blk.{}.ffn_gate_inp.weight", f"{_B}.gate.weight"),
  ("blk.{}.ffn_gate_exps.weight", f"{_B}.experts.{{expert}}.w1.weight"),
  ("blk.{}.ffn_up_exps.weight", f"{_B}.experts.{{expert}}.w3.weight"),
  ("blk.{}.ffn_down_exps.weight", f"{_B}.experts.{{expert}}.w2.weight"),
)
_SHARED = lines(
  Same(),
  ("blk.{}.exp_probs_b.bias", f"{_L}.mlp.gate.e_score_correction_bias"),
  (
    "blk.{}.ffn_gate_shexp.weight",
    f"{_L}.mlp.shared_experts.gate_proj.weight",
  ),
  ("blk.{}.ffn_up_shexp.weight", f"{_L}.mlp.shared_experts.up_proj.weight"),
  (
    "blk.{}.ffn_down_shexp.weight",
    f"{_L}.mlp.shared_experts.down_proj.weight",
  ),
)
_LATENT = (
  *lines(
    Same(),
    ("blk.{}.attn_q.weight", f"{_L}.self_attn.q_proj.weight"),
    ("blk.{}.attn_q_a.weight", f"{_L}.self_attn.q_a_proj.weight"),
    ("blk.{}.attn_q_a_norm.weight", f"{_L}.self_attn.q_a_layernorm.weight"),
    ("blk.{}.attn_q_b.weight", f"{_L}.self_attn.q_b_proj.weight"),
    (
      "blk.{}.attn_kv_a_mqa.weight",
      f"{_L}.self_attn.kv_a_proj_with_mqa.weight",
    ),
    ("blk.{}.attn_kv_a_norm.weight", f"{_L}.self_attn.kv_a_layernorm.weight"),
    ("blk.{}.attn_output.weight", f"{_L}.self_attn.o_proj.weight"),
  ),
  *lines(
    LatentHeads(),
    (
      "blk.{}.attn_k_b.weight blk.{}.attn_v_b.weight",
      f"{_L}.self_attn.kv_b_proj.weight",
    ),
  ),
)
_GEMMA_NORMS = lines(
  PlusOne(),
  ("output_norm.weight", "model.norm.weight"),
  ("blk.{}.attn_norm.weight", f"{_L}.input_layernorm.weight"),
  (
    "blk.{}.post_attention_norm.weight",
    f"{_L}.post_attention_layernorm.weight",
  ),
  ("blk.{}.ffn_norm.weight", f"{_L}.pre_feedforward_layernorm.weight"),
  ("blk.{}.post_ffw_norm.weight", f"{_L}.post_feedforward_layernorm.weight"),
)
_H = "transformer.h.{}"
_N = "gpt_neox.layers.{}"

_LLAMA = (*_ENDS, *_NORMS, *_PAIRED, *_VALUES, *_GLU)
_SILU = {"hidden_act": "silu"}
_LLAMA_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
_LLAMA_SAYS = _SILU | {"mlp_bias": False, "sliding_window": None}
_MOE = (
  ("expert_count", "num_experts"),
  ("expert_count", "num_local_experts"),  # in newer configs
  ("expert_used_count", "num_experts_per_tok"),
)

_LATENT_NUMBERS = (
  *_PLAIN,
  ("attention.q_lora_rank", "q_lora_rank"),
  ("attention.kv_lora_rank", "kv_lora_rank"),
  ("attention.value_length_mla", "v_head_dim"),
  ("rope.dimension_count", "qk_rope_head_dim"),
  ("leading_dense_block_count", "first_k_dense_replace"),
  ("expert_feed_forward_length", "moe_intermediate_size"),
  ("expert_count", "n_routed_experts"),
  ("expert_used_count", "num_experts_per_tok"),
  ("expert_shared_count", "n_shared_experts"),
  ("expert_group_count", "n_group"),
  ("expert_group_used_count", "topk_group"),
  ("expert_weights_scale", "routed_scaling_factor"),
  ("expert_weights_norm", "norm_topk_prob"),
)
_LATENT_SAYS = _SILU | {"attention_bias": False, "moe_layer_freq": 1}

ARCHS = (
  Arch(
    "llama",
    ("mixtral",),
    (*_ENDS, *_NORMS, *_PAIRED, *_VALUES, *_SPARSE),
    (
      *_ROTATED,
      ("expert_count", "num_local_experts"),
      ("expert_used_count", "num_experts_per_tok"),
    ),
    _SILU | {"sliding_window": None},
    needs=("expert_count", 1),
  ),
  Arch(
    "llama",
    ("llama", "mistral"),
    _LLAMA,
    _ROTATED,
    _LLAMA_SAYS,
    _LLAMA_BIAS,
  ),
  Arch(
    "smollm3",
    ("smollm3",),
    _LLAMA,
    _ROTATED,
    _SILU
    | {"mlp_bias": False, "use_sliding_window": False}
    | {"no_rope_layer_interval": 4},
    _LLAMA_BIAS,
  ),
  Arch(
    "qwen2",
    ("qwen2",),
    (*_ENDS, *_NORMS, *_QUERIES, *_VALUES, *_GLU),
    _RMS,
    _SILU | {"use_sliding_window": False},
  ),
  Arch(
    "qwen3",
    ("qwen3",),
    (*_ENDS, *_NORMS, *_QUERIES, *_VALUES, *lines(Same(), *_QK_NORM), *_GLU),
    _RMS,
    _SILU | {"use_sliding_window": False, "attention_bias": False},
  ),
  Arch(
    "qwen3moe",
    ("qwen3_moe",),
    (
      *_ENDS,
      *_NORMS,
      *_QUERIES,
      *_VALUES,
      *lines(Same(), *_QK_NORM),
      *_EXPERTS,
    ),
    (
      *_RMS,
      *_MOE,
      ("expert_feed_forward_length", "moe_intermediate_size"),
    ),
    _SILU
    | {"use_sliding_window": False, "attention_bias": False}
    | {"norm_topk_prob": True, "decoder_sparse_step": 1}
    | {"mlp_only_layers": []},
  ),
  Arch(
    "gemma2",
    ("gemma2",),
    (_ENDS[0], *_GEMMA_NORMS, *_QUERIES, *_VALUES, *_GLU),
    (*_RMS, *_SOFTCAPS, *_WINDOW),
    {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    also=(QueryScale(wide=46), Windows(2)),
  ),
  Arch(
    "gemma3",
    ("gemma3_text",),
    (
      _ENDS[0],
      _ENDS[2],
      *_GEMMA_NORMS,
      *_QUERIES,
      *_VALUES,
      *lines(PlusOne(), *_QK_NORM),
      *_GLU,
    ),
    (*_RMS, *_SOFTCAPS, *_WINDOW),
    {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    also=(QueryScale(wide=62), Windows(6)),
    local_theta=10000.0,
  ),
  Arch(
    "olmo2",
    ("olmo2",),
    (
      *_ENDS,
      *_QUERIES,
      *_VALUES,
      *_GLU,
      *lines(
        Same(),
        *_QK_NORM,
        (
          "blk.{}.post_attention_norm.weight",
          f"{_L}.post_attention_layernorm.weight",
        ),
        (
          "blk.{}.post_ffw_norm.weight",
          f"{_L}.post_feedforward_layernorm.weight",
        ),
      ),
    ),
    _RMS,
    _SILU | {"attention_bias": False},
  ),
  Arch(
    "deepseek2",
    ("deepseek_v3",),
    (*_ENDS, *_NORMS, *_LATENT, *_GLU, *_EXPERTS, *_SHARED),
    _LATENT_NUMBERS,
    _LATENT_SAYS | {"scoring_func": "sigmoid", "rope_interleave": True},
    also=(LatentSizes(gating=2),),
    needs=("expert_gating_func", 2),
  ),
  Arch(
    "deepseek2",
    ("deepseek_v2",),
    (*_ENDS, *_NORMS, *_LATENT, *_GLU, *_EXPERTS, *_SHARED),
    _LATENT_NUMBERS,
    _LATENT_SAYS | {"scoring_func": "softmax"},
    also=(LatentSizes(gating=1),),
  ),
  Arch(
    "gpt-oss",
    ("gpt_oss",),
    (
      *_ENDS,
      *_QUERIES,
      *_VALUES,
      *lines(
        Same(),
        ("blk.{}.attn_norm.weight", f"{_L}.input_layernorm.weight"),
        (
          "blk.{}.post_attention_norm.weight",
          f"{_L}.post_attention_layernorm.weight",
        ),
        ("blk.{}.attn_sinks.weight", f"{_L}.self_attn.sinks"),
        ("blk.{}.ffn_gate_inp.*", f"{_L}.mlp.router.*"),
        ("blk.{}.ffn_down_exps.bias", f"{_L}.mlp.experts.down_proj_bias"),
      ),
      *lines(
        Turned(),
        ("blk.{}.ffn_down_exps.weight", f"{_L}.mlp.experts.down_proj"),
      ),
      *lines(
        GateUp(turns=True),
        (
          "blk.{}.ffn_gate_exps.weight blk.{}.ffn_up_exps.weight",
          f"{_L}.mlp.experts.gate_up_proj",
        ),
      ),
      *lines(
        GateUp(turns=True, biases=True),
        (
          "blk.{}.ffn_gate_exps.bias blk.{}.ffn_up_exps.bias",
          f"{_L}.mlp.experts.gate_up_proj_bias",
        ),
      ),
    ),
    (
      *_RMS,
      *_WINDOW,
      ("expert_feed_forward_length", "intermediate_size"),
      ("expert_count", "num_local_experts"),
      ("expert_used_count", "num_experts_per_tok"),
    ),
    _SILU | {"attention_bias": True, "swiglu_limit": 7.0},
    also=(Windows(2),),
    rope={"truncate": False},
  ),
  Arch(
    "gpt2",
    ("gpt2",),
    (
      *lines(
        Same(),
        ("token_embd.weight", "transformer.wte.weight"),
        ("position_embd.weight", "transformer.wpe.weight"),
        ("output_norm.*", "transformer.ln_f.*"),
        ("output.weight", "lm_head.weight"),
        ("blk.{}.attn_norm.*", f"{_H}.ln_1.*"),
        ("blk.{}.ffn_norm.*", f"{_H}.ln_2.*"),
        ("blk.{}.attn_qkv.bias", f"{_H}.attn.c_attn.bias"),
        ("blk.{}.attn_output.bias", f"{_H}.attn.c_proj.bias"),
        ("blk.{}.ffn_up.bias", f"{_H}.mlp.c_fc.bias"),
        ("blk.{}.ffn_down.bias", f"{_H}.mlp.c_proj.bias"),
      ),
      *lines(
        Turned(),
        ("blk.{}.attn_qkv.weight", f"{_H}.attn.c_attn.weight"),
        ("blk.{}.attn_output.weight", f"{_H}.attn.c_proj.weight"),
        ("blk.{}.ffn_up.weight", f"{_H}.mlp.c_fc.weight"),
        ("blk.{}.ffn_down.weight", f"{_H}.mlp.c_proj.weight"),
      ),
    ),
    (
      ("context_length", "n_positions"),
      ("embedding_length", "n_embd"),
      ("block_count", "n_layer"),
      ("attention.head_count", "n_head"),
      ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    ),
    {"activation_function": "gelu_new"},
    also=(Wide("n_inner", "n_embd"),),
    rope=None,
  ),
  Arch(
    "gptneox",
    ("gpt_neox",),
    (
      *lines(
        Same(),
        ("token_embd.weight", "gpt_neox.embed_in.weight"),
        ("output_norm.*", "gpt_neox.final_layer_norm.*"),
        ("output.weight", "embed_out.weight"),
        ("blk.{}.attn_norm.*", f"{_N}.input_layernorm.*"),
        ("blk.{}.ffn_norm.*", f"{_N}.post_attention_layernorm.*"),
        ("blk.{}.attn_output.*", f"{_N}.attention.dense.*"),
        ("blk.{}.ffn_up.*", f"{_N}.mlp.dense_h_to_4h.*"),
        ("blk.{}.ffn_down.*", f"{_N}.mlp.dense_4h_to_h.*"),
      ),
      *lines(
        HeadsApart("num_attention_heads"),
        ("blk.{}.attn_qkv.*", f"{_N}.attention.query_key_value.*"),
      ),
    ),
    (
      *_SIZES,
      ("feed_forward_length", "intermediate_size"),
      ("attention.layer_norm_epsilon", "layer_norm_eps"),
      ("use_parallel_residual", "use_parallel_residual"),
    ),
    {"hidden_act": "gelu", "attention_bias": True},
    also=(Fraction("rotary_pct"),),
  ),
  Arch(
    "bloom",
    ("bloom",),
    (
      *lines(
        Same(),
        ("token_embd.weight", "transformer.word_embeddings.weight"),
        ("token_embd_norm.*", "transformer.word_embeddings_layernorm.*"),
        ("output_norm.*", "transformer.ln_f.*"),
        ("output.weight", "lm_head.weight"),
        ("blk.{}.attn_norm.*", f"{_H}.input_layernorm.*"),
        ("blk.{}.ffn_norm.*", f"{_H}.post_attention_layernorm.*"),
        ("blk.{}.attn_output.*", f"{_H}.self_attention.dense.*"),
        ("blk.{}.ffn_up.*", f"{_H}.mlp.dense_h_to_4h.*"),
        ("blk.{}.ffn_down.*", f"{_H}.mlp.dense_4h_to_h.*"),
      ),
      *lines(
        HeadsApart("n_head"),
        ("blk.{}.attn_qkv.*", f"{_H}.self_attention.query_key_value.*"),
      ),
    ),
    (
      ("context_length", "seq_length"),
      ("embedding_length", "hidden_size"),
      ("block_count", "n_layer"),
      ("attention.head_count", "n_head"),
      ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    ),
    {"apply_residual_connection_post_layernorm": False},
    also=(Wide("n_inner", "hidden_size"),),
    rope=None,
  ),
)
