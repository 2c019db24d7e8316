"""`attention` in float32 over a cache of any type: the same items, chunks and order of merging.

Keys and values are widened to float32 as they are loaded, queries and probabilities stay what they are. A token alone multiplies straight
from the cache, which is read once. Several tokens share the widening: 16 positions of keys, and 16 dimensions of a chunk's values, lie in
the first-level cache as float32 while the rows of all tokens go over them. Either way a score adds its dimensions from first to last, and
an output its positions, so that both give the same bits.
"""

from __future__ import annotations

from typing import Any

from .attention import VISIBLE, item_kernel, mask_scores
from .geometry import FLOAT_LINE as LINE
from .geometry import cache_item_bytes, cache_row_bytes, cache_scale_group, float_rows, query_tile_tokens, register_rows
from .helpers import inline
from .register_tiles import add_tiles, fma_tile, multiply_tile, store_tile, zero_tile
from .simd import (
    bits_to_f32,
    exp,
    greater,
    load_f32x16,
    load_i8x16,
    load_i32,
    load_i64,
    prefetch,
    select,
    splat_f32,
    store_f32,
    store_f32x16,
    sum_lanes,
    to_f32,
)
from .small_floats import load_bf16x16, load_f8x16, load_f16x16


@inline
def load_int8x16(at):
    return to_f32(load_i8x16(at))


_LOADERS = {"f32": load_f32x16, "f16": load_f16x16, "bf16": load_bf16x16, "f8e4m3": load_f8x16, "int8": load_int8x16}


@inline
def softmax(line, width, first, limit, cap, maximum_at, sum_at):
    """Probabilities of the positions ``first`` to ``limit - 1``, unnormalised, in place of a row of scores."""
    whole = first <= 0 and limit >= width
    top = mask_scores(line, width, first, limit, cap)
    total = splat_f32(0.0)
    for at in range(0, 4 * width, 64):
        s = load_f32x16(line + at)
        p = exp(s - splat_f32(top))
        if not whole:  # what is masked becomes exactly 0
            p = select(greater(splat_f32(VISIBLE), s), splat_f32(0.0), p)
        total = total + p
        store_f32x16(line + at, p)
    store_f32(maximum_at, top)
    store_f32(sum_at, sum_lanes(total))


def attention(*, head_dim: int, group: int, cache: str) -> Any:
    """Slots as `attention.attention`'s."""
    load, item_bytes, group_dims = _LOADERS[cache], cache_item_bytes(cache), cache_scale_group(cache, head_dim)
    scaled = item_bytes == 1
    tile_rows = register_rows()  # of an item of several tokens
    parts = -(-group // tile_rows)
    part = -(-group // parts)  # rows of a single token that share a load
    wide = 3 * part <= tile_rows and head_dim % 32 == 0  # two vectors at a time keep the multipliers busy
    vectors = 2 if wide else 1
    capacity = float_rows(group)
    row_bytes = head_dim * 4
    vector_bytes = head_dim * 16 * item_bytes  # of 16 positions of keys
    value_bytes = head_dim * item_bytes
    position_bytes = cache_row_bytes(cache, head_dim)
    shared = group_dims if scaled else head_dim  # dimensions whose products are added before they are scaled
    line_dims = max(1, 4 // item_bytes)  # dimensions of 16 keys in a line of the cache

    @inline
    def prepare(q, q_row, rows, queries):
        for row in range(rows):
            source, target = q + row // group * q_row + row % group * row_bytes, queries + row * row_bytes
            for i in range(0, row_bytes, 64):
                store_f32x16(target + i, load_f32x16(source + i))

    @inline
    def place(cache_at, table, block_size, kv_heads, head, at):
        """The block of a position, for a key/value head."""
        return cache_at + (load_i32(table + at // block_size * 4) * kv_heads + head) * block_size * position_bytes

    @inline
    def add_scaled(total, tile, scales):
        """The products of dimensions that share a scale, for 16 positions."""
        return add_tiles(total, multiply_tile(tile, load_bf16x16(scales)))

    @inline
    def weigh(values, table, block_size, kv_heads, head, start, stop, i, rows, scores, weights):
        """Probabilities times the scales of the values' dimension ``i``."""
        for at in range(start, stop, 16):
            block = place(values, table, block_size, kv_heads, head, at)
            scale = load_bf16x16(block + block_size * value_bytes + (i // group_dims * block_size + at % block_size) * 2)
            line = (at - start) * 4
            for row in range(rows):
                store_f32x16(weights + row * LINE + line, load_f32x16(scores + row * LINE + line) * scale)

    @inline
    def one_token(slots, q, rows, table, head, position, start, stop, outputs, maxima, sums):
        """A chunk for the rows of one token.

        Each block asks for the next one while it is worked through: a block lies anywhere, so the CPU cannot foresee it.
        """
        keys, values = load_i64(slots + 32), load_i64(slots + 40)
        block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        window, cap = load_i64(slots + 96), bits_to_f32(load_i64(slots + 104))
        scores = q + capacity * row_bytes
        weights = scores + capacity * LINE if scaled else scores
        for at in range(start, stop, 16 * vectors):
            block = place(keys, table, block_size, kv_heads, head, at)
            k = block + at % block_size // 16 * vector_bytes
            scales = block + block_size * value_bytes + at % block_size * 2
            later = at + 16 * vectors
            if later < stop:
                ahead = place(keys, table, block_size, kv_heads, head, later) + later % block_size // 16 * vector_bytes - k
            else:
                ahead = place(values, table, block_size, kv_heads, head, start) - k
            for some in range(0, group, part):
                row = min(some, group - part)  # the last part may begin with rows of the one before
                low, high = zero_tile(part), zero_tile(part)
                low_total, high_total = zero_tile(part), zero_tile(part)
                for first in range(0, head_dim, shared):
                    for i in range(first, first + shared, line_dims):
                        for j in range(i, i + line_dims):
                            at_dim = k + j * 16 * item_bytes
                            low = fma_tile(low, load(at_dim), q + row * row_bytes + 4 * j, row_bytes)
                            if wide:
                                high = fma_tile(high, load(at_dim + vector_bytes), q + row * row_bytes + 4 * j, row_bytes)
                        prefetch(k + i * 16 * item_bytes + ahead)
                        if wide:
                            prefetch(k + i * 16 * item_bytes + ahead + vector_bytes)
                    if scaled:
                        low_total = add_scaled(low_total, low, scales + first // shared * block_size * 2)
                        high_total = add_scaled(high_total, high, scales + first // shared * block_size * 2 + 32)
                        low, high = zero_tile(part), zero_tile(part)
                if scaled:
                    low, high = low_total, high_total
                line = scores + row * LINE + (at - start) * 4
                store_tile(low, line, LINE)
                if wide:
                    store_tile(high, line + 64, LINE)
        width = (stop - start + 15) // 16 * 16
        first = position - window + 1 - start if window else 0
        for row in range(group):
            softmax(scores + row * LINE, width, first, position + 1 - start, cap, maxima + 4 * row, sums + 4 * row)
        for i in range(0, head_dim, 16 * vectors):
            if scaled and i % group_dims == 0:
                weigh(values, table, block_size, kv_heads, head, start, stop, i, group, scores, weights)
            for some in range(0, group, part):
                row = min(some, group - part)
                low, high = zero_tile(part), zero_tile(part)
                for at in range(start, stop, 32):
                    block = place(values, table, block_size, kv_heads, head, at)
                    v = block + at % block_size * value_bytes + i * item_bytes
                    p = weights + row * LINE + (at - start) * 4
                    later = min(at + 32, stop - 1)
                    ahead = place(values, table, block_size, kv_heads, head, later) + later % block_size * value_bytes - v
                    for j in range(min(32, stop - at)):
                        low = fma_tile(low, load(v), p + 4 * j, LINE)
                        if wide:
                            high = fma_tile(high, load(v + 16 * item_bytes), p + 4 * j, LINE)
                        for line in range(0, value_bytes, 64):
                            prefetch(v + ahead + line)
                        v += value_bytes
                out = outputs + row * row_bytes + 4 * i
                store_tile(low, out, row_bytes)
                if wide:
                    store_tile(high, out + 64, row_bytes)

    @inline
    def many_tokens(slots, queries, rows, table, head, position, start, stop, outputs, maxima, sums):
        """A chunk for the rows of several tokens, as many as fit the registers at a time."""
        keys, values = load_i64(slots + 32), load_i64(slots + 40)
        block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        window, cap = load_i64(slots + 96), bits_to_f32(load_i64(slots + 104))
        scores = queries + capacity * row_bytes
        weights = scores + capacity * LINE if scaled else scores
        floats = weights + capacity * LINE
        for at in range(start, stop, 16):
            block = place(keys, table, block_size, kv_heads, head, at)
            k = block + at % block_size // 16 * vector_bytes
            scales = block + block_size * value_bytes + at % block_size * 2
            for i in range(head_dim):
                store_f32x16(floats + 64 * i, load(k + i * 16 * item_bytes))
            for row in range(0, rows, tile_rows):
                tile, total = zero_tile(tile_rows), zero_tile(tile_rows)
                for first in range(0, head_dim, shared):
                    for i in range(first, first + shared):
                        tile = fma_tile(tile, load_f32x16(floats + 64 * i), queries + row * row_bytes + 4 * i, row_bytes)
                    if scaled:
                        total = add_scaled(total, tile, scales + first // shared * block_size * 2)
                        tile = zero_tile(tile_rows)
                if scaled:
                    tile = total
                store_tile(tile, scores + row * LINE + (at - start) * 4, LINE)
        width = (stop - start + 15) // 16 * 16
        for row in range(rows):
            visible = position + row // group
            first = visible - window + 1 - start if window else 0
            softmax(scores + row * LINE, width, first, visible + 1 - start, cap, maxima + 4 * row, sums + 4 * row)
        for i in range(0, head_dim, 16):
            if scaled and i % group_dims == 0:
                weigh(values, table, block_size, kv_heads, head, start, stop, i, rows, scores, weights)
            for at in range(start, stop, 32):
                block = place(values, table, block_size, kv_heads, head, at)
                v = block + at % block_size * value_bytes + i * item_bytes
                target = floats + (at - start) * 64
                for j in range(min(32, stop - at)):
                    store_f32x16(target + 64 * j, load(v + j * value_bytes))
            for row in range(0, rows, tile_rows):
                tile = zero_tile(tile_rows)
                p = weights + row * LINE
                for j in range(stop - start):
                    tile = fma_tile(tile, load_f32x16(floats + 64 * j), p + 4 * j, LINE)
                store_tile(tile, outputs + row * row_bytes + 4 * i, row_bytes)

    return item_kernel(
        head_dim=head_dim,
        group=group,
        capacity=capacity,
        several=query_tile_tokens("float_attention", group) > 1,
        prepare=prepare,
        one_token=one_token,
        many_tokens=many_tokens,
    )
