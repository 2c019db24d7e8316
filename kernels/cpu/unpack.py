"""Quants and scales out of the records of packed weights, as LLVM instructions. `tiles` states how they lie there."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import vectors
from .byte_vectors import look_up, shift_bytes
from .small_floats import load_halves
from .tiles import TILE_FORMATS


def group_of(b: Any, format: Any, address: Any, group: int) -> Any:
    """The 64 quants (16 rows by 4 columns) of one group, as unsigned bytes."""

    def vector(offset: int) -> Any:
        return vectors.load(b, vectors.row_address(b, address, 64, offset), vectors.i8x64.llvm)

    def bits(value: Any, start: int, count: int, at: int) -> Any:
        if count == 8:
            return value
        mask = vectors.constant(vectors.i8x64.llvm, ((1 << count) - 1) << at)
        return b.and_(shift_bytes(b, value, start - at), mask)

    per_vector = 8 // format.bits
    quants = bits(vector(group // per_vector), format.bits * (group % per_vector), format.bits, 0)
    if format.high_bits:
        per_plane = 8 // format.high_bits
        plane = vector(format.bits + group // per_plane)
        quants = b.or_(quants, bits(plane, format.high_bits * (group % per_plane), format.high_bits, format.bits))
    if format.codebook:
        quants = look_up(b, quants, [value + format.zero for value in format.codebook])
    return quants


@intrinsic(prefer_literal=True)
def scale_vector(typing_context, layout, block, header, index):
    """Scale ``index`` (a literal) of each row, from the block and its record's header."""
    format = TILE_FORMATS[layout.literal_value]

    def codegen(context, b, sig, values):
        return _scales(b, format, values[1], values[2], sig.args[3].literal_value, minimum=False)

    return vectors.f32x16(layout, types.intp, types.intp, index), codegen


@intrinsic(prefer_literal=True)
def minimum_vector(typing_context, layout, block, header, index):
    """Minimum ``index`` (a literal) of each row; K-quants store it negated."""
    format = TILE_FORMATS[layout.literal_value]

    def codegen(context, b, sig, values):
        return _scales(b, format, values[1], values[2], sig.args[3].literal_value, minimum=True)

    return vectors.f32x16(layout, types.intp, types.intp, index), codegen


@intrinsic(prefer_literal=True)
def pair_vector(typing_context, layout, block, factors):
    """The pair of int16 of each row, of a format in pairs."""
    format = TILE_FORMATS[layout.literal_value]

    def codegen(context, b, sig, values):
        return _pairs(b, format, values[1], values[2])

    return vectors.i32x16(layout, types.intp, vectors.i32x16), codegen


@intrinsic(prefer_literal=True)
def pair_units(typing_context, layout, header):
    """What the pairs of each row count, by the start of the tile or of 256 columns."""
    format = TILE_FORMATS[layout.literal_value]

    def codegen(context, b, sig, values):
        return _units(b, format, values[1])

    return vectors.f32x16(layout, types.intp), codegen


@intrinsic(prefer_literal=True)
def pair_factors(typing_context, layout, header):
    """What `pair_vector` multiplies the scales and minimums of 256 columns with; nothing of other formats."""
    format = TILE_FORMATS[layout.literal_value]

    def codegen(context, b, sig, values):
        return _factors(b, format, values[1])

    return vectors.i32x16(layout, types.intp), codegen


def _units(b: Any, format: Any, header: Any) -> Any:
    if format.scale == "i16 pairs":
        return vectors.load(b, header, vectors.f32x16.llvm)
    floats = vectors.f32x16.llvm
    eighth = b.select(_of_minimums(b, header), vectors.constant(floats, 2.0**-11), vectors.constant(floats, 2.0**-8))
    return b.fmul(load_halves(b, header), eighth)


def _of_minimums(b: Any, header: Any) -> Any:
    integers = vectors.i32x16.llvm
    return b.icmp_signed("!=", b.and_(_others(b, header), vectors.constant(integers, 1)), vectors.constant(integers, 0))


def _others(b: Any, header: Any) -> Any:
    return b.sext(vectors.load(b, vectors.row_address(b, header, 32, 1), ir.VectorType(vectors.I16, 16)), vectors.i32x16.llvm)


def _factors(b: Any, format: Any, header: Any) -> Any:
    """Of the scale in the lower half of each lane, of minus the minimum in the upper one; 32,768ths."""
    integers = vectors.i32x16.llvm
    if format.scale != "u8 pairs":
        return vectors.constant(integers, 0)
    whole, of_minimums = vectors.constant(integers, 1 << 14), _of_minimums(b, header)
    other = b.ashr(_others(b, header), vectors.constant(integers, 1))
    of_scale, of_minimum = b.select(of_minimums, other, whole), b.select(of_minimums, whole, other)
    low = b.and_(of_scale, vectors.constant(integers, 0xFFFF))
    return b.or_(low, b.shl(b.neg(of_minimum), vectors.constant(integers, 16)))


def _pairs(b: Any, format: Any, block: Any, factors: Any) -> Any:
    integers, words = vectors.i32x16.llvm, ir.VectorType(vectors.I16, 32)
    address = vectors.row_address(b, block, 1, format.quant_bytes)
    if format.scale == "i16 pairs":
        return vectors.load(b, address, integers)
    stored = b.zext(vectors.load(b, address, ir.VectorType(vectors.I8, 32)), words)
    stored = b.shl(stored, vectors.constant(words, 9))
    rounded = vectors.call(b, "llvm.x86.avx512.pmul.hr.sw.512", words, stored, b.bitcast(factors, words))
    # a minimum is counted from the middle of the quants, where the scale has been 8 times
    scales = b.shl(b.bitcast(rounded, integers), vectors.constant(integers, 16))
    return b.bitcast(b.add(rounded, b.bitcast(scales, words)), integers)


def _scales(b: Any, format: Any, block: Any, header: Any, index: int, minimum: bool) -> Any:
    floats, integers = vectors.f32x16.llvm, vectors.i32x16.llvm
    if format.has_pairs:
        pairs = _pairs(b, format, block, _factors(b, format, header))
        count = b.ashr(b.shl(pairs, vectors.constant(integers, 16)), vectors.constant(integers, 16))
        if minimum:  # of quants that nothing was taken from
            count = b.shl(b.sub(b.ashr(pairs, vectors.constant(integers, 16)), count), vectors.constant(integers, 3))
        return b.fmul(_units(b, format, header), b.sitofp(count, floats))
    position = index + (format.scales if minimum and format.has_minimum_vectors else 0)
    address = vectors.row_address(b, block, 1, format.quant_bytes + format.plane_bytes + position * format.scale_bytes)

    def halves(where: Any) -> Any:
        return load_halves(b, where)

    def super_scale() -> Any:
        scale = halves(vectors.row_address(b, header, 32, 1 if minimum else 0))
        if format.unit != 1:
            scale = b.fmul(scale, vectors.constant(floats, format.unit))
        return b.fneg(scale) if minimum else scale

    if format.scale == "f16":
        return halves(address)
    if format.scale == "super":
        return super_scale()
    raw = vectors.load(b, address, ir.VectorType(ir.IntType(8), 16))
    if format.scale == "e8m0":
        # 2 ** (e - 128), as the codebook holds doubled values; subnormal for the two smallest
        exponent = b.zext(raw, integers)
        one = vectors.constant(integers, 1)
        normal = b.shl(b.sub(exponent, one), vectors.constant(integers, 23))
        subnormal = b.shl(vectors.constant(integers, 1 << 21), b.and_(exponent, one))
        return b.bitcast(b.select(b.icmp_unsigned(">", exponent, one), normal, subnormal), floats)
    if format.scale == "nibbles":
        wide = b.zext(raw, integers)
        wide = b.lshr(wide, vectors.constant(integers, 4)) if minimum else b.and_(wide, vectors.constant(integers, 15))
    else:
        wide = b.sext(raw, integers) if format.scale == "i8" else b.zext(raw, integers)
    return b.fmul(super_scale(), b.sitofp(wide, floats))
