"""Float weights to GGUF's blocks, 16 rows at a time: lane ``r`` of every vector is row ``r``, so that a search runs in all lanes at once.

The block layouts are ggml's (ggml-common.h). `scale_search` finds the scales; weights are rounded last, to the scales as they are stored.
"""

from __future__ import annotations

from typing import Any

from .helpers import inline
from .scale_search import TINY, affine_search, as_half, inverse, of_largest_magnitude, rounded, symmetric_search
from .simd import (
    absolute,
    as_f32,
    as_i32,
    at_least,
    bits_to_f32,
    f32_to_bits,
    fma,
    greater,
    larger_magnitudes,
    load_f32,
    load_f32x16,
    load_i64,
    load_u8,
    load_u16,
    maximum,
    minimum,
    peak_lanes,
    round_to_i32,
    select,
    splat_f32,
    splat_i32,
    store_f32,
    store_f32x16,
    store_i8x16,
    store_i32,
    store_i64,
    store_u8,
    to_f32,
)
from .small_floats import load_bf16x16, load_f16, load_f16x16, store_f16
from .tiles import FP8_LARGEST
from .weight_layout import LARGEST_FINITE, LARGEST_HALF, NOT_FINITE, Q_BYTES, TOO_LARGE, X_BYTES


def _loader(source: str) -> tuple[int, Any]:
    """Bytes of a stored float, and a function that loads one."""

    @inline
    def f32(at):
        return load_f32(at)

    @inline
    def f16(at):
        return load_f16(at)

    @inline
    def bf16(at):
        return bits_to_f32(load_u16(at) << 16)

    return (4 if source == "f32" else 2), {"f32": f32, "f16": f16, "bf16": bf16}[source]


@inline
def write_quants(x, quants, count, scale, offset, low, high, zero):
    """Round to the scales that are stored. A scale of 0 makes them ``zero``."""
    factor = inverse(scale)
    for i in range(count):
        quant = rounded((load_f32x16(x + 64 * i) - offset) * factor, low, high)
        store_i8x16(quants + 16 * i, round_to_i32(quant) + splat_i32(zero))


# ---- one record: 16 rows of 32 or 256 columns -----------------------------------------------------------------------


def _encoder(layout: str) -> Any:
    """A function ``(x, quants, scales)`` from float32 ``[columns][16]`` to u8 ``[columns][16]`` and to vectors of scales.

    ``scales``: vector 0 the scale (halves), 1 the minimum; for K-quants then one vector of integer scales, and one of minimums, for each
    group.
    """
    half = {"q4_0": 8, "q5_0": 16, "q3_k": 4, "q6_k": 32}.get(layout, 1)
    symmetric = symmetric_search(half)
    levels = {"q4_1": 15, "q5_1": 31, "q2_k": 3, "q4_k": 15, "q5_k": 31}.get(layout, 1)
    first, steps = {"q2_k": (-0.5, 16), "q4_k": (-1.0, 21), "q5_k": (-0.5, 16)}.get(layout, (-0.5, 16))
    affine = affine_search(levels, first, steps, layout.endswith("k"))
    count = 16 if layout in ("q2_k", "q3_k", "q6_k") else 32
    groups = 256 // count
    top = {"q2_k": 15.0, "q4_k": 63.0, "q5_k": 63.0, "q3_k": 32.0, "q6_k": 128.0}.get(layout, 1.0)

    @inline
    def by_scale(x, quants, scales):
        scale = as_half(symmetric(x, 32), scales + 64)
        store_f32x16(scales, scale)
        write_quants(x, quants, 32, scale, splat_f32(0.0), -float(half), half - 1.0, half)

    @inline
    def by_scale_and_minimum(x, quants, scales):
        scale, offset = affine(x, 32)
        scale = as_half(scale, scales + 128)
        offset = as_half(offset, scales + 128)
        store_f32x16(scales, scale)
        store_f32x16(scales + 64, offset)
        write_quants(x, quants, 32, scale, offset, 0.0, float(levels), 0)

    @inline
    def q8_0(x, quants, scales):
        scale = as_half(absolute(of_largest_magnitude(x, 32)) * splat_f32(1.0 / 127.0), scales + 64)
        store_f32x16(scales, scale)
        write_quants(x, quants, 32, scale, splat_f32(0.0), -127.0, 127.0, 0)

    @inline
    def k_affine(x, quants, scales):
        each = scales + 128
        largest = splat_f32(0.0)
        lowest = splat_f32(0.0)
        for group in range(groups):
            scale, offset = affine(x + 64 * count * group, count)
            store_f32x16(each + 128 * group, scale)
            store_f32x16(each + 128 * group + 64, offset)
            largest = maximum(largest, scale)
            lowest = minimum(lowest, offset)
        work = each + 128 * groups
        to_scale, to_minimum = inverse(largest) * splat_f32(top), inverse(lowest) * splat_f32(top)
        unit, unit_minimum = as_half(largest * splat_f32(1.0 / top), work), as_half(lowest * splat_f32(-1.0 / top), work)
        store_f32x16(scales, unit)
        store_f32x16(scales + 64, unit_minimum)
        for group in range(groups):
            scale = rounded(load_f32x16(each + 128 * group) * to_scale, 0.0, top)
            offset = rounded(load_f32x16(each + 128 * group + 64) * to_minimum, 0.0, top)
            store_f32x16(each + 128 * group, scale)
            store_f32x16(each + 128 * group + 64, offset)
            start = quants + 16 * count * group
            offset = splat_f32(0.0) - unit_minimum * offset
            write_quants(x + 64 * count * group, start, count, unit * scale, offset, 0.0, float(levels), 0)

    @inline
    def k_symmetric(x, quants, scales):
        each = scales + 128
        for group in range(groups):
            store_f32x16(each + 64 * group, symmetric(x + 64 * count * group, count))
        peak = of_largest_magnitude(each, groups)
        to_scale = inverse(peak) * splat_f32(-top)
        unit = as_half(peak * splat_f32(-1.0 / top), each + 64 * groups)
        store_f32x16(scales, unit)
        for group in range(groups):
            scale = rounded(load_f32x16(each + 64 * group) * to_scale, -top, top - 1.0)
            store_f32x16(each + 64 * group, scale)
            start = quants + 16 * count * group
            write_quants(x + 64 * count * group, start, count, unit * scale, splat_f32(0.0), -float(half), half - 1.0, half)

    @inline
    def mxfp4(x, quants, scales):
        peak = absolute(of_largest_magnitude(x, 32))
        floor = as_f32(as_i32(peak) & splat_i32(0x7F800000))  # the power of two below
        wide = select(greater(floor, splat_f32(2.0**-120)), floor * splat_f32(0.25), splat_f32(0.0))
        wider = wide * splat_f32(2.0)  # nothing is cut off at 6, but steps are twice as large
        error, wider_error = splat_f32(0.0), splat_f32(0.0)
        for i in range(32):
            value = absolute(load_f32x16(x + 64 * i))
            difference = nearest_e2m1(value * inverse(wide)) * wide - value
            error = fma(difference, difference, error)
            difference = nearest_e2m1(value * inverse(wider)) * wider - value
            wider_error = fma(difference, difference, wider_error)
        scale = select(greater(error, wider_error), wider, wide)
        store_f32x16(scales, scale)
        for i in range(32):
            value = load_f32x16(x + 64 * i)
            index = e2m1_index(absolute(value) * inverse(scale))
            negative = greater(splat_f32(0.0), value * index)
            store_i8x16(quants + 16 * i, round_to_i32(index + select(negative, splat_f32(8.0), splat_f32(0.0))))

    plain = {"q4_0": by_scale, "q5_0": by_scale, "q4_1": by_scale_and_minimum, "q5_1": by_scale_and_minimum, "q8_0": q8_0}
    return {**plain, "q2_k": k_affine, "q4_k": k_affine, "q5_k": k_affine, "q3_k": k_symmetric, "q6_k": k_symmetric, "mxfp4": mxfp4}[layout]


@inline
def step_at(x, threshold, step):
    return select(at_least(x, splat_f32(threshold)), splat_f32(step), splat_f32(0.0))


@inline
def nearest_e2m1(x):
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6."""
    small = step_at(x, 0.25, 0.5) + step_at(x, 0.75, 0.5) + step_at(x, 1.25, 0.5) + step_at(x, 1.75, 0.5)
    return small + step_at(x, 2.5, 1.0) + step_at(x, 3.5, 1.0) + step_at(x, 5.0, 2.0)


@inline
def e2m1_index(x):
    small = step_at(x, 0.25, 1.0) + step_at(x, 0.75, 1.0) + step_at(x, 1.25, 1.0) + step_at(x, 1.75, 1.0)
    return small + step_at(x, 2.5, 1.0) + step_at(x, 3.5, 1.0) + step_at(x, 5.0, 1.0)


# ---- one row's block ------------------------------------------------------------------------------------------------


def _writer(layout: str) -> Any:
    """A function ``(quants, scales, block)``: ``quants`` and ``scales`` point at the row's lane, 16 bytes and 64 bytes apart."""
    five = layout in ("q5_0", "q5_1")
    with_minimum = layout in ("q4_1", "q5_1")

    @inline
    def low_four(quants, at):
        for i in range(16):
            store_u8(at + i, (load_u8(quants + 16 * i) & 15) | (load_u8(quants + 16 * (i + 16)) & 15) << 4)

    @inline
    def plain(quants, scales, block):
        store_f16(block, load_f32(scales))
        at = block + 2
        if with_minimum:
            store_f16(block + 2, load_f32(scales + 64))
            at += 2
        if five:
            high = 0
            for i in range(32):
                high |= (load_u8(quants + 16 * i) >> 4) << i
            store_i32(at, high)
            at += 4
        low_four(quants, at)

    @inline
    def q8_0(quants, scales, block):
        store_f16(block, load_f32(scales))
        for i in range(32):
            store_u8(block + 2 + i, load_u8(quants + 16 * i))

    @inline
    def mxfp4(quants, scales, block):
        store_u8(block, f32_to_bits(load_f32(scales)) >> 23)
        low_four(quants, block + 1)

    @inline
    def two_bits(quants, at):
        """Four columns, 32 apart, in a byte."""
        for half in range(2):
            for i in range(32):
                q = quants + 16 * (128 * half + i)
                byte = 0
                for k in range(4):
                    byte |= (load_u8(q + 512 * k) & 3) << (2 * k)
                store_u8(at + 32 * half + i, byte)

    @inline
    def high_bits(quants, at, bit):
        """Bit ``bit`` of eight columns, 32 apart, in a byte."""
        for i in range(32):
            byte = 0
            for k in range(8):
                byte |= (load_u8(quants + 16 * i + 512 * k) >> bit & 1) << k
            store_u8(at + i, byte)

    @inline
    def integer(scales, index):
        return int(load_f32(scales + 128 + 64 * index))

    @inline
    def q2_k(quants, scales, block):
        for group in range(16):
            store_u8(block + group, integer(scales, 2 * group) | integer(scales, 2 * group + 1) << 4)
        two_bits(quants, block + 16)
        store_f16(block + 80, load_f32(scales))
        store_f16(block + 82, load_f32(scales + 64))

    @inline
    def q3_k(quants, scales, block):
        high_bits(quants, block, 2)
        two_bits(quants, block + 32)
        for i in range(8):
            store_u8(block + 96 + i, (integer(scales, i) + 32 & 15) | (integer(scales, i + 8) + 32 & 15) << 4)
        for i in range(4):
            byte = 0
            for k in range(4):
                byte |= (integer(scales, i + 4 * k) + 32 >> 4) << (2 * k)
            store_u8(block + 104 + i, byte)
        store_f16(block + 108, load_f32(scales))

    @inline
    def scales_and_minimums(scales, block):
        """Q4_K and Q5_K: eight pairs of 6 bits in 12 bytes."""
        store_f16(block, load_f32(scales))
        store_f16(block + 2, load_f32(scales + 64))
        for i in range(4):
            scale, minimum_ = integer(scales, 2 * i), integer(scales, 2 * i + 1)
            later, later_minimum = integer(scales, 2 * i + 8), integer(scales, 2 * i + 9)
            store_u8(block + 4 + i, scale | later >> 4 << 6)
            store_u8(block + 8 + i, minimum_ | later_minimum >> 4 << 6)
            store_u8(block + 12 + i, (later & 15) | (later_minimum & 15) << 4)

    @inline
    def four_bits(quants, at):
        """Two columns, 32 apart, in a byte."""
        for pair in range(4):
            for i in range(32):
                q = quants + 16 * (64 * pair + i)
                store_u8(at + 32 * pair + i, (load_u8(q) & 15) | (load_u8(q + 512) & 15) << 4)

    @inline
    def q4_k(quants, scales, block):
        scales_and_minimums(scales, block)
        four_bits(quants, block + 16)

    @inline
    def q5_k(quants, scales, block):
        scales_and_minimums(scales, block)
        high_bits(quants, block + 16, 4)
        four_bits(quants, block + 48)

    @inline
    def q6_k(quants, scales, block):
        for half in range(2):
            for i in range(32):
                q = quants + 16 * (128 * half + i)
                first, second, third, fourth = load_u8(q), load_u8(q + 512), load_u8(q + 1024), load_u8(q + 1536)
                store_u8(block + 64 * half + i, (first & 15) | (third & 15) << 4)
                store_u8(block + 64 * half + 32 + i, (second & 15) | (fourth & 15) << 4)
                store_u8(block + 128 + 32 * half + i, first >> 4 | second >> 4 << 2 | third >> 4 << 4 | fourth >> 4 << 6)
        for group in range(16):
            store_u8(block + 192 + group, integer(scales, group))
        store_f16(block + 208, load_f32(scales))

    return {name: writer for name, writer in locals().items() if name.startswith(("q", "mx"))}.get(layout, plain)


# ---- kernels --------------------------------------------------------------------------------------------------------


def quantize(*, layout: str, source: str, block_columns: int, block_bytes: int) -> Any:
    """Rows of ``source`` floats (f32, f16 or bf16) to blocks. Units are 16 rows.

    Slots: 0 floats, 1 blocks, 2 rows, 3 columns, 4 scratch, 5 bytes of scratch for a thread (`weight_layout.SCRATCH_BYTES`), 6 address of
    two int64: 1 + a row with what is not finite, and one with what is too large for the scales, if there is any. ``block_columns`` and
    ``block_bytes`` are those of a block.
    """
    if layout == "f8e4m3":
        return _quantize_fp8(source)
    item, load = _loader(source)
    encode, write = _encoder(layout), _writer(layout)
    largest = LARGEST_FINITE if layout == "mxfp4" else LARGEST_HALF

    def kernel(slots, begin, end, thread):
        floats, blocks = load_i64(slots), load_i64(slots + 8)
        rows, columns = load_i64(slots + 16), load_i64(slots + 24)
        x = load_i64(slots + 32) + thread * load_i64(slots + 40)
        quants = x + X_BYTES
        scales = quants + Q_BYTES
        flags = load_i64(slots + 48)
        records = columns // block_columns
        for unit in range(begin, end):
            here = min(16, rows - 16 * unit)
            for record in range(records):
                for lane in range(16):
                    at = floats + ((16 * unit + lane) * columns + record * block_columns) * item
                    for i in range(block_columns):
                        store_f32(x + 64 * i + 4 * lane, load(at + i * item) if lane < here else 0.0)
                peak = splat_f32(0.0)
                for i in range(block_columns):
                    peak = larger_magnitudes(peak, load_f32x16(x + 64 * i))
                if not peak_lanes(peak) <= largest:
                    store_i64(flags + (TOO_LARGE if peak_lanes(peak) <= LARGEST_FINITE else NOT_FINITE), 16 * unit + 1)
                    break
                encode(x, quants, scales)
                for lane in range(here):
                    write(quants + lane, scales + 4 * lane, blocks + ((16 * unit + lane) * records + record) * block_bytes)

    return kernel


def _quantize_fp8(source: str) -> Any:
    """Each row to a float32 scale and E4M3 floats (arXiv:2209.05433); the largest of the row becomes 448."""
    item = 4 if source == "f32" else 2
    load = {"f32": load_f32x16, "f16": load_f16x16, "bf16": load_bf16x16}[source]

    @inline
    def load16(at):
        return load(at)

    def kernel(slots, begin, end, thread):
        floats, blocks = load_i64(slots), load_i64(slots + 8)
        rows, columns = load_i64(slots + 16), load_i64(slots + 24)
        flags = load_i64(slots + 48)
        for row in range(16 * begin, min(16 * end, rows)):
            at = floats + row * columns * item
            block = blocks + row * (4 + columns)
            peaks = splat_f32(0.0)
            for column in range(0, columns, 16):
                peaks = larger_magnitudes(peaks, load16(at + column * item))
            peak = peak_lanes(peaks)
            if not peak <= LARGEST_FINITE:
                store_i64(flags + NOT_FINITE, row + 1)
                continue
            scale = peak / FP8_LARGEST if peak > TINY else 0.0
            factor = splat_f32(1.0 / scale if scale > 0.0 else 0.0)
            store_f32(block, scale)
            for column in range(0, columns, 16):
                value = load16(at + column * item) * factor
                size = minimum(absolute(value), splat_f32(FP8_LARGEST))
                # the power of two below, at least that of subnormals; eighths of it are the steps
                power = maximum(as_f32(as_i32(size) & splat_i32(0x7F800000)), splat_f32(2.0**-6))
                exponent = to_f32(as_i32(power)) * splat_f32(2.0**-23) - splat_f32(121.0)
                steps = rounded(size * (splat_f32(8.0) / power), 0.0, 16.0)
                sign = select(greater(splat_f32(0.0), value), splat_f32(128.0), splat_f32(0.0))
                store_i8x16(block + 4 + column, round_to_i32(exponent * splat_f32(8.0) + steps + sign))

    return kernel
