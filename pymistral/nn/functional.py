"""The operations that models are written in. Each records itself (see `graph`); a backend decides what is fused with what.

Given NumPy arrays, outside a recording, each is computed at once and returns a NumPy array; rows are then the tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..quantization.types import Tensor
from .graph import TOKENS, A, Array, Tokens, columns_of, emit
from .rope import Rope


@overload
def embedding(tokens: Tokens, weight: Tensor, *, scale: float = 1.0) -> Array: ...
@overload
def embedding(tokens: NDArray[np.integer[Any]], weight: Tensor, *, scale: float = 1.0) -> NDArray[np.float32]: ...
def embedding(tokens: Tokens | NDArray[np.integer[Any]], weight: Tensor, *, scale: float = 1.0) -> Array | NDArray[np.float32]:
    """Rows of ``weight`` ``[vocab_size, hidden]`` for the tokens of the step, times ``scale``."""
    if len(weight.shape) != 2:
        raise ValueError(f"{weight.name}: an embedding is a matrix, and this has the shape {weight.shape}")
    if isinstance(tokens, np.ndarray):
        from .eager import evaluate

        return evaluate(lambda: embedding(Tokens(), weight, scale=scale), tokens=tokens)
    none: tuple[Array, ...] = ()
    return emit("embedding", none, columns=weight.shape[1], rows=TOKENS, weight=weight, scale=scale)


def rms_norm(x: A, weight: Tensor, epsilon: float, *, offset: float = 0.0) -> A:
    """``x / sqrt(mean(x**2) + epsilon) * (weight + offset)`` (arXiv:1910.07467)."""
    _check_length(weight, columns_of(x))
    return emit("rms_norm", (x,), columns=columns_of(x), weight=weight, epsilon=epsilon, offset=offset)


def linear(x: A, weight: Tensor) -> A:
    """``x @ weight.T`` for ``weight`` ``[out_features, in_features]``."""
    _check_columns(x, weight)
    return emit("linear", (x,), columns=weight.shape[0], weight=weight)


def gated_linear(x: A, gate: Tensor, up: Tensor, activation: str) -> A:
    """``activation(x @ gate.T) * (x @ up.T)`` (arXiv:2002.05202); ``activation`` is ``"silu"``, ``"gelu"`` (its tanh form) or ``"relu"``."""
    _check_columns(x, gate)
    _check_columns(x, up)
    if gate.shape != up.shape:
        raise ValueError(f"{gate.name} {gate.shape} and {up.name} {up.shape} must have the same shape")
    if activation not in ("silu", "gelu", "relu"):
        raise ValueError(f"activation {activation!r}: expected silu, gelu or relu")
    return emit("gated_linear", (x,), columns=gate.shape[0], gate=gate, up=up, activation=activation)


def soft_cap(x: A, cap: float) -> A:
    """``cap * tanh(x / cap)``."""
    return emit("soft_cap", (x,), columns=columns_of(x), cap=cap)


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over each head of q or k."""

    weight: Tensor
    epsilon: float
    offset: float = 0.0


def attention(
    q: A,
    k: A,
    v: A,
    *,
    head_dim: int,
    scale: float,
    rope: Rope | None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> A:
    """Causal attention over all of a token's sequence, through the KV cache, which it extends.

    q ``[tokens, heads * head_dim]`` and k, v ``[tokens, key_value_heads * head_dim]`` are normed and rotated first, as asked;
    ``window`` limits it to that many newest positions; ``soft_cap`` bounds the scores.
    """
    queries, keys, values = columns_of(q), columns_of(k), columns_of(v)
    if head_dim < 1 or min(queries, keys) < 1 or queries % head_dim or keys % head_dim or keys != values or queries % keys:
        raise ValueError(f"attention: {queries} query, {keys} key and {values} value columns do not divide into heads of {head_dim}")
    if rope is not None and 2 * rope.pairs > head_dim:
        raise ValueError(f"attention: {rope.pairs} rotated pairs do not fit heads of {head_dim} dimensions")
    if window is not None and window < 1:
        raise ValueError(f"attention: a window of {window} positions holds nothing")
    for norm in (q_norm, k_norm):
        if norm is not None:
            _check_length(norm.weight, head_dim)
    return emit(
        "attention",
        (q, k, v),
        columns=queries,
        head_dim=head_dim,
        scale=scale,
        rope=rope,
        q_norm=q_norm,
        k_norm=k_norm,
        window=window,
        soft_cap=soft_cap,
    )


def _check_columns(x: Array | NDArray[np.float32], weight: Tensor) -> None:
    if len(weight.shape) != 2 or weight.shape[1] != columns_of(x):
        raise ValueError(f"{weight.name}: shape {weight.shape} does not multiply {columns_of(x)} columns")


def _check_length(weight: Tensor, columns: int) -> None:
    if weight.shape != (columns,):
        raise ValueError(f"{weight.name}: shape {weight.shape} does not scale {columns} columns")
