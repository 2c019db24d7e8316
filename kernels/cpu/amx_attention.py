"""`attention` on the tile registers of AMX: the same items, chunks, cache and order of merging.

A tile of keys is 32 dimensions of 16 positions, a tile of values 32 positions of 16 dimensions: as `rope` has written them. The left
factors are the queries, ``bf16[head_dim / 32][tiles][16 rows][32 dimensions]``, and the probabilities, where the scores were. What takes
the time is the softmax; its exponentials are finer than the bfloat16 that they are rounded to.
"""

from __future__ import annotations

from typing import Any

from .amx import add_products, clear_sums, release_tiles, store_sums, use_tiles
from .attention import bf16_softmax, clear, merge_chunk, write_out
from .geometry import ATTENTION_CHUNK as CHUNK
from .geometry import QUERY_TILES as TILES
from .geometry import partial_floats
from .helpers import inline
from .simd import bits_to_f32, load_f32x16, load_i32, load_i64
from .small_floats import store_bf16x32

_LINE = 4 * CHUNK + 64  # bytes of a row of scores: rows do not compete for the same lines of the cache
_NEXT_LINES = 16 * _LINE


def _chunk_attention(head_dim: int, group: int, tiles: int) -> Any:
    """One chunk for up to ``16 tiles`` query rows, token by token: scores, softmax, weighted values."""
    positions_bytes = head_dim * 32  # of 16 positions of keys
    pair_bytes = head_dim * 4  # of a pair of positions of values

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
                add_products(tiles, queries + step * (tiles * 1024), 64, 1024, k + step * 1024, 64, positions_bytes, "right")
            store_sums(tiles, scores + (at - start) * 4, _LINE)
        width = (stop - start + 31) // 32 * 32
        for row in range(rows):
            visible = position + row // group
            first = visible - window + 1 - start if window else 0
            bf16_softmax(scores + row * _LINE, width, first, visible + 1 - start, cap, maxima + 4 * row, sums + 4 * row)
        for i in range(0, head_dim, 32):
            clear_sums(tiles)
            for at in range(start, stop, 32):
                v = load_i64(slots + 40) + (load_i32(table + at // block_size * 4) * kv_heads + head) * head_bytes
                v += (at % block_size * head_dim + 2 * i) * 2
                add_products(tiles, scores + (at - start) * 2, _LINE, _NEXT_LINES, v, pair_bytes, 64, "right")
            store_sums(tiles, outputs + 4 * i, head_dim * 4)

    return attend


def attention(*, head_dim: int, group: int) -> Any:
    """Slots as `attention.attention`'s.

    The tokens of an item make up to `TILES` pairs of tiles of query rows, which all take a chunk of keys and values before the next one.
    """
    one_token, all_tokens = _chunk_attention(head_dim, group, 1), _chunk_attention(head_dim, group, 2)
    partial_bytes = partial_floats(group, head_dim) * 4
    pair_tokens = 32 // group  # whose rows fill a pair of tiles
    steps = head_dim // 32
    queries_bytes, outputs_bytes = 64 * head_dim, 128 * head_dim + 256  # of a pair of tiles; the latter with its maxima and sums

    @inline
    def load_queries(q, q_row, tokens, queries, tiles):
        for row in range(tokens * group):
            source = q + row // group * q_row + row % group * head_dim * 4
            for step in range(steps):
                tile = tiles * step + row // 16
                store_bf16x32(
                    queries + tile * 1024 + row % 16 * 64, load_f32x16(source + 128 * step), load_f32x16(source + 128 * step + 64)
                )

    def kernel(slots, begin, end, thread):
        q_row, out_row = load_i64(slots + 8), load_i64(slots + 24)
        kv_heads, positions, items = load_i64(slots + 56), load_i64(slots + 64), load_i64(slots + 72)
        window = load_i64(slots + 96)
        scores = load_i64(slots + 112) + thread * load_i64(slots + 120)
        chunk_outputs = scores + 32 * _LINE
        chunk_maxima = chunk_outputs + 128 * head_dim
        chunk_sums = chunk_maxima + 128
        all_queries = chunk_sums + 128
        all_outputs = all_queries + TILES * queries_bytes
        shaped_for = 0
        for unit in range(begin, end):
            item = items + unit // kv_heads * 20
            head = unit % kv_heads
            first, tokens, only = load_i32(item), load_i32(item + 4), load_i32(item + 12)
            table = load_i64(slots + 80) + load_i32(item + 8) * load_i64(slots + 88) * 4
            position = load_i32(positions + 4 * first)
            q = load_i64(slots) + first * q_row + head * group * head_dim * 4
            out = load_i64(slots + 16) + first * out_row + head * group * head_dim * 4
            oldest = max(0, position - window + 1) if window else 0
            last = position + tokens
            if tokens == 1:
                if shaped_for != 1:
                    use_tiles(group)
                    shaped_for = 1
                load_queries(q, q_row, 1, all_queries, 1)
                if only >= 0:
                    outputs = load_i64(slots + 128) + (load_i32(item + 16) * kv_heads + head) * partial_bytes
                    maxima = outputs + group * head_dim * 4
                    sums = maxima + group * 4
                    start = only * CHUNK
                    if start + CHUNK <= oldest:
                        clear(outputs, maxima, sums, group, head_dim)
                    else:
                        stop = min(last, start + CHUNK)
                        one_token(slots, all_queries, table, head, position, group, start, stop, scores, outputs, maxima, sums)
                    continue
                maxima = all_outputs + 128 * head_dim
                sums = maxima + 128
                clear(all_outputs, maxima, sums, group, head_dim)
                for start in range(oldest // CHUNK * CHUNK, last, CHUNK):
                    stop = min(last, start + CHUNK)
                    one_token(
                        slots, all_queries, table, head, position, group, start, stop, scores, chunk_outputs, chunk_maxima, chunk_sums
                    )
                    merge_chunk(all_outputs, maxima, sums, chunk_outputs, chunk_maxima, chunk_sums, group, head_dim)
                write_out(out, out_row, all_outputs, sums, group, group, head_dim)
                continue
            if shaped_for != 2:
                use_tiles(16)
                shaped_for = 2
            pairs = (tokens + pair_tokens - 1) // pair_tokens
            for pair in range(pairs):
                token = pair * pair_tokens
                outputs = all_outputs + pair * outputs_bytes
                maxima = outputs + 128 * head_dim
                count = min(pair_tokens, tokens - token)
                load_queries(q + token * q_row, q_row, count, all_queries + pair * queries_bytes, 2)
                clear(outputs, maxima, maxima + 128, count * group, head_dim)
            for start in range(oldest // CHUNK * CHUNK, last, CHUNK):
                for pair in range(pairs):
                    token = pair * pair_tokens
                    count = min(pair_tokens, tokens - token)
                    stop = min(position + token + count, start + CHUNK)
                    if stop <= start or (window and start + CHUNK <= position + token - window + 1):
                        continue
                    rows = count * group
                    all_tokens(
                        slots,
                        all_queries + pair * queries_bytes,
                        table,
                        head,
                        position + token,
                        rows,
                        start,
                        stop,
                        scores,
                        chunk_outputs,
                        chunk_maxima,
                        chunk_sums,
                    )
                    outputs = all_outputs + pair * outputs_bytes
                    maxima = outputs + 128 * head_dim
                    merge_chunk(outputs, maxima, maxima + 128, chunk_outputs, chunk_maxima, chunk_sums, rows, head_dim)
            for pair in range(pairs):
                token = pair * pair_tokens
                outputs = all_outputs + pair * outputs_bytes
                rows = min(pair_tokens, tokens - token) * group
                write_out(out + token * out_row, out_row, outputs, outputs + 128 * head_dim + 128, rows, group, head_dim)
        release_tiles()

    return kernel
