"""Attention over a paged KV cache, token by token or many tokens together; rotation and the write to the cache before it.

State arrays are int32:

- ``positions``, ``slots`` (``block * block_size + offset``) and ``table_rows`` (row of the block table) of each token
- ``items`` ``[first token, tokens, row of the block table]`` for `attention_prefill`: up to `query_tile_tokens` tokens of one sequence
- ``block_tables`` ``[sequences][table_width]``

The KV cache of a layer is ``[num_blocks][kv_heads][block_size][head_dim]``, bfloat16 or float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .launch import Kernel, Launch
from .operands import OUT, Rows, ceil_div, defines

CACHE_ITEM_BYTES = {"bf16": 2, "f32": 4}


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
    macros = defines(HEAD_DIM=heads.head_dim, CACHE_F32=heads.float_cache)
    kernel = Kernel("rope_and_cache", "rope.cu", "pipipiiippfpifppppip", macros)
    strides = (q.f32, q.stride, k.f32, k.stride, v.f32, v.stride)
    norms = (q_norm, k_norm, epsilon, rotations, pairs, scale)
    cache = (places.positions, places.slots, heads.keys, heads.values, heads.block_size)
    grid = (ceil_div(heads.heads + heads.kv_heads, 4), max_rows, 1)
    return Launch(kernel, grid, 128, 0, (*strides, heads.heads, heads.kv_heads, *norms, *cache, count))


def _head_group(heads: Heads) -> int:
    """Query heads that a block takes together: as even as can be, eight at most; registers hold fewer of wide heads."""
    most = 4 if heads.head_dim > 128 else 8
    return ceil_div(heads.group, ceil_div(heads.group, most))


def decode_tensor_cores(heads: Heads, arch: int) -> bool:
    """Whether `attention_decode` is that of tensor cores: registers hold heads of up to 128 dimensions."""
    return arch >= 80 and not heads.float_cache and heads.head_dim in (64, 128)


def decode_splits(heads: Heads, max_rows: int, max_length: int, multiprocessors: int, *, tensor_cores: bool) -> int:
    """Splits of each token, of 64 positions at least: as many blocks as run together, or four, so that a long sequence among short ones
    is dealt out too."""
    blocks = max_rows * heads.kv_heads * ceil_div(heads.group, _head_group(heads))
    together = (2 if tensor_cores else 4) * multiprocessors
    return max(1, min(max(4, together // blocks), ceil_div(max_length, 64), 128))


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
    grid = (heads.kv_heads * ceil_div(heads.group, group), splits, max_rows)
    cache = (heads.keys, heads.values, heads.block_size, heads.heads, heads.kv_heads)
    state = (places.positions, places.table_rows, places.block_tables, places.table_width)
    arguments = (q.f32, q.stride, *cache, *state, window, soft_cap, partials)
    signature = "pippiiipppiifp"
    if tensor_cores:
        macros = defines(HEAD_DIM=heads.head_dim, GROUP=group)
        kernel = Kernel("attention_decode_bf16", "attention_decode.cu", f"{signature}p{OUT}p", macros, 80)
        return [Launch(kernel, grid, 128, 0, (*arguments, arrived, *out.out, count))]
    macros = defines(HEAD_DIM=heads.head_dim, CACHE_F32=heads.float_cache, GROUP=group)
    decode = Kernel("attention_decode", "attention.cu", f"{signature}p", macros)
    merge = Kernel("attention_merge", "attention.cu", f"piipi{OUT}p", macros)
    columns = ceil_div(heads.heads * heads.head_dim, 128)
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
    macros = defines(HEAD_DIM=heads.head_dim, GROUP=heads.group, BLOCK_SIZE=heads.block_size, SOFT_CAP=soft_cap > 0, ROWS=rows, KEYS=keys)
    kernel = Kernel("attention_prefill", "attention_prefill.cu", "pippipppiifppip", macros, 80)
    state = (places.positions, places.items, places.block_tables, places.table_width)
    arguments = (q.f32, q.stride, heads.keys, heads.values, heads.kv_heads, *state, window, soft_cap, out.f32, out.bf16, out.stride, count)
    shared = (rows + 2 * keys) * (heads.head_dim + 8) * 2
    return Launch(kernel, (heads.kv_heads, max_items, 1), 128, shared, arguments)
