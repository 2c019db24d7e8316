"""Granite 3: Llama with multipliers on embeddings, scores, residuals and logits (arXiv:2408.13359)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn import Array, Attention, Batch, Embedding, GatedMLP, Linear, RMSNorm, Rope, Weights
from .registry import register


class Block:
    def __init__(self, config: Mapping[str, Any], weights: Weights, rope: Rope) -> None:
        epsilon = config["rms_norm_eps"]
        self.attention_norm = RMSNorm(weights.tensor("input_layernorm"), epsilon)
        self.attention = Attention(weights.child("self_attn"), config, rope, scale=config["attention_multiplier"])
        self.mlp_norm = RMSNorm(weights.tensor("post_attention_layernorm"), epsilon)
        self.mlp = GatedMLP(weights.child("mlp"), "silu")
        self.scale = float(config["residual_multiplier"])

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x)) * self.scale
        return x + self.mlp(self.mlp_norm(x)) * self.scale


@register("granite")
class Granite:
    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        rope = Rope.from_config(config, config["head_dim"], factors=weights.rope_factors())
        self.embed = Embedding(weights.tensor("embed_tokens"), scale=config["embedding_multiplier"])
        self.layers = [Block(config, weights.child("layers", i), rope) for i in range(config["num_hidden_layers"])]
        self.norm = RMSNorm(weights.tensor("norm"), config["rms_norm_eps"])
        self.lm_head = Linear(weights.tensor("lm_head") if "lm_head" in weights else weights.tensor("embed_tokens"))
        self.scale = 1.0 / float(config["logits_scaling"])

    def __call__(self, batch: Batch) -> Array:
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x[batch.output_rows])) * self.scale
