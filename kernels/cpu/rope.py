"""Rotary position embedding (arXiv:2104.09864), half-split; with the head norms before it and the write to the KV cache after it."""

from __future__ import annotations

from typing import Any

from .geometry import cache_item_bytes, cache_row_bytes, cache_scale_group
from .helpers import inline
from .int16_dots import store_i16x16
from .norm import normalize
from .simd import (
    bits_to_f32,
    f32_to_bits,
    first_lane,
    fma,
    larger_magnitudes,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    load_u8,
    load_u16,
    maximum,
    minimum,
    peak_lanes,
    round_to_i32,
    splat_f32,
    store_f32,
    store_f32x16,
    store_i8x16,
    store_i32,
    store_u8,
    store_u16,
)
from .small_floats import round_bf16, scatter_bf16_pairs, scatter_bf16x16, store_bf16x16, store_f8x16, store_f16x16

# what a type can hold; beside a scale that may be rounded up, nearly any float
_LARGEST = {"f32": 3.4e38, "f16": 65504.0, "bf16": 3.38e38, "bf16 pairs": 3.38e38, "int16": 3.3e38, "f8e4m3": 3.3e38, "int8": 3.3e38}
_SMALLEST = 1e-35  # what shares a scale becomes zeros if its largest is below


@inline
def rotate(x, cosines, sines, pairs):
    """Rotate ``(x[i], x[i + pairs])`` by the angle whose cosine and sine are given, in place."""
    for i in range(0, pairs - 15, 16):
        a = load_f32x16(x + 4 * i)
        b = load_f32x16(x + 4 * (i + pairs))
        c = load_f32x16(cosines + 4 * i)
        s = load_f32x16(sines + 4 * i)
        store_f32x16(x + 4 * i, a * c - b * s)
        store_f32x16(x + 4 * (i + pairs), fma(a, s, b * c))
    for i in range(pairs // 16 * 16, pairs):
        a1 = load_f32(x + 4 * i)
        b1 = load_f32(x + 4 * (i + pairs))
        c1 = load_f32(cosines + 4 * i)
        s1 = load_f32(sines + 4 * i)
        store_f32(x + 4 * i, a1 * c1 - b1 * s1)
        store_f32(x + 4 * (i + pairs), a1 * s1 + b1 * c1)


def _store_item(item_bytes: int) -> Any:
    """What copies one item of a key to its place."""

    @inline
    def copy(source, target):
        if item_bytes == 4:
            store_f32(target, load_f32(source))
        elif item_bytes == 2:
            store_u16(target, load_u16(source))
        else:
            store_u8(target, load_u8(source))

    return copy


def _writer(layout: str, head_dim: int) -> Any:
    """What writes one key and one value to their block, at an offset."""
    item_bytes = cache_item_bytes(layout)
    largest = _LARGEST[layout]
    # What the largest of a row becomes, and what it may be: the scale may have been rounded down, which 8 bits do not show.
    steps, most = {"int16": (32600.0, 32767.0), "int8": (127.0, 127.0), "f8e4m3": (448.0, 448.0)}.get(layout, (0.0, 0.0))
    group = cache_scale_group(layout, head_dim)
    copy = _store_item(item_bytes)

    @inline
    def bounded(x):
        """Attention takes values behind those that a token sees as well, times 0: what is not finite would reach its result."""
        return minimum(maximum(load_f32x16(x), splat_f32(-largest)), splat_f32(largest))

    @inline
    def put(target, x):
        if layout == "f32":
            store_f32x16(target, x)
        elif layout == "f16":
            store_f16x16(target, x)
        elif layout == "bf16":
            store_bf16x16(target, x)
        elif layout == "f8e4m3":
            store_f8x16(target, x)
        elif layout == "int16":
            store_i16x16(target, round_to_i32(x))
        else:
            store_i8x16(target, round_to_i32(x))

    @inline
    def put_row(x, target, scales, stride):
        """A row in the cache's type; its scales, if it has them, go to ``scales``, ``stride`` bytes apart."""
        if not steps:
            for i in range(0, head_dim, 16):
                put(target + item_bytes * i, bounded(x + 4 * i))
            return
        for first in range(0, head_dim, group):
            peak = splat_f32(0.0)
            for i in range(first, first + group, 16):
                peak = larger_magnitudes(peak, bounded(x + 4 * i))
            size = peak_lanes(peak)
            scale = first_lane(round_bf16(splat_f32(size / steps)))
            store_u16(scales + first // group * stride, f32_to_bits(scale) >> 16)
            factor = splat_f32(1.0 / scale if size > _SMALLEST else 0.0)
            for i in range(first, first + group, 16):
                row = minimum(maximum(bounded(x + 4 * i) * factor, splat_f32(-most)), splat_f32(most))
                put(target + item_bytes * i, row)

    @inline
    def write(k, v, key_block, value_block, offset, block_size):
        if layout == "bf16 pairs":
            key = key_block + offset // 16 * head_dim * 32 + offset % 16 * 4
            value = value_block + offset // 2 * head_dim * 4 + offset % 2 * 2
            for i in range(0, head_dim, 16):
                scatter_bf16_pairs(key + 32 * i, load_f32x16(k + 4 * i), 64)
                scatter_bf16x16(value + 4 * i, bounded(v + 4 * i), 4)
            return
        scales = block_size * head_dim * item_bytes
        put_row(k, k, key_block + scales + 2 * offset, 2 * block_size)  # narrowed in place
        if layout == "int16":
            put_row(v, v, value_block + scales + 2 * offset, 2 * block_size)
            key = key_block + offset // 16 * head_dim * 32 + offset % 16 * 4
            value = value_block + offset // 2 * 64 + offset % 2 * 2
            for i in range(0, head_dim, 2):
                store_i32(key + 32 * i, load_i32(k + 2 * i))
            for i in range(0, head_dim, 16):
                for j in range(16):
                    copy(v + 2 * (i + j), value + i * 2 * block_size + 4 * j)
            return
        key = key_block + (offset // 16 * head_dim * 16 + offset % 16) * item_bytes
        for i in range(head_dim):
            copy(k + i * item_bytes, key + i * 16 * item_bytes)
        put_row(v, value_block + offset * head_dim * item_bytes, value_block + scales + 2 * offset, 2 * block_size)

    return write


def rope_and_cache(*, head_dim: int, cache: str) -> Any:
    """Norm and rotate the heads of q and k; scale q; write k and v to the cache. Units are tokens. It spoils the rows of k, and those of v
    too if the cache is ``int16``.

    A layer's cache has, for each block of ``B`` positions and each key/value head, keys ``[B / 16][head_dim][16 positions]`` and values
    ``[B][head_dim]``, so that either way 16 items are a vector. In the types of 8 bits 32 dimensions share a scale (16 where heads are no
    multiple of 32), with which the largest of them becomes 127, or 448. The scales are bfloat16 and lie behind the items, ``[head_dim /
    32][B]``. In ``bf16 pairs``, for CPUs that multiply such, the order is keys ``[B / 16][head_dim / 2][16 positions][2 dimensions]`` and
    values ``[B / 2][head_dim][2 positions]``. ``int16`` has such keys, values ``[head_dim / 16][B / 2][16 dimensions][2 positions]``, and
    behind them a scale for each position, with which the largest becomes about 32,600.

    Slots: 0 q, 1 bytes of a q row, 2 k, 3 bytes of a k row, 4 v, 5 bytes of a v row, 6 heads, 7 key/value heads, 8 q norm weight or 0, 9 k
    norm weight or 0, 10 epsilon (f32 bits), 11 rotation table (f32 [position][cosines, sines]) or 0, 12 pairs to rotate, 13 q scale (f32
    bits), 14 positions (int32), 15 cache slots (int32: block * B + offset), 16 key cache, 17 value cache, 18 B.
    """
    write = _writer(cache, head_dim)
    position_bytes = cache_row_bytes(cache, head_dim)

    def kernel(slots, begin, end, thread):
        q_row, k_row, v_row = load_i64(slots + 8), load_i64(slots + 24), load_i64(slots + 40)
        heads, kv_heads = load_i64(slots + 48), load_i64(slots + 56)
        q_norm, k_norm = load_i64(slots + 64), load_i64(slots + 72)
        epsilon = bits_to_f32(load_i64(slots + 80))
        table, pairs = load_i64(slots + 88), load_i64(slots + 96)
        scale = bits_to_f32(load_i64(slots + 104))
        positions, cache_slots = load_i64(slots + 112), load_i64(slots + 120)
        keys, values = load_i64(slots + 128), load_i64(slots + 136)
        block_size = load_i64(slots + 144)
        for token in range(begin, end):
            cosines = table + load_i32(positions + 4 * token) * pairs * 8
            sines = cosines + pairs * 4
            for head in range(heads):
                q = load_i64(slots) + token * q_row + head * head_dim * 4
                if q_norm:
                    normalize(q, q_norm, q, head_dim, epsilon)
                if table:
                    rotate(q, cosines, sines, pairs)
                for i in range(0, head_dim, 16):
                    store_f32x16(q + 4 * i, load_f32x16(q + 4 * i) * splat_f32(scale))
            slot = load_i32(cache_slots + 4 * token)
            block = slot // block_size
            offset = slot % block_size
            for head in range(kv_heads):
                k = load_i64(slots + 16) + token * k_row + head * head_dim * 4
                v = load_i64(slots + 32) + token * v_row + head * head_dim * 4
                if k_norm:
                    normalize(k, k_norm, k, head_dim, epsilon)
                if table:
                    rotate(k, cosines, sines, pairs)
                start = (block * kv_heads + head) * block_size * position_bytes
                write(k, v, keys + start, values + start, offset, block_size)

    return kernel
