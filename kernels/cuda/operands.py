"""What all operations work on, matrices of weights and rows of activations, and how it becomes the arguments of a kernel.

An operation is a function that returns a `Launch`: which kernel, on what grid, with which arguments. Grids are made for the most rows that
a program may see; how many there are is read from ``count``, the address of an int32, when the kernel runs. So launches can be captured
once as a CUDA graph. All addresses are of device memory; arrays of tokens and of indices are int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .planes import Layout

ACTIVATIONS = {"silu": 1, "gelu": 2, "relu": 3}  # common.cuh
OUT = "ppppi"  # ROWS_ARGUMENTS in common.cuh: the letters of `Rows.out`


@dataclass(frozen=True)
class Weights:
    """A matrix in planes (`planes.Layout.pack`) at a device address that is a multiple of 256."""

    layout: Layout
    address: int
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        return -(-self.columns // 32)


class Rows(NamedTuple):
    """An array of activations in the forms that are kept; 0: not in that form. A producer writes all, a consumer takes
    the one that it needs.

    Rows lie ``stride`` columns apart, a multiple of 32, in every form: float32, int8 with float32 pairs (scale, scale times sum of
    quants) of 32 columns each, bfloat16. Producers fill rows up to a multiple of 32 with zeros.
    """

    stride: int
    f32: int = 0
    q8: int = 0
    scales: int = 0
    bf16: int = 0

    @property
    def out(self) -> tuple[int, int, int, int, int]:
        return self.f32, self.q8, self.scales, self.bf16, self.stride

    @property
    def vector(self) -> tuple[int, int, int, int]:
        return self.f32, self.q8, self.scales, self.stride


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def defines(**values: int) -> tuple[tuple[str, str], ...]:
    """Macros of a kernel."""
    return tuple((name, str(int(value))) for name, value in values.items())
