"""Activations to panels of int8, once for each input of a matrix product, or to int16 (see `tiles`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .helpers import inline
from .int8_dots import SUMS_COUNT
from .int16_dots import store_words
from .isa import current_isa
from .register_tiles import MAGIC_BITS
from .simd import (
    in_halves,
    larger_magnitudes,
    load_f32x16,
    load_i64,
    pair_sums,
    peak_lanes,
    round_to_i32,
    splat_f32,
    store_f32,
    store_i8x16,
    store_i32,
    sum_lanes_i32,
)
from .tiles import panel_bytes, panel_offsets
from .winograd import products_of_activations

_SMALLEST = np.float32(1e-36)  # a block whose peak is below becomes zeros: 127 / peak would overflow
_ZERO, _MOST_WORDS = np.float32(0), np.float32(32767)  # with Python's numbers Numba would compute in float64
_PANEL = current_isa().tokens
_RECORD = panel_bytes(_PANEL, 32)
_WORD_RECORD = panel_bytes(1, 32, 2)
_SUMMARY, _WORD_SUMMARY = panel_offsets(_PANEL)[0], panel_offsets(1, 2)[0]
_PAIRS, _FIRST_PAIRS, _LAST_PAIRS = (panel_offsets(_PANEL)[field] - _SUMMARY for field in (1, 6, 7))
_SUMS_PAIRS = current_isa().name == "avx2"
_HAS_PAIRS = current_isa().pairs_scales
_HAS_SUMS = current_isa().adds_beside
_HAS_MAGIC = current_isa().two_pipes
_START = 8 * 0xFFFF  # eight in the upper half, less eight


@inline
def _two_words(low, high):
    return (low & 0xFFFF) | (high << 16)


@inline
def quantize_row(x, panels, token, columns, largest):
    """Quantise ``columns`` floats at ``x`` as row ``token``: int8 with one scale for 32 (``scale = max|x| / largest``)."""
    slot = token % _PANEL
    record = panels + token // _PANEL * (columns // 32) * _RECORD
    for column in range(0, columns, 32):
        quantize_block(load_f32x16(x + 4 * column), load_f32x16(x + 4 * column + 64), record, slot, largest)
        record += _RECORD


@inline
def quantize_block(low, high, record, slot, largest):
    """32 floats into one token's place in a record, as quants of up to ``largest`` (a float32; see `geometry.largest_activation`)."""
    peak = peak_lanes(larger_magnitudes(low, high))  # NaN makes the scale NaN, and so all that comes of it
    scale, inverse = peak / largest, splat_f32(largest / peak if peak > _SMALLEST else _ZERO)
    low_quants = round_to_i32(low * inverse)
    high_quants = round_to_i32(high * inverse)
    quants, at = record + 32 * slot, record + _SUMMARY + 4 * slot
    store_i8x16(quants, low_quants)
    store_i8x16(quants + 16, high_quants)
    if not _SUMS_PAIRS:
        sums = sum_lanes_i32(in_halves(low_quants, high_quants))  # two at once
        first = sums << 48 >> 48
        last = (sums - first) >> 16
        if _HAS_MAGIC:
            _describe_with_magic(at, scale, first, last)
        else:
            _describe(at, 4 * _PANEL, scale, first, last)
        if _HAS_PAIRS:
            store_i32(at + _PAIRS, (first + last) * _START)
        if _HAS_SUMS:
            products = sum_lanes_i32(products_of_activations(low_quants, high_quants))
            store_i32(at + _FIRST_PAIRS, ((first + last) << 19) - products)
            store_i32(at + _LAST_PAIRS, -products)
        return
    low_sums, high_sums = pair_sums(low_quants), pair_sums(high_quants)
    first, second = low_sums << 32 >> 32, low_sums >> 32
    third, fourth = high_sums << 32 >> 32, high_sums >> 32
    _describe(at, 4 * _PANEL, scale, first + second, third + fourth)
    store_i32(at + _PAIRS, _two_words(-first - third, -second - fourth))
    store_i32(at + _FIRST_PAIRS, _two_words(-first, -second))
    store_i32(at + _LAST_PAIRS, _two_words(-third, -fourth))


@inline
def quantize_row_to_words(x, record, columns):
    """As `quantize_row`, but to int16 of up to 32,767 (``scale = max|x| / 32767``), as one token's records from ``record`` on."""
    for column in range(0, columns, 32):
        low, high = load_f32x16(x + 4 * column), load_f32x16(x + 4 * column + 64)
        peak = peak_lanes(larger_magnitudes(low, high))
        inverse = splat_f32(_MOST_WORDS / peak if peak > _SMALLEST else _ZERO)
        low_quants = round_to_i32(low * inverse)
        high_quants = round_to_i32(high * inverse)
        store_words(record, low_quants)
        store_words(record + 32, high_quants)
        _describe(record + _WORD_SUMMARY, 4, peak / _MOST_WORDS, sum_lanes_i32(low_quants), sum_lanes_i32(high_quants))
        record += _WORD_RECORD


@inline
def _describe(at, stride, scale, first, last):
    """A token's scale and sums, at their places behind the quants of a record."""
    _describe_scale(at, stride, scale, first + last)
    store_i32(at + 3 * stride, (-first - last) * SUMS_COUNT)
    store_i32(at + 4 * stride, -first)
    store_i32(at + 5 * stride, -last)


@inline
def _describe_scale(at, stride, scale, total):
    store_f32(at, scale)
    store_f32(at + 2 * stride, scale * np.float32(total))


@inline
def _describe_with_magic(at, scale, first, last):
    """As `_describe`, where sums of products become floats as `register_tiles.MAGIC` says."""
    stride = 4 * _PANEL
    _describe_scale(at, stride, scale, first + last)
    store_i32(at + 3 * stride, MAGIC_BITS - (first + last) * SUMS_COUNT)
    store_f32(at + 4 * stride, scale * np.float32(first))
    store_f32(at + 5 * stride, scale * np.float32(last))


def quantize() -> Any:
    """To panels of int8. Units are tokens. Slots: 0 x, 1 bytes of a row, 2 panels, 3 columns, 4 the largest quant."""

    def kernel(slots, begin, end, thread):
        x = load_i64(slots)
        row_bytes = load_i64(slots + 8)
        panels = load_i64(slots + 16)
        columns = load_i64(slots + 24)
        largest = np.float32(load_i64(slots + 32))
        for token in range(begin, end):
            quantize_row(x + token * row_bytes, panels, token, columns, largest)

    return kernel
