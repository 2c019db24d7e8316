"""Embedding rows, read out of the same tiles that the output matrix uses."""

from __future__ import annotations

from typing import Any

import numpy as np

from .helpers import inline
from .simd import bits_to_f32, load_f32, load_i8, load_i32, load_i64, load_u8, load_u16, store_f32
from .small_floats import load_f8, load_f16
from .tiles import FLOAT_FORMATS, TILE_FORMATS

_SCALES_UNIT, _MINIMUMS_UNIT = np.float32(2.0**-8), np.float32(2.0**-11)  # of what pairs of Q4_K count


def read_row(layout: str) -> Any:
    """A function ``(tiles, row, columns, tile_bytes, out)`` that writes one row as float32."""
    if layout in FLOAT_FORMATS:
        return _read_float_row(layout)
    format = TILE_FORMATS[layout]
    bits, high_bits, minimum = format.bits, format.high_bits, format.minimum
    record_blocks, record_bytes = format.columns // 32, format.record_bytes
    header_bytes, block_bytes = format.header_bytes, format.block_bytes
    scale_kind, scales, scale_bytes = format.scale, format.scales, format.scale_bytes
    planes_at, scales_at = format.quant_bytes, format.quant_bytes + format.plane_bytes
    per_vector = 8 // bits
    per_plane = 8 // high_bits if high_bits else 1
    codebook = format.codebook or (0,)
    has_codebook = bool(format.codebook)
    zero = 0 if has_codebook else format.zero
    unit = np.float32(format.unit)
    units_bytes, has_pairs = format.units_bytes, format.has_pairs

    @inline
    def pair(block, header, row):
        """The first number of a row's pair, and how much more the second is."""
        at = block + scales_at + scale_bytes // 16 * row
        if scale_kind == "i16 pairs":
            first = load_u16(at) << 48 >> 48
            return first, (load_u16(at + 2) << 48 >> 48) - first
        other = load_u16(header + 32 + 2 * row) << 48 >> 49
        of_minimum = load_u16(header + 32 + 2 * row) & 1
        scale, minimum = load_u8(at), load_u8(at + 1)
        if of_minimum:
            return (scale * other + 32) >> 6, -minimum << 8
        return scale << 8, (32 - minimum * other) >> 6

    @inline
    def pair_unit(header, row):
        if scale_kind == "i16 pairs":
            return load_f32(header + 4 * row)
        return load_f16(header + 2 * row) * (_MINIMUMS_UNIT if load_u16(header + 32 + 2 * row) & 1 else _SCALES_UNIT)

    @inline
    def factor(block, header, index, row):
        if has_pairs:
            return pair_unit(header, row) * np.float32(pair(block, header, row)[0])
        at = block + scales_at + index * scale_bytes
        if scale_kind == "f16":
            return load_f16(at + 2 * row)
        super_scale = load_f16(header + 2 * row) * unit if header_bytes else load_f16(block)
        if scale_kind == "super":
            return super_scale
        if scale_kind == "e8m0":
            exponent = load_u8(at + row)
            return bits_to_f32((exponent - 1) << 23 if exponent > 1 else (1 << 21) << exponent)
        if scale_kind == "i8":
            return super_scale * load_i8(at + row)
        if scale_kind == "nibbles":
            return super_scale * (load_u8(at + row) & 15)
        return super_scale * load_u8(at + row)

    @inline
    def offset(block, header, index, row):
        if has_pairs:
            return pair_unit(header, row) * np.float32(8 * pair(block, header, row)[1])
        at = block + scales_at + (index + scales) * scale_bytes
        if scale_kind == "f16":
            return load_f16(at + 2 * row)
        super_minimum = load_f16(header + 32 + 2 * row)
        if scale_kind == "nibbles":
            return -super_minimum * (load_u8(block + scales_at + index * scale_bytes + row) >> 4)
        return -super_minimum * load_u8(at + row)

    @inline
    def read(tiles, row, columns, tile_bytes, out):
        tile = tiles + row // 16 * tile_bytes
        lane = row % 16
        for b in range(columns // 32):
            record = tile + units_bytes + b // record_blocks * record_bytes
            header = tile if units_bytes else record
            block = record + header_bytes + b % record_blocks * block_bytes
            for index in range(scales):
                scale = factor(block, header, index, lane)
                low = offset(block, header, index, lane) if minimum else scale * 0.0
                for column in range(32 // scales * index, 32 // scales * (index + 1)):
                    group = column // 4
                    byte = 4 * lane + column % 4
                    quant = load_u8(block + 64 * (group // per_vector) + byte) >> (bits * (group % per_vector)) & ((1 << bits) - 1)
                    if high_bits:
                        plane = load_u8(block + planes_at + 64 * (group // per_plane) + byte)
                        quant |= (plane >> (high_bits * (group % per_plane)) & ((1 << high_bits) - 1)) << bits
                    if has_codebook:
                        quant = codebook[quant]
                    store_f32(out + 4 * (32 * b + column), scale * (quant - zero) + low)

    return read


def _read_float_row(layout: str) -> Any:
    item = FLOAT_FORMATS[layout].item_bytes

    @inline
    def read(tiles, row, columns, tile_bytes, out):
        tile = tiles + row // 16 * tile_bytes
        header_bytes = tile_bytes - 16 * item * columns
        at = tile + header_bytes + row % 16 * item
        for column in range(columns):
            if layout == "f8e4m3":
                scale = column * (header_bytes // 64) // columns
                value = load_f8(at) * load_f32(tile + 64 * scale + 4 * (row % 16))
            elif layout == "f32":
                value = load_f32(at)
            elif layout == "f16":
                value = load_f16(at)
            else:
                value = bits_to_f32(load_u16(at) << 16)
            store_f32(out + 4 * column, value)
            at += 16 * item

    return read


def embedding(*, layout: str) -> Any:
    """Units are tokens. Slots: 0 tokens (int32), 1 tiles, 2 out, 3 columns, 4 bytes of a tile, 5 bytes of an output row, 6 scale
    (f32 bits).
    """
    read = read_row(layout)

    def kernel(slots, begin, end, thread):
        tokens = load_i64(slots)
        tiles = load_i64(slots + 8)
        out = load_i64(slots + 16)
        columns = load_i64(slots + 24)
        tile_bytes = load_i64(slots + 32)
        row_bytes = load_i64(slots + 40)
        scale = bits_to_f32(load_i64(slots + 48))
        for unit in range(begin, end):
            target = out + unit * row_bytes
            read(tiles, load_i32(tokens + 4 * unit), columns, tile_bytes, target)
            if scale != 1.0:
                for column in range(columns):
                    store_f32(target + 4 * column, load_f32(target + 4 * column) * scale)

    return kernel
