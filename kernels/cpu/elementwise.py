"""What is left between the matrix products where nothing fuses it: sums, products, activations, caps, copies of rows."""

from __future__ import annotations

from typing import Any

from .amx import widen_row
from .matmul import activation_function
from .simd import bits_to_f32, exp, load_f32, load_f32x16, load_i32, load_i64, splat_f32, store_f32x16


def add() -> Any:
    """``out = x + y``. Units are rows. Slots of all in this file: 0 x, 1 y, 2 out, 3 columns (a multiple of 16), 4 bytes of a row,
    5 a parameter.
    """

    def kernel(slots, begin, end, thread):
        x, y, out = load_i64(slots), load_i64(slots + 8), load_i64(slots + 16)
        columns, row_bytes = load_i64(slots + 24), load_i64(slots + 32)
        for row in range(begin, end):
            for at in range(row * row_bytes, row * row_bytes + 4 * columns, 64):
                store_f32x16(out + at, load_f32x16(x + at) + load_f32x16(y + at))

    return kernel


def multiply() -> Any:
    """``out = x * y``."""

    def kernel(slots, begin, end, thread):
        x, y, out = load_i64(slots), load_i64(slots + 8), load_i64(slots + 16)
        columns, row_bytes = load_i64(slots + 24), load_i64(slots + 32)
        for row in range(begin, end):
            for at in range(row * row_bytes, row * row_bytes + 4 * columns, 64):
                store_f32x16(out + at, load_f32x16(x + at) * load_f32x16(y + at))

    return kernel


def activate(*, activation: str) -> Any:
    """``out = activation(x)``."""
    function = activation_function(activation)

    def kernel(slots, begin, end, thread):
        x, out = load_i64(slots), load_i64(slots + 16)
        columns, row_bytes = load_i64(slots + 24), load_i64(slots + 32)
        for row in range(begin, end):
            for at in range(row * row_bytes, row * row_bytes + 4 * columns, 64):
                store_f32x16(out + at, function(load_f32x16(x + at)))

    return kernel


def gate(*, activation: str, panels: str = "no") -> Any:
    """``out = activation(x) * y``, as rows, or as the wide panels of `amx` (``panels="wide"``; then x is spoiled)."""
    function = activation_function(activation)
    wide = panels == "wide"

    def kernel(slots, begin, end, thread):
        x, y, out = load_i64(slots), load_i64(slots + 8), load_i64(slots + 16)
        columns, row_bytes = load_i64(slots + 24), load_i64(slots + 32)
        for row in range(begin, end):
            first = row * row_bytes
            target = x if wide else out
            for at in range(first, first + 4 * columns, 64):
                store_f32x16(target + at, function(load_f32x16(x + at)) * load_f32x16(y + at))
            if wide:
                widen_row(x + first, out, row, columns)

    return kernel


def add_vector() -> Any:
    """``out = x + y``, where y is one row for all."""

    def kernel(slots, begin, end, thread):
        x, y, out = load_i64(slots), load_i64(slots + 8), load_i64(slots + 16)
        columns, row_bytes = load_i64(slots + 24), load_i64(slots + 32)
        for row in range(begin, end):
            for at in range(0, 4 * columns, 64):
                store_f32x16(out + row * row_bytes + at, load_f32x16(x + row * row_bytes + at) + load_f32x16(y + at))

    return kernel


def sigmoid_gate() -> Any:
    """``out = x * sigmoid(y)``, where y has one column; the parameter is the bytes of its rows."""

    def kernel(slots, begin, end, thread):
        x, y, out = load_i64(slots), load_i64(slots + 8), load_i64(slots + 16)
        columns, row_bytes = load_i64(slots + 24), load_i64(slots + 32)
        for row in range(begin, end):
            gate = splat_f32(load_f32(y + row * load_i64(slots + 40)))
            factor = splat_f32(1.0) / (splat_f32(1.0) + exp(splat_f32(0.0) - gate))
            for at in range(row * row_bytes, row * row_bytes + 4 * columns, 64):
                store_f32x16(out + at, load_f32x16(x + at) * factor)

    return kernel


def soft_cap() -> Any:
    """``out = cap * tanh(x / cap)``; the parameter is the cap (f32 bits)."""

    def kernel(slots, begin, end, thread):
        x, out = load_i64(slots), load_i64(slots + 16)
        columns, row_bytes = load_i64(slots + 24), load_i64(slots + 32)
        cap = splat_f32(bits_to_f32(load_i64(slots + 40)))
        one, two = splat_f32(1.0), splat_f32(2.0)
        for row in range(begin, end):
            for at in range(row * row_bytes, row * row_bytes + 4 * columns, 64):
                e = exp(two * load_f32x16(x + at) / cap)
                store_f32x16(out + at, cap * (one - two / (e + one)))

    return kernel


def scale() -> Any:
    """``out = x * parameter`` (f32 bits)."""

    def kernel(slots, begin, end, thread):
        x, out = load_i64(slots), load_i64(slots + 16)
        columns, row_bytes = load_i64(slots + 24), load_i64(slots + 32)
        factor = splat_f32(bits_to_f32(load_i64(slots + 40)))
        for row in range(begin, end):
            for at in range(row * row_bytes, row * row_bytes + 4 * columns, 64):
                store_f32x16(out + at, load_f32x16(x + at) * factor)

    return kernel


def take_rows() -> Any:
    """``out[i] = x[y[i]]``; y is int32. Units are rows of out."""

    def kernel(slots, begin, end, thread):
        x, y, out = load_i64(slots), load_i64(slots + 8), load_i64(slots + 16)
        columns, row_bytes = load_i64(slots + 24), load_i64(slots + 32)
        for row in range(begin, end):
            source = x + load_i32(y + 4 * row) * row_bytes
            for at in range(0, 4 * columns, 64):
                store_f32x16(out + row * row_bytes + at, load_f32x16(source + at))

    return kernel
