"""GGUF's names for tensors and metadata, and Hugging Face's: one table for all architectures.

A new architecture is one more entry of `ARCHITECTURES`, and rows for what it has that no other had.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import ModelLoadError

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


class Architecture(NamedTuple):
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
    defaults
        What Hugging Face's configuration class assumes where ``config.json`` is silent.
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
    renamed: Mapping[str, str] = MappingProxyType({})
    config: Mapping[str, Any] = MappingProxyType({})
    defaults: Mapping[str, Any] = MappingProxyType({})
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
ATTENTION_BIASES = (*QKV_BIASES, *_layer("attn_output.bias"))
BIASES = (*ATTENTION_BIASES, *_layer("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"))
HEAD_AND_ROPE = ("output.weight", "rope_freqs.weight")

SILU = {"hidden_act": "silu"}
# the converter adds the 1 of Gemma's norms to their weights
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "norm_weight_offset": 0}
GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "norm_weight_offset": 1}
GEMMA2 = {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3 = {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
    "norm_weight_offset": 1,
}
GRANITE = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
FOUR_NORMS = {"blk.*.ffn_norm.weight": "layers.*.pre_feedforward_layernorm.weight"}

WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
QWEN = {**WINDOW, "max_window_layers": 28}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("llama", EMBEDDINGS + ATTENTION + MLP, HEAD_AND_ROPE + BIASES, config=SILU, permuted=True),
        "qwen2": Architecture("qwen2", EMBEDDINGS + ATTENTION + QKV_BIASES + MLP, config=SILU, defaults=QWEN),
        "qwen2moe": Architecture(
            "qwen2_moe",
            EMBEDDINGS + ATTENTION + QKV_BIASES + EXPERTS + SHARED_EXPERT,
            config={**SILU, "norm_topk_prob": False},
            defaults={**QWEN, "norm_topk_prob": False, "num_experts": 60, "num_experts_per_tok": 4},
        ),
        "qwen3": Architecture(
            "qwen3",
            EMBEDDINGS + ATTENTION + QK_NORMS + MLP,
            HEAD_AND_ROPE + ATTENTION_BIASES,
            config=SILU,
            defaults={**QWEN, "head_dim": 128},
        ),
        "qwen3moe": Architecture(
            "qwen3_moe",
            EMBEDDINGS + ATTENTION + QK_NORMS + EXPERTS,
            HEAD_AND_ROPE + ATTENTION_BIASES,
            config={**SILU, "norm_topk_prob": True},
            defaults={**WINDOW, "norm_topk_prob": False, "num_experts": 128, "num_experts_per_tok": 8},
        ),
        "gemma": Architecture("gemma", EMBEDDINGS + ATTENTION + MLP, config=GEMMA, defaults=GEMMA_DEFAULTS),
        "gemma2": Architecture(
            "gemma2",
            EMBEDDINGS + ATTENTION + POST_NORMS + MLP,
            renamed=FOUR_NORMS,
            config={**GEMMA, **GEMMA2},
            defaults={**GEMMA_DEFAULTS, **GEMMA2, "query_pre_attn_scalar": 256},
            sliding_window_pattern=2,
            query_scale_from_hidden=46,
        ),
        "gemma3": Architecture(
            "gemma3_text",
            EMBEDDINGS + ATTENTION + QK_NORMS + POST_NORMS + MLP,
            renamed=FOUR_NORMS,
            config={**GEMMA, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
            defaults=GEMMA3,
            sliding_window_pattern=6,
            query_scale_from_hidden=62,
        ),
        "phi3": Architecture(
            "phi3",
            EMBEDDINGS + FUSED_QKV + _layer("ffn_up.weight", "ffn_down.weight"),
            ("output.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
            renamed={"blk.*.ffn_up.weight": "layers.*.mlp.gate_up_proj.weight"},
            config=SILU,
            defaults={"original_max_position_embeddings": 4096},
        ),
        "granite": Architecture(
            "granite",
            EMBEDDINGS + ATTENTION + MLP,
            HEAD_AND_ROPE + BIASES,
            config={**SILU, **GRANITE},
            defaults={**GRANITE, "attention_multiplier": 1.0},
            permuted=True,
        ),
        "smollm3": Architecture(
            "smollm3",
            EMBEDDINGS + ATTENTION + MLP,
            HEAD_AND_ROPE + BIASES,
            config={**SILU, "no_rope_layer_interval": 4},
            defaults={"tie_word_embeddings": True, "rope_theta": 2_000_000.0, "no_rope_layer_interval": 4, "use_sliding_window": False},
            permuted=True,
        ),
    }
)
# what GGUF calls llama too, told apart by its expert_count
MIXTRAL = Architecture(
    "mixtral",
    EMBEDDINGS + ATTENTION + EXPERTS,
    config={**SILU, "norm_topk_prob": True},
    defaults={"rope_theta": 1_000_000.0, "num_local_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    permuted=True,
)
MISTRAL = ARCHITECTURES["llama"]._replace(model_type="mistral", defaults={"sliding_window": 4096})

# by Hugging Face's model_type
MODEL_TYPES: Mapping[str, Architecture] = MappingProxyType(
    {architecture.model_type: architecture for architecture in (*ARCHITECTURES.values(), MISTRAL, MIXTRAL)}
)

# Hugging Face's own names that differ from the canonical ones: pattern -> replacement
RENAMED_IN_HUGGING_FACE: tuple[tuple[str, str], ...] = (
    (r"^(model\.|language_model\.|text_model\.)+", ""),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
    (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
    (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
)

# shapes that an architecture has its own words for
SHAPES: Mapping[tuple[str, str], str] = MappingProxyType({("phi3", "blk.*.ffn_up.weight"): "ffn2 hidden"})


def canonical_name(architecture: Architecture, name: str) -> str:
    """The canonical name of a GGUF tensor (with ``*`` for the layer)."""
    return architecture.renamed.get(name, TENSORS[name][0])


def shape_words(architecture: Architecture, name: str) -> tuple[str, ...]:
    """The dimensions of a GGUF tensor (with ``*`` for the layer), in the words of `TENSORS`."""
    return tuple(SHAPES.get((architecture.model_type, name), TENSORS[name][1]).split())


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """What the words for dimensions in `TENSORS` mean for a model."""
    head = config["head_dim"]
    q, kv, ffn = config["num_attention_heads"] * head, config["num_key_value_heads"] * head, config["intermediate_size"]
    return {
        "one": 1,
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "head": head,
        "q": q,
        "kv": kv,
        "qkv": q + 2 * kv,
        "rope": round(head * config.get("partial_rotary_factor", 1)) // 2,
        "ffn": ffn,
        "ffn2": 2 * ffn,
        "experts": config.get("num_experts", 0),
        "expert_ffn": config.get("moe_intermediate_size", 0),
        "shared_ffn": config.get("shared_expert_intermediate_size", 0),
    }


def no_rope_layers(config: Mapping[str, Any]) -> list[int]:
    """SmolLM3's list: 1 for a layer that rotates queries and keys, which is all but every n-th, 0 for one that does not."""
    layers, given, interval = config["num_hidden_layers"], config.get("no_rope_layers"), config["no_rope_layer_interval"]
    if isinstance(given, list) and len(given) >= layers:
        return [int(bool(rotated)) for rotated in given[:layers]]
    if type(interval) is not int or interval < 1:
        raise ModelLoadError(f"no_rope_layer_interval is {interval!r:.80}, not a whole number above 0")
    return [int((layer + 1) % interval != 0) for layer in range(layers)]
