"""`attention` in integers over a cache of int16: the same items, chunks and order of merging.

Queries become int16 as well, with a scale for each row, and so do a chunk's probabilities, times the scales of their values: then one
instruction multiplies pairs and adds the products, on AVX2 twice as many in a cycle as float32 has. What meets keys or values in one sum
has magnitudes of `_MOST` together, so that no sum leaves 32 bits, whatever they are; a query of 64 dimensions keeps about 11 bits of its
largest, as a half float does. Sums of integers are exact: a token's bits do not depend on how many others share its keys.
"""

from __future__ import annotations

from typing import Any

from .attention import LOWEST, VISIBLE, item_kernel, soft_cap
from .geometry import ATTENTION_CHUNK as CHUNK
from .geometry import FLOAT_LINE as LINE
from .geometry import cache_row_bytes, float_rows, query_tile_tokens, register_rows
from .helpers import inline
from .int16_dots import add_words, scaled_floats, store_i16x16, zero_words
from .register_tiles import add_tiles, multiply_tile, store_tile, zero_tile
from .simd import (
    absolute,
    bits_to_f32,
    both,
    exp2,
    fma,
    greater,
    lane_numbers,
    less_i32,
    load_bf16x16,
    load_f32x16,
    load_i32,
    load_i32x16,
    load_i64,
    max_lanes,
    maximum,
    prefetch,
    round_to_i32,
    select,
    splat_f32,
    splat_i32,
    store_f32,
    store_f32x16,
    sum_lanes,
)

_LOG2_E = 1.4426950408889634
_RUN = 64  # dimensions of a key that are added as integers
_LARGEST = 32767.0
_MOST = 65000.0  # times 32767 is below 2**31, with room for what rounding adds
_SMALLEST = 1e-35  # a scale below becomes 0


@inline
def scale_of(most, largest):
    """The step in which integers of these magnitudes, together and at most, are as large as they may be. NaN stays NaN."""
    scale = most / _MOST
    return largest / _LARGEST if largest / _LARGEST > scale else scale


@inline
def inverse(scale):
    return splat_f32(1.0 / scale if scale > _SMALLEST else 0.0)


def attention(*, head_dim: int, group: int) -> Any:
    """Slots as `attention.attention`'s."""
    tile_rows = register_rows()  # of an item of several tokens
    parts = -(-group // tile_rows)
    part = -(-group // parts)  # rows of a single token that share a load
    capacity = float_rows(group)
    row_bytes = head_dim * 4
    query_bytes = head_dim * 2
    item_bytes = head_dim * 2
    scales_at = capacity * query_bytes  # in the scratch, behind the queries
    position_bytes = cache_row_bytes("int16", head_dim)

    @inline
    def quantize(source, target, scale_at):
        """A row of queries."""
        peak = splat_f32(0.0)
        most = 0.0
        for first in range(0, head_dim, _RUN):
            total = splat_f32(0.0)
            for i in range(first, min(first + _RUN, head_dim), 16):
                x = absolute(load_f32x16(source + 4 * i))
                total = total + x
                peak = maximum(peak, x)
            run = sum_lanes(total)
            most = most if most > run else run
        scale = scale_of(most, max_lanes(peak))
        factor = inverse(scale)
        store_f32(scale_at, scale)
        for i in range(0, head_dim, 16):
            store_i16x16(target + 2 * i, round_to_i32(load_f32x16(source + 4 * i) * factor))

    @inline
    def prepare(q, q_row, rows, scratch):
        for row in range(rows):
            quantize(q + row // group * q_row + row % group * row_bytes, scratch + row * query_bytes, scratch + scales_at + 4 * row)

    @inline
    def softmax(line, width, first, limit, cap, value_scales, maximum_at, sum_at, scale_at):
        """Probabilities of the positions ``first`` to ``limit - 1``, unnormalised, times their values' scales, in place of a row of scores:
        as int16, whose step goes to ``scale_at``."""
        whole = first <= 0 and limit >= width
        peak = splat_f32(LOWEST)
        if whole and cap == 0.0:
            for at in range(0, 4 * width, 64):
                peak = maximum(peak, load_f32x16(line + at))
        else:
            for at in range(0, width, 16):
                lanes = lane_numbers() + splat_i32(at)
                s = load_f32x16(line + 4 * at)
                if cap > 0.0:
                    s = soft_cap(s, cap)
                s = select(both(less_i32(lanes, splat_i32(limit)), less_i32(splat_i32(first - 1), lanes)), s, splat_f32(LOWEST))
                store_f32x16(line + 4 * at, s)
                peak = maximum(peak, s)
        top = max_lanes(peak)
        shift = splat_f32(top * -_LOG2_E)
        total = most = largest = splat_f32(0.0)
        for at in range(0, 4 * width, 64):
            s = load_f32x16(line + at)
            p = exp2(fma(s, splat_f32(_LOG2_E), shift))
            if not whole:  # what is masked becomes exactly 0
                p = select(greater(s, splat_f32(VISIBLE)), p, splat_f32(0.0))
            total = total + p
            p = p * load_f32x16(value_scales + at)
            most = most + p
            largest = maximum(largest, p)
            store_f32x16(line + at, p)
        scale = scale_of(sum_lanes(most), max_lanes(largest))
        factor = inverse(scale)
        for at in range(0, width, 16):  # behind what is still to be read
            store_i16x16(line + 2 * at, round_to_i32(load_f32x16(line + 4 * at) * factor))
        store_f32(maximum_at, top)
        store_f32(sum_at, sum_lanes(total))
        store_f32(scale_at, scale)

    def chunk_attention(tile_rows, ahead_of_use):
        """One chunk for ``rows`` query rows, ``tile_rows`` of them at a time; the last ones may begin with rows of the ones before.

        Each block asks for the next one if it is used but once: a block lies anywhere, so the CPU cannot foresee it.
        """

        @inline
        def place(cache_at, table, block_size, kv_heads, head, at):
            return cache_at + (load_i32(table + at // block_size * 4) * kv_heads + head) * block_size * position_bytes

        @inline
        def attend(slots, queries, rows, table, head, position, start, stop, outputs, maxima, sums):
            keys, values = load_i64(slots + 32), load_i64(slots + 40)
            block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
            window, cap = load_i64(slots + 96), bits_to_f32(load_i64(slots + 104))
            query_scales = queries + scales_at
            key_scales = query_scales + 4 * capacity
            value_scales = key_scales + 4 * CHUNK
            steps = value_scales + 4 * CHUNK
            scores = steps + 4 * capacity
            last = (rows if ahead_of_use else capacity) - tile_rows
            for at in range(start, stop, 16):
                block = place(keys, table, block_size, kv_heads, head, at)
                scales = block_size * item_bytes + at % block_size * 2
                store_f32x16(key_scales + (at - start) * 4, load_bf16x16(block + scales))
                value_block = place(values, table, block_size, kv_heads, head, at)
                store_f32x16(value_scales + (at - start) * 4, load_bf16x16(value_block + scales))
                k = block + at % block_size * item_bytes
                ahead = 0
                if ahead_of_use:
                    if at + 16 < stop:
                        ahead = place(keys, table, block_size, kv_heads, head, at + 16) + (at + 16) % block_size * item_bytes - k
                    else:
                        ahead = place(values, table, block_size, kv_heads, head, start) - k
                for some in range(0, rows, tile_rows):
                    row = min(some, last)
                    total = zero_tile(tile_rows)
                    for first in range(0, head_dim, _RUN):
                        tile = zero_words(tile_rows)
                        for i in range(first, min(first + _RUN, head_dim), 8):
                            for j in range(i, i + 8, 2):
                                tile = add_words(tile, load_i32x16(k + 32 * j), queries + row * query_bytes + 2 * j, query_bytes)
                                if ahead_of_use:
                                    prefetch(k + 32 * j + ahead)
                        total = add_tiles(total, scaled_floats(tile, query_scales + 4 * row))
                    total = multiply_tile(total, load_f32x16(key_scales + (at - start) * 4))
                    store_tile(total, scores + row * LINE + (at - start) * 4, LINE)
            width = (stop - start + 15) // 16 * 16
            for row in range(rows):
                visible = position + row // group
                first = visible - window + 1 - start if window else 0
                line, at = scores + row * LINE, 4 * row
                softmax(line, width, first, visible + 1 - start, cap, value_scales, maxima + at, sums + at, steps + at)
            for i in range(0, head_dim, 16):
                for of_rows in range(0, rows, tile_rows):
                    row = min(of_rows, last)
                    tile = zero_words(tile_rows)
                    for at in range(start, start + width, 32):
                        block = place(values, table, block_size, kv_heads, head, at)
                        v = block + (i // 16 * block_size + at % block_size) * 32
                        p = scores + row * LINE + (at - start) * 2
                        for some in range(0, min(16, (start + width - at) // 2), 4):
                            for j in range(some, some + 4):
                                tile = add_words(tile, load_i32x16(v + 64 * j), p + 4 * j, LINE)
                                if ahead_of_use:
                                    prefetch(v + 64 * j + 32 * block_size)
                    store_tile(scaled_floats(tile, steps + 4 * row), outputs + row * row_bytes + 4 * i, row_bytes)

        return attend

    return item_kernel(
        head_dim=head_dim,
        group=group,
        capacity=capacity,
        several=query_tile_tokens("int16_attention", group) > 1,
        prepare=prepare,
        one_token=chunk_attention(part, True),
        many_tokens=chunk_attention(tile_rows, False),
    )
