"""SmolLM3: Llama in which every fourth layer goes without positions (arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn import Array, Attention, Batch, Embedding, GatedMLP, Linear, RMSNorm, Rope, Weights, layer_window
from .registry import register


class Block:
    def __init__(self, config: Mapping[str, Any], weights: Weights, rope: Rope | None, window: int | None) -> None:
        epsilon = config["rms_norm_eps"]
        self.attention_norm = RMSNorm(weights.tensor("input_layernorm"), epsilon)
        self.attention = Attention(weights.child("self_attn"), config, rope, window=window)
        self.mlp_norm = RMSNorm(weights.tensor("post_attention_layernorm"), epsilon)
        self.mlp = GatedMLP(weights.child("mlp"), "silu")

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


@register("smollm3")
class SmolLM3:
    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        rope = Rope.from_config(config, config["head_dim"], factors=weights.rope_factors())
        self.embed = Embedding(weights.tensor("embed_tokens"))
        self.layers = []
        for i, rotated in enumerate(config["no_rope_layers"]):
            self.layers.append(Block(config, weights.child("layers", i), rope if rotated else None, layer_window(config, i)))
        self.norm = RMSNorm(weights.tensor("norm"), config["rms_norm_eps"])
        self.lm_head = Linear(weights.tensor("lm_head") if "lm_head" in weights else weights.tensor("embed_tokens"))

    def __call__(self, batch: Batch) -> Array:
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x[batch.output_rows]))
