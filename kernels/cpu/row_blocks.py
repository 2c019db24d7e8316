"""Rows of logits in blocks of `BLOCK`: where these lie, the largest of each, and the largest of all.

A row is an address, how many floats it holds, and ``tail``: where its last block lies, filled up with minus infinity.
"""

from __future__ import annotations

from math import inf, nan

import numpy as np

from .helpers import inline
from .sampling_layout import BLOCK
from .simd import (
    at_least,
    count_trailing_zeros,
    either,
    load_f32,
    load_f32x16,
    load_i32,
    mask_bits,
    max_lanes,
    maximum,
    splat_f32,
    store_f32,
    store_f32x16,
    unordered,
)


@inline
def block_address(row, tail, count, block):
    return tail if (block + 1) * BLOCK > count else row + block * (4 * BLOCK)


@inline
def blocks_of(count):
    return (count + BLOCK - 1) // BLOCK


@inline
def pad_last_block(row, count, out):
    """Copy what lies beyond the last whole block of a row."""
    for first in range(0, 4 * BLOCK, 64):
        store_f32x16(out + first, splat_f32(-inf))
    for index in range(count // BLOCK * BLOCK, count):
        store_f32(out + 4 * (index % BLOCK), load_f32(row + 4 * index))


@inline
def find_maximum(row, tail, count, maxima, block):
    """The largest of a block goes to its place in ``maxima``; NaN if there is one."""
    source = block_address(row, tail, count, block)
    x, y = load_f32x16(source), load_f32x16(source + 64)
    bad = unordered(x, y)
    for first in range(source + 128, source + 4 * BLOCK, 128):
        u, v = load_f32x16(first), load_f32x16(first + 64)
        bad = either(bad, unordered(u, v))
        x, y = maximum(u, x), maximum(v, y)
    store_f32(maxima + 4 * block, np.float32(nan) if mask_bits(bad) else max_lanes(maximum(x, y)))


@inline
def find_maxima(row, tail, count, maxima):
    for block in range(blocks_of(count)):
        find_maximum(row, tail, count, maxima, block)


@inline
def find_again(row, tail, count, maxima, ids, size):
    """The same of the blocks in which the tokens on a list are."""
    for entry in range(size):
        token = load_i32(ids + 4 * entry)
        if 0 <= token < count:
            find_maximum(row, tail, count, maxima, token // BLOCK)


@inline
def copy_maxima(known, maxima, count):
    """Both are whole vectors."""
    for first in range(0, blocks_of(count), 16):
        store_f32x16(maxima + 4 * first, load_f32x16(known + 4 * first))


@inline
def largest_of(maxima, count):
    """The largest of a row; NaN if there is one."""
    peak = np.float32(-inf)
    for block in range(blocks_of(count)):
        highest = load_f32(maxima + 4 * block)
        if highest != highest:
            return highest
        peak = max(peak, highest)
    return peak


@inline
def first_equal(row, tail, count, maxima, peak):
    """The lowest id of the most likely. It stays within the row, whatever the maxima are."""
    block, last = 0, blocks_of(count) - 1
    while load_f32(maxima + 4 * block) != peak and block < last:
        block += 1
    source = block_address(row, tail, count, block)
    first = 0
    bits = mask_bits(at_least(load_f32x16(source), splat_f32(peak)))
    while bits == 0 and first < BLOCK - 16:
        first += 16
        bits = mask_bits(at_least(load_f32x16(source + 4 * first), splat_f32(peak)))
    return min(block * BLOCK + first + count_trailing_zeros(bits), count - 1)
