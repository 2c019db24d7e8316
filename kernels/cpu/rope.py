"""Rotary position embedding (arXiv:2104.09864), half-split; with the head norms before it and the write to the KV cache after it."""

from __future__ import annotations

from typing import Any

from .helpers import inline
from .norm import normalize
from .simd import (
    bits_to_f32,
    fma,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    maximum,
    minimum,
    scatter_bf16_pairs,
    scatter_bf16x16,
    splat_f32,
    store_f32,
    store_f32x16,
)

_LARGEST = 3.38e38  # what bfloat16 can hold


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


def rope_and_cache(*, head_dim: int, cache: str = "bf16") -> Any:
    """Norm and rotate the heads of q and k; scale q; write k and v to the cache. Units are tokens.

    The cache of a layer is bfloat16, in pairs as the dot product of pairs wants them. For each block of ``B`` positions and each
    key/value head:
    keys ``[B / 16][head_dim / 2][16 positions][2 dimensions]``, values ``[B / 2][head_dim][2 positions]``. With ``cache="f32"`` it is
    float32, as
    `exact_attention` states.

    Slots: 0 q, 1 bytes of a q row, 2 k, 3 bytes of a k row, 4 v, 5 bytes of a v row, 6 heads, 7 key/value heads, 8 q norm weight or 0, 9
    k norm weight or 0,
    10 epsilon (f32 bits), 11 rotation table (f32 [position][cosines, sines]) or 0, 12 pairs to rotate, 13 q scale (f32 bits),
    14 positions (int32), 15 cache slots (int32: block * B + offset), 16 key cache, 17 value cache, 18 B.
    """
    exact = cache == "f32"

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
                start = (block * kv_heads + head) * block_size * head_dim * 2
                if exact:
                    key = keys + 2 * start + (offset // 16 * head_dim * 16 + offset % 16) * 4
                    value = values + 2 * start + offset * head_dim * 4
                    for i in range(head_dim):
                        store_f32(key + 64 * i, load_f32(k + 4 * i))
                        store_f32(value + 4 * i, load_f32(v + 4 * i))
                    continue
                key = keys + start + offset // 16 * head_dim * 32 + offset % 16 * 4
                value = values + start + offset // 2 * head_dim * 4 + offset % 2 * 2
                for i in range(0, head_dim, 16):
                    scatter_bf16_pairs(key + 32 * i, load_f32x16(k + 4 * i), 64)
                    # Attention takes values by the 32, also behind a sequence's end, times 0: what is not finite would reach the block's
                    # next owner.
                    bounded = minimum(maximum(load_f32x16(v + 4 * i), splat_f32(-_LARGEST)), splat_f32(_LARGEST))
                    scatter_bf16x16(value + 4 * i, bounded, 4)

    return kernel
