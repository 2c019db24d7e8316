"""Attention over a paged KV cache, flash style (arXiv:2205.14135): softmax on line, chunk by chunk, nothing of size context kept.

A query tile is up to ``tokens`` consecutive tokens of one sequence; with the ``group`` query heads that share a key/value head they make up to
``tokens * group`` query rows, which share every load of a key and a value. `rope` states the layout of the cache.

Chunks lie at multiples of `CHUNK` positions and are always merged in order, so a token's result does not depend on the tile that it is in.
"""

from __future__ import annotations

from typing import Any

from .geometry import ATTENTION_CHUNK as CHUNK
from .geometry import query_tile_tokens
from .helpers import inline
from .isa import current_isa
from .simd import (
    add_tiles,
    bits_to_f32,
    both,
    exp,
    first_lane,
    fma_tile,
    greater,
    lane_numbers,
    less_i32,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    load_tile,
    max_lanes,
    maximum,
    select,
    splat_f32,
    splat_i32,
    store_f32,
    store_f32x16,
    store_tile,
    sum_lanes,
    zero_tile,
)

_LOWEST = -1.0e30  # of a masked score
_VISIBLE = -1.0e29


@inline
def soft_cap(s, cap):
    """``cap * tanh(s / cap)``."""
    e = exp(s * splat_f32(2.0 / cap))
    return splat_f32(cap) * (splat_f32(1.0) - splat_f32(2.0) / (e + splat_f32(1.0)))


def attention(*, head_dim: int, group: int) -> Any:
    """``out = softmax(q . k) . v`` for each query row; q comes scaled. Units are (query tile, key/value head).

    Slots: 0 q, 1 bytes of a q row, 2 out, 3 bytes of an out row, 4 key cache, 5 value cache, 6 block size, 7 key/value heads, 8 positions (int32),
    9 query tiles (int32 [first token, tokens, row of the block table]), 10 block tables (int32), 11 entries of a block table, 12 window or 0,
    13 soft cap or 0 (f32 bits), 14 scratch, 15 bytes of scratch for a thread.
    """
    tile_tokens = query_tile_tokens(group)
    full = tile_tokens * group
    one_token, all_tokens = _tile_attention(head_dim, group, group), _tile_attention(head_dim, group, full)
    single = full == group

    def kernel(slots, begin, end, thread):
        q_row = load_i64(slots + 8)
        out_row = load_i64(slots + 24)
        kv_heads = load_i64(slots + 56)
        positions = load_i64(slots + 64)
        tiles = load_i64(slots + 72)
        scratch = load_i64(slots + 112) + thread * load_i64(slots + 120)
        for unit in range(begin, end):
            tile = tiles + unit // kv_heads * 12
            head = unit % kv_heads
            first = load_i32(tile)
            tokens = load_i32(tile + 4)
            table = load_i64(slots + 80) + load_i32(tile + 8) * load_i64(slots + 88) * 4
            position = load_i32(positions + 4 * first)
            q = load_i64(slots) + first * q_row + head * group * head_dim * 4
            rows = full if tokens > 1 else group
            # queries, transposed to [dimension][row]; rows beyond the last token repeat it and are not written back
            for row in range(rows):
                source = q + min(row // group, tokens - 1) * q_row + row % group * head_dim * 4
                for i in range(head_dim):
                    store_f32(scratch + 4 * (i * rows + row), load_f32(source + 4 * i))
            if single or tokens == 1:
                one_token(slots, scratch, table, position, head, tokens)
                result = scratch + group * (head_dim + CHUNK) * 4
                sums = result + group * (head_dim + 1) * 4
            else:
                all_tokens(slots, scratch, table, position, head, tokens)
                result = scratch + full * (head_dim + CHUNK) * 4
                sums = result + full * (head_dim + 1) * 4
            out = load_i64(slots + 16) + first * out_row + head * group * head_dim * 4
            for row in range(tokens * group):
                target = out + row // group * out_row + row % group * head_dim * 4
                inverse = splat_f32(1.0) / splat_f32(load_f32(sums + 4 * row))
                for i in range(0, head_dim, 16):
                    store_f32x16(target + 4 * i, load_f32x16(result + (row * head_dim + i) * 4) * inverse)

    return kernel


def _tile_attention(head_dim: int, group: int, rows: int) -> Any:
    """All chunks of one unit; ``rows`` query rows, token by token. Scratch: queries [head_dim][rows], scores [rows][CHUNK], outputs [rows][head_dim], maxima, sums."""
    group_stride = rows * 4
    score_stride = CHUNK * 4
    # value vectors taken together, so that rows * width accumulators fit the registers
    vectors = head_dim // 16
    budget = 2 * current_isa().tokens
    pairs = vectors % 2 == 0 and 2 * rows <= budget

    @inline
    def attend(slots, scratch, table, position, head, tokens):
        keys, values = load_i64(slots + 32), load_i64(slots + 40)
        block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        window = load_i64(slots + 96)
        cap = bits_to_f32(load_i64(slots + 104))
        head_bytes = block_size * head_dim * 2
        scores = scratch + head_dim * rows * 4
        result = scores + rows * CHUNK * 4
        maxima = result + rows * head_dim * 4
        sums = maxima + rows * 4
        for row in range(rows):
            store_f32(maxima + 4 * row, _LOWEST)
            store_f32(sums + 4 * row, 0.0)
            for i in range(0, head_dim, 16):
                store_f32x16(result + (row * head_dim + i) * 4, splat_f32(0.0))
        end = position + tokens
        start = 0
        if window:
            start = max(0, position - window + 1) // CHUNK * CHUNK
        while start < end:
            stop = min(end, start + CHUNK)
            # scores of 16 positions at a time
            for at in range(start, stop, 16):
                block = load_i32(table + at // block_size * 4)
                k = keys + (block * kv_heads + head) * head_bytes + at % block_size * head_dim * 2
                even = zero_tile(rows)
                odd = zero_tile(rows)
                for i in range(0, head_dim, 2):
                    even = fma_tile(even, load_f16x16(k + 32 * i), scratch + i * group_stride, 4)
                    odd = fma_tile(odd, load_f16x16(k + 32 * i + 32), scratch + (i + 1) * group_stride, 4)
                store_tile(add_tiles(even, odd), scores + (at - start) * 4, score_stride)
            # softmax so far
            for row in range(rows):
                visible = position + min(row // group, tokens - 1)
                line = scores + row * score_stride
                newest = splat_i32(visible - start + 1)
                oldest = splat_i32(visible - window - start if window else -1)
                peak = splat_f32(_LOWEST)
                for at in range(0, stop - start, 16):
                    lanes = lane_numbers() + splat_i32(at)
                    s = load_f32x16(line + 4 * at)
                    if cap > 0.0:
                        s = soft_cap(s, cap)
                    s = select(both(less_i32(lanes, newest), less_i32(oldest, lanes)), s, splat_f32(_LOWEST))
                    store_f32x16(line + 4 * at, s)
                    peak = maximum(peak, s)
                old = load_f32(maxima + 4 * row)
                new = max(old, max_lanes(peak))
                factor = exp(splat_f32(old - new))
                total = splat_f32(0.0)
                for at in range(0, stop - start, 16):
                    s = load_f32x16(line + 4 * at)
                    p = select(greater(s, splat_f32(_VISIBLE)), exp(s - splat_f32(new)), splat_f32(0.0))
                    store_f32x16(line + 4 * at, p)
                    total = total + p
                store_f32(maxima + 4 * row, new)
                store_f32(sums + 4 * row, load_f32(sums + 4 * row) * first_lane(factor) + sum_lanes(total))
                for i in range(0, head_dim, 16):
                    o = result + (row * head_dim + i) * 4
                    store_f32x16(o, load_f32x16(o) * factor)
            # weighted values
            for i in range(0, head_dim, 32 if pairs else 16):
                left = load_tile(rows, result + 4 * i, head_dim * 4)
                right = load_tile(rows, result + 4 * i + 64, head_dim * 4) if pairs else left
                for at in range(start, stop, 16):
                    block = load_i32(table + at // block_size * 4)
                    v = values + (block * kv_heads + head) * head_bytes + (at % block_size * head_dim + i) * 2
                    p = scores + (at - start) * 4
                    for _ in range(min(16, stop - at)):
                        left = fma_tile(left, load_f16x16(v), p, score_stride)
                        if pairs:
                            right = fma_tile(right, load_f16x16(v + 32), p, score_stride)
                        v += head_dim * 2
                        p += 4
                store_tile(left, result + 4 * i, head_dim * 4)
                if pairs:
                    store_tile(right, result + 4 * i + 64, head_dim * 4)
            start += CHUNK

    return attend
