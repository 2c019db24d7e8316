"""RMSNorm (arXiv:1910.07467), alone or with the residual addition before it and the quantisation after it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .amx import widen_row
from .helpers import inline
from .quantize import quantize_row
from .simd import (
    bits_to_f32,
    fma,
    load_f32x16,
    load_i32,
    load_i64,
    splat_f32,
    sqrt,
    store_f32x16,
    sum_lanes,
)


@inline
def inverse_rms(x, columns, epsilon):
    """1 / sqrt(mean(x**2) + epsilon), in every lane."""
    squares = splat_f32(0.0)
    for column in range(0, columns, 16):
        v = load_f32x16(x + 4 * column)
        squares = fma(v, v, squares)
    mean = sum_lanes(squares) / columns + epsilon
    return splat_f32(1.0) / sqrt(splat_f32(mean))


@inline
def normalize(x, weight, out, columns, epsilon):
    """``out = x * inverse_rms(x) * weight``; ``out`` may be ``x``."""
    factor = inverse_rms(x, columns, epsilon)
    for column in range(0, columns, 16):
        store_f32x16(out + 4 * column, load_f32x16(x + 4 * column) * factor * load_f32x16(weight + 4 * column))


def norm(*, panels: str = "int8") -> Any:
    """The end of one block and the start of the next; units are rows. What an address of 0 stands for is left out.

    ``x += branch``, or ``x += rms_norm(branch, branch_weight)``; then ``rms_norm(x, weight)`` goes to float rows, or to panels, of int8 or
    the wide ones of `amx` (``panels="wide"``), or to both.

    Slots: 0 x, 1 bytes of a row, 2 branch, 3 branch weight, 4 weight, 5 out (float rows as x's), 6 panels, 7 columns, 8 epsilon (f32 bits),
    9 rows (int32 indices into x, for outputs; or 0: all rows), 10 scratch, 11 bytes of scratch for a thread, 12 the largest quant.
    """
    wide = panels == "wide"

    def kernel(slots, begin, end, thread):
        row_bytes = load_i64(slots + 8)
        branch = load_i64(slots + 16)
        branch_weight = load_i64(slots + 24)
        weight = load_i64(slots + 32)
        out = load_i64(slots + 40)
        target = load_i64(slots + 48)
        columns = load_i64(slots + 56)
        epsilon = bits_to_f32(load_i64(slots + 64))
        rows = load_i64(slots + 72)
        scratch = load_i64(slots + 80) + thread * load_i64(slots + 88)
        largest = np.float32(load_i64(slots + 96))
        for unit in range(begin, end):
            row = load_i32(rows + 4 * unit) if rows else unit
            x = load_i64(slots) + row * row_bytes
            if branch:
                y = branch + row * row_bytes
                if branch_weight:
                    normalize(y, branch_weight, y, columns, epsilon)
                for column in range(0, columns, 16):
                    store_f32x16(x + 4 * column, load_f32x16(x + 4 * column) + load_f32x16(y + 4 * column))
            if out:
                normalize(x, weight, out + unit * row_bytes, columns, epsilon)
            if target:
                normalize(x, weight, scratch, columns, epsilon)
                if wide:
                    widen_row(scratch, target, unit, columns)
                else:
                    quantize_row(scratch, target, unit, columns, largest)

    return kernel
