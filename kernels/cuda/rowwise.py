"""What is done to each row by itself: norms, elementwise operations, picking rows."""

from __future__ import annotations

from .launch import Kernel, Launch
from .linear import MATVEC_TOKENS
from .operands import ACTIVATIONS, OUT, Rows, ceil_div, defines


def norm(
    x: Rows,
    columns: int,
    epsilon: float,
    *,
    weight: int = 0,
    out: Rows | None = None,
    branch: Rows | None = None,
    branch_weight: int = 0,
    indices: int = 0,
    count: int,
    max_rows: int,
) -> Launch:
    """``x += branch``, or ``x += rms_norm(branch) * branch_weight``; then ``out = rms_norm(x) * weight``; of the rows
    ``indices`` only, if given.
    """
    if bool(weight) != (out is not None):
        raise ValueError("a norm has both a weight and an output, or neither")
    out, branch = out or Rows(32), branch or Rows(32)
    most = 2 if max_rows <= MATVEC_TOKENS else 4  # pieces of four columns to a thread; few rows: the time of one counts
    threads = 32 * min(32, ceil_div(columns, 128 * most))
    macros = defines(PIECES=ceil_div(columns, 4 * threads), THREADS=threads, WHOLE=columns % 4 == 0)
    kernel = Kernel("norm_rows", "norm.cu", f"pipipppif{OUT}p", macros)
    arguments = (x.f32, x.stride, branch.f32, branch.stride, branch_weight, weight, indices, columns, epsilon, *out.out, count)
    return Launch(kernel, (max_rows, 1, 1), threads, 0, arguments)


def _element(name: str, kinds: str, x: Rows, columns: int, parameters: tuple[int | float, ...], out: Rows, count: int, rows: int) -> Launch:
    kernel = Kernel(name, "rows.cu", f"pii{kinds}{OUT}p")
    return Launch(kernel, (ceil_div(columns, 512), rows, 1), 128, 0, (x.f32, x.stride, columns, *parameters, *out.out, count))


def add(x: Rows, y: Rows, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x + y``."""
    return _element("add", "pi", x, columns, (y.f32, y.stride), out, count, max_rows)


def multiply(x: Rows, y: Rows, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x * y``."""
    return _element("multiply", "pi", x, columns, (y.f32, y.stride), out, count, max_rows)


def add_vector(x: Rows, vector: int, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x + vector``, for every row."""
    return _element("add_vector", "p", x, columns, (vector,), out, count, max_rows)


def activate(x: Rows, activation: str, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = activation(x)``."""
    return _element("activate", "i", x, columns, (ACTIVATIONS[activation],), out, count, max_rows)


def gate(x: Rows, y: Rows, activation: str, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = activation(x) * y``."""
    return _element("gate", "pii", x, columns, (y.f32, y.stride, ACTIVATIONS[activation]), out, count, max_rows)


def sigmoid_gate(x: Rows, y: Rows, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x * sigmoid(y)`` for y of one column."""
    return _element("sigmoid_gate", "pi", x, columns, (y.f32, y.stride), out, count, max_rows)


def soft_cap(x: Rows, cap: float, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = cap * tanh(x / cap)``."""
    return _element("soft_cap", "f", x, columns, (cap,), out, count, max_rows)


def scale(x: Rows, factor: float, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out = x * factor``; by 1 it copies, and makes other forms of x."""
    return _element("scale", "f", x, columns, (factor,), out, count, max_rows)


def take_rows(x: Rows, indices: int, columns: int, out: Rows, *, count: int, max_rows: int) -> Launch:
    """``out[i] = x[indices[i]]``."""
    kernel = Kernel("take_rows", "rows.cu", f"pipi{OUT}p")
    return Launch(kernel, (ceil_div(columns, 512), max_rows, 1), 128, 0, (x.f32, x.stride, indices, columns, *out.out, count))
