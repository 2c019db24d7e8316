"""The operations that models are written in. Each records itself (see `graph`); a backend decides what is fused with what."""

from __future__ import annotations

from dataclasses import dataclass

from ..quantization.types import Tensor
from .graph import TOKENS, Array, Tokens, emit
from .rope import Rope


def embedding(tokens: Tokens, weight: Tensor, *, scale: float = 1.0) -> Array:
    """Rows of ``weight`` ``[vocab_size, hidden]`` for the tokens of the step, times ``scale``."""
    return emit("embedding", (), columns=weight.shape[1], rows=TOKENS, weight=weight, scale=scale)


def rms_norm(x: Array, weight: Tensor, epsilon: float, *, offset: float = 0.0) -> Array:
    """``x / sqrt(mean(x**2) + epsilon) * (weight + offset)`` (arXiv:1910.07467)."""
    return emit("rms_norm", (x,), columns=x.columns, weight=weight, epsilon=epsilon, offset=offset)


def linear(x: Array, weight: Tensor) -> Array:
    """``x @ weight.T`` for ``weight`` ``[out_features, in_features]``."""
    _check_columns(x, weight)
    return emit("linear", (x,), columns=weight.shape[0], weight=weight)


def gated_linear(x: Array, gate: Tensor, up: Tensor, activation: str) -> Array:
    """``activation(x @ gate.T) * (x @ up.T)`` (arXiv:2002.05202)."""
    _check_columns(x, gate)
    _check_columns(x, up)
    return emit("gated_linear", (x,), columns=gate.shape[0], gate=gate, up=up, activation=activation)


def soft_cap(x: Array, cap: float) -> Array:
    """``cap * tanh(x / cap)``."""
    return emit("soft_cap", (x,), columns=x.columns, cap=cap)


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over each head of q or k."""

    weight: Tensor
    epsilon: float
    offset: float = 0.0


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    head_dim: int,
    scale: float,
    rope: Rope | None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Causal attention over all of a token's sequence, through the KV cache, which it extends.

    q ``[tokens, heads * head_dim]`` and k, v ``[tokens, key_value_heads * head_dim]`` are normed and rotated first, as asked;
    ``window`` limits it to that many newest positions; ``soft_cap`` bounds the scores.
    """
    if q.columns % head_dim or k.columns % head_dim or k.columns != v.columns or q.columns % k.columns:
        raise ValueError(f"attention: {q.columns} query, {k.columns} key and {v.columns} value columns do not divide into heads of {head_dim}")
    return emit(
        "attention",
        (q, k, v),
        columns=q.columns,
        head_dim=head_dim,
        scale=scale,
        rope=rope,
        q_norm=q_norm,
        k_norm=k_norm,
        window=window,
        soft_cap=soft_cap,
    )


def _check_columns(x: Array, weight: Tensor) -> None:
    if len(weight.shape) != 2 or weight.shape[1] != x.columns:
        raise ValueError(f"{weight.name}: shape {weight.shape} does not multiply {x.columns} columns")
