"""Gemma 3, text: norms before and after each part, heads normed, five windowed layers to each full one (arXiv:2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn import Array, Attention, Batch, Embedding, GatedMLP, Linear, RMSNorm, Rope, Weights
from .registry import register


class Block:
    def __init__(self, config: Mapping[str, Any], weights: Weights, rope: Rope, window: int | None) -> None:
        epsilon, offset = config["rms_norm_eps"], config["norm_weight_offset"]
        scale = config["query_pre_attn_scalar"] ** -0.5
        self.attention_norm = RMSNorm(weights.tensor("input_layernorm"), epsilon, offset)
        self.attention = Attention(weights.child("self_attn"), config, rope, scale=scale, window=window, norm_offset=offset)
        self.after_attention_norm = RMSNorm(weights.tensor("post_attention_layernorm"), epsilon, offset)
        self.mlp_norm = RMSNorm(weights.tensor("pre_feedforward_layernorm"), epsilon, offset)
        self.mlp = GatedMLP(weights.child("mlp"), "gelu")
        self.after_mlp_norm = RMSNorm(weights.tensor("post_feedforward_layernorm"), epsilon, offset)

    def __call__(self, x: Array) -> Array:
        x = x + self.after_attention_norm(self.attention(self.attention_norm(x)))
        return x + self.after_mlp_norm(self.mlp(self.mlp_norm(x)))


@register("gemma3_text")
class Gemma3:
    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        rope = Rope.from_config(config, config["head_dim"])
        local_rope = Rope.from_config(config, config["head_dim"], theta=config["rope_local_base_freq"], scaling={})
        self.embed = Embedding(weights.tensor("embed_tokens"), scale=config["hidden_size"] ** 0.5)
        self.layers = []
        for i, kind in enumerate(config["layer_types"]):
            local = kind == "sliding_attention"
            window = config["sliding_window"] if local else None
            self.layers.append(Block(config, weights.child("layers", i), local_rope if local else rope, window))
        self.norm = RMSNorm(weights.tensor("norm"), config["rms_norm_eps"], config["norm_weight_offset"])
        self.lm_head = Linear(weights.tensor("lm_head") if "lm_head" in weights else weights.tensor("embed_tokens"))

    def __call__(self, batch: Batch) -> Array:
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x[batch.output_rows]))
