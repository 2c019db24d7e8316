"""GGUF's names for tensors and metadata, and Hugging Face's: one table for all architectures.

A new architecture is one more entry of `ARCHITECTURES`, and rows for what it has that no other had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# GGUF tensor -> (canonical name: Hugging Face's without "model.", shape). "*" stands for the layer.
# The words of a shape: hidden, vocab, head (one head), q and kv (all heads), qkv (all three), rope (half the rotated part of a head),
# ffn (and ffn2, gate and up in one), experts, expert_ffn, shared_ffn, one (which files leave out). Weights are (out, in).
TENSORS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "token_embd.weight": ("embed_tokens.weight", "vocab hidden"),
        "output_norm.weight": ("norm.weight", "hidden"),
        "output.weight": ("lm_head.weight", "vocab hidden"),
        "rope_freqs.weight": ("rope_freqs.weight", "rope"),
        "rope_factors_long.weight": ("rope_factors_long.weight", "rope"),
        "rope_factors_short.weight": ("rope_factors_short.weight", "rope"),
        "blk.*.attn_norm.weight": ("layers.*.input_layernorm.weight", "hidden"),
        "blk.*.attn_q.weight": ("layers.*.self_attn.q_proj.weight", "q hidden"),
        "blk.*.attn_k.weight": ("layers.*.self_attn.k_proj.weight", "kv hidden"),
        "blk.*.attn_v.weight": ("layers.*.self_attn.v_proj.weight", "kv hidden"),
        "blk.*.attn_qkv.weight": ("layers.*.self_attn.qkv_proj.weight", "qkv hidden"),
        "blk.*.attn_output.weight": ("layers.*.self_attn.o_proj.weight", "hidden q"),
        "blk.*.attn_q.bias": ("layers.*.self_attn.q_proj.bias", "q"),
        "blk.*.attn_k.bias": ("layers.*.self_attn.k_proj.bias", "kv"),
        "blk.*.attn_v.bias": ("layers.*.self_attn.v_proj.bias", "kv"),
        "blk.*.attn_output.bias": ("layers.*.self_attn.o_proj.bias", "hidden"),
        "blk.*.attn_q_norm.weight": ("layers.*.self_attn.q_norm.weight", "head"),
        "blk.*.attn_k_norm.weight": ("layers.*.self_attn.k_norm.weight", "head"),
        "blk.*.post_attention_norm.weight": ("layers.*.post_attention_layernorm.weight", "hidden"),
        "blk.*.ffn_norm.weight": ("layers.*.post_attention_layernorm.weight", "hidden"),
        "blk.*.post_ffw_norm.weight": ("layers.*.post_feedforward_layernorm.weight", "hidden"),
        "blk.*.ffn_gate.weight": ("layers.*.mlp.gate_proj.weight", "ffn hidden"),
        "blk.*.ffn_up.weight": ("layers.*.mlp.up_proj.weight", "ffn hidden"),
        "blk.*.ffn_down.weight": ("layers.*.mlp.down_proj.weight", "hidden ffn"),
        "blk.*.ffn_gate.bias": ("layers.*.mlp.gate_proj.bias", "ffn"),
        "blk.*.ffn_up.bias": ("layers.*.mlp.up_proj.bias", "ffn"),
        "blk.*.ffn_down.bias": ("layers.*.mlp.down_proj.bias", "hidden"),
        "blk.*.ffn_gate_inp.weight": ("layers.*.mlp.gate.weight", "experts hidden"),
        "blk.*.ffn_gate_exps.weight": ("layers.*.mlp.experts.gate_proj.weight", "experts expert_ffn hidden"),
        "blk.*.ffn_up_exps.weight": ("layers.*.mlp.experts.up_proj.weight", "experts expert_ffn hidden"),
        "blk.*.ffn_down_exps.weight": ("layers.*.mlp.experts.down_proj.weight", "experts hidden expert_ffn"),
        "blk.*.ffn_gate_inp_shexp.weight": ("layers.*.mlp.shared_expert_gate.weight", "one hidden"),
        "blk.*.ffn_gate_shexp.weight": ("layers.*.mlp.shared_expert.gate_proj.weight", "shared_ffn hidden"),
        "blk.*.ffn_up_shexp.weight": ("layers.*.mlp.shared_expert.up_proj.weight", "shared_ffn hidden"),
        "blk.*.ffn_down_shexp.weight": ("layers.*.mlp.shared_expert.down_proj.weight", "hidden shared_ffn"),
    }
)

# metadata key, after the architecture's name and a dot -> Hugging Face config key, for whole numbers ...
INTEGERS: Mapping[str, str] = MappingProxyType(
    {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.sliding_window": "sliding_window",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "vocab_size": "vocab_size",
    }
)
# ... and for others
REALS: Mapping[str, str] = MappingProxyType(
    {
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
        "rope.freq_base_swa": "rope_local_base_freq",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
)
REQUIRED_KEYS = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)

# metadata key -> Hugging Face generation_config.json key
SAMPLING: Mapping[str, str] = MappingProxyType(
    {
        "general.sampling.temp": "temperature",
        "general.sampling.top_k": "top_k",
        "general.sampling.top_p": "top_p",
        "general.sampling.min_p": "min_p",
        "general.sampling.penalty_repeat": "repetition_penalty",
    }
)
SPECIAL_TOKENS: Mapping[str, str] = MappingProxyType(
    {
        "tokenizer.ggml.bos_token_id": "bos_token_id",
        "tokenizer.ggml.eos_token_id": "eos_token_id",
        "tokenizer.ggml.padding_token_id": "pad_token_id",
    }
)
# all tokens that end an answer
END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


@dataclass(frozen=True)
class Architecture:
    """What a file of one GGUF architecture must hold, and what it means.

    Attributes
    ----------
    model_type
        Hugging Face's name.
    tensors, optional
        GGUF names of `TENSORS`, those that must be there and those that may be.
    renamed
        GGUF name -> canonical name, where it differs from `TENSORS`.
    config
        Config entries that metadata does not hold, or may leave out.
    permuted
        Rows of q and k lie interleaved for RoPE, as llama.cpp's converter leaves them.
    sliding_window_pattern
        Every n-th layer attends to everything, the others to a sliding window. Metadata may say otherwise.
    query_scale_from_hidden
        Of the size with this many layers, queries are scaled by hidden size / heads; of all others, by the head dimension.
    """

    model_type: str
    tensors: tuple[str, ...]
    optional: tuple[str, ...] = ("output.weight", "rope_freqs.weight")
    renamed: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False
    sliding_window_pattern: int | None = None
    query_scale_from_hidden: int | None = None


def _layer(*names: str) -> tuple[str, ...]:
    return tuple(f"blk.*.{name}" for name in names)


EMBEDDINGS = ("token_embd.weight", "output_norm.weight")
ATTENTION = _layer("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight", "ffn_norm.weight")
QKV_BIASES = _layer("attn_q.bias", "attn_k.bias", "attn_v.bias")
QK_NORMS = _layer("attn_q_norm.weight", "attn_k_norm.weight")
POST_NORMS = _layer("post_attention_norm.weight", "post_ffw_norm.weight")
FUSED_QKV = _layer("attn_norm.weight", "attn_qkv.weight", "attn_output.weight", "ffn_norm.weight")
MLP = _layer("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
EXPERTS = _layer("ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")
SHARED_EXPERT = _layer("ffn_gate_inp_shexp.weight", "ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight")
BIASES = (*QKV_BIASES, *_layer("attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"))
HEAD_AND_ROPE = ("output.weight", "rope_freqs.weight")

SILU = {"hidden_act": "silu"}
# the converter adds the 1 of Gemma's norms to their weights
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "norm_weight_offset": 0}
FOUR_NORMS = {"blk.*.ffn_norm.weight": "layers.*.pre_feedforward_layernorm.weight"}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("llama", EMBEDDINGS + ATTENTION + MLP, HEAD_AND_ROPE + BIASES, config=SILU, permuted=True),
        "qwen2": Architecture("qwen2", EMBEDDINGS + ATTENTION + QKV_BIASES + MLP, config=SILU),
        "qwen2moe": Architecture(
            "qwen2_moe", EMBEDDINGS + ATTENTION + QKV_BIASES + EXPERTS + SHARED_EXPERT, config={**SILU, "norm_topk_prob": False}
        ),
        "qwen3": Architecture("qwen3", EMBEDDINGS + ATTENTION + QK_NORMS + MLP, config=SILU),
        "qwen3moe": Architecture("qwen3_moe", EMBEDDINGS + ATTENTION + QK_NORMS + EXPERTS, config={**SILU, "norm_topk_prob": True}),
        "gemma": Architecture("gemma", EMBEDDINGS + ATTENTION + MLP, config=GEMMA),
        "gemma2": Architecture(
            "gemma2",
            EMBEDDINGS + ATTENTION + POST_NORMS + MLP,
            renamed=FOUR_NORMS,
            config={**GEMMA, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            sliding_window_pattern=2,
            query_scale_from_hidden=46,
        ),
        "gemma3": Architecture(
            "gemma3_text",
            EMBEDDINGS + ATTENTION + QK_NORMS + POST_NORMS + MLP,
            renamed=FOUR_NORMS,
            config={**GEMMA, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
            sliding_window_pattern=6,
            query_scale_from_hidden=62,
        ),
        "phi3": Architecture(
            "phi3",
            EMBEDDINGS + FUSED_QKV + _layer("ffn_up.weight", "ffn_down.weight"),
            ("output.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
            renamed={"blk.*.ffn_up.weight": "layers.*.mlp.gate_up_proj.weight"},
            config=SILU,
        ),
        "granite": Architecture(
            "granite",
            EMBEDDINGS + ATTENTION + MLP,
            HEAD_AND_ROPE + BIASES,
            config={**SILU, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
            permuted=True,
        ),
    }
)
# what GGUF calls llama too, told apart by its expert_count
MIXTRAL = Architecture("mixtral", EMBEDDINGS + ATTENTION + EXPERTS, config={**SILU, "norm_topk_prob": True}, permuted=True)

# shapes that an architecture has its own words for
SHAPES: Mapping[tuple[str, str], str] = MappingProxyType({("phi3", "blk.*.ffn_up.weight"): "ffn2 hidden"})


def canonical_name(architecture: Architecture, name: str) -> str:
    """The canonical name of a GGUF tensor (with ``*`` for the layer)."""
    return architecture.renamed.get(name, TENSORS[name][0])


def shape_words(architecture: Architecture, name: str) -> tuple[str, ...]:
    """The dimensions of a GGUF tensor (with ``*`` for the layer), in the words of `TENSORS`."""
    return tuple(SHAPES.get((architecture.model_type, name), TENSORS[name][1]).split())
