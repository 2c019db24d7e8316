"""Attention over a paged KV cache, flash style (arXiv:2205.14135): softmax on line, chunk by chunk, nothing of size context kept.

An item is up to `query_tile_tokens` consecutive tokens of one sequence. With the ``group`` query heads that share a key/value head they
make up to ``tokens * group`` query rows, which share every load of a key and a value. `rope` states the layout of the cache.

A chunk of `CHUNK` positions, at multiples of `CHUNK`, gives each row a maximum, a sum and outputs of its own, and chunks are merged from
first to last. So a token's result depends neither on the item that it is in nor on whether one thread took all chunks or several took one
each (flash decoding): items of one token may name a single chunk and leave its result for `merge`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .geometry import ATTENTION_CHUNK as CHUNK
from .geometry import partial_floats, query_tile_tokens
from .helpers import inline
from .register_tiles import dot_pairs_grid, store_grid, zero_tile
from .simd import (
    bits_to_f32,
    both,
    exp,
    exp2,
    first_lane,
    fma,
    greater,
    lane_numbers,
    less_i32,
    load_f32,
    load_f32x16,
    load_i32,
    load_i32x16,
    load_i64,
    max_lanes,
    maximum,
    prefetch_to_l2,
    select,
    splat_f32,
    splat_i32,
    store_f32,
    store_f32x16,
    sum_lanes,
)
from .small_floats import scatter_bf16_pairs, store_bf16x32

LOWEST = -1.0e30  # of a masked score
VISIBLE = -1.0e29  # what is below is masked; what is no number is not
LOG2_E = 1.4426950408889634


@inline
def soft_cap(s, cap):
    """``cap * tanh(s / cap)``."""
    e = exp(s * splat_f32(2.0 / cap))
    return splat_f32(cap) * (splat_f32(1.0) - splat_f32(2.0) / (e + splat_f32(1.0)))


@inline
def mask_scores(line, width, first, limit, cap):
    """Cap a row of scores, if ``cap`` is not 0, and mask those before ``first`` and from ``limit`` on; returns the largest."""
    peak = splat_f32(LOWEST)
    plain = min(width, max(limit, 0) // 16 * 16) if first <= 0 and cap == 0.0 else 0  # positions that need neither
    for at in range(0, 4 * plain, 64):
        peak = maximum(peak, load_f32x16(line + at))
    for at in range(plain, width, 16):
        lanes = lane_numbers() + splat_i32(at)
        s = load_f32x16(line + 4 * at)
        if cap > 0.0:
            s = soft_cap(s, cap)
        s = select(both(less_i32(lanes, splat_i32(limit)), less_i32(splat_i32(first - 1), lanes)), s, splat_f32(LOWEST))
        store_f32x16(line + 4 * at, s)
        peak = maximum(peak, s)
    return max_lanes(peak)


@inline
def bf16_softmax(line, width, first, limit, cap, maximum_at, sum_at):
    """Probabilities of the positions ``first`` to ``limit - 1``, unnormalised, as bfloat16 in place of a row of scores. ``width`` is a
    multiple of 32."""
    whole = first <= 0 and limit >= width
    top = mask_scores(line, width, first, limit, cap)
    shift = splat_f32(top) * splat_f32(-LOG2_E)
    total, total2 = splat_f32(0.0), splat_f32(0.0)
    for at in range(0, width, 32):
        low, high = load_f32x16(line + 4 * at), load_f32x16(line + 4 * at + 64)
        p, q = exp2(fma(low, splat_f32(LOG2_E), shift)), exp2(fma(high, splat_f32(LOG2_E), shift))
        if not whole:  # what is masked becomes exactly 0
            p = select(greater(splat_f32(VISIBLE), low), splat_f32(0.0), p)
            q = select(greater(splat_f32(VISIBLE), high), splat_f32(0.0), q)
        store_bf16x32(line + 2 * at, p, q)  # behind what is still to be read
        total = total + p
        total2 = total2 + q
    store_f32(maximum_at, top)
    store_f32(sum_at, sum_lanes(total + total2))


@inline
def merge_chunk(outputs, maxima, sums, chunk_outputs, chunk_maxima, chunk_sums, rows, head_dim):
    """Fold one chunk's result into the result so far."""
    for row in range(rows):
        old, new = load_f32(maxima + 4 * row), load_f32(chunk_maxima + 4 * row)
        top = max(old, new)
        keep, add = exp(splat_f32(old - top)), exp(splat_f32(new - top))
        store_f32(maxima + 4 * row, top)
        store_f32(sums + 4 * row, load_f32(sums + 4 * row) * first_lane(keep) + load_f32(chunk_sums + 4 * row) * first_lane(add))
        for i in range(row * head_dim * 4, (row + 1) * head_dim * 4, 64):
            store_f32x16(outputs + i, load_f32x16(outputs + i) * keep + load_f32x16(chunk_outputs + i) * add)


@inline
def clear(outputs, maxima, sums, rows, head_dim):
    for row in range(rows):
        store_f32(maxima + 4 * row, LOWEST)
        store_f32(sums + 4 * row, 0.0)
        for i in range(row * head_dim * 4, (row + 1) * head_dim * 4, 64):
            store_f32x16(outputs + i, splat_f32(0.0))


@inline
def write_out(out, out_row, outputs, sums, rows, group, head_dim):
    for row in range(rows):
        target = out + row // group * out_row + row % group * head_dim * 4
        inverse = splat_f32(1.0) / splat_f32(load_f32(sums + 4 * row))
        for i in range(0, head_dim * 4, 64):
            store_f32x16(target + i, load_f32x16(outputs + row * head_dim * 4 + i) * inverse)


@inline
def _place(cache, table, block_size, kv_heads, head, at, head_dim):
    """Where 32 positions of a head begin, of keys or of values."""
    block = load_i32(table + at // block_size * 4) * kv_heads + head
    return cache + (block * block_size + at % block_size) * head_dim * 2


def _chunk_attention(head_dim: int, group: int, rows: int) -> Any:
    """One chunk for ``rows`` query rows, token by token: scores, softmax, weighted values.

    ``queries`` are bfloat16 ``[head_dim / 2][rows][2]``, ``scores`` float32 ``[rows][CHUNK]``, outputs ``[rows][head_dim]``. ``next_keys``
    and ``more_keys`` are where the 64 keys lie that will be read after this chunk.
    """
    line_bytes, output_bytes = CHUNK * 4, head_dim * 4
    twice, fourfold = 2 * rows, 4 * rows
    few = 4 * rows <= 24  # few rows: more vectors at a time keep the multipliers busy

    @inline
    def score(queries, keys, stride):
        """Scores of 32 positions; vectors of keys ``stride`` apart."""
        grid = zero_tile(twice)
        for i in range(head_dim // 2):
            k = (load_i32x16(keys + 64 * i), load_i32x16(keys + stride + 64 * i))
            grid = dot_pairs_grid(grid, rows, k, queries + i * rows * 4, 4)
        return grid

    @inline
    def score_more(queries, keys, more, stride, ahead, more_ahead):
        """Scores of 64 positions, 32 at each address. The next ones are asked for: they lie anywhere, so the CPU cannot foresee it."""
        grid = zero_tile(fourfold)
        for i in range(head_dim // 2):
            at = 64 * i
            k = (load_i32x16(keys + at), load_i32x16(keys + stride + at), load_i32x16(more + at), load_i32x16(more + stride + at))
            grid = dot_pairs_grid(grid, rows, k, queries + i * rows * 4, 4)
            for line in (ahead + at, ahead + stride + at, more_ahead + at, more_ahead + stride + at):
                prefetch_to_l2(line)
        return grid

    @inline
    def attend(slots, queries, table, head, position, tokens, start, stop, next_keys, more_keys, scores, outputs, maxima, sums):
        keys, values = load_i64(slots + 32), load_i64(slots + 40)
        block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        window = load_i64(slots + 96)
        cap = bits_to_f32(load_i64(slots + 104))
        vector_bytes = head_dim * 32

        if few:
            first = _place(keys, table, block_size, kv_heads, head, start, head_dim)
            second = _place(keys, table, block_size, kv_heads, head, start + 32, head_dim)
            for at in range(start, stop, 64):
                later, cache = (at + 64, keys) if at + 64 < stop else (start, values)
                ahead = _place(cache, table, block_size, kv_heads, head, later, head_dim)
                more_ahead = _place(cache, table, block_size, kv_heads, head, later + 32, head_dim)
                grid = score_more(queries, first, second, vector_bytes, ahead, more_ahead)
                store_grid(grid, rows, scores + (at - start) * 4, line_bytes)
                first, second = ahead, more_ahead
        else:
            for at in range(start, stop, 32):
                k = _place(keys, table, block_size, kv_heads, head, at, head_dim)
                store_grid(score(queries, k, vector_bytes), rows, scores + (at - start) * 4, line_bytes)
        width = (stop - start + 31) // 32 * 32
        for row in range(rows):
            visible = position + min(row // group, tokens - 1)
            first = visible - window + 1 - start if window else 0
            bf16_softmax(scores + row * line_bytes, width, first, visible + 1 - start, cap, maxima + 4 * row, sums + 4 * row)
        for i in range(0, head_dim, 64 if few and head_dim % 64 == 0 else 32 if head_dim % 32 == 0 else 16):
            if few and head_dim % 64 == 0:
                four = zero_tile(fourfold)
                for at in range(start, stop, 32):
                    v = _place(values, table, block_size, kv_heads, head, at, head_dim) + 4 * i
                    ahead = next_keys if at + 32 < stop else more_keys  # the first 64 values were asked for before
                    if at + 64 < stop:
                        ahead = _place(values, table, block_size, kv_heads, head, at + 64, head_dim)
                    ahead += 4 * i - v
                    p = scores + (at - start) * 2
                    for _ in range(16):
                        v4 = (load_i32x16(v), load_i32x16(v + 64), load_i32x16(v + 128), load_i32x16(v + 192))
                        four = dot_pairs_grid(four, rows, v4, p, line_bytes)
                        for line in range(0, 256, 64):
                            prefetch_to_l2(v + ahead + line)
                        v += head_dim * 4
                        p += 4
                store_grid(four, rows, outputs + 4 * i, output_bytes)
            elif head_dim % 32 == 0:
                two = zero_tile(twice)
                for at in range(start, stop, 32):
                    v = _place(values, table, block_size, kv_heads, head, at, head_dim) + 4 * i
                    p = scores + (at - start) * 2
                    for _ in range(16):
                        two = dot_pairs_grid(two, rows, (load_i32x16(v), load_i32x16(v + 64)), p, line_bytes)
                        v += head_dim * 4
                        p += 4
                store_grid(two, rows, outputs + 4 * i, output_bytes)
            else:
                one = zero_tile(rows)
                for at in range(start, stop, 32):
                    v = _place(values, table, block_size, kv_heads, head, at, head_dim) + 4 * i
                    p = scores + (at - start) * 2
                    for _ in range(16):
                        one = dot_pairs_grid(one, rows, (load_i32x16(v),), p, line_bytes)
                        v += head_dim * 4
                        p += 4
                store_grid(one, rows, outputs + 4 * i, output_bytes)

    return attend


@inline
def _first_chunk(position, window, only):
    """Where the chunks of an item start whose first token is at ``position``: that of the oldest key that it sees, or the only one."""
    if only >= 0:
        return only * CHUNK
    return max(0, position - window + 1) // CHUNK * CHUNK if window else 0


def attention(*, head_dim: int, group: int) -> Any:
    """``out = softmax(q . k) . v`` for each query row; q comes scaled. Units are (item, key/value head).

    Slots: 0 q, 1 bytes of a q row, 2 out, 3 bytes of an out row, 4 key cache, 5 value cache, 6 block size (a multiple of 32), 7 key/value
    heads, 8 positions (int32), 9 items (int32 [first token, tokens, row of the block table, chunk or -1 for all, index of the partial
    result]), 10 block tables (int32), 11 entries of a block table, 12 window or 0, 13 soft cap or 0 (f32 bits), 14 scratch, 15 bytes of
    scratch for a thread, 16 partial results (`geometry.partial_floats` for each index and key/value head), 17 address of the number of
    items.
    """
    full = query_tile_tokens("attention", group) * group
    one_token, all_tokens = _chunk_attention(head_dim, group, group), _chunk_attention(head_dim, group, full)
    only_one = full == group
    partial_bytes = partial_floats(group, head_dim) * 4

    @inline
    def keys_from(slots, table, head, start):
        """Where 64 keys lie: 32 each."""
        keys, block_size, kv_heads = load_i64(slots + 32), load_i64(slots + 48), load_i64(slots + 56)
        first = _place(keys, table, block_size, kv_heads, head, start, head_dim)
        return first, _place(keys, table, block_size, kv_heads, head, start + 32, head_dim)

    @inline
    def first_keys(slots, unit):
        """Where the first 64 keys of a unit lie."""
        kv_heads, positions = load_i64(slots + 56), load_i64(slots + 64)
        item = load_i64(slots + 72) + unit // kv_heads * 20
        table = load_i64(slots + 80) + load_i32(item + 8) * load_i64(slots + 88) * 4
        start = _first_chunk(load_i32(positions + 4 * load_i32(item)), load_i64(slots + 96), load_i32(item + 12))
        return keys_from(slots, table, unit % kv_heads, start)

    def kernel(slots, begin, end, thread):
        q_row, out_row = load_i64(slots + 8), load_i64(slots + 24)
        kv_heads, positions, items = load_i64(slots + 56), load_i64(slots + 64), load_i64(slots + 72)
        window = load_i64(slots + 96)
        units = load_i64(load_i64(slots + 136)) * kv_heads
        queries = load_i64(slots + 112) + thread * load_i64(slots + 120)
        for unit in range(begin, end):
            item = items + unit // kv_heads * 20
            head = unit % kv_heads
            first, tokens, only = load_i32(item), load_i32(item + 4), load_i32(item + 12)
            table = load_i64(slots + 80) + load_i32(item + 8) * load_i64(slots + 88) * 4
            position = load_i32(positions + 4 * first)
            single = only_one or tokens == 1
            rows = group if single else full
            # rows beyond the last token repeat it, and are not written back
            q = load_i64(slots) + first * q_row + head * group * head_dim * 4
            for row in range(rows):
                source = q + min(row // group, tokens - 1) * q_row + row % group * head_dim * 4
                for i in range(0, head_dim, 16):
                    scatter_bf16_pairs(queries + (i // 2 * rows + row) * 4, load_f32x16(source + 4 * i), rows * 4)
            scores = queries + rows * head_dim * 2
            chunk_outputs = scores + rows * CHUNK * 4
            chunk_maxima = chunk_outputs + rows * head_dim * 4
            chunk_sums = chunk_maxima + rows * 4
            outputs = chunk_sums + rows * 4
            maxima = outputs + rows * head_dim * 4
            sums = maxima + rows * 4
            last = position + tokens
            next_keys, more_keys = first_keys(slots, min(unit + 1, units - 1))
            begins = _first_chunk(position, window, only)
            if only >= 0:
                outputs = load_i64(slots + 128) + (load_i32(item + 16) * kv_heads + head) * partial_bytes
                maxima = outputs + rows * head_dim * 4
                sums = maxima + rows * 4
                if window and begins + CHUNK <= position - window + 1:
                    clear(outputs, maxima, sums, rows, head_dim)
                else:
                    stop = min(last, begins + CHUNK)
                    one_token(
                        slots, queries, table, head, position, tokens, begins, stop, next_keys, more_keys, scores, outputs, maxima, sums
                    )
                continue
            several = last - begins > CHUNK  # chunks; what comes of a single one is the result
            results = scores, outputs, maxima, sums
            if several:
                clear(outputs, maxima, sums, rows, head_dim)
                results = scores, chunk_outputs, chunk_maxima, chunk_sums
            for start in range(begins, last, CHUNK):
                stop = min(last, start + CHUNK)
                after = keys_from(slots, table, head, stop) if stop < last else (next_keys, more_keys)
                if single:
                    one_token(slots, queries, table, head, position, tokens, start, stop, *after, *results)
                else:
                    all_tokens(slots, queries, table, head, position, tokens, start, stop, *after, *results)
                if several:
                    merge_chunk(outputs, maxima, sums, chunk_outputs, chunk_maxima, chunk_sums, rows, head_dim)
            out = load_i64(slots + 16) + first * out_row + head * group * head_dim * 4
            write_out(out, out_row, outputs, sums, tokens * group, group, head_dim)

    return kernel


def item_kernel(
    *,
    head_dim: int,
    group: int,
    capacity: int,
    several: bool,
    prepare: Callable[..., Any],
    one_token: Callable[..., Any],
    many_tokens: Callable[..., Any],
) -> Any:
    """A kernel as `attention` out of its parts, for `float_attention` and `int16_attention`.

    An item has up to ``capacity`` rows of queries, and ``several`` tokens or one. ``prepare(q, bytes of a q row, rows, scratch)`` writes
    them to the scratch; the other two take a chunk each, ``(slots, scratch, rows, block table, head, position of the first token, start,
    stop, outputs, maxima, sums)``.
    """
    row_bytes = head_dim * 4
    partial_bytes = partial_floats(group, head_dim) * 4

    def kernel(slots, begin, end, thread):
        q_row, out_row = load_i64(slots + 8), load_i64(slots + 24)
        kv_heads, positions, items = load_i64(slots + 56), load_i64(slots + 64), load_i64(slots + 72)
        window = load_i64(slots + 96)
        outputs = load_i64(slots + 112) + thread * load_i64(slots + 120)
        maxima = outputs + capacity * row_bytes
        sums = maxima + capacity * 4
        chunk_outputs = sums + capacity * 4
        chunk_maxima = chunk_outputs + capacity * row_bytes
        chunk_sums = chunk_maxima + capacity * 4
        scratch = chunk_sums + capacity * 4
        for unit in range(begin, end):
            item = items + unit // kv_heads * 20
            head = unit % kv_heads
            first, tokens, only = load_i32(item), load_i32(item + 4), load_i32(item + 12)
            table = load_i64(slots + 80) + load_i32(item + 8) * load_i64(slots + 88) * 4
            position = load_i32(positions + 4 * first)
            q = load_i64(slots) + first * q_row + head * group * row_bytes
            oldest = max(0, position - window + 1) if window else 0
            rows = tokens * group
            begins, ends = oldest // CHUNK * CHUNK, position + tokens
            several_chunks = ends - begins > CHUNK  # what comes of a single one is the result
            to_outputs, to_maxima, to_sums = outputs, maxima, sums
            if only >= 0:  # one chunk, left for `merge`
                to_outputs = load_i64(slots + 128) + (load_i32(item + 16) * kv_heads + head) * partial_bytes
                to_maxima = to_outputs + group * row_bytes
                to_sums = to_maxima + group * 4
                clear(to_outputs, to_maxima, to_sums, group, head_dim)
                begins, ends = max(begins, only * CHUNK), min(ends, only * CHUNK + CHUNK)
            elif several_chunks:
                clear(outputs, maxima, sums, rows, head_dim)
                to_outputs, to_maxima, to_sums = chunk_outputs, chunk_maxima, chunk_sums
            prepare(q, q_row, rows, scratch)
            for start in range(begins, ends, CHUNK):
                stop = min(ends, start + CHUNK)
                if several and tokens > 1:
                    many_tokens(slots, scratch, rows, table, head, position, start, stop, to_outputs, to_maxima, to_sums)
                else:
                    one_token(slots, scratch, rows, table, head, position, start, stop, to_outputs, to_maxima, to_sums)
                if only < 0 and several_chunks:
                    merge_chunk(outputs, maxima, sums, to_outputs, to_maxima, to_sums, rows, head_dim)
            if only >= 0:
                continue
            out = load_i64(slots + 16) + first * out_row + head * group * row_bytes
            write_out(out, out_row, outputs, sums, rows, group, head_dim)

    return kernel


def merge(*, head_dim: int, group: int) -> Any:
    """The results of items that took one chunk each, merged in order. Units are (token, key/value head).

    Slots: 0 merges (int32 [token, index of the first partial result, how many]), 1 partial results, 2 key/value heads, 3 out, 4 bytes of an
    out row, 5 scratch, 6 bytes of scratch for a thread.
    """
    partial_bytes = partial_floats(group, head_dim) * 4

    def kernel(slots, begin, end, thread):
        partials, kv_heads, out_row = load_i64(slots + 8), load_i64(slots + 16), load_i64(slots + 32)
        outputs = load_i64(slots + 40) + thread * load_i64(slots + 48)
        maxima = outputs + group * head_dim * 4
        sums = maxima + group * 4
        for unit in range(begin, end):
            entry = load_i64(slots) + unit // kv_heads * 12
            head = unit % kv_heads
            clear(outputs, maxima, sums, group, head_dim)
            for index in range(load_i32(entry + 4), load_i32(entry + 4) + load_i32(entry + 8)):
                partial = partials + (index * kv_heads + head) * partial_bytes
                partial_maxima = partial + group * head_dim * 4
                merge_chunk(outputs, maxima, sums, partial, partial_maxima, partial_maxima + group * 4, group, head_dim)
            out = load_i64(slots + 24) + load_i32(entry) * out_row + head * group * head_dim * 4
            write_out(out, out_row, outputs, sums, group, group, head_dim)

    return kernel
