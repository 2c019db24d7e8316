"""The likeliest logits once more, of finer activations: of 16 bits where all were made of 8, of float32 where they were made of bfloat16.

Finer ones double a product that is a large part of a step, and show in few of its results: the logits near the largest one, which have
nearly all of the probability. So the product takes coarse ones (`matmul.matmul`, `bf16_matmul.matmul`), and then tiles in which a logit is
near the token's largest one are multiplied again. Which these are depends on the token alone. Where very many are near, no single one
matters much, and the margin is made smaller.
"""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np

from .geometry import LOGITS_GROUP
from .helpers import inline
from .matmul import float_tile_product, matmul, tile_product
from .quantize import quantize_row_to_words
from .register_tiles import store_tile
from .simd import (
    at_least,
    bits_to_f32,
    count_ones,
    either,
    lane_numbers,
    less_i32,
    load_f32,
    load_f32x16,
    load_i64,
    mask_bits,
    max_lanes,
    maximum,
    select,
    splat_f32,
    splat_i32,
    store_f32,
    unordered,
)
from .tiles import FLOAT_FORMATS

_MOST_GROUPS = 32  # with tiles that are multiplied again


@inline
def _peak(logits, vocabulary, group):
    """The largest logit of a group of `geometry.LOGITS_GROUP` tiles; NaN if there is one."""
    whole, tiles = vocabulary // 16, (vocabulary + 15) // 16
    real = less_i32(lane_numbers(), splat_i32(vocabulary % 16))  # of the last tile, if it has less than 16 rows
    peak = splat_f32(-inf)
    bad = unordered(peak, peak)
    for tile in range(group * LOGITS_GROUP, min((group + 1) * LOGITS_GROUP, tiles)):
        values = load_f32x16(logits + 64 * tile)
        if tile == whole:
            values = select(real, values, peak)
        bad = either(bad, unordered(values, values))
        peak = maximum(peak, values)
    return np.float32(nan) if mask_bits(bad) else max_lanes(peak)


def product(*, layout: str) -> Any:
    """`matmul.matmul` that finds the largest logit of each group while it is in the nearest cache. Units are groups.

    Slots: 0 to 10 as there, 11 vocabulary, 12 groups (a multiple of 16), 13 peaks (f32 [rows][groups]).
    """
    multiply = inline(matmul(layout=layout))

    def kernel(slots, begin, end, thread):
        rows, vocabulary, groups = load_i64(load_i64(slots + 48)), load_i64(slots + 88), load_i64(slots + 96)
        tiles = (vocabulary + 15) // 16
        for group in range(begin, end):
            multiply(slots, min(group * LOGITS_GROUP, tiles), min((group + 1) * LOGITS_GROUP, tiles), thread)
            for row in range(rows):
                logits = load_i64(slots + 16) + row * load_i64(slots + 40)
                store_f32(load_i64(slots + 104) + 4 * (row * groups + group), _peak(logits, vocabulary, group))

    return kernel


def peaks() -> Any:
    """The same of logits that are there. Units are pieces of a row of logits.

    Slots: 0 logits, 1 bytes of a row, 2 vocabulary, 3 groups (a multiple of 16), 4 pieces of a row, 5 peaks (f32 [rows][groups]).
    """

    def kernel(slots, begin, end, thread):
        row_bytes, vocabulary, groups, pieces = load_i64(slots + 8), load_i64(slots + 16), load_i64(slots + 24), load_i64(slots + 32)
        for unit in range(begin, end):
            row, piece = unit // pieces, unit % pieces
            logits = load_i64(slots) + row * row_bytes
            for group in range(piece * groups // pieces, (piece + 1) * groups // pieces):
                store_f32(load_i64(slots + 40) + 4 * (row * groups + group), _peak(logits, vocabulary, group))

    return kernel


@inline
def _near(peaks, groups, limit):
    """How many groups reach the limit."""
    count = 0
    for at in range(0, 4 * groups, 64):
        count += count_ones(mask_bits(at_least(load_f32x16(peaks + at), splat_f32(limit))))
    return count


@inline
def _limit(peaks, groups, margin):
    """The smallest logit for which a tile is multiplied again."""
    lanes = load_f32x16(peaks)
    for at in range(64, 4 * groups, 64):
        lanes = maximum(lanes, load_f32x16(peaks + at))
    peak = max_lanes(lanes)
    while margin > 0.1:
        if _near(peaks, groups, peak - margin) <= _MOST_GROUPS:
            return peak - margin
        margin *= 0.5
    return peak


def refine(*, layout: str) -> Any:
    """Multiply tiles again in which a logit is within a margin of the largest one of its row. Units are pieces of a row.

    Slots: 0 to 5 as those of `peaks`, 6 margin (f32 bits), 7 weights, 8 x (float rows), 9 bytes of a row of x, 10 blocks of 32 columns,
    11 bytes of a tile, 12 scratch, 13 bytes of scratch for a thread (`geometry.word_row_bytes`; of quantised weights), 14 peaks afterwards.
    """
    float_weights = layout in FLOAT_FORMATS
    product = float_tile_product(layout, 1) if float_weights else tile_product(layout, 1, item=2)

    @inline
    def product_of(w, x, words, blocks):
        return product(w, x, 32 * blocks, 0, 0) if float_weights else product(w, 0, words, blocks, 0)

    def kernel(slots, begin, end, thread):
        row_bytes, vocabulary, groups, pieces = load_i64(slots + 8), load_i64(slots + 16), load_i64(slots + 24), load_i64(slots + 32)
        margin, blocks, tile_bytes = bits_to_f32(load_i64(slots + 48)), load_i64(slots + 80), load_i64(slots + 88)
        words = load_i64(slots + 96) + thread * load_i64(slots + 104)
        tiles = (vocabulary + 15) // 16
        quantized = -1
        for unit in range(begin, end):
            row, piece = unit // pieces, unit % pieces
            logits = load_i64(slots) + row * row_bytes
            peaks = load_i64(slots + 40) + 4 * row * groups
            limit = _limit(peaks, groups, margin)
            for group in range(piece * groups // pieces, (piece + 1) * groups // pieces):
                peak = load_f32(peaks + 4 * group)
                if peak >= limit:
                    for tile in range(group * LOGITS_GROUP, min((group + 1) * LOGITS_GROUP, tiles)):
                        target = logits + 64 * tile
                        if mask_bits(at_least(load_f32x16(target), splat_f32(limit))):
                            x = load_i64(slots + 64) + row * load_i64(slots + 72)
                            if not float_weights and quantized != row:
                                quantize_row_to_words(x, words, 32 * blocks)
                                quantized = row
                            store_tile(product_of(load_i64(slots + 56) + tile * tile_bytes, x, words, blocks), target, 0)
                    peak = _peak(logits, vocabulary, group)
                store_f32(load_i64(slots + 112) + 4 * (row * groups + group), peak)

    return kernel
