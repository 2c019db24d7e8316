"""Qwen 1.5 and 2 with a mixture of experts in place of the MLP (arXiv:2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn import Array, Attention, Batch, Embedding, GatedMLP, Linear, MixtureOfExperts, RMSNorm, Rope, Weights, layer_window, sigmoid_gate
from .registry import register


class SparseMLP:
    """A mixture of experts, and one more expert for every token, with a gate of its own."""

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self.experts = MixtureOfExperts(weights, config, "silu")
        self.shared = GatedMLP(weights.child("shared_expert"), "silu")
        self.gate = Linear(weights.tensor("shared_expert_gate"))

    def __call__(self, x: Array) -> Array:
        return self.experts(x) + sigmoid_gate(self.shared(x), self.gate(x))


class Block:
    def __init__(self, config: Mapping[str, Any], weights: Weights, rope: Rope, window: int | None, dense: bool) -> None:
        epsilon = config["rms_norm_eps"]
        self.attention_norm = RMSNorm(weights.tensor("input_layernorm"), epsilon)
        self.attention = Attention(weights.child("self_attn"), config, rope, window=window)
        self.mlp_norm = RMSNorm(weights.tensor("post_attention_layernorm"), epsilon)
        self.mlp = GatedMLP(weights.child("mlp"), "silu") if dense else SparseMLP(weights.child("mlp"), config)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


@register("qwen2_moe")
class Qwen2Moe:
    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        rope = Rope.from_config(config, config["head_dim"])
        self.embed = Embedding(weights.tensor("embed_tokens"))
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            dense = i in config.get("mlp_only_layers", ())
            self.layers.append(Block(config, weights.child("layers", i), rope, layer_window(config, i), dense))
        self.norm = RMSNorm(weights.tensor("norm"), config["rms_norm_eps"])
        self.lm_head = Linear(weights.tensor("lm_head") if "lm_head" in weights else weights.tensor("embed_tokens"))

    def __call__(self, batch: Batch) -> Array:
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x[batch.output_rows]))
