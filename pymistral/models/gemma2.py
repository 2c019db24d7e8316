"""Gemma 2: norms before and after each part, every other layer windowed, scores and logits soft-capped (arXiv:2408.00118)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn import Array, Attention, Batch, Embedding, GatedMLP, Linear, RMSNorm, Rope, Weights, layer_window, soft_cap
from .registry import register


class Block:
    def __init__(self, config: Mapping[str, Any], weights: Weights, rope: Rope, window: int | None) -> None:
        epsilon, offset = config["rms_norm_eps"], config["norm_weight_offset"]
        scale, cap = config["query_pre_attn_scalar"] ** -0.5, config["attn_logit_softcapping"]
        self.attention_norm = RMSNorm(weights.tensor("input_layernorm"), epsilon, offset)
        self.attention = Attention(weights.child("self_attn"), config, rope, scale=scale, window=window, soft_cap=cap)
        self.after_attention_norm = RMSNorm(weights.tensor("post_attention_layernorm"), epsilon, offset)
        self.mlp_norm = RMSNorm(weights.tensor("pre_feedforward_layernorm"), epsilon, offset)
        self.mlp = GatedMLP(weights.child("mlp"), "gelu")
        self.after_mlp_norm = RMSNorm(weights.tensor("post_feedforward_layernorm"), epsilon, offset)

    def __call__(self, x: Array) -> Array:
        x = x + self.after_attention_norm(self.attention(self.attention_norm(x)))
        return x + self.after_mlp_norm(self.mlp(self.mlp_norm(x)))


@register("gemma2")
class Gemma2:
    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        rope = Rope.from_config(config, config["head_dim"])
        self.embed = Embedding(weights.tensor("embed_tokens"), scale=config["hidden_size"] ** 0.5)
        self.layers = [Block(config, weights.child("layers", i), rope, layer_window(config, i)) for i in range(config["num_hidden_layers"])]
        self.norm = RMSNorm(weights.tensor("norm"), config["rms_norm_eps"], config["norm_weight_offset"])
        self.lm_head = Linear(weights.tensor("lm_head") if "lm_head" in weights else weights.tensor("embed_tokens"))
        self.cap = config["final_logit_softcapping"]

    def __call__(self, batch: Batch) -> Array:
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x[batch.output_rows]))
        return logits if self.cap is None else soft_cap(logits, self.cap)
