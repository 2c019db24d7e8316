"""Matrices of floats in other floats, and what FP8 stands for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .types import GgmlType, Tensor

FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)


def _fp8_values() -> NDArray[np.float32]:
    """E4M3 (the variant without infinities, arXiv:2209.05433) by its byte."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[(byte & 127) == 127] = np.nan
    return np.where(byte < 128, magnitude, -magnitude).astype(np.float32)


FP8_VALUES = _fp8_values()


def float_values(tensor: Tensor) -> NDArray[np.float32]:
    """The values of a tensor of one of `FLOATS` or of FP8, in its shape."""
    tensor = tensor.in_order()
    if tensor.scales is not None:
        shares = FP8_VALUES[tensor.data].reshape(*tensor.scales.shape, -1)
        return (shares * tensor.scales[..., None]).reshape(tensor.shape)
    if tensor.type == GgmlType.BF16:
        values: NDArray[np.float32] = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = tensor.data.view(np.float16 if tensor.type == GgmlType.F16 else np.float32).astype(np.float32)
    return values.reshape(tensor.shape)


def as_floats(tensor: Tensor, type: GgmlType) -> Tensor:
    """A tensor of one of `FLOATS` or of FP8 in one of `FLOATS`, rounded to the nearest, ties to even."""
    if tensor.type == type:
        return tensor
    values = float_values(tensor).reshape(-1)
    if type == GgmlType.BF16:
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        rounded[np.isnan(values)] = 0x7FC0
        data = rounded.view(np.uint8)
    else:
        with np.errstate(over="ignore"):  # beyond F16's largest: infinity, as the format has it
            data = values.astype(np.float16 if type == GgmlType.F16 else np.float32).view(np.uint8)
    return Tensor(tensor.name, type, tensor.shape, data)


def matrices_as(weights: Mapping[str, Tensor], type: GgmlType) -> dict[str, Tensor]:
    """The weights, with the matrices of floats among them in another type. Vectors, and what is quantised, stay as they are."""
    return {
        name: as_floats(tensor, type) if tensor.type in FLOATS and len(tensor.shape) > 1 else tensor for name, tensor in weights.items()
    }
