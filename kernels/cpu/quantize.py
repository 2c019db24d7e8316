"""Activations to int8 panels (see `tiles`), once for each input of a matrix product."""

from __future__ import annotations

from typing import Any

from .helpers import inline
from .isa import current_isa
from .simd import (
    larger_magnitudes,
    load_f32,
    load_f32x16,
    load_i8x16,
    load_i64,
    peak_lanes,
    round_to_i32,
    splat_f32,
    store_f32,
    store_i8x16,
    store_i32,
    sum_lanes_i32,
    to_f32,
)
from .tiles import panel_bytes, panel_offsets

_SMALLEST = 1e-36  # a block whose peak is below becomes zeros: 127 / peak would overflow
_PANEL = current_isa().tokens
_RECORD = panel_bytes(_PANEL, 32)
_SCALES, _SCALED_SUMS, _SUMS, _FIRST, _LAST = panel_offsets(_PANEL)


@inline
def quantize_row(x, panels, token, columns):
    """Quantise ``columns`` floats at ``x`` as row ``token``: int8 with one scale for 32 (``scale = max|x| / 127``)."""
    slot = token % _PANEL
    record = panels + token // _PANEL * (columns // 32) * _RECORD
    for column in range(0, columns, 32):
        quantize_block(load_f32x16(x + 4 * column), load_f32x16(x + 4 * column + 64), record, slot)
        record += _RECORD


@inline
def quantize_block(low, high, record, slot):
    """32 floats into one token's place in a record."""
    peak = peak_lanes(larger_magnitudes(low, high))  # NaN makes the scale NaN, and so all that comes of it
    inverse = 127.0 / peak if peak > _SMALLEST else 0.0
    scale = peak / 127.0
    low_quants = round_to_i32(low * splat_f32(inverse))
    high_quants = round_to_i32(high * splat_f32(inverse))
    quants = record + 32 * slot
    store_i8x16(quants, low_quants)
    store_i8x16(quants + 16, high_quants)
    first = sum_lanes_i32(low_quants)
    last = sum_lanes_i32(high_quants)
    store_f32(record + _SCALES + 4 * slot, scale)
    store_f32(record + _SCALED_SUMS + 4 * slot, scale * (first + last))
    store_i32(record + _SUMS + 4 * slot, -first - last)
    store_i32(record + _FIRST + 4 * slot, -first)
    store_i32(record + _LAST + 4 * slot, -last)


@inline
def quantize_row_twice(x, panels, residuals, token, columns):
    """As `quantize_row`, and what the rounding lost likewise into a second set of panels: 15 bits in all."""
    slot = token % _PANEL
    offset = token // _PANEL * (columns // 32) * _RECORD
    for column in range(0, columns, 32):
        low, high = load_f32x16(x + 4 * column), load_f32x16(x + 4 * column + 64)
        record = panels + offset
        quantize_block(low, high, record, slot)
        scale = splat_f32(load_f32(record + _SCALES + 4 * slot))
        quants = record + 32 * slot
        low = low - to_f32(load_i8x16(quants)) * scale
        high = high - to_f32(load_i8x16(quants + 16)) * scale
        quantize_block(low, high, residuals + offset, slot)
        offset += _RECORD


def quantize() -> Any:
    """Units are tokens. Slots: 0 x, 1 bytes of a row, 2 panels, 3 columns, 4 panels for what the rounding lost, or 0."""

    def kernel(slots, begin, end, thread):
        x = load_i64(slots)
        row_bytes = load_i64(slots + 8)
        panels = load_i64(slots + 16)
        columns = load_i64(slots + 24)
        residuals = load_i64(slots + 32)
        for token in range(begin, end):
            if residuals:
                quantize_row_twice(x + token * row_bytes, panels, residuals, token, columns)
            else:
                quantize_row(x + token * row_bytes, panels, token, columns)

    return kernel
