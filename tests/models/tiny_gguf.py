"""A tiny checkpoint as llama.cpp's converter would write it, by the `gguf` package's own table of names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tiny import BYTES

ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
PERMUTED = ("llama", "mistral", "mixtral", "granite", "smollm3")


def write_gguf(path: Path, config: Mapping[str, Any], values: Mapping[str, NDArray[np.float32]], matrices: str = "F32") -> Path:
    """``matrices`` is the type of all but vectors and routers."""
    model_type = config["model_type"]
    name = ARCHITECTURES.get(model_type, model_type)
    writer = gguf.GGUFWriter(path, name)
    _metadata(writer, config)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for hugging_face, tensor in _converted(config, values).items():
        found = table.get_name(hugging_face, try_suffixes=(".weight", ".bias")) or hugging_face
        tensor = np.ascontiguousarray(tensor, np.float32)
        if tensor.ndim > 1 and matrices != "F32" and "ffn_gate_inp" not in found:
            kind = gguf.GGMLQuantizationType[matrices]
            writer.add_tensor(found, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(found, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = dict(config["rope_parameters"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "full_attention" in rope:
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        stretch = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
        factor = (1 + np.log(stretch) / np.log(rope["original_max_position_embeddings"])) ** 0.5 if stretch > 1 else 1.0
        writer.add_rope_scaling_attn_factors(float(factor))
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if config.get(key):
            add(config[key])
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        writer.add_expert_count(experts)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(BYTES)
    writer.add_token_types([3, *[1] * 255])
    writer.add_token_merges(["A B"])  # into nothing: a list may not be empty
    writer.add_eos_token_id(0)


def _converted(config: Mapping[str, Any], values: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """What the converter changes: rows of q and k, Gemma's norms, experts stacked, frequencies as tensors."""
    out: dict[str, NDArray[np.float32]] = {}
    model_type, rope = config["model_type"], config["rope_parameters"]
    stacks: dict[str, dict[int, NDArray[np.float32]]] = {}
    for name, tensor in values.items():
        if model_type in PERMUTED and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            tensor = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        elif model_type.startswith("gemma") and "norm" in name:
            tensor = tensor + 1
        elif "shared_expert_gate" in name:
            tensor = tensor[0]
        if ".experts." in name:
            before, _, rest = name.partition(".experts.")
            number, _, kind = rest.partition(".")
            stacks.setdefault(f"{before}.experts.{kind}", {})[int(number)] = tensor
        else:
            out[name] = tensor
    for name, parts in stacks.items():
        out[name] = np.stack([parts[number] for number in sorted(parts)])
    if rope.get("rope_type") == "llama3":
        out["rope_freqs.weight"] = _llama3_factors(config, rope)
    if rope.get("rope_type") == "longrope":
        out["rope_factors_long.weight"] = np.array(rope["long_factor"])
        out["rope_factors_short.weight"] = np.array(rope["short_factor"])
    return out


def _llama3_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> NDArray[np.float64]:
    dims = config["hidden_size"] // config["num_attention_heads"]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dims, 2) / dims)
    original, low, high = (rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    smooth = (original / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, rope["factor"], blended))
