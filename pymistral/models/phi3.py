"""Phi 3 and 4-mini: Llama with q, k and v in one matrix, gate and up in another, and LongRoPE (arXiv:2404.14219)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn import Array, Attention, Batch, Embedding, GatedMLP, Linear, RMSNorm, Rope, Weights, layer_window
from .registry import register


class Block:
    def __init__(self, config: Mapping[str, Any], weights: Weights, rope: Rope, window: int | None) -> None:
        epsilon, head_dim, ffn = config["rms_norm_eps"], config["head_dim"], config["intermediate_size"]
        heads, kv_heads = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
        attention = weights.child("self_attn").split("qkv_proj", {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads})
        mlp = weights.child("mlp").split("gate_up_proj", {"gate_proj": ffn, "up_proj": ffn})
        self.attention_norm = RMSNorm(weights.tensor("input_layernorm"), epsilon)
        self.attention = Attention(attention, config, rope, window=window)
        self.mlp_norm = RMSNorm(weights.tensor("post_attention_layernorm"), epsilon)
        self.mlp = GatedMLP(mlp, "silu")

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


@register("phi3")
class Phi3:
    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        rope = Rope.from_config(config, config["head_dim"])
        self.embed = Embedding(weights.tensor("embed_tokens"))
        self.layers = [Block(config, weights.child("layers", i), rope, layer_window(config, i)) for i in range(config["num_hidden_layers"])]
        self.norm = RMSNorm(weights.tensor("norm"), config["rms_norm_eps"])
        self.lm_head = Linear(weights.tensor("lm_head") if "lm_head" in weights else weights.tensor("embed_tokens"))

    def __call__(self, batch: Batch) -> Array:
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x[batch.output_rows]))
