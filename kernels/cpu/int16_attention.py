"""`attention` in integers over a cache of int16: the same items, chunks and order of merging.

Queries become int16 as well, with a scale for each row, and so do a chunk's probabilities, times the scales of their values: then one
instruction multiplies pairs and adds the products, on AVX2 twice as many in a cycle as float32 has. What meets keys or values in one sum
has magnitudes of `_MOST` together, so that no sum leaves 32 bits, whatever they are; a query of 64 dimensions keeps about 11 bits of its
largest, as a half float does. Sums of integers are exact: a token's bits do not depend on how many others share its keys.
"""

from __future__ import annotations

from typing import Any

from .attention import LOG2_E, VISIBLE, item_kernel, mask_scores
from .geometry import ATTENTION_CHUNK as CHUNK
from .geometry import FLOAT_LINE as LINE
from .geometry import cache_row_bytes, float_rows, query_tile_tokens, register_rows
from .helpers import inline
from .int16_dots import add_words, scaled_floats, store_i16x16
from .register_tiles import add_tiles, load_words, multiply_tile, store_tile, zero_tile, zero_words
from .simd import (
    absolute,
    bits_to_f32,
    exp2,
    fma,
    greater,
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
    store_i32x16,
    store_i64,
    sum_lanes,
)
from .small_floats import load_bf16x16

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
    def areas(scratch):
        """Behind the queries: their scales, those of a chunk's keys and of its values, the steps of probabilities, scores, integer sums."""
        query_scales = scratch + scales_at
        key_scales = query_scales + 4 * capacity
        value_scales = key_scales + 4 * CHUNK
        steps = value_scales + 4 * CHUNK
        scores = steps + 4 * capacity
        return query_scales, key_scales, value_scales, steps, scores, scores + capacity * LINE

    @inline
    def prepare(q, q_row, rows, scratch):
        for row in range(rows):
            quantize(q + row // group * q_row + row % group * row_bytes, scratch + row * query_bytes, scratch + scales_at + 4 * row)

    @inline
    def softmax(line, width, first, limit, cap, value_scales, maximum_at, sum_at, scale_at):
        """Probabilities of the positions ``first`` to ``limit - 1``, unnormalised, times their values' scales, in place of a row of scores:
        as int16, whose step goes to ``scale_at``."""
        whole = first <= 0 and limit >= width
        top = mask_scores(line, width, first, limit, cap)
        shift = splat_f32(top) * splat_f32(-LOG2_E)
        total = most = largest = splat_f32(0.0)
        for at in range(0, 4 * width, 64):
            s = load_f32x16(line + at)
            p = exp2(fma(s, splat_f32(LOG2_E), shift))
            if not whole:  # what is masked becomes exactly 0
                p = select(greater(splat_f32(VISIBLE), s), splat_f32(0.0), p)
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

    @inline
    def place(cache_at, table, block_size, kv_heads, head, at):
        return cache_at + (load_i32(table + at // block_size * 4) * kv_heads + head) * block_size * position_bytes

    def score_keys(tile_rows, ahead_of_use):
        """What scores 16 keys for ``tile_rows`` rows of queries, and asks for as many lines at ``ahead``."""

        @inline
        def score(k, queries, scales, key_scales, target, ahead):
            total = zero_tile(tile_rows)
            for first in range(0, head_dim, _RUN):
                tile = zero_words(tile_rows)
                for i in range(first, min(first + _RUN, head_dim), 8):
                    for j in range(i, i + 8, 2):
                        tile = add_words(tile, load_i32x16(k + 32 * j), queries + 2 * j, query_bytes)
                        if ahead_of_use:
                            prefetch(ahead + 32 * j)
                total = add_tiles(total, scaled_floats(tile, scales))
            store_tile(multiply_tile(total, load_f32x16(key_scales)), target, LINE)

        return score

    score_for_one, score_for_many = score_keys(part, True), score_keys(tile_rows, False)

    @inline
    def softmax_of_rows(slots, rows, position, start, width, scores, value_scales, maxima, sums, steps):
        window, cap = load_i64(slots + 96), bits_to_f32(load_i64(slots + 104))
        for row in range(rows):
            visible = position + row // group
            first = visible - window + 1 - start if window else 0
            line, at = scores + row * LINE, 4 * row
            softmax(line, width, first, visible + 1 - start, cap, value_scales, maxima + at, sums + at, steps + at)

    @inline
    def one_token(slots, queries, rows, table, head, position, start, stop, outputs, maxima, sums):
        """A chunk for the rows of one token, ``part`` at a time; the last ones may begin with rows of the ones before.

        Keys and values are used but once, and are asked for 32 positions ahead of that: a block lies anywhere, so the CPU cannot foresee
        it. So all dimensions of a block's values are taken before the next block's, with the sums in memory.
        """
        keys, values = load_i64(slots + 32), load_i64(slots + 40)
        block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        query_scales, key_scales, value_scales, steps, scores, partials = areas(queries)
        for at in range(start, stop, 16):
            block = place(keys, table, block_size, kv_heads, head, at)
            scales = block_size * item_bytes + at % block_size * 2
            later, cache = (at + 32, keys) if at + 32 < stop else (max(start, start + at + 32 - stop) // 16 * 16, values)
            ahead = place(cache, table, block_size, kv_heads, head, later)
            prefetch(ahead + block_size * item_bytes + later % block_size * 2)
            prefetch(place(values, table, block_size, kv_heads, head, at) + scales)
            store_f32x16(key_scales + (at - start) * 4, load_bf16x16(block + scales))
            k, ahead = block + at % block_size * item_bytes, ahead + later % block_size * item_bytes
            for some in range(0, group, part):
                row = min(some, group - part)
                target = scores + row * LINE + (at - start) * 4
                score_for_one(k, queries + row * query_bytes, query_scales + 4 * row, key_scales + (at - start) * 4, target, ahead)
        width = (stop - start + 15) // 16 * 16
        for at in range(start, stop, 16):
            block = place(values, table, block_size, kv_heads, head, at) + block_size * item_bytes + at % block_size * 2
            store_f32x16(value_scales + (at - start) * 4, load_bf16x16(block))
        softmax_of_rows(slots, rows, position, start, width, scores, value_scales, maxima, sums, steps)
        for i in range(0, parts * part * row_bytes, 64):
            store_i32x16(partials + i, splat_i32(0))
        for at in range(start, start + width, 32):
            later = min(at + 32, stop - 1)
            v = place(values, table, block_size, kv_heads, head, at) + at % block_size * 32
            ahead = place(values, table, block_size, kv_heads, head, later) + later % block_size // 32 * 1024
            for some in range(0, group, part):
                p = scores + min(some, group - part) * LINE + (at - start) * 2
                for i in range(0, head_dim, 16):
                    sums_at = partials + some * row_bytes + 4 * i
                    tile = load_words(part, sums_at, row_bytes)
                    far = 2 * i * block_size
                    for few in range(0, min(16, (start + width - at) // 2), 4):
                        for j in range(few, few + 4):
                            tile = add_words(tile, load_i32x16(v + far + 64 * j), p + 4 * j, LINE)
                            prefetch(ahead + far + 64 * j)
                    store_tile(tile, sums_at, row_bytes)
        for some in range(0, group, part):
            row = min(some, group - part)
            for i in range(0, head_dim, 16):
                tile = load_words(part, partials + some * row_bytes + 4 * i, row_bytes)
                store_tile(scaled_floats(tile, steps + 4 * row), outputs + row * row_bytes + 4 * i, row_bytes)

    @inline
    def many_tokens(slots, queries, rows, table, head, position, start, stop, outputs, maxima, sums):
        """A chunk for the rows of several tokens, as many as fit the registers at a time."""
        keys, values = load_i64(slots + 32), load_i64(slots + 40)
        block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        query_scales, key_scales, value_scales, steps, scores, _ = areas(queries)
        for at in range(start, stop, 16):
            block = place(keys, table, block_size, kv_heads, head, at)
            value_block = place(values, table, block_size, kv_heads, head, at)
            scales = block_size * item_bytes + at % block_size * 2
            store_f32x16(key_scales + (at - start) * 4, load_bf16x16(block + scales))
            store_f32x16(value_scales + (at - start) * 4, load_bf16x16(value_block + scales))
            k = block + at % block_size * item_bytes
            for row in range(0, rows, tile_rows):
                target = scores + row * LINE + (at - start) * 4
                score_for_many(k, queries + row * query_bytes, query_scales + 4 * row, key_scales + (at - start) * 4, target, 0)
        width = (stop - start + 15) // 16 * 16
        softmax_of_rows(slots, rows, position, start, width, scores, value_scales, maxima, sums, steps)
        places = key_scales  # these have been used: where the values of 32 positions lie, since dividing by the block's size takes long
        for at in range(0, width, 32):
            block = place(values, table, block_size, kv_heads, head, start + at)
            store_i64(places + at // 4, block + (start + at) % block_size * 32)
        for i in range(0, head_dim, 16):
            for row in range(0, rows, tile_rows):
                tile = zero_words(tile_rows)
                for at in range(0, width, 32):
                    v = load_i64(places + at // 4) + i // 16 * block_size * 32
                    p = scores + row * LINE + at * 2
                    for some in range(0, min(16, (width - at) // 2), 4):
                        for j in range(some, some + 4):
                            tile = add_words(tile, load_i32x16(v + 64 * j), p + 4 * j, LINE)
                store_tile(scaled_floats(tile, steps + 4 * row), outputs + row * row_bytes + 4 * i, row_bytes)

    return item_kernel(
        head_dim=head_dim,
        group=group,
        capacity=capacity,
        several=query_tile_tokens("int16_attention", group) > 1,
        prepare=prepare,
        one_token=one_token,
        many_tokens=many_tokens,
    )
