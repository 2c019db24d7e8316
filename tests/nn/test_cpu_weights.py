"""Packing: which tensors share a program changes no tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymistral.kernels.cpu.compiler import entry_point, load_kernels

from pymistral.nn import cpu_weights, quantize
from pymistral.nn.cpu_weights import TiledWeights
from pymistral.nn.memory import address, zeros
from pymistral.nn.pool import EXECUTOR_KERNELS, thread_pool
from pymistral.nn.quantize import repacker, tile_format
from pymistral.quantization.types import BLOCK_SIZES, GgmlType, Tensor, tensor_nbytes

COLUMNS = 256
ROWS = (16, 1, 100, 31, 48, 400)


def random_tensor(seed: int, rows: int, *, shuffled: bool = False) -> Tensor:
    random = np.random.default_rng(seed)
    type = (GgmlType.Q4_1, GgmlType.Q8_0, GgmlType.Q4_K)[seed % 3]
    data = random.integers(0, 256, tensor_nbytes(type, (rows, COLUMNS)), np.uint8)
    return Tensor(f"t{seed}", type, (rows, COLUMNS), data, order=random.permutation(rows) if shuffled else None)


def alone(tensor: Tensor) -> NDArray[Any]:
    """A tensor's tiles, made by one call of the kernel."""
    format, size = tile_format(tensor), BLOCK_SIZES[tensor.type][1]
    tiles: NDArray[Any] = zeros(format.nbytes(*tensor.shape), np.uint8)
    blocks = tensor.in_order().data
    slots = np.array([address(blocks), address(tiles), *tensor.shape, format.tile_bytes(COLUMNS)], np.int64)
    kernel = repacker(tensor.layout, size)
    entry_point(load_kernels([kernel])[kernel], 4)(address(slots), 0, -(-tensor.shape[0] // 16), 0)
    return tiles


@pytest.mark.parametrize("part_bytes", [1, 8 << 10, 40 << 10, 4 << 20])
def test_tiles_are_those_of_each_tensor_alone(monkeypatch, part_bytes):
    for module in (cpu_weights, quantize):
        monkeypatch.setattr(module, "PART_BYTES", part_bytes)
    tensors = [random_tensor(seed, rows, shuffled=seed % 2 == 1) for seed, rows in enumerate(ROWS)]
    weights = TiledWeights(tensors)
    matrices = [weights[tensor] for tensor in tensors]
    weights.pack(load_kernels([*EXECUTOR_KERNELS, *weights.packers()]), thread_pool(2))
    for matrix in matrices:
        np.testing.assert_array_equal(matrix.tiles, alone(matrix.tensor), err_msg=matrix.tensor.name)
