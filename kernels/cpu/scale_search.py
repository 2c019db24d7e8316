"""Scales for groups of float weights, for the types of `quantize_weights`: as ggml looks for them (ggml-quants.c).

Some twenty scales around the one that just covers a group's range are tried, the best offset goes with each by least squares, and what
leaves the smallest weighted error stays. A group's weights are ``f32[count][16]``: lane ``r`` is row ``r``.
"""

from __future__ import annotations

from typing import Any

from .helpers import inline
from .simd import (
    absolute,
    fma,
    greater,
    load_f32x16,
    maximum,
    minimum,
    round_to_i32,
    select,
    splat_f32,
    sqrt,
    to_f32,
)
from .small_floats import load_f16x16, store_f16x16

TINY = 1e-30  # a range that would make its inverse overflow


@inline
def inverse(x):
    """1 / x, and 0 for 0."""
    return select(greater(absolute(x), splat_f32(0.0)), splat_f32(1.0) / x, splat_f32(0.0))


@inline
def as_half(x, scratch):
    """The value that is left when it is stored as a half."""
    store_f16x16(scratch, x)
    return load_f16x16(scratch)


@inline
def rounded(x, low, high):
    return to_f32(round_to_i32(minimum(maximum(x, splat_f32(low)), splat_f32(high))))


@inline
def of_largest_magnitude(x, count):
    """Of each lane's ``count`` values the one furthest from 0, with its sign."""
    largest = load_f32x16(x)
    for i in range(1, count):
        value = load_f32x16(x + 64 * i)
        largest = select(greater(absolute(value), absolute(largest)), value, largest)
    return largest


def symmetric_search(half: int) -> Any:
    """A function ``(x, count) -> scale``: x is about scale times -half ... half - 1. Large weights count more, by their size."""
    low, high = float(-half), float(half - 1)

    @inline
    def symmetric(x, count):
        peak = of_largest_magnitude(x, count)
        one = select(greater(absolute(peak), splat_f32(TINY)), splat_f32(-1.0) / peak, splat_f32(0.0))
        scale = splat_f32(0.0)
        best = splat_f32(0.0)
        for step in range(-9, 10):
            factor = one * splat_f32(half + 0.1 * step)
            products = splat_f32(0.0)
            squares = splat_f32(0.0)
            for i in range(count):
                value = load_f32x16(x + 64 * i)
                quant = rounded(value * factor, low, high)
                weighted = absolute(value) * quant
                products = fma(weighted, value, products)
                squares = fma(weighted, quant, squares)
            fit = products * inverse(squares)
            gain = fit * products
            better = greater(gain, best)
            best = select(better, gain, best)
            scale = select(better, fit, scale)
        return scale

    return symmetric


def affine_search(levels: int, first: float, steps: int, below_zero: bool) -> Any:
    """A function ``(x, count) -> (scale, minimum)``: x is about scale times 0 ... levels plus the minimum.

    ``steps`` scales are tried, for ranges of ``levels + first`` on in tenths; ``below_zero`` keeps the minimum at 0 or less.
    """
    high = float(levels)

    @inline
    def affine(x, count):
        least = load_f32x16(x)
        most = least
        square_sum = least * least
        for i in range(1, count):
            value = load_f32x16(x + 64 * i)
            least = minimum(least, value)
            most = maximum(most, value)
            square_sum = fma(value, value, square_sum)
        rms = sqrt(square_sum * splat_f32(1.0 / count))
        if below_zero:
            least = minimum(least, splat_f32(0.0))
        weight_sum = splat_f32(0.0)
        value_sum = splat_f32(0.0)
        error = splat_f32(0.0)
        extent = most - least
        one = splat_f32(1.0) / maximum(extent, splat_f32(TINY))
        scale = extent * splat_f32(1.0 / levels)
        for i in range(count):
            value = load_f32x16(x + 64 * i)
            weight = rms + absolute(value)
            weight_sum = weight_sum + weight
            value_sum = fma(weight, value, value_sum)
            quant = rounded((value - least) * one * splat_f32(high), 0.0, high)
            difference = fma(scale, quant, least - value)
            error = fma(weight * difference, difference, error)
        offset = least
        for step in range(steps):
            factor = one * splat_f32(high + first + 0.1 * step)
            quant_sum = splat_f32(0.0)
            squares = splat_f32(0.0)
            products = splat_f32(0.0)
            for i in range(count):
                value = load_f32x16(x + 64 * i)
                quant = rounded((value - offset) * factor, 0.0, high)
                weighted = (rms + absolute(value)) * quant
                quant_sum = quant_sum + weighted
                squares = fma(weighted, quant, squares)
                products = fma(weighted, value, products)
            determinant = weight_sum * squares - quant_sum * quant_sum
            divisor = inverse(determinant)
            fit = (weight_sum * products - value_sum * quant_sum) * divisor
            fit_offset = (squares * value_sum - quant_sum * products) * divisor
            if below_zero:
                positive = greater(fit_offset, splat_f32(0.0))
                fit = select(positive, products * inverse(squares), fit)
                fit_offset = select(positive, splat_f32(0.0), fit_offset)
            fit_error = splat_f32(0.0)
            for i in range(count):
                value = load_f32x16(x + 64 * i)
                quant = rounded((value - offset) * factor, 0.0, high)
                difference = fma(fit, quant, fit_offset - value)
                fit_error = fma((rms + absolute(value)) * difference, difference, fit_error)
            fit_error = select(greater(determinant, splat_f32(0.0)), fit_error, error)
            better = greater(error, fit_error)
            error = select(better, fit_error, error)
            scale = select(better, fit, scale)
            offset = select(better, fit_offset, offset)
        return scale, offset

    return affine
