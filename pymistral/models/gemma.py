"""Gemma 1: Llama with scaled embeddings, GeGLU, and norms that count from 1 (arXiv:2403.08295)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn import Array, Attention, Batch, Embedding, GatedMLP, Linear, RMSNorm, Rope, Weights
from .registry import register


class Block:
    def __init__(self, config: Mapping[str, Any], weights: Weights, rope: Rope) -> None:
        epsilon, offset = config["rms_norm_eps"], config["norm_weight_offset"]
        self.attention_norm = RMSNorm(weights.tensor("input_layernorm"), epsilon, offset)
        self.attention = Attention(weights.child("self_attn"), config, rope)
        self.mlp_norm = RMSNorm(weights.tensor("post_attention_layernorm"), epsilon, offset)
        self.mlp = GatedMLP(weights.child("mlp"), "gelu")

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


@register("gemma")
class Gemma:
    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        rope = Rope.from_config(config, config["head_dim"])
        self.embed = Embedding(weights.tensor("embed_tokens"), scale=config["hidden_size"] ** 0.5)
        self.layers = [Block(config, weights.child("layers", i), rope) for i in range(config["num_hidden_layers"])]
        self.norm = RMSNorm(weights.tensor("norm"), config["rms_norm_eps"], config["norm_weight_offset"])
        self.lm_head = Linear(weights.tensor("lm_head") if "lm_head" in weights else weights.tensor("embed_tokens"))

    def __call__(self, batch: Batch) -> Array:
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x[batch.output_rows]))
