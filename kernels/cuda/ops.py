"""Every operation as launches: which kernel, on what grid, with which arguments.

Grids are made for the most rows that a program may see; how many there are is read from ``count``, the address of an int32,
when the kernel runs. So launches can be captured once as a CUDA graph. All addresses are of device memory. State arrays are int32:

- ``tokens``, ``positions``, ``slots`` (``block * block_size + offset``) and ``table_rows`` (row of the block table) of each token
- ``items`` ``[first token, tokens, row of the block table]`` for `attention_prefill`: up to `query_tile_tokens` tokens of one sequence
- ``block_tables`` ``[sequences][table_width]``, ``output_rows``

The KV cache of a layer is ``[num_blocks][kv_heads][block_size][head_dim]``, bfloat16 or float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .launch import Kernel, Launch
from .planes import Layout

ACTIVATIONS = {"silu": 1, "gelu": 2, "relu": 3}  # common.cuh
CACHE_ITEM_BYTES = {"bf16": 2, "f32": 4}
MATVEC_TOKENS = 8
"""Rows for which `matvec` reads weights once."""
MATVEC_ROWS = 32
"""Rows up to which `matvec` is the better kernel. `matmul` has few blocks then, each of which waits for memory in every step."""

_OUT = "ppppi"  # ROWS_ARGUMENTS


@dataclass(frozen=True)
class Weights:
    """A matrix in planes (`planes.Layout.pack`) at a device address that is a multiple of 256."""

    layout: Layout
    address: int
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        return -(-self.columns // 32)


class Rows(NamedTuple):
    """An array of activations in the forms that are kept; 0: not in that form. A producer writes all, a consumer takes
    the one that it needs.

    Rows lie ``stride`` columns apart, a multiple of 32, in every form: float32, int8 with float32 pairs (scale, scale times sum of
    quants) of 32 columns each, bfloat16. Producers fill rows up to a multiple of 32 with zeros.
    """

    stride: int
    f32: int = 0
    q8: int = 0
    scales: int = 0
    bf16: int = 0

    @property
    def out(self) -> tuple[int, int, int, int, int]:
        return self.f32, self.q8, self.scales, self.bf16, self.stride

    @property
    def vector(self) -> tuple[int, int, int, int]:
        return self.f32, self.q8, self.scales, self.stride


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _macros(**values: int) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(int(value))) for name, value in values.items())


# ---- weights ---------------------------------------------------------------------------------------------------------


def embedding(weights: Weights, tokens: int, out: Rows, scale: float, *, count: int, max_rows: int) -> Launch:
    """``out.f32[i] = weights[tokens[i]] * scale``."""
    kernel = Kernel("embedding", "unpack.cu", "piipfpip", weights.layout.macros)
    arguments = (weights.address, weights.rows, weights.blocks, tokens, scale, out.f32, out.stride, count)
    return Launch(kernel, (max_rows, 1, 1), 32 * min(4, _ceil(weights.blocks, 32)), 0, arguments)


def dequantize(weights: Weights, out: int) -> Launch:
    """The matrix in bfloat16 ``[rows][columns rounded up to 32]``, for `matmul_bf16`."""
    kernel = Kernel("dequantize", "unpack.cu", "piip", weights.layout.macros)
    return Launch(kernel, (_ceil(weights.rows * weights.blocks, 256), 1, 1), 256, 0, (weights.address, weights.rows, weights.blocks, out))


def _vector_kernel(name: str, arguments: str, layout: Layout, tokens: int, rows: int) -> Kernel:
    return Kernel(name, "matvec.cu", arguments, (*layout.macros, *_macros(TOKENS=tokens, ROWS=rows)))


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
    kernel = _vector_kernel("matvec", "pipipipipipiipppiip", products[0].weights.layout, tokens, rows)
    arguments = (*_product_arguments(products), *x.vector, int(accumulate), count)
    groups = sum(_ceil(each.weights.rows, rows) for each in products)  # a warp has one
    return Launch(kernel, (_ceil(groups, warps), _ceil(max_rows, tokens), 1), 32 * warps, 0, arguments)


def gated_matvec(gate: Weights, up: Weights, x: Rows, activation: str, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = activation(x @ gate.T) * (x @ up.T)``; both matrices have one layout and shape."""
    tokens = _group_of_tokens(max_rows)
    kernel = _vector_kernel("gated_matvec", f"ppiipppii{_OUT}p", gate.layout, tokens, 2)
    arguments = (gate.address, up.address, gate.rows, gate.blocks, *x.vector, ACTIVATIONS[activation], *out.out, count)
    blocks = _ceil(gate.rows, 32)
    threads = 256 if blocks <= 256 else 128  # registers let a block of 256 have two neighbours on an SM, one of 128 five
    return Launch(kernel, (blocks, _ceil(max_rows, tokens), 1), threads, 0, arguments)


FEW_ROWS = 128
"""Rows up to which `matmul_few` is the better kernel: it reads weights once for 32, but has more blocks than `matmul`, none of which
waits for others to unpack."""
_FEW_BLOCKS = 128  # that `matmul_few` should have, about one for each multiprocessor of a large GPU
_FEW_WARPS = 8


def _few_kernel(name: str, arguments: str, layout: Layout, max_rows: int, tiles: int, row_warps: int) -> tuple[Kernel, int, int]:
    """Kernel, rows of x for each block, and bytes of shared memory: stages of x, then sums."""
    tokens = next((tokens for tokens in (8, 16) if max_rows <= tokens), 32)
    macros = _macros(TOKENS=tokens, MATRIX_TILES=tiles, ROW_WARPS=row_warps)
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
    blocks = sum(_ceil(each.weights.rows, 16 * tiles * row_warps) for each in products)
    return Launch(kernel, (_ceil(max_rows, tokens), blocks, 1), 32 * _FEW_WARPS, shared, arguments)


def gated_matmul_few(gate: Weights, up: Weights, x: Rows, activation: str, out: Rows, *, count: int, max_rows: int) -> Launch:
    """As `gated_matvec`, on tensor cores; takes ``x.bf16``."""
    row_warps = 4 if gate.rows >= 64 * _FEW_BLOCKS else 2
    kernel, tokens, shared = _few_kernel("gated_matmul_few", f"ppiipii{_OUT}p", gate.layout, max_rows, 2, row_warps)
    arguments = (gate.address, up.address, gate.rows, gate.blocks, x.bf16, x.stride, ACTIVATIONS[activation], *out.out, count)
    return Launch(kernel, (_ceil(max_rows, tokens), _ceil(gate.rows, 16 * row_warps), 1), 32 * _FEW_WARPS, shared, arguments)


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
    return _matmul(weights, x, out, out_stride, accumulate, experts, tile, _ceil(max_rows, tile), tensor_cores)


UNPACKED_ROWS = 512
"""Rows from which on weights are written down in bfloat16 (`dequantize`) for `matmul_bf16`; `matmul` unpacks them again for every 128."""


def matmul_bf16(
    unpacked: int, weights: Weights, x: Rows, out: int, out_stride: int, *, accumulate: bool, count: int, max_rows: int
) -> Launch:
    """As `matmul`, on what `dequantize` made of the weights (or on a BF16 matrix itself); takes ``x.bf16``."""
    kernel = Kernel("matmul_bf16", "matmul_bf16.cu", "piipipiip", (), 80)
    arguments = (unpacked, weights.rows, 32 * weights.blocks, x.bf16, x.stride, out, out_stride, int(accumulate), count)
    grid = (_ceil(max_rows, 128), _ceil(weights.rows, 128), 1)
    return Launch(kernel, grid, 128, 4 * (128 + 128) * (32 + 8) * 2, arguments)


def matmul_hopper(
    unpacked: int, weights: Weights, x: Rows, out: int, out_stride: int, *, accumulate: bool, count: int, max_rows: int
) -> Launch:
    """As `matmul_bf16`, by the instructions of a warpgroup that sm_90 alone has."""
    tiles = _ceil(max_rows, 128)
    width = 256 if tiles * _ceil(weights.rows, 256) >= HOPPER_TILES else 128
    kernel = Kernel("matmul_hopper", "matmul_hopper.cu", "piipipiip", _macros(BN=width), 90, only_there=True)
    arguments = (unpacked, weights.rows, 32 * weights.blocks, x.bf16, x.stride, out, out_stride, int(accumulate), count)
    return Launch(kernel, (tiles, _ceil(weights.rows, width), 1), 256, (192 << 10) + 1024, arguments)


def gated_matmul_hopper(
    unpacked: tuple[int, int], weights: Weights, x: Rows, activation: str, out: Rows, *, count: int, max_rows: int
) -> Launch:
    """``out.bf16 = activation(x @ gate.T) * (x @ up.T)`` of two matrices of this shape, both unpacked."""
    kernel = Kernel("gated_matmul_hopper", "matmul_hopper.cu", "ppiipiipip", _macros(BN=256), 90, only_there=True)
    shape = (weights.rows, 32 * weights.blocks)
    arguments = (*unpacked, *shape, x.bf16, x.stride, ACTIVATIONS[activation], out.bf16, out.stride, count)
    return Launch(kernel, (_ceil(max_rows, 128), _ceil(weights.rows, 128), 1), 256, (192 << 10) + 1024, arguments)


HOPPER_TILES = 200
"""Wide tiles from which on they are better than twice as many narrow ones: 1.5 for each SM."""


def _matmul(
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
    expert_bytes, *places = experts
    signature = "pliipipiippip"
    if tensor_cores:
        width = 128 if weights.rows >= 2048 else 64
        kernel = Kernel("matmul", "matmul.cu", signature, (*weights.layout.macros, *_macros(BM=tile, BN=width)), 80)
        shared = (2 * tile + width) * (64 + 8) * 2
    else:
        width, shared = 64, 0
        kernel = Kernel("matmul_float", "matmul_float.cu", signature, weights.layout.macros)
    source = x.bf16 if tensor_cores else x.f32
    arguments = (weights.address, expert_bytes, weights.rows, weights.blocks, source, x.stride, out, out_stride, int(accumulate), *places)
    # Tiles of x come first: blocks that run together share their weights.
    return Launch(kernel, (tiles, _ceil(weights.rows, width), 1), 256, shared, arguments)


# ---- rows ------------------------------------------------------------------------------------------------------------


def norm(
    x: Rows,
    columns: int,
    epsilon: float,
    *,
    weight: int = 0,
    out: Rows | None = None,
    branch: Rows | None = None,
    branch_weight: int = 0,
    indices: int = 0,
    count: int,
    max_rows: int,
) -> Launch:
    """``x += branch``, or ``x += rms_norm(branch) * branch_weight``; then ``out = rms_norm(x) * weight``; of the rows
    ``indices`` only, if given.
    """
    if bool(weight) != (out is not None):
        raise ValueError("a norm has both a weight and an output, or neither")
    out, branch = out or Rows(32), branch or Rows(32)
    most = 2 if max_rows <= MATVEC_TOKENS else 4  # pieces of four columns to a thread; few rows: the time of one counts
    threads = 32 * min(32, _ceil(columns, 128 * most))
    macros = _macros(PIECES=_ceil(columns, 4 * threads), THREADS=threads, WHOLE=columns % 4 == 0)
    kernel = Kernel("norm_rows", "norm.cu", f"pipipppif{_OUT}p", macros)
    arguments = (x.f32, x.stride, branch.f32, branch.stride, branch_weight, weight, indices, columns, epsilon, *out.out, count)
    return Launch(kernel, (max_rows, 1, 1), threads, 0, arguments)


def _element(name: str, kinds: str, x: Rows, columns: int, parameters: tuple[int | float, ...], out: Rows, count: int, rows: int) -> Launch:
    kernel = Kernel(name, "rows.cu", f"pii{kinds}{_OUT}p")
    return Launch(kernel, (_ceil(columns, 512), rows, 1), 128, 0, (x.f32, x.stride, columns, *parameters, *out.out, count))


def add(x: Rows, y: Rows, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x + y``."""
    return _element("add", "pi", x, columns, (y.f32, y.stride), out, count, max_rows)


def multiply(x: Rows, y: Rows, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x * y``."""
    return _element("multiply", "pi", x, columns, (y.f32, y.stride), out, count, max_rows)


def add_vector(x: Rows, vector: int, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x + vector``, for every row."""
    return _element("add_vector", "p", x, columns, (vector,), out, count, max_rows)


def activate(x: Rows, activation: str, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = activation(x)``."""
    return _element("activate", "i", x, columns, (ACTIVATIONS[activation],), out, count, max_rows)


def gate(x: Rows, y: Rows, activation: str, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = activation(x) * y``."""
    return _element("gate", "pii", x, columns, (y.f32, y.stride, ACTIVATIONS[activation]), out, count, max_rows)


def sigmoid_gate(x: Rows, y: Rows, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x * sigmoid(y)`` for y of one column."""
    return _element("sigmoid_gate", "pi", x, columns, (y.f32, y.stride), out, count, max_rows)


def soft_cap(x: Rows, cap: float, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = cap * tanh(x / cap)``."""
    return _element("soft_cap", "f", x, columns, (cap,), out, count, max_rows)


def scale(x: Rows, factor: float, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x * factor``; by 1 it copies, and makes other forms of x."""
    return _element("scale", "f", x, columns, (factor,), out, count, max_rows)


def take_rows(x: Rows, indices: int, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out[i] = x[indices[i]]``."""
    kernel = Kernel("take_rows", "rows.cu", f"pipi{_OUT}p")
    return Launch(kernel, (_ceil(columns, 512), max_rows, 1), 128, 0, (x.f32, x.stride, indices, columns, *out.out, count))


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Shapes of an attention layer, and its cache."""

    heads: int
    kv_heads: int
    head_dim: int
    keys: int
    values: int
    block_size: int
    float_cache: bool = False

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


class Places(NamedTuple):
    """State arrays that attention reads (addresses)."""

    positions: int
    slots: int
    table_rows: int
    items: int
    block_tables: int
    table_width: int


def rope_and_cache(
    q: Rows,
    k: Rows,
    v: Rows,
    heads: Heads,
    places: Places,
    *,
    q_norm: int,
    k_norm: int,
    epsilon: float,
    rotations: int,
    pairs: int,
    scale: float,
    count: int,
    max_rows: int,
) -> Launch:
    """Norm (weights or 0) and rotate (table ``[position][2][pairs]`` or 0) q and k; scale q in place; write k and v to the cache."""
    macros = _macros(HEAD_DIM=heads.head_dim, CACHE_F32=heads.float_cache)
    kernel = Kernel("rope_and_cache", "rope.cu", "pipipiiippfpifppppip", macros)
    strides = (q.f32, q.stride, k.f32, k.stride, v.f32, v.stride)
    norms = (q_norm, k_norm, epsilon, rotations, pairs, scale)
    cache = (places.positions, places.slots, heads.keys, heads.values, heads.block_size)
    grid = (_ceil(heads.heads + heads.kv_heads, 4), max_rows, 1)
    return Launch(kernel, grid, 128, 0, (*strides, heads.heads, heads.kv_heads, *norms, *cache, count))


def _head_group(heads: Heads) -> int:
    """Query heads that a block takes together: as even as can be, eight at most; registers hold fewer of wide heads."""
    most = 4 if heads.head_dim > 128 else 8
    return _ceil(heads.group, _ceil(heads.group, most))


def decode_tensor_cores(heads: Heads, arch: int) -> bool:
    """Whether `attention_decode` is that of tensor cores: registers hold heads of up to 128 dimensions."""
    return arch >= 80 and not heads.float_cache and heads.head_dim in (64, 128)


def decode_splits(heads: Heads, max_rows: int, max_length: int, multiprocessors: int, *, tensor_cores: bool) -> int:
    """Splits of each token, of 64 positions at least: as many blocks as run together, or four, so that a long sequence among short ones
    is dealt out too."""
    blocks = max_rows * heads.kv_heads * _ceil(heads.group, _head_group(heads))
    together = (2 if tensor_cores else 4) * multiprocessors
    return max(1, min(max(4, together // blocks), _ceil(max_length, 64), 128))


def partial_floats(heads: Heads, max_rows: int, splits: int) -> int:
    """float32 of scratch for the splits of `attention_decode`."""
    return max_rows * heads.heads * splits * (heads.head_dim + 2)


def attention_decode(
    q: Rows,
    heads: Heads,
    places: Places,
    out: Rows,
    *,
    window: int,
    soft_cap: float,
    partials: int,
    arrived: int,
    splits: int,
    tensor_cores: bool,
    count: int,
    max_rows: int,
) -> list[Launch]:
    """Each token by itself, its positions dealt out to ``splits`` blocks; ``out`` in every form. ``window`` and ``soft_cap`` 0: none.

    ``arrived``: an int32 for each row and query head, all 0 before and after.
    """
    group = _head_group(heads)
    grid = (heads.kv_heads * _ceil(heads.group, group), splits, max_rows)
    cache = (heads.keys, heads.values, heads.block_size, heads.heads, heads.kv_heads)
    state = (places.positions, places.table_rows, places.block_tables, places.table_width)
    arguments = (q.f32, q.stride, *cache, *state, window, soft_cap, partials)
    signature = "pippiiipppiifp"
    if tensor_cores:
        macros = _macros(HEAD_DIM=heads.head_dim, GROUP=group)
        kernel = Kernel("attention_decode_bf16", "attention_decode.cu", f"{signature}p{_OUT}p", macros, 80)
        return [Launch(kernel, grid, 128, 0, (*arguments, arrived, *out.out, count))]
    macros = _macros(HEAD_DIM=heads.head_dim, CACHE_F32=heads.float_cache, GROUP=group)
    decode = Kernel("attention_decode", "attention.cu", f"{signature}p", macros)
    merge = Kernel("attention_merge", "attention.cu", f"piipi{_OUT}p", macros)
    columns = _ceil(heads.heads * heads.head_dim, 128)
    merged = (partials, splits, heads.heads, places.positions, window, *out.out, count)
    return [Launch(decode, grid, 128, 0, (*arguments, count)), Launch(merge, (columns, max_rows, 1), 128, 0, merged)]


def _prefill_rows(heads: Heads) -> int:
    """Queries of a block of `attention_prefill`: outputs of more than this fill the registers."""
    return 128 if heads.head_dim <= 128 else 64


def query_tile_tokens(heads: Heads) -> int:
    """Tokens of an item of `attention_prefill`."""
    return _prefill_rows(heads) // heads.group


def can_prefill(heads: Heads, arch: int) -> bool:
    """Whether `attention_prefill` serves these heads; `attention_decode` serves all, token by token."""
    return arch >= 80 and not heads.float_cache and heads.group <= 64 and heads.head_dim <= 256 and heads.head_dim % 16 == 0


def attention_prefill(
    q: Rows, heads: Heads, places: Places, out: Rows, *, window: int, soft_cap: float, count: int, max_items: int
) -> Launch:
    """Many tokens of a sequence together, on tensor cores; writes ``out.f32`` and ``out.bf16``. ``count`` is of items."""
    rows = _prefill_rows(heads)
    keys = rows // 2
    macros = _macros(HEAD_DIM=heads.head_dim, GROUP=heads.group, BLOCK_SIZE=heads.block_size, SOFT_CAP=soft_cap > 0, ROWS=rows, KEYS=keys)
    kernel = Kernel("attention_prefill", "attention_prefill.cu", "pippipppiifppip", macros, 80)
    state = (places.positions, places.items, places.block_tables, places.table_width)
    arguments = (q.f32, q.stride, heads.keys, heads.values, heads.kv_heads, *state, window, soft_cap, out.f32, out.bf16, out.stride, count)
    shared = (rows + 2 * keys) * (heads.head_dim + 8) * 2
    return Launch(kernel, (heads.kv_heads, max_items, 1), 128, shared, arguments)


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


def route(logits: Rows, experts: int, top_k: int, *, normalize: bool, chosen: int, weights: int, count: int, max_rows: int) -> Launch:
    """``chosen`` int32 and ``weights`` float32 ``[tokens][top_k]``: the best experts, by softmax over all."""
    kernel = Kernel("route", "moe.cu", "piiiippp")
    arguments = (logits.f32, logits.stride, experts, top_k, int(normalize), chosen, weights, count)
    return Launch(kernel, (_ceil(max_rows, 4), 1, 1), 128, 0, arguments)


def expert_matvec(
    experts: Weights, x: Rows, out: int, out_stride: int, *, chosen: int, top_k: int, shared_x: bool, count: int, max_rows: int
) -> Launch:
    """A product for each choice with its expert's matrix; `experts` is that of expert 0, the others follow `planes.Layout.nbytes` apart.

    ``shared_x``: x has a row for each token, else for each choice.
    """
    rows, warps = 2, 4
    kernel = _vector_kernel("expert_matvec", "pliipppiipipip", experts.layout, 1, rows)
    stride = experts.layout.nbytes(experts.rows, experts.columns)
    choices = (int(shared_x), out, out_stride, chosen, top_k, count)
    arguments = (experts.address, stride, experts.rows, experts.blocks, *x.vector, *choices)
    return Launch(kernel, (_ceil(experts.rows, rows * warps), max_rows * top_k, 1), 32 * warps, 0, arguments)


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
    """As `expert_matvec`, for many choices that `group` put into tiles of ``tile`` (`matmul_tile`, or `MATMUL_FLOAT_TILE`).

    ``choices_per_row`` is ``top_k`` if x has a row for each token, and 1 if it has one for each choice. Row *c* of out is choice *c*.
    """
    stride = experts.layout.nbytes(experts.rows, experts.columns)
    where = (stride, places, tile_experts, choices_per_row, tiles)
    return _matmul(experts, x, out, out_stride, False, where, tile, max_tiles, tensor_cores)


def gate_choices(gate: Rows, up: Rows, columns: int, activation: str, top_k: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``activation(gate) * up`` for each choice; both have one stride."""
    if gate.stride != up.stride:
        raise ValueError(f"gate and up lie in rows of {gate.stride} and {up.stride} columns")
    kernel = Kernel("gate_choices", "moe.cu", f"ppiiii{_OUT}p")
    arguments = (gate.f32, up.f32, gate.stride, columns, ACTIVATIONS[activation], top_k, *out.out, count)
    return Launch(kernel, (_ceil(columns, 512), max_rows * top_k, 1), 128, 0, arguments)


def combine(rows: Rows, weights: int, top_k: int, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out[token]`` is the sum of its choices' rows, by weight."""
    kernel = Kernel("combine", "moe.cu", f"pipii{_OUT}p")
    arguments = (rows.f32, rows.stride, weights, top_k, columns, *out.out, count)
    return Launch(kernel, (_ceil(columns, 512), max_rows, 1), 128, 0, arguments)


# ---- sampling --------------------------------------------------------------------------------------------------------


def sampling_scratch_floats(vocab_size: int, max_rows: int) -> int:
    """float32 of scratch that `sample` needs."""
    return 2 * _ceil(vocab_size, 4) * 4 * max_rows


def sample(descriptions: int, vocab_size: int, scratch: int, *, count: int, max_rows: int) -> Launch:
    """Sample rows: ``descriptions`` int64 ``[rows][ROW_WORDS]`` as `kernels.cpu.sampling_layout` states, with device addresses in them."""
    return Launch(Kernel("sample", "sampling.cu", "pipp"), (max_rows, 1, 1), 1024, 0, (descriptions, vocab_size, scratch, count))
