"""The operations that models are written in. Each records itself (see `graph`); a backend decides what is fused with what.

Given NumPy arrays, outside a recording, each is computed at once and returns a NumPy array; rows are then the tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
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


def linear(x: A, weight: Tensor, bias: Tensor | None = None) -> A:
    """``x @ weight.T + bias`` for ``weight`` ``[out_features, in_features]``."""
    _check_columns(x, weight)
    product = emit("linear", (x,), columns=weight.shape[0], weight=weight)
    return product if bias is None else add_vector(product, bias)


def add_vector(x: A, vector: Tensor) -> A:
    """``x + vector``, for every row."""
    _check_length(vector, columns_of(x))
    return emit("add_vector", (x,), columns=columns_of(x), vector=vector)


def activate(x: A, activation: str) -> A:
    """``silu``, ``gelu`` (its tanh form) or ``relu`` of every element."""
    return emit("activate", (x,), columns=columns_of(x), activation=activation)


def sigmoid_gate(x: A, gate: A) -> A:
    """``x * sigmoid(gate)`` for ``gate`` of one column."""
    if columns_of(gate) != 1:
        raise ValueError(f"a gate has one column, not {columns_of(gate)}")
    return emit("sigmoid_gate", (x, gate), columns=columns_of(x))


def gated_linear(x: A, gate: Tensor, up: Tensor, activation: str) -> A:
    """``activation(x @ gate.T) * (x @ up.T)`` (arXiv:2002.05202); ``activation`` is ``"silu"``, ``"gelu"`` (its tanh form) or
    ``"relu"``.
    """
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


def mixture_of_experts(
    x: A,
    router: A,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    *,
    activation: str,
    top_k: int,
    normalize: bool,
) -> A:
    """Each token through the gated MLPs of its ``top_k`` experts, summed by weight (arXiv:1701.06538).

    ``router`` ``[tokens, experts]`` holds logits: their softmax ranks the experts and weighs what they say; ``normalize`` makes the weights
    of the chosen ones add up to 1.
    """
    experts, columns = columns_of(router), columns_of(x)
    if not len(gate) == len(up) == len(down) == experts or not 1 <= top_k <= experts:
        counts = f"{len(gate)} gates, {len(up)} ups and {len(down)} downs"
        raise ValueError(f"{experts} router columns, {counts}, of which {top_k} are used")
    ffn = gate[0].shape[0]
    for tensors, shape in ((gate, (ffn, columns)), (up, (ffn, columns)), (down, (columns, ffn))):
        for tensor in tensors:
            if tensor.shape != shape or tensor.kind != tensors[0].kind:
                found, others = f"{tensor.kind} {tensor.shape}", f"{tensors[0].kind} {shape}"
                raise ModelLoadError(f"tensor {tensor.name!r} is {found}, but the experts beside it are {others}: all must be alike")
    return emit(
        "mixture_of_experts",
        (x, router),
        columns=columns,
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
    if q_norm is not None and k_norm is not None and q_norm.epsilon != k_norm.epsilon:
        raise ValueError(f"attention: the epsilons of the head norms differ, {q_norm.epsilon} and {k_norm.epsilon}")
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
