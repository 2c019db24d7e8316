"""GGUF blocks to tiles (see `tiles`). Four columns of one row travel as a 32-bit word: one quant in each byte.

The block layouts are ggml's (ggml-common.h). Packing takes no call of Python's: rows are put in order on the way, and a chunk's part of the
file is forgotten when it is done, so that a whole model can be packed while the interpreter does something else.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .grids import grid
from .helpers import inline
from .simd import load_f32, load_i64, load_u8, load_u16, load_u32, prefetch, store_f32, store_i32, store_u8, store_u16
from .small_floats import load_f16
from .tiles import FLOAT_FORMATS, TILE_FORMATS

_LOW = 0x0F0F0F0F
_EIGHT, _MOST, _WHOLE = np.float32(8), np.float32(32767), np.float32(1 << 14)


@inline
def spread_bits(four):
    """Bit ``i`` of a nibble to bit 0 of byte ``i``."""
    return (four * 0x00204081) & 0x01010101


@inline
def nearest(value):
    """The integer next to a float."""
    return np.int64(math.floor(value + np.float32(0.5)))


@inline
def k_scale(scales, sub):
    """The 6-bit scale of a sub-block in Q4_K and Q5_K's 12 packed bytes."""
    if sub < 4:
        return load_u8(scales + sub) & 63
    return (load_u8(scales + sub + 4) & 15) | (load_u8(scales + sub - 4) >> 6 << 4)


@inline
def k_minimum(scales, sub):
    if sub < 4:
        return load_u8(scales + sub + 4) & 63
    return load_u8(scales + sub + 4) >> 4 | (load_u8(scales + sub) >> 6 << 4)


@inline
def q3_scale(scales, index):
    """Q3_K: four low bits, then two high bits, minus 32."""
    low = load_u8(scales + index) & 15 if index < 8 else load_u8(scales + index - 8) >> 4
    high = load_u8(scales + 8 + index % 4) >> (2 * (index // 4)) & 3
    return (low | high << 4) - 32


@inline
def ternary_digits(word, power):
    """A base-3 digit (0, 1 or 2) of each byte: TQ1_0's bytes are fractions of 256, which ``power`` moves the digit to the top of."""
    even = (word & 0x00FF00FF) * power & 0x00FF00FF
    odd = (word >> 8 & 0x00FF00FF) * power & 0x00FF00FF
    return (even * 3 >> 8 & 0x00FF00FF) | (odd * 3 & 0xFF00FF00)


@inline
def spread_pairs(eight):
    """Bits ``2 i`` and ``2 i + 1`` to the low bits of byte ``i``."""
    return (eight & 3) | (eight & 12) << 6 | (eight & 48) << 12 | (eight & 192) << 18


@inline
def spread_triples(twelve):
    """Bits ``3 i`` to ``3 i + 2`` to the low bits of byte ``i``."""
    return (twelve & 7) | (twelve & 0x38) << 5 | (twelve & 0x1C0) << 10 | (twelve & 0xE00) << 15


@inline
def eight_signs(seven):
    """Signs are stored for seven of eight columns: an even number of the eight is negative."""
    parity = seven ^ seven >> 4
    parity ^= parity >> 2
    return seven | ((parity ^ parity >> 1) & 1) << 7


_DONT_NEED = 4  # MADV_DONTNEED, of Linux and macOS
_AROUND = 1 << 16  # bytes that Linux maps when one of them is read, from a multiple on


@intrinsic
def _advise(typing_context, madvise, start, length):
    """``madvise(start, length, MADV_DONTNEED)`` of the C library, called by its address."""

    def codegen(context, b, sig, values):
        word = ir.IntType(64)
        function = b.inttoptr(values[0], ir.FunctionType(ir.IntType(32), [word, word, ir.IntType(32)]).as_pointer())
        b.call(function, [values[1], values[2], ir.Constant(ir.IntType(32), _DONT_NEED)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@inline
def stored_row(order, row):
    """Which of the file's rows a row is."""
    return load_i64(order + 8 * row) if order else row


@inline
def forget(slots, source, row_bytes, order, begin, end):
    """Let the system have these rows, and what it mapped around them. What others of that still want is mapped again."""
    madvise = load_i64(slots + 48)
    if madvise:
        first, last = stored_row(order, begin), 0
        for row in range(begin, end):
            stored = stored_row(order, row)
            first, last = min(first, stored), max(last, stored)
        start = max(load_i64(slots + 56), (source + first * row_bytes) // _AROUND * _AROUND)
        stop = min(load_i64(slots + 64), (source + (last + 1) * row_bytes + _AROUND - 1) // _AROUND * _AROUND)
        _advise(madvise, start, stop - start)


def _words(layout: str) -> Any:
    """A function ``(block, sub, group)``: the four quants of columns ``32 sub + 4 group`` on, as a word."""

    @inline
    def q4_0(block, sub, group):
        return load_u32(block + 2 + 4 * (group % 4)) >> (4 * (group // 4)) & _LOW

    @inline
    def q4_1(block, sub, group):
        return load_u32(block + 4 + 4 * (group % 4)) >> (4 * (group // 4)) & _LOW

    @inline
    def q5_0(block, sub, group):
        low = load_u32(block + 6 + 4 * (group % 4)) >> (4 * (group // 4)) & _LOW
        return low | spread_bits(load_u32(block + 2) >> (4 * group) & 15) << 4

    @inline
    def q5_1(block, sub, group):
        low = load_u32(block + 8 + 4 * (group % 4)) >> (4 * (group // 4)) & _LOW
        return low | spread_bits(load_u32(block + 4) >> (4 * group) & 15) << 4

    @inline
    def q8_0(block, sub, group):
        return load_u32(block + 2 + 4 * group) ^ 0x80808080

    @inline
    def q2_k(block, sub, group):
        return load_u32(block + 16 + 32 * (sub // 4) + 4 * group) >> (2 * (sub % 4)) & 0x03030303

    @inline
    def q3_k(block, sub, group):
        low = load_u32(block + 32 + 32 * (sub // 4) + 4 * group) >> (2 * (sub % 4)) & 0x03030303
        return low | (load_u32(block + 4 * group) >> sub & 0x01010101) << 2

    @inline
    def q4_k(block, sub, group):
        return load_u32(block + 16 + 32 * (sub // 2) + 4 * group) >> (4 * (sub % 2)) & _LOW

    @inline
    def q5_k(block, sub, group):
        low = load_u32(block + 48 + 32 * (sub // 2) + 4 * group) >> (4 * (sub % 2)) & _LOW
        return low | (load_u32(block + 16 + 4 * group) >> sub & 0x01010101) << 4

    @inline
    def q6_k(block, sub, group):
        low = load_u32(block + 64 * (sub // 4) + 32 * (sub % 2) + 4 * group) >> (4 * (sub % 4 // 2)) & _LOW
        return low | (load_u32(block + 128 + 32 * (sub // 4) + 4 * group) >> (2 * (sub % 4)) & 0x03030303) << 4

    @inline
    def iq4_nl(block, sub, group):
        return load_u32(block + 2 + 4 * (group % 4)) >> (4 * (group // 4)) & _LOW

    @inline
    def iq4_xs(block, sub, group):
        return load_u32(block + 8 + 16 * sub + 4 * (group % 4)) >> (4 * (group // 4)) & _LOW

    @inline
    def mxfp4(block, sub, group):
        return load_u32(block + 1 + 4 * (group % 4)) >> (4 * (group // 4)) & _LOW

    @inline
    def tq1_0(block, sub, group):
        # 5 x 32 digits of 32 bytes, 5 x 16 of 16 bytes, 4 x 4 of 4 bytes
        if sub < 5:
            return ternary_digits(load_u32(block + 4 * group), 3**sub)
        index = 2 * (sub - 5) + group // 4
        if index < 5:
            return ternary_digits(load_u32(block + 32 + 4 * (group % 4)), 3**index)
        return ternary_digits(load_u32(block + 48), 3 ** (group % 4))

    @inline
    def tq2_0(block, sub, group):
        return load_u32(block + 32 * (sub // 4) + 4 * group) >> (2 * (sub % 4)) & 0x03030303

    grid_word, ternary_grid_word = _grid_words(layout)

    @inline
    def iq2_xxs(block, sub, group):
        signs = eight_signs(load_u32(block + 6 + 8 * sub) >> (7 * (group // 2)) & 127)
        return ternary_grid_word(load_u8(block + 2 + 8 * sub + group // 2), signs, group)

    @inline
    def iq2_xs(block, sub, group):
        index = load_u16(block + 2 + 8 * sub + 2 * (group // 2))
        return ternary_grid_word(index & 511, eight_signs(index >> 9), group)

    @inline
    def iq2_s(block, sub, group):
        eight = 4 * sub + group // 2
        high = load_u8(block + 66 + sub) >> (2 * (group // 2)) & 3
        return ternary_grid_word(load_u8(block + 2 + eight) | high << 8, load_u8(block + 34 + eight), group)

    @inline
    def iq3_xxs(block, sub, group):
        signs = eight_signs(load_u32(block + 66 + 4 * sub) >> (7 * (group // 2)) & 127)
        return grid_word(load_u8(block + 2 + 8 * sub + group), signs, group)

    @inline
    def iq3_s(block, sub, group):
        high = load_u8(block + 66 + sub) >> group & 1
        return grid_word(load_u8(block + 2 + 8 * sub + group) | high << 8, load_u8(block + 74 + 4 * sub + group // 2), group)

    @inline
    def iq1_s(block, sub, group):
        high = load_u16(block + 34 + 2 * sub)
        index = load_u8(block + 2 + 4 * sub + group // 2) | (high >> (3 * (group // 2)) & 7) << 8
        return ternary_grid_word(index, 255 * (high >> 15), group)

    @inline
    def iq1_m(block, sub, group):
        eight = 4 * sub + group // 2
        high = load_u8(block + 32 + eight // 2) >> (4 * (eight % 2)) & 15
        return ternary_grid_word(load_u8(block + eight) | (high & 7) << 8, 255 * (high >> 3), group)

    return locals()[layout.removesuffix("_pairs")]


def _grid_words(layout: str) -> tuple[Any, Any]:
    """Functions ``(index, signs, group)``: a group's coordinates of a point, four or half of eight, below the bits of its signs."""
    points = grid(layout) if layout.startswith(("iq1", "iq2", "iq3")) else np.zeros(1, np.uint32)

    @inline
    def grid_word(index, signs, group):
        return spread_triples(np.int64(points[index])) | spread_bits(signs >> (4 * (group % 2)) & 15) << 3

    @inline
    def ternary_grid_word(index, signs, group):
        half = np.int64(points[index]) >> (8 * (group % 2)) & 255
        return spread_pairs(half) | spread_bits(signs >> (4 * (group % 2)) & 15) << 2

    return grid_word, ternary_grid_word


def _scales(layout: str, block_bytes: int) -> Any:
    """A function ``(block, sub, row, header, target)`` that writes one row's scales and minimums for 32 columns."""

    @inline
    def half_scale(block, sub, row, header, target):
        store_u16(target + 2 * row, load_u16(block))

    @inline
    def half_scale_and_minimum(block, sub, row, header, target):
        store_u16(target + 2 * row, load_u16(block))
        store_u16(target + 32 + 2 * row, load_u16(block + 2))

    @inline
    def q2_k(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block + 80))
        store_u16(header + 32 + 2 * row, load_u16(block + 82))
        store_u8(target + row, load_u8(block + 2 * sub))
        store_u8(target + 16 + row, load_u8(block + 2 * sub + 1))

    @inline
    def q3_k(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block + 108))
        store_u8(target + row, q3_scale(block + 96, 2 * sub))
        store_u8(target + 16 + row, q3_scale(block + 96, 2 * sub + 1))

    @inline
    def q4_k(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block))
        store_u16(header + 32 + 2 * row, load_u16(block + 2))
        store_u8(target + row, k_scale(block + 4, sub))
        store_u8(target + 16 + row, k_minimum(block + 4, sub))

    @inline
    def q6_k(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block + 208))
        store_u8(target + row, load_u8(block + 192 + 2 * sub))
        store_u8(target + 16 + row, load_u8(block + 192 + 2 * sub + 1))

    @inline
    def iq4_xs(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block))
        low = load_u8(block + 4 + sub // 2) >> (4 * (sub % 2)) & 15
        store_u8(target + row, (low | (load_u16(block + 2) >> (2 * sub) & 3) << 4) - 32)

    @inline
    def mxfp4(block, sub, row, header, target):
        store_u8(target + row, load_u8(block))

    @inline
    def tq1_0(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block + 52))

    @inline
    def tq2_0(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block + 64))

    @inline
    def iq2_xxs(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block))
        store_u8(target + row, 2 * (load_u32(block + 6 + 8 * sub) >> 28) + 1)

    @inline
    def iq2_xs(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block))
        both = load_u8(block + block_bytes - 8 + sub)
        store_u8(target + row, 2 * (both & 15) + 1)
        store_u8(target + 16 + row, 2 * (both >> 4) + 1)

    @inline
    def iq3_xxs(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block))
        store_u8(target + row, 2 * (load_u32(block + 66 + 4 * sub) >> 28) + 1)

    @inline
    def iq3_s(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block))
        store_u8(target + row, 2 * (load_u8(block + 106 + sub // 2) >> (4 * (sub % 2)) & 15) + 1)

    @inline
    def iq1_s(block, sub, row, header, target):
        store_u16(header + 2 * row, load_u16(block))
        store_u8(target + row, 2 * (load_u16(block + 34 + 2 * sub) >> 12 & 7) + 1)

    @inline
    def iq1_m(block, sub, row, header, target):
        # the super-scale is cut into the top nibbles of four words of scales
        scales = load_i64(block + 48)
        store_u16(header + 2 * row, (scales >> 12 & 15) | (scales >> 24 & 0xF0) | (scales >> 36 & 0xF00) | (scales >> 48 & 0xF000))
        two = scales >> (16 * (sub // 2) + 6 * (sub % 2))
        store_u8(target + row, 2 * (two & 7) + 1)
        store_u8(target + 16 + row, 2 * (two >> 3 & 7) + 1)

    @inline
    def q4_1_pairs(block, sub, row, header, target):
        unit = load_f32(header + 4 * row)
        scale, minimum = load_f16(block), load_f16(block + 2)
        store_u16(target + 4 * row, nearest(scale / unit if unit else unit))
        store_u16(target + 4 * row + 2, nearest((scale + minimum / _EIGHT) / unit if unit else unit))

    @inline
    def q4_k_pairs(block, sub, row, header, target):
        if sub == 0:
            scale, minimum = load_f16(block), load_f16(block + 2) / _EIGHT
            of_minimum = abs(minimum) > abs(scale) or minimum != minimum
            larger, other = (minimum, scale) if of_minimum else (scale, minimum)
            store_u16(header + 2 * row, load_u16(block + 2) if of_minimum else load_u16(block))
            count = min(nearest(_WHOLE * (other / larger)), 16383) if larger else 0
            store_u16(header + 32 + 2 * row, 2 * count + of_minimum)
        store_u8(target + 2 * row, k_scale(block + 4, sub))
        store_u8(target + 2 * row + 1, k_minimum(block + 4, sub))

    writers = locals() | {"q5_k": q4_k, "iq2_s": iq2_xs}
    return writers.get(layout, half_scale_and_minimum if TILE_FORMATS[layout].minimum else half_scale)


def _units(layout: str, block_bytes: int) -> Any:
    """A function ``(row, blocks, target)``: what 16 bits count in a row of Q4_1, so that the largest scale, or eighth of a minimum that is
    counted from the middle of the quants, just fits."""

    @inline
    def write_unit(row, blocks, target):
        largest = wrong = np.float32(0)
        for block in range(row, row + blocks * block_bytes, block_bytes):
            scale, minimum = load_f16(block), load_f16(block + 2)
            middle = scale + minimum / _EIGHT
            largest = max(largest, abs(scale), abs(middle))
            wrong += (scale - scale) + (minimum - minimum)  # NaN where one is no number
        store_f32(target, largest / _MOST + wrong)

    return write_unit


def repack(*, layout: str, block_bytes: int) -> Any:
    """Units are tiles. Slots: 0 blocks (row after row), 1 tiles (zeroed), 2 rows, 3 columns, 4 bytes of a tile, 5 for each row the
    stored row that it is (int64), or 0 if they are in order. If the blocks are of a mapped file, which may forget them, 6 the address of
    C's ``madvise``, 7 the file's, and 8 that of its end; else 6 is 0. ``block_bytes`` is the size of a GGUF block. A row of FP8 is its
    scales (f32), then its bytes.
    """
    if layout in FLOAT_FORMATS:
        return _repack_floats(layout)
    format = TILE_FORMATS[layout]
    columns_per_record = format.columns
    subs = columns_per_record // 32
    header_bytes, tile_block_bytes, record_bytes = format.header_bytes, format.block_bytes, format.record_bytes
    bits, high_bits, plane_at = format.bits, format.high_bits, format.quant_bytes
    scales_at = format.quant_bytes + format.plane_bytes
    per_vector = 8 // bits
    per_plane = 8 // high_bits if high_bits else 8
    low_mask = ((1 << bits) - 1) * 0x01010101
    high_mask = ((1 << high_bits) - 1) * 0x01010101
    word, write_scales = _words(layout), _scales(layout, block_bytes)
    units_bytes, write_unit = format.units_bytes, _units(layout, block_bytes)

    def kernel(slots, begin, end, thread):
        source, tiles = load_i64(slots), load_i64(slots + 8)
        rows, columns, order = load_i64(slots + 16), load_i64(slots + 24), load_i64(slots + 40)
        tile_bytes, records = load_i64(slots + 32), columns // columns_per_record
        for tile in range(begin, end):
            start = tiles + tile * tile_bytes
            if units_bytes:
                for row in range(min(16, rows - 16 * tile)):
                    write_unit(source + stored_row(order, 16 * tile + row) * records * block_bytes, records, start + 4 * row)
            for record in range(records):
                header = start + units_bytes + record * record_bytes
                upcoming = source + 16 * ((tile + 1) * records + record) * block_bytes  # as many bytes of the next tile
                for line in range(0, 16 * block_bytes, 64):
                    prefetch(upcoming + line)
                for row in range(min(16, rows - 16 * tile)):
                    block = source + (stored_row(order, 16 * tile + row) * records + record) * block_bytes
                    for sub in range(subs):
                        target = header + header_bytes + sub * tile_block_bytes
                        for vector in range(bits):
                            packed = 0
                            for i in range(per_vector):
                                packed |= (word(block, sub, vector * per_vector + i) & low_mask) << (bits * i)
                            store_i32(target + 64 * vector + 4 * row, packed)
                        for plane in range(high_bits):
                            packed = 0
                            for i in range(per_plane):
                                packed |= (word(block, sub, plane * per_plane + i) >> bits & high_mask) << (high_bits * i)
                            store_i32(target + plane_at + 64 * plane + 4 * row, packed)
                        write_scales(block, sub, row, start if units_bytes else header, target + scales_at)
        forget(slots, source, records * block_bytes, order, 16 * begin, min(16 * end, rows))

    return kernel


def _repack_floats(layout: str) -> Any:
    item = FLOAT_FORMATS[layout].item_bytes

    def kernel(slots, begin, end, thread):
        source, tiles = load_i64(slots), load_i64(slots + 8)
        rows, columns, tile_bytes = load_i64(slots + 16), load_i64(slots + 24), load_i64(slots + 32)
        order, row_bytes = load_i64(slots + 40), tile_bytes // 16
        scale_bytes = row_bytes - columns * item  # FP8: a row starts with its scales
        for tile in range(begin, end):
            header = tiles + tile * tile_bytes
            for row in range(min(16, rows - 16 * tile)):
                at = source + stored_row(order, 16 * tile + row) * row_bytes + scale_bytes
                target = header + 16 * scale_bytes + row * item
                for scale in range(0, scale_bytes, 4):
                    store_i32(header + 16 * scale + 4 * row, load_u32(at - scale_bytes + scale))
                for column in range(columns):
                    if item == 1:
                        store_u8(target + 16 * column, load_u8(at + column))
                    elif item == 4:
                        store_i32(target + 64 * column, load_u32(at + 4 * column))
                    else:
                        store_u16(target + 32 * column, load_u16(at + 2 * column))
        forget(slots, source, row_bytes, order, 16 * begin, min(16 * end, rows))

    return kernel
