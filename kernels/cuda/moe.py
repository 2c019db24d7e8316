"""Mixtures of experts: which experts a token goes to, their products, and the sum of what they say."""

from __future__ import annotations

from .launch import Kernel, Launch
from .linear import tiled_matmul, vector_kernel
from .operands import ACTIVATIONS, OUT, Rows, Weights, ceil_div


def route(logits: Rows, experts: int, top_k: int, *, normalize: bool, chosen: int, weights: int, count: int, max_rows: int) -> Launch:
    """``chosen`` int32 and ``weights`` float32 ``[tokens][top_k]``: the best experts, by softmax over all."""
    kernel = Kernel("route", "moe.cu", "piiiippp")
    arguments = (logits.f32, logits.stride, experts, top_k, int(normalize), chosen, weights, count)
    return Launch(kernel, (ceil_div(max_rows, 4), 1, 1), 128, 0, arguments)


def expert_matvec(
    experts: Weights, x: Rows, out: int, out_stride: int, *, chosen: int, top_k: int, shared_x: bool, count: int, max_rows: int
) -> Launch:
    """A product for each choice with its expert's matrix; `experts` is that of expert 0, the others follow `planes.Layout.nbytes` apart.

    ``shared_x``: x has a row for each token, else for each choice.
    """
    rows, warps = 2, 4
    kernel = vector_kernel("expert_matvec", "pliipppiipipip", experts.layout, 1, rows)
    stride = experts.layout.nbytes(experts.rows, experts.columns)
    choices = (int(shared_x), out, out_stride, chosen, top_k, count)
    arguments = (experts.address, stride, experts.rows, experts.blocks, *x.vector, *choices)
    return Launch(kernel, (ceil_div(experts.rows, rows * warps), max_rows * top_k, 1), 32 * warps, 0, arguments)


def max_expert_tiles(max_rows: int, top_k: int, experts: int, tile: int) -> int:
    """Tiles that `group` may make: each expert that is chosen may leave one partly empty."""
    choices = max_rows * top_k
    return choices // tile + min(choices, experts)


def group(chosen: int, top_k: int, experts: int, tile: int, *, places: int, tile_experts: int, tiles: int, count: int) -> Launch:
    """Choices by expert, in tiles: ``places`` int32 ``[tiles][tile]``, ``tile_experts`` int32 ``[tiles]``, and ``tiles``,
    how many there are.
    """
    kernel = Kernel("group", "moe.cu", "piiipppp")
    return Launch(kernel, (1, 1, 1), 256, 8 * experts, (chosen, top_k, experts, tile, places, tile_experts, tiles, count))


def expert_matmul(
    experts: Weights,
    x: Rows,
    out: int,
    out_stride: int,
    *,
    places: int,
    tile_experts: int,
    tiles: int,
    tile: int,
    max_tiles: int,
    choices_per_row: int,
    tensor_cores: bool,
) -> Launch:
    """As `expert_matvec`, for many choices that `group` put into tiles of ``tile`` (`linear.matmul_tile`, or `linear.MATMUL_FLOAT_TILE`).

    ``choices_per_row`` is ``top_k`` if x has a row for each token, and 1 if it has one for each choice. Row *c* of out is choice *c*.
    """
    stride = experts.layout.nbytes(experts.rows, experts.columns)
    where = (stride, places, tile_experts, choices_per_row, tiles)
    return tiled_matmul(experts, x, out, out_stride, False, where, tile, max_tiles, tensor_cores)


def gate_choices(gate: Rows, up: Rows, columns: int, activation: str, top_k: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``activation(gate) * up`` for each choice; both have one stride."""
    if gate.stride != up.stride:
        raise ValueError(f"gate and up lie in rows of {gate.stride} and {up.stride} columns")
    kernel = Kernel("gate_choices", "moe.cu", f"ppiiii{OUT}p")
    arguments = (gate.f32, up.f32, gate.stride, columns, ACTIVATIONS[activation], top_k, *out.out, count)
    return Launch(kernel, (ceil_div(columns, 512), max_rows * top_k, 1), 128, 0, arguments)


def combine(rows: Rows, weights: int, top_k: int, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out[token]`` is the sum of its choices' rows, by weight."""
    kernel = Kernel("combine", "moe.cu", f"pipii{OUT}p")
    arguments = (rows.f32, rows.stride, weights, top_k, columns, *out.out, count)
    return Launch(kernel, (ceil_div(columns, 512), max_rows, 1), 128, 0, arguments)
