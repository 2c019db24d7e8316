"""Products of weights and activations, for one row and for thousands; embeddings, which are rows of weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from .launch import Kernel, Launch
from .operands import ACTIVATIONS, OUT, Rows, Weights, ceil_div, defines
from .planes import Layout

MATVEC_TOKENS = 8
"""Rows for which `matvec` reads weights once."""
MATVEC_ROWS = 32
"""Rows up to which `matvec` is the better kernel. `matmul` has few blocks then, each of which waits for memory in every step."""


def embedding(weights: Weights, tokens: int, out: Rows, scale: float, *, count: int, max_rows: int) -> Launch:
    """``out.f32[i] = weights[tokens[i]] * scale``."""
    kernel = Kernel("embedding", "unpack.cu", "piipfpip", weights.layout.macros)
    arguments = (weights.address, weights.rows, weights.blocks, tokens, scale, out.f32, out.stride, count)
    return Launch(kernel, (max_rows, 1, 1), 32 * min(4, ceil_div(weights.blocks, 32)), 0, arguments)


def dequantize(weights: Weights, out: int) -> Launch:
    """The matrix in bfloat16 ``[rows][columns rounded up to 32]``, for `matmul_bf16`."""
    kernel = Kernel("dequantize", "unpack.cu", "piip", weights.layout.macros)
    return Launch(
        kernel, (ceil_div(weights.rows * weights.blocks, 256), 1, 1), 256, 0, (weights.address, weights.rows, weights.blocks, out)
    )


def vector_kernel(name: str, arguments: str, layout: Layout, tokens: int, rows: int) -> Kernel:
    return Kernel(name, "matvec.cu", arguments, (*layout.macros, *defines(TOKENS=tokens, ROWS=rows)))


def _group_of_tokens(max_rows: int) -> int:
    return next((tokens for tokens in (1, 2, 4) if max_rows <= tokens), MATVEC_TOKENS)


class Product(NamedTuple):
    """A matrix, and where its product goes: float32 rows ``stride`` columns apart."""

    weights: Weights
    out: int
    stride: int


MATVEC_PRODUCTS = 3


def _product_arguments(products: Sequence[Product]) -> tuple[int, ...]:
    parts = [(each.weights.address, each.weights.rows, each.out, each.stride) for each in products]
    parts += [(0, 0, 0, 0)] * (MATVEC_PRODUCTS - len(parts))
    return (*itertools.chain.from_iterable(parts), products[0].weights.blocks)


def matvec(products: Sequence[Product], x: Rows, *, accumulate: bool, count: int, max_rows: int) -> Launch:
    """``out = x @ weights.T`` (float32), or ``out += ...``, for up to `MATVEC_PRODUCTS` matrices of one layout and width.
    Quantised weights take ``x.q8``, floats ``x.f32``.
    """
    tokens, rows, warps = _group_of_tokens(max_rows), 2, 4
    kernel = vector_kernel("matvec", "pipipipipipiipppiip", products[0].weights.layout, tokens, rows)
    arguments = (*_product_arguments(products), *x.vector, int(accumulate), count)
    groups = sum(ceil_div(each.weights.rows, rows) for each in products)  # a warp has one
    return Launch(kernel, (ceil_div(groups, warps), ceil_div(max_rows, tokens), 1), 32 * warps, 0, arguments)


def gated_matvec(gate: Weights, up: Weights, x: Rows, activation: str, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = activation(x @ gate.T) * (x @ up.T)``; both matrices have one layout and shape."""
    tokens = _group_of_tokens(max_rows)
    kernel = vector_kernel("gated_matvec", f"ppiipppii{OUT}p", gate.layout, tokens, 2)
    arguments = (gate.address, up.address, gate.rows, gate.blocks, *x.vector, ACTIVATIONS[activation], *out.out, count)
    blocks = ceil_div(gate.rows, 32)
    threads = 256 if blocks <= 256 else 128  # registers let a block of 256 have two neighbours on an SM, one of 128 five
    return Launch(kernel, (blocks, ceil_div(max_rows, tokens), 1), threads, 0, arguments)


FEW_ROWS = 128
"""Rows up to which `matmul_few` is the better kernel: it reads weights once for 32, but has more blocks than `matmul`, none of which
waits for others to unpack."""
_FEW_BLOCKS = 128  # that `matmul_few` should have, about one for each multiprocessor of a large GPU
_FEW_WARPS = 8


def _few_kernel(name: str, arguments: str, layout: Layout, max_rows: int, tiles: int, row_warps: int) -> tuple[Kernel, int, int]:
    """Kernel, rows of x for each block, and bytes of shared memory: stages of x, then sums."""
    tokens = next((tokens for tokens in (8, 16) if max_rows <= tokens), 32)
    macros = defines(TOKENS=tokens, MATRIX_TILES=tiles, ROW_WARPS=row_warps)
    shared = max(_FEW_WARPS // row_warps * 4 * tokens * 64 * 2, _FEW_WARPS * tokens * (16 * tiles + 4) * 4)
    return Kernel(name, "matmul_few.cu", arguments, (*layout.macros, *macros), 80), tokens, shared


def matmul_few(products: Sequence[Product], x: Rows, *, accumulate: bool, count: int, max_rows: int) -> Launch:
    """As `matvec`, on tensor cores (sm_80 and later), for quantised weights and floats of two bytes; takes ``x.bf16``. A row's result does
    not depend on how many others there are.
    """
    rows = sum(each.weights.rows for each in products)
    # Of weights, as many rows to a block as leave enough blocks: each reads all of x.
    tiles, row_warps = next((shape for shape in ((2, 4), (2, 2), (2, 1)) if rows >= 16 * shape[0] * shape[1] * _FEW_BLOCKS), (1, 1))
    kernel, tokens, shared = _few_kernel("matmul_few", "pipipipipipiipiip", products[0].weights.layout, max_rows, tiles, row_warps)
    arguments = (*_product_arguments(products), x.bf16, x.stride, int(accumulate), count)
    blocks = sum(ceil_div(each.weights.rows, 16 * tiles * row_warps) for each in products)
    return Launch(kernel, (ceil_div(max_rows, tokens), blocks, 1), 32 * _FEW_WARPS, shared, arguments)


def gated_matmul_few(gate: Weights, up: Weights, x: Rows, activation: str, out: Rows, *, count: int, max_rows: int) -> Launch:
    """As `gated_matvec`, on tensor cores; takes ``x.bf16``."""
    row_warps = 4 if gate.rows >= 64 * _FEW_BLOCKS else 2
    kernel, tokens, shared = _few_kernel("gated_matmul_few", f"ppiipii{OUT}p", gate.layout, max_rows, 2, row_warps)
    arguments = (gate.address, up.address, gate.rows, gate.blocks, x.bf16, x.stride, ACTIVATIONS[activation], *out.out, count)
    return Launch(kernel, (ceil_div(max_rows, tokens), ceil_div(gate.rows, 16 * row_warps), 1), 32 * _FEW_WARPS, shared, arguments)


def matmul_tile(max_rows: int) -> int:
    """Rows of x in a tile of `matmul`."""
    return 32 if max_rows <= 32 else 64 if max_rows <= 64 else 128


MATMUL_FLOAT_TILE = 64


def matmul(
    weights: Weights,
    x: Rows,
    out: int,
    out_stride: int,
    *,
    accumulate: bool,
    count: int,
    max_rows: int,
    tensor_cores: bool,
) -> Launch:
    """As `matvec`, for many rows: takes ``x.bf16`` with tensor cores (sm_80 and later), else ``x.f32``."""
    tile = matmul_tile(max_rows) if tensor_cores else MATMUL_FLOAT_TILE
    experts = (0, 0, 0, 1, count)
    return tiled_matmul(weights, x, out, out_stride, accumulate, experts, tile, ceil_div(max_rows, tile), tensor_cores)


UNPACKED_ROWS = 512
"""Rows from which on weights are written down in bfloat16 (`dequantize`) for `matmul_bf16`; `matmul` unpacks them again for every 128."""


def matmul_bf16(
    unpacked: int, weights: Weights, x: Rows, out: int, out_stride: int, *, accumulate: bool, count: int, max_rows: int
) -> Launch:
    """As `matmul`, on what `dequantize` made of the weights (or on a BF16 matrix itself); takes ``x.bf16``."""
    kernel = Kernel("matmul_bf16", "matmul_bf16.cu", "piipipiip", (), 80)
    arguments = (unpacked, weights.rows, 32 * weights.blocks, x.bf16, x.stride, out, out_stride, int(accumulate), count)
    grid = (ceil_div(max_rows, 128), ceil_div(weights.rows, 128), 1)
    return Launch(kernel, grid, 128, 4 * (128 + 128) * (32 + 8) * 2, arguments)


def matmul_hopper(
    unpacked: int, weights: Weights, x: Rows, out: int, out_stride: int, *, accumulate: bool, count: int, max_rows: int
) -> Launch:
    """As `matmul_bf16`, by the instructions of a warpgroup that sm_90 alone has."""
    tiles = ceil_div(max_rows, 128)
    width = 256 if tiles * ceil_div(weights.rows, 256) >= HOPPER_TILES else 128
    kernel = Kernel("matmul_hopper", "matmul_hopper.cu", "piipipiip", defines(BN=width), 90, only_there=True)
    arguments = (unpacked, weights.rows, 32 * weights.blocks, x.bf16, x.stride, out, out_stride, int(accumulate), count)
    return Launch(kernel, (tiles, ceil_div(weights.rows, width), 1), 256, (192 << 10) + 1024, arguments)


def gated_matmul_hopper(
    unpacked: tuple[int, int], weights: Weights, x: Rows, activation: str, out: Rows, *, count: int, max_rows: int
) -> Launch:
    """``out.bf16 = activation(x @ gate.T) * (x @ up.T)`` of two matrices of this shape, both unpacked."""
    kernel = Kernel("gated_matmul_hopper", "matmul_hopper.cu", "ppiipiipip", defines(BN=256), 90, only_there=True)
    shape = (weights.rows, 32 * weights.blocks)
    arguments = (*unpacked, *shape, x.bf16, x.stride, ACTIVATIONS[activation], out.bf16, out.stride, count)
    return Launch(kernel, (ceil_div(max_rows, 128), ceil_div(weights.rows, 128), 1), 256, (192 << 10) + 1024, arguments)


HOPPER_TILES = 200
"""Wide tiles from which on they are better than twice as many narrow ones: 1.5 for each SM."""


def tiled_matmul(
    weights: Weights,
    x: Rows,
    out: int,
    out_stride: int,
    accumulate: bool,
    experts: tuple[int, int, int, int, int],
    tile: int,
    tiles: int,
    tensor_cores: bool,
) -> Launch:
    """``experts``: bytes from one expert's matrix to the next, then `places`, `tile_experts`, choices for each row of x and the count, as
    in matmul.cu.
    """
    expert_bytes, *places = experts
    signature = "pliipipiippip"
    if tensor_cores:
        width = 128 if weights.rows >= 2048 else 64
        kernel = Kernel("matmul", "matmul.cu", signature, (*weights.layout.macros, *defines(BM=tile, BN=width)), 80)
        shared = (2 * tile + width) * (64 + 8) * 2
    else:
        width, shared = 64, 0
        kernel = Kernel("matmul_float", "matmul_float.cu", signature, weights.layout.macros)
    source = x.bf16 if tensor_cores else x.f32
    arguments = (weights.address, expert_bytes, weights.rows, weights.blocks, source, x.stride, out, out_stride, int(accumulate), *places)
    # Tiles of x come first: blocks that run together share their weights.
    return Launch(kernel, (tiles, ceil_div(weights.rows, width), 1), 256, shared, arguments)
