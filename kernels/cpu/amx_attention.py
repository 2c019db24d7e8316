"""`attention` on the tile registers of AMX: the same items, chunks, cache and order of merging.

A tile of keys is 32 dimensions of 16 positions, a tile of values 32 positions of 16 dimensions: as `rope` has written them. The left
factors are the queries, ``bf16[head_dim / 32][tiles][16 rows][32 dimensions]``, and the probabilities, where the scores were. What takes
the time is the softmax; its exponentials are finer than the bfloat16 that they are rounded to.
"""

from __future__ import annotations

from typing import Any

from .amx import add_products, clear_sums, release_tiles, store_32, store_sums, use_tiles
from .attention import clear, merge_chunk, soft_cap, write_out
from .geometry import ATTENTION_CHUNK as CHUNK
from .geometry import partial_floats
from .helpers import inline
from .simd import (
    bits_to_f32,
    both,
    exp2,
    lane_numbers,
    less_i32,
    load_f32x16,
    load_i32,
    load_i64,
    max_lanes,
    maximum,
    select,
    splat_f32,
    splat_i32,
    store_f32,
    store_f32x16,
    sum_lanes,
)

_LOWEST = -1.0e30  # of a masked score
_VISIBLE = -1.0e29
_LOG2_E = 1.4426950408889634
_LINE = 4 * CHUNK + 64  # bytes of a row of scores: rows do not compete for the same lines of the cache
_NEXT_LINES = 16 * _LINE


def _chunk_attention(head_dim: int, group: int, tiles: int) -> Any:
    """One chunk for up to ``16 tiles`` query rows, token by token: scores, softmax, weighted values."""
    positions_bytes = head_dim * 32  # of 16 positions of keys
    pair_bytes = head_dim * 4  # of a pair of positions of values

    @inline
    def softmax(line, width, first, limit, cap, maximum_at, sum_at):
        """Probabilities of the positions ``first`` to ``limit - 1``, unnormalised, in place of a row of scores."""
        whole = first <= 0 and limit >= width
        peak, peak2 = splat_f32(_LOWEST), splat_f32(_LOWEST)
        if whole and cap == 0.0:
            for at in range(0, 4 * width, 128):
                peak = maximum(peak, load_f32x16(line + at))
                peak2 = maximum(peak2, load_f32x16(line + at + 64))
        else:
            for at in range(0, width, 16):
                lanes = lane_numbers() + splat_i32(at)
                s = load_f32x16(line + 4 * at)
                if cap > 0.0:
                    s = soft_cap(s, cap)
                s = select(both(less_i32(lanes, splat_i32(limit)), less_i32(splat_i32(first - 1), lanes)), s, splat_f32(_LOWEST))
                store_f32x16(line + 4 * at, s)
                peak = maximum(peak, s)
        top = max_lanes(maximum(peak, peak2))
        shift = splat_f32(top * _LOG2_E)
        if top < _VISIBLE:  # nothing is visible: all become 0
            shift = splat_f32(0.0)
        total, total2 = splat_f32(0.0), splat_f32(0.0)
        for at in range(0, width, 32):
            low = exp2(load_f32x16(line + 4 * at) * splat_f32(_LOG2_E) - shift)
            high = exp2(load_f32x16(line + 4 * at + 64) * splat_f32(_LOG2_E) - shift)
            store_32(line + 2 * at, low, high)  # behind what is still to be read
            total = total + low
            total2 = total2 + high
        store_f32(maximum_at, top)
        store_f32(sum_at, sum_lanes(total + total2))

    @inline
    def attend(slots, queries, table, head, position, rows, start, stop, scores, outputs, maxima, sums):
        block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        window = load_i64(slots + 96)
        cap = bits_to_f32(load_i64(slots + 104))
        head_bytes = block_size * head_dim * 2
        for at in range(start, stop, 32):
            k = load_i64(slots + 32) + (load_i32(table + at // block_size * 4) * kv_heads + head) * head_bytes
            k += at % block_size // 16 * positions_bytes
            clear_sums(tiles)
            for step in range(head_dim // 32):
                add_products(tiles, queries + step * (tiles * 1024), 64, 1024, k + step * 1024, 64, positions_bytes)
            store_sums(tiles, scores + (at - start) * 4, _LINE)
        width = (stop - start + 31) // 32 * 32
        for row in range(rows):
            visible = position + row // group
            first = visible - window + 1 - start if window else 0
            softmax(scores + row * _LINE, width, first, visible + 1 - start, cap, maxima + 4 * row, sums + 4 * row)
        for i in range(0, head_dim, 32):
            clear_sums(tiles)
            for at in range(start, stop, 32):
                v = load_i64(slots + 40) + (load_i32(table + at // block_size * 4) * kv_heads + head) * head_bytes
                v += (at % block_size * head_dim + 2 * i) * 2
                add_products(tiles, scores + (at - start) * 2, _LINE, _NEXT_LINES, v, pair_bytes, 64)
            store_sums(tiles, outputs + 4 * i, head_dim * 4)

    return attend


def attention(*, head_dim: int, group: int) -> Any:
    """Slots as `attention.attention`'s."""
    one_token, all_tokens = _chunk_attention(head_dim, group, 1), _chunk_attention(head_dim, group, 2)
    partial_bytes = partial_floats(group, head_dim) * 4

    def kernel(slots, begin, end, thread):
        q_row, out_row = load_i64(slots + 8), load_i64(slots + 24)
        kv_heads, positions, items = load_i64(slots + 56), load_i64(slots + 64), load_i64(slots + 72)
        window = load_i64(slots + 96)
        queries = load_i64(slots + 112) + thread * load_i64(slots + 120)
        scores = queries + 64 * head_dim
        chunk_outputs = scores + 32 * _LINE
        chunk_maxima = chunk_outputs + 128 * head_dim
        chunk_sums = chunk_maxima + 128
        outputs = chunk_sums + 128
        maxima = outputs + 128 * head_dim
        sums = maxima + 128
        shaped_for_one = False
        use_tiles(16)
        for unit in range(begin, end):
            item = items + unit // kv_heads * 20
            head = unit % kv_heads
            first, tokens, only = load_i32(item), load_i32(item + 4), load_i32(item + 12)
            table = load_i64(slots + 80) + load_i32(item + 8) * load_i64(slots + 88) * 4
            position = load_i32(positions + 4 * first)
            single = tokens == 1
            if single and not shaped_for_one:
                use_tiles(group)
                shaped_for_one = True
            if shaped_for_one and not single:
                use_tiles(16)
                shaped_for_one = False
            rows = tokens * group
            q = load_i64(slots) + first * q_row + head * group * head_dim * 4
            for row in range(rows):
                source = q + row // group * q_row + row % group * head_dim * 4
                for step in range(head_dim // 32):
                    # of one token there is one tile, of more there are two
                    tile = step if single else 2 * step + row // 16
                    store_32(queries + tile * 1024 + row % 16 * 64, load_f32x16(source + 128 * step), load_f32x16(source + 128 * step + 64))
            last = position + tokens
            oldest = max(0, position - window + 1) if window else 0
            if only >= 0:
                partial = load_i64(slots + 128) + (load_i32(item + 16) * kv_heads + head) * partial_bytes
                partial_maxima = partial + rows * head_dim * 4
                partial_sums = partial_maxima + rows * 4
                start = only * CHUNK
                if start + CHUNK <= oldest:
                    clear(partial, partial_maxima, partial_sums, rows, head_dim)
                else:
                    stop = min(last, start + CHUNK)
                    one_token(slots, queries, table, head, position, rows, start, stop, scores, chunk_outputs, partial_maxima, partial_sums)
                    for at in range(0, rows * head_dim * 4, 64):
                        store_f32x16(partial + at, load_f32x16(chunk_outputs + at))
                continue
            clear(outputs, maxima, sums, rows, head_dim)
            for start in range(oldest // CHUNK * CHUNK, last, CHUNK):
                stop = min(last, start + CHUNK)
                if single:
                    one_token(slots, queries, table, head, position, rows, start, stop, scores, chunk_outputs, chunk_maxima, chunk_sums)
                else:
                    all_tokens(slots, queries, table, head, position, rows, start, stop, scores, chunk_outputs, chunk_maxima, chunk_sums)
                merge_chunk(outputs, maxima, sums, chunk_outputs, chunk_maxima, chunk_sums, rows, head_dim)
            out = load_i64(slots + 16) + first * out_row + head * group * head_dim * 4
            write_out(out, out_row, outputs, sums, rows, group, head_dim)
        release_tiles()

    return kernel
