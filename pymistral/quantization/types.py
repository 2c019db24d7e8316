"""GGML's tensor types: ids, block sizes, and the raw tensor that a file holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from math import prod

import numpy as np
from numpy.typing import NDArray


class GgmlType(IntEnum):
    """A tensor's storage type, by its number in GGUF files (ggml.h, ``enum ggml_type``)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


class SafetensorsType(IntEnum):
    """Storage types that safetensors have and GGUF has not."""

    F8E4M3 = -1


StorageType = GgmlType | SafetensorsType

# type -> (elements in a block, bytes in a block)
BLOCK_SIZES: dict[StorageType, tuple[int, int]] = {
    SafetensorsType.F8E4M3: (1, 1),
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q8_1: (32, 36),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
    GgmlType.Q8_K: (256, 292),
    GgmlType.IQ2_XXS: (256, 66),
    GgmlType.IQ2_XS: (256, 74),
    GgmlType.IQ3_XXS: (256, 98),
    GgmlType.IQ1_S: (256, 50),
    GgmlType.IQ4_NL: (32, 18),
    GgmlType.IQ3_S: (256, 110),
    GgmlType.IQ2_S: (256, 82),
    GgmlType.IQ4_XS: (256, 136),
    GgmlType.I8: (1, 1),
    GgmlType.I16: (1, 2),
    GgmlType.I32: (1, 4),
    GgmlType.I64: (1, 8),
    GgmlType.F64: (1, 8),
    GgmlType.IQ1_M: (256, 56),
    GgmlType.BF16: (1, 2),
    GgmlType.TQ1_0: (256, 54),
    GgmlType.TQ2_0: (256, 66),
    GgmlType.MXFP4: (32, 17),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor as a file stores it.

    Attributes
    ----------
    name
        For error messages.
    type
        Storage type.
    shape
        NumPy order: ``(out_features, in_features)`` for a matrix. Blocks run along the last axis.
    data
        The stored bytes, uint8 ``[nbytes]``, contiguous; usually a view into the mapped file.
    isq
        The tile format that it is quantised to when it is packed; None: that of its type.
    scales
        Of an FP8 matrix, float32 ``[rows, n]``: what each n-th of a row is multiplied by.
    order
        Where the file has the rows in another order: the stored row that each row is. Whoever reads ``data`` asks for `rows` or `in_order`.
    """

    name: str
    type: StorageType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    isq: str | None = None
    scales: NDArray[np.float32] | None = None
    order: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.order is not None and (self.order.shape != self.shape[:1] or not ((self.order >= 0) & (self.order < self.shape[0])).all()):
            raise ValueError(f"tensor {self.name!r}: its order {self.order.shape} is none of {self.shape[0]} rows")
        expected = tensor_nbytes(self.type, self.shape)
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.size != expected or not self.data.flags.c_contiguous:
            raise ValueError(f"tensor {self.name!r}: {self.type.name} {self.shape} needs {expected} contiguous bytes, got {self.data.size}")
        if (self.type == SafetensorsType.F8E4M3) != (self.scales is not None):
            raise ValueError(f"tensor {self.name!r}: FP8 has scales, and only FP8")
        if self.scales is not None and (self.scales.shape[:-1] != self.shape[:-1] or self.shape[-1] % self.scales.shape[-1]):
            raise ValueError(f"tensor {self.name!r}: scales {self.scales.shape} do not fit {self.shape}")

    @property
    def layout(self) -> str:
        """The tile format that it is packed in."""
        return self.isq or self.type.name.lower()

    @property
    def kind(self) -> str:
        """The type, what it becomes, and how many scales a row has: tensors of one kind and shape are packed alike."""
        words = [self.type.name]
        if self.scales is not None:
            words.append(f"with {self.scales.shape[-1]} scales a row")
        if self.isq is not None:
            words.append(f"to {self.isq.upper()}")
        return " ".join(words)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop - 1`` as a tensor of their own, on the same bytes where these are in order."""
        if not 0 <= start < stop <= self.shape[0]:
            raise ValueError(f"tensor {self.name!r}: rows {start} to {stop} of {self.shape[0]}")
        stored = self.data.reshape(self.shape[0], -1)
        data = stored[start:stop] if self.order is None else stored[self.order[start:stop]]
        scales = None if self.scales is None else self.scales[start:stop]
        name, shape = f"{self.name}[{start}:{stop}]", (stop - start, *self.shape[1:])
        return replace(self, name=name, shape=shape, data=data.reshape(-1), scales=scales, order=None)

    def in_order(self) -> Tensor:
        """The tensor with its rows as they should be: itself, or a copy."""
        return self if self.order is None else replace(self.rows(0, self.shape[0]), name=self.name)

    def __getitem__(self, index: int) -> Tensor:
        """Matrix ``index`` of a stack of them, on the same bytes."""
        one = self.rows(index, index + 1)
        return replace(one, name=f"{self.name}[{index}]", shape=self.shape[1:])


def tensor_nbytes(type: StorageType, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes. Raises ValueError if a row is not a whole number of blocks."""
    block, size = BLOCK_SIZES[type]
    if not shape or min(shape) < 0 or shape[-1] % block:
        raise ValueError(f"{type.name} stores blocks of {block} elements, which shape {shape} does not divide into")
    return prod(shape) // block * size


def block_size(layout: str) -> tuple[int, int] | None:
    """Columns and bytes of a block of a tile format; None for FP8, whose rows are 4 bytes of scale and a byte for each column."""
    return None if layout == "f8e4m3" else BLOCK_SIZES[GgmlType[layout.upper()]]


def quantized_bytes(layout: str, shape: tuple[int, ...]) -> int:
    """What a matrix takes in blocks."""
    rows, columns = shape
    size = block_size(layout)
    return rows * (4 + columns if size is None else columns // size[0] * size[1])
