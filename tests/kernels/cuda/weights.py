"""Random weights of every storage type in planes, made by the CPU's packing kernels as a program's are."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy_reference as ref
from numpy.typing import NDArray
from pymistral.kernels.cpu.compiler import entry_point, load_kernels, spec
from pymistral.kernels.cuda.planes import LAYOUTS, Layout

from pymistral.nn.memory import address, zeros
from pymistral.quantization.types import BLOCK_SIZES, Tensor


@cache
def _packer(name: str, block_bytes: int) -> int:
    kernel = spec("repack.repack", layout=name, block_bytes=block_bytes)
    return load_kernels([kernel])[kernel]


def tiles_of(tensor: Tensor) -> NDArray[np.uint8]:
    name = tensor.type.name.lower()
    rows, columns = tensor.shape
    format = LAYOUTS[name].format
    tiles = zeros(format.nbytes(rows, columns), np.uint8)
    slots = np.array([address(tensor.data), address(tiles), rows, columns, format.tile_bytes(columns), 0, 0], np.int64)
    entry_point(_packer(name, BLOCK_SIZES[tensor.type][1]), 4)(address(slots), 0, -(-rows // 16), 0)
    return tiles


def random_weights(
    kind: str, rows: int, columns: int, rng: np.random.Generator, *, edges: bool = False
) -> tuple[Layout, NDArray[np.uint8], ref.Floats]:
    """Layout, planes, and values."""
    tensor, _ = ref.random_tensor(kind, rows, columns, rng, edges=edges)
    layout = LAYOUTS[kind.lower()]
    return layout, layout.pack(tiles_of(tensor), rows, columns), ref.values_of(kind, tensor.data, rows, columns)
