"""`attention` in float32 throughout, for models whose weights are float32: the same items, chunks and order of merging, nothing rounded.

The cache of a layer is, for each block of ``B`` positions and each key/value head: keys ``f32[B / 16][head_dim][16 positions]``, values
``f32[B][head_dim]``.
"""

from __future__ import annotations

from typing import Any

from .attention import clear, merge_chunk, soft_cap, write_out
from .geometry import ATTENTION_CHUNK as CHUNK
from .geometry import partial_floats
from .helpers import inline
from .simd import (
    bits_to_f32,
    both,
    exp,
    fma,
    greater,
    lane_numbers,
    less_i32,
    load_f32,
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


def attention(*, head_dim: int, group: int) -> Any:
    """Slots as `attention.attention`'s."""
    partial_bytes = partial_floats(group, head_dim) * 4

    @inline
    def attend(slots, q, table, head, position, start, stop, scores, outputs, maxima, sums):
        """One query row, one chunk."""
        block_size, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        window = load_i64(slots + 96)
        cap = bits_to_f32(load_i64(slots + 104))
        head_bytes = block_size * head_dim * 4
        newest = splat_i32(position - start + 1)
        oldest = splat_i32(position - window - start if window else -1)
        peak = splat_f32(_LOWEST)
        for at in range(start, stop, 16):
            k = load_i64(slots + 32) + (load_i32(table + at // block_size * 4) * kv_heads + head) * head_bytes
            k += at % block_size * head_dim * 4
            s = splat_f32(0.0)
            for i in range(head_dim):
                s = fma(splat_f32(load_f32(q + 4 * i)), load_f32x16(k + 64 * i), s)
            if cap > 0.0:
                s = soft_cap(s, cap)
            lanes = lane_numbers() + splat_i32(at - start)
            s = select(both(less_i32(lanes, newest), less_i32(oldest, lanes)), s, splat_f32(_LOWEST))
            store_f32x16(scores + (at - start) * 4, s)
            peak = maximum(peak, s)
        top = max_lanes(peak)
        total = splat_f32(0.0)
        for at in range(0, stop - start, 16):
            s = load_f32x16(scores + 4 * at)
            p = select(greater(s, splat_f32(_VISIBLE)), exp(s - splat_f32(top)), splat_f32(0.0))
            store_f32x16(scores + 4 * at, p)
            total = total + p
        store_f32(maxima, top)
        store_f32(sums, sum_lanes(total))
        for i in range(0, 4 * head_dim, 64):
            total = splat_f32(0.0)
            for at in range(start, stop):
                v = load_i64(slots + 40) + (load_i32(table + at // block_size * 4) * kv_heads + head) * head_bytes
                v += at % block_size * head_dim * 4
                total = fma(splat_f32(load_f32(scores + (at - start) * 4)), load_f32x16(v + i), total)
            store_f32x16(outputs + i, total)

    def kernel(slots, begin, end, thread):
        q_row, out_row = load_i64(slots + 8), load_i64(slots + 24)
        kv_heads, positions, items = load_i64(slots + 56), load_i64(slots + 64), load_i64(slots + 72)
        window = load_i64(slots + 96)
        scores = load_i64(slots + 112) + thread * load_i64(slots + 120)
        chunk_outputs = scores + CHUNK * 4
        chunk_maximum = chunk_outputs + head_dim * 4
        chunk_sum = chunk_maximum + 4
        for unit in range(begin, end):
            item = items + unit // kv_heads * 20
            head = unit % kv_heads
            first, tokens, only = load_i32(item), load_i32(item + 4), load_i32(item + 12)
            table = load_i64(slots + 80) + load_i32(item + 8) * load_i64(slots + 88) * 4
            for row in range(tokens * group):
                token = first + row // group
                position = load_i32(positions + 4 * token)
                oldest = max(0, position - window + 1) if window else 0
                q = load_i64(slots) + token * q_row + (head * group + row % group) * head_dim * 4
                if only >= 0:
                    partial = load_i64(slots + 128) + (load_i32(item + 16) * kv_heads + head) * partial_bytes
                    outputs = partial + row * head_dim * 4
                    maximum_at = partial + (group * head_dim + row) * 4
                    sum_at = maximum_at + group * 4
                    start = only * CHUNK
                    if start + CHUNK <= oldest:
                        clear(outputs, maximum_at, sum_at, 1, head_dim)
                    else:
                        stop = min(position + 1, start + CHUNK)
                        attend(slots, q, table, head, position, start, stop, scores, outputs, maximum_at, sum_at)
                else:
                    outputs = chunk_sum + 4
                    maximum_at = outputs + head_dim * 4
                    sum_at = maximum_at + 4
                    clear(outputs, maximum_at, sum_at, 1, head_dim)
                    for start in range(oldest // CHUNK * CHUNK, position + 1, CHUNK):
                        stop = min(position + 1, start + CHUNK)
                        attend(slots, q, table, head, position, start, stop, scores, chunk_outputs, chunk_maximum, chunk_sum)
                        merge_chunk(outputs, maximum_at, sum_at, chunk_outputs, chunk_maximum, chunk_sum, 1, head_dim)
                    out = load_i64(slots + 16) + token * out_row + (head * group + row % group) * head_dim * 4
                    write_out(out, 0, outputs, sum_at, 1, 1, head_dim)

    return kernel
