"""The operations that models are written in. Each records itself (see `graph`); a backend decides what is fused with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ModelLoadError
from ..quantization.types import Tensor
from .graph import TOKENS, Array, Tokens, emit
from .rope import Rope


def embedding(tokens: Tokens, weight: Tensor, *, scale: float = 1.0) -> Array:
    """Rows of ``weight`` ``[vocab_size, hidden]`` for the tokens of the step, times ``scale``."""
    return emit("embedding", (), columns=weight.shape[1], rows=TOKENS, weight=weight, scale=scale)


def rms_norm(x: Array, weight: Tensor, epsilon: float, *, offset: float = 0.0) -> Array:
    """``x / sqrt(mean(x**2) + epsilon) * (weight + offset)`` (arXiv:1910.07467)."""
    _check_vector(weight, x.columns)
    return emit("rms_norm", (x,), columns=x.columns, weight=weight, epsilon=epsilon, offset=offset)


def linear(x: Array, weight: Tensor, bias: Tensor | None = None) -> Array:
    """``x @ weight.T + bias`` for ``weight`` ``[out_features, in_features]``."""
    _check_columns(x, weight)
    product = emit("linear", (x,), columns=weight.shape[0], weight=weight)
    return product if bias is None else add_vector(product, bias)


def add_vector(x: Array, vector: Tensor) -> Array:
    """``x + vector``, for every row."""
    _check_vector(vector, x.columns)
    return emit("add_vector", (x,), columns=x.columns, vector=vector)


def activate(x: Array, activation: str) -> Array:
    """``silu``, ``gelu`` (its tanh form) or ``relu`` of every element."""
    return emit("activate", (x,), columns=x.columns, activation=activation)


def sigmoid_gate(x: Array, gate: Array) -> Array:
    """``x * sigmoid(gate)`` for ``gate`` of one column."""
    if gate.columns != 1:
        raise ValueError(f"a gate has one column, not {gate.columns}")
    return emit("sigmoid_gate", (x, gate), columns=x.columns)


def gated_linear(x: Array, gate: Tensor, up: Tensor, activation: str) -> Array:
    """``activation(x @ gate.T) * (x @ up.T)`` (arXiv:2002.05202)."""
    _check_columns(x, gate)
    _check_columns(x, up)
    if gate.shape != up.shape:
        raise ValueError(f"{gate.name} {gate.shape} and {up.name} {up.shape}: gate and up must have one shape")
    return emit("gated_linear", (x,), columns=gate.shape[0], gate=gate, up=up, activation=activation)


def soft_cap(x: Array, cap: float) -> Array:
    """``cap * tanh(x / cap)``."""
    return emit("soft_cap", (x,), columns=x.columns, cap=cap)


def mixture_of_experts(
    x: Array,
    router: Array,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    *,
    activation: str,
    top_k: int,
    normalize: bool,
) -> Array:
    """Each token through the gated MLPs of its ``top_k`` experts, summed by weight (arXiv:1701.06538).

    ``router`` ``[tokens, experts]`` holds logits: their softmax ranks the experts and weighs what they say; ``normalize`` makes the weights
    of the chosen ones add up to 1.
    """
    if not len(gate) == len(up) == len(down) == router.columns or not 1 <= top_k <= router.columns:
        counts = f"{len(gate)} gates, {len(up)} ups and {len(down)} downs"
        raise ValueError(f"{router.columns} router columns, {counts}, of which {top_k} are used")
    ffn = gate[0].shape[0]
    for tensors, shape in ((gate, (ffn, x.columns)), (up, (ffn, x.columns)), (down, (x.columns, ffn))):
        for tensor in tensors:
            if tensor.shape != shape or tensor.type != tensors[0].type:
                found, others = f"{tensor.type.name} {tensor.shape}", f"{tensors[0].type.name} {shape}"
                raise ModelLoadError(f"tensor {tensor.name!r} is {found}, but the experts beside it are {others}: all must be alike")
    return emit(
        "mixture_of_experts",
        (x, router),
        columns=x.columns,
        gate=tuple(gate),
        up=tuple(up),
        down=tuple(down),
        activation=activation,
        top_k=top_k,
        normalize=normalize,
    )


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
        raise ValueError(
            f"attention: {q.columns} query, {k.columns} key and {v.columns} value columns do not divide into heads of {head_dim}"
        )
    for norm in (q_norm, k_norm):
        if norm is not None:
            _check_vector(norm.weight, head_dim)
    if rope is not None and 2 * rope.pairs > head_dim:
        raise ValueError(f"attention: {rope.pairs} pairs to rotate in heads of {head_dim}")
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


def _check_vector(vector: Tensor, columns: int) -> None:
    if vector.shape != (columns,):
        raise ValueError(f"{vector.name}: shape {vector.shape}, for {columns} columns")
