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
from .int16_dots import add_words, scaled_floats, store_i16x16, sum_words
from .isa import current_isa
from .register_tiles import add_tiles, load_words, multiply_grid, store_grid, store_tile, zero_tile, zero_words
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
_SUMS = 16 if current_isa().has_avx512 else register_rows()  # that a single token's products keep in registers
_SMALLEST = 1e-35  # a scale below becomes 0


@inline
def scale_of(most, largest):
    """The step in which integers of these magnitudes, together and at most, are as large as they may be. NaN stays NaN."""
    scale = most / _MOST
    return largest / _LARGEST if largest / _LARGEST > scale else scale


@inline
def inverse(scale):
    return splat_f32(1.0 / scale if scale > _SMALLEST else 0.0)


def vectors_at(count: int) -> Any:
    """What loads one, two or four vectors, ``between`` bytes apart."""

    @inline
    def one(at, between):
        return (load_i32x16(at),)

    @inline
    def two(at, between):
        return load_i32x16(at), load_i32x16(at + between)

    @inline
    def four(at, between):
        return load_i32x16(at), load_i32x16(at + between), load_i32x16(at + 2 * between), load_i32x16(at + 3 * between)

    return {1: one, 2: two, 4: four}[count]


def attention(*, head_dim: int, group: int) -> Any:
    """Slots as `attention.attention`'s."""
    tile_rows = register_rows()  # of an item of several tokens
    parts = -(-group // tile_rows)
    part = -(-group // parts)  # rows of a single token that share a load
    key_vectors = 2 if 2 * part <= _SUMS else 1  # of 16 positions, that share a query
    value_vectors = next(count for count in (4, 2, 1) if count == 1 or (count * part <= _SUMS and head_dim % (16 * count) == 0))
    values_at, value_sums = vectors_at(value_vectors), part * value_vectors
    one_pass = head_dim == 16 * value_vectors
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
            most = most if most >= run or most != most else run  # NaN stays NaN
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

    @inline
    def find_places(slots, table, head, start, stop, places):
        """Where 32 positions each lie: the bytes before their block, of keys as of values, and their place in it. Dividing takes long."""
        block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        entry, offset = table + start // block_size * 4, start % block_size
        groups = (stop - start + 31) // 32
        for at in range(places, places + 16 * groups, 16):
            store_i64(at, (load_i32(entry) * kv_heads + head) * block_size * position_bytes)
            store_i64(at + 8, offset)
            offset += 32
            if offset == block_size:
                entry, offset = entry + 4, 0
        return groups

    @inline
    def where(places, index):
        return load_i64(places + 16 * index), load_i64(places + 16 * index + 8)

    @inline
    def one_scale(at):
        return (load_f32x16(at),)

    @inline
    def two_scales(at):
        return load_f32x16(at), load_f32x16(at + 64)

    def score_keys(rows, vectors, asks):
        """What scores 16 keys, or 32, for so many rows of queries, and asks for as many lines at ``ahead``."""
        grid_size, keys_at, scales_at = rows * vectors, vectors_at(vectors), two_scales if vectors == 2 else one_scale
        twice = 2 * grid_size <= _SUMS  # sums of every other pair: else each would wait for the one before

        @inline
        def score(k, queries, scales, key_scales, target, ahead):
            total = zero_tile(grid_size)
            for first in range(0, head_dim, _RUN):
                grid, other = zero_words(grid_size), zero_words(grid_size)
                for i in range(first, min(first + _RUN, head_dim), 8):
                    for j in range(i, i + 8, 4):
                        grid = add_words(grid, rows, keys_at(k + 32 * j, 32 * head_dim), queries + 2 * j, query_bytes)
                        if twice:
                            other = add_words(other, rows, keys_at(k + 32 * j + 64, 32 * head_dim), queries + 2 * j + 4, query_bytes)
                        else:
                            grid = add_words(grid, rows, keys_at(k + 32 * j + 64, 32 * head_dim), queries + 2 * j + 4, query_bytes)
                        if asks:
                            for line in range(0, 128 * vectors, 64):
                                prefetch(ahead + 32 * vectors * j + line)
                if twice:
                    grid = sum_words(grid, other)
                total = add_tiles(total, scaled_floats(grid, rows, scales))
            store_grid(multiply_grid(total, rows, scales_at(key_scales)), rows, target, LINE)

        return score

    score_for_one, score_for_many = score_keys(part, key_vectors, True), score_keys(tile_rows, 1, False)

    @inline
    def add_values(grid, v, between, p, pairs, ahead):
        """Add up to 32 positions of vectors of values, ``between`` bytes apart, and ask for as many lines at ``ahead``."""
        for some in range(0, pairs, 4):
            for j in range(some, some + 4):
                grid = add_words(grid, part, values_at(v + 64 * j, between), p + 4 * j, LINE)
                for vector in range(value_vectors):
                    prefetch(ahead + 64 * j + vector * between)
        return grid

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

        Keys and values are used but once, and are asked for 64 positions ahead of that: a block lies anywhere, so the CPU cannot foresee
        it. So all dimensions of a block's values are taken before the next block's, with the sums in memory if they are many.
        """
        keys, values = load_i64(slots + 32), load_i64(slots + 40)
        block_size = load_i64(slots + 48)
        query_scales, key_scales, value_scales, steps, scores, partials = areas(queries)
        places = partials + part * row_bytes
        groups = find_places(slots, table, head, start, stop, places)
        for index in range(groups):
            block, offset = where(places, index)
            later, later_offset = where(places, (index + 2) % groups)
            ahead = later + (keys if index + 2 < groups else values)
            prefetch(ahead + block_size * item_bytes + later_offset * 2)
            at, scales = 32 * index, block + block_size * item_bytes + offset * 2
            for i in range(0, 32, 16):
                store_f32x16(key_scales + (at + i) * 4, load_bf16x16(keys + scales + 2 * i))
                store_f32x16(value_scales + (at + i) * 4, load_bf16x16(values + scales + 2 * i))
            k, ahead = keys + block + offset * item_bytes, ahead + later_offset * item_bytes
            for i in range(0, 32, 16 * key_vectors):
                for some in range(0, group, part):
                    row = min(some, group - part)
                    target = scores + row * LINE + (at + i) * 4
                    score_for_one(
                        k + i * item_bytes,
                        queries + row * query_bytes,
                        query_scales + 4 * row,
                        key_scales + (at + i) * 4,
                        target,
                        ahead + i * item_bytes,
                    )
        width = (stop - start + 15) // 16 * 16
        softmax_of_rows(slots, rows, position, start, width, scores, value_scales, maxima, sums, steps)
        between = 32 * block_size
        for some in range(0, group, part):
            p = scores + min(some, group - part) * LINE
            in_registers = zero_words(value_sums)
            for i in range(0, 0 if one_pass else part * row_bytes, 64):
                store_i32x16(partials + i, splat_i32(0))
            for index in range(groups):
                block, offset = where(places, index)
                later, later_offset = where(places, min(index + 2, groups - 1))
                v, ahead = values + block + offset * 32, values + later + later_offset * 32
                pairs = min(16, (width - 32 * index) // 2)
                if one_pass:
                    in_registers = add_values(in_registers, v, between, p, pairs, ahead)
                else:
                    for i in range(0, head_dim, 16 * value_vectors):
                        grid = load_words(part, value_vectors, partials + 4 * i, row_bytes)
                        grid = add_values(grid, v, between, p, pairs, ahead)
                        store_grid(grid, part, partials + 4 * i, row_bytes)
                        v += between * value_vectors
                        ahead += between * value_vectors
                p += 64
            row = min(some, group - part)
            for i in range(0, head_dim, 16 * value_vectors):
                grid = in_registers if one_pass else load_words(part, value_vectors, partials + 4 * i, row_bytes)
                store_grid(scaled_floats(grid, part, steps + 4 * row), part, outputs + row * row_bytes + 4 * i, row_bytes)

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
                            tile = add_words(tile, tile_rows, (load_i32x16(v + 64 * j),), p + 4 * j, LINE)
                store_tile(scaled_floats(tile, tile_rows, steps + 4 * row), outputs + row * row_bytes + 4 * i, row_bytes)

    return item_kernel(
        head_dim=head_dim,
        group=group,
        capacity=capacity,
        several=query_tile_tokens("int16_attention", group) > 1,
        prepare=prepare,
        one_token=one_token,
        many_tokens=many_tokens,
    )
