"""Layers: an operation and the weights it uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..quantization.types import Tensor
from . import functional as F
from .graph import Array, Tokens
from .rope import Rope
from .weights import Weights


class Embedding:
    def __init__(self, weight: Tensor, scale: float = 1.0) -> None:
        self.weight = weight
        self.scale = scale

    def __call__(self, tokens: Tokens) -> Array:
        return F.embedding(tokens, self.weight, scale=self.scale)


class Linear:
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @classmethod
    def of(cls, weights: Weights, name: str) -> Linear:
        """The matrix of this name, with its bias if the checkpoint has one."""
        return cls(weights.tensor(name), weights.bias(name))

    def __call__(self, x: Array) -> Array:
        return F.linear(x, self.weight, self.bias)


class RMSNorm:
    def __init__(self, weight: Tensor, epsilon: float, offset: float = 0.0) -> None:
        self.weight = weight
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: Array) -> Array:
        return F.rms_norm(x, self.weight, self.epsilon, offset=self.offset)


class GatedMLP:
    """``down(activation(gate(x)) * up(x))`` (arXiv:2002.05202)."""

    def __init__(self, weights: Weights, activation: str) -> None:
        self.gate, self.up, self.down = (Linear.of(weights, name) for name in ("gate_proj", "up_proj", "down_proj"))
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        if self.gate.bias is None and self.up.bias is None:
            return self.down(F.gated_linear(x, self.gate.weight, self.up.weight, self.activation))
        return self.down(F.activate(self.gate(x), self.activation) * self.up(x))


class MixtureOfExperts:
    """A router and gated MLPs, of which each token uses a few (arXiv:1701.06538)."""

    def __init__(self, weights: Weights, config: Mapping[str, Any], activation: str) -> None:
        self.router = Linear(weights.tensor("gate"))
        self.gate, self.up, self.down = (weights.experts(name, config["num_experts"]) for name in ("gate_proj", "up_proj", "down_proj"))
        self.activation = activation
        self.top_k = int(config["num_experts_per_tok"])
        self.normalize = bool(config["norm_topk_prob"])

    def __call__(self, x: Array) -> Array:
        return F.mixture_of_experts(
            x, self.router(x), self.gate, self.up, self.down, activation=self.activation, top_k=self.top_k, normalize=self.normalize
        )


class Attention:
    """Grouped-query self-attention (arXiv:2305.13245)."""

    def __init__(
        self,
        weights: Weights,
        config: Mapping[str, Any],
        rope: Rope | None,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        norm_offset: float = 0.0,
    ) -> None:
        self.q, self.k, self.v, self.o = (Linear.of(weights, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        self.head_dim = int(config["head_dim"])
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.rope = rope
        self.window = window
        self.soft_cap = soft_cap
        epsilon = float(config["rms_norm_eps"])
        self.q_norm, self.k_norm = (
            F.HeadNorm(weights.tensor(name), epsilon, norm_offset) if name in weights else None for name in ("q_norm", "k_norm")
        )

    def __call__(self, x: Array) -> Array:
        attended = F.attention(
            self.q(x),
            self.k(x),
            self.v(x),
            head_dim=self.head_dim,
            scale=self.scale,
            rope=self.rope,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            window=self.window,
            soft_cap=self.soft_cap,
        )
        return self.o(attended)


def layer_window(config: Mapping[str, Any], layer: int) -> int | None:
    """How many positions back a layer sees: ``sliding_window``, in all layers or in those that ``layer_types`` names; None: all."""
    types = config.get("layer_types")
    return config.get("sliding_window") if types is None or types[layer] == "sliding_attention" else None
