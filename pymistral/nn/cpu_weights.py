"""Weight matrices in tiles: which tiles a type becomes, where they lie, and how they are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.cpu.compiler import Spec
from ..kernels.cpu.tiles import ROWS, FloatFormat, TileFormat
from ..quantization.types import BLOCK_SIZES, Tensor, block_size
from .memory import address, forget, zeros
from .pool import ThreadPool
from .quantize import PART_BYTES, blocks_of, kernels_for, launch_all, parts, repacker, stored_blocks, tile_format


@dataclass
class Matrix:
    tensor: Tensor
    format: TileFormat | FloatFormat
    tiles: NDArray[Any]

    @property
    def tile_bytes(self) -> int:
        return int(self.format.tile_bytes(self.tensor.shape[1]))

    @property
    def tile_count(self) -> int:
        return int(-(-self.tensor.shape[0] // ROWS))

    @property
    def is_float(self) -> bool:
        return isinstance(self.format, FloatFormat)


class TiledWeights:
    """The matrices of a program in one piece of memory, in the order in which they are asked for."""

    def __init__(self, matrices: list[Tensor]) -> None:
        nbytes = sum(-(-tile_format(tensor).nbytes(*tensor.shape) // 64) * 64 for tensor in matrices)  # each in whole cache lines
        self.arena: NDArray[Any] = zeros(nbytes, np.uint8, huge_pages=True)
        self._used = 0
        self._matrices: dict[int, Matrix] = {}

    @property
    def nbytes(self) -> int:
        return sum(matrix.tiles.nbytes for matrix in self._matrices.values())

    def __getitem__(self, tensor: Tensor) -> Matrix:
        known = self._matrices.get(id(tensor))
        if known is None:
            format = tile_format(tensor)
            size = format.nbytes(*tensor.shape)
            tiles = self.arena[self._used : self._used + size]
            self._used += -(-size // 64) * 64
            known = self._matrices[id(tensor)] = Matrix(tensor, format, tiles)
        return known

    def packers(self) -> list[Spec]:
        """The kernels that `pack` needs."""
        return [kernel for matrix in self._matrices.values() for kernel in kernels_for(matrix.tensor)]

    def pack(self, kernels: dict[Spec, int], pool: ThreadPool) -> None:
        """Blocks to tiles, some MB in one program, forgotten when done: the file and the tiles are never in memory together."""
        batch = _Batch(pool)
        for matrix in self._matrices.values():
            tensor = matrix.tensor
            size = BLOCK_SIZES[tensor.type] if tensor.isq is None else block_size(tensor.isq)
            repack = kernels[repacker(matrix.format.name, size[1] if size else 1)]
            target = address(matrix.tiles)
            for part in parts(tensor):
                rows, columns = part.shape
                batch.make_room(part.data.nbytes)
                blocks = stored_blocks(part) if part.isq is None else blocks_of(part, kernels, pool)
                batch.add(tensor, part, blocks, (repack, (address(blocks), target, rows, columns, matrix.tile_bytes), -(-rows // ROWS)))
                target += rows // ROWS * matrix.tile_bytes
        batch.run()


class _Batch:
    """Parts of tensors that one program packs."""

    def __init__(self, pool: ThreadPool) -> None:
        self.pool = pool
        self._clear()

    def _clear(self) -> None:
        self.nbytes = 0
        self.launches: list[tuple[int, tuple[int, ...], int]] = []
        self.blocks: list[NDArray[Any]] = []  # kept alive
        self.sources: dict[int, NDArray[Any]] = {}

    def make_room(self, nbytes: int) -> None:
        """Pack what is there if it would be too much with so many bytes more."""
        if self.nbytes + nbytes > PART_BYTES:
            self.run()

    def add(self, tensor: Tensor, part: Tensor, blocks: NDArray[Any], launch: tuple[int, tuple[int, ...], int]) -> None:
        self.nbytes += part.data.nbytes
        self.launches.append(launch)
        self.blocks.append(blocks)
        # of a tensor in another order the part is a copy
        source = part.data if tensor.order is None else tensor.data
        self.sources[address(source)] = source

    def run(self) -> None:
        launch_all(self.pool, self.launches)
        for source in self.sources.values():
            forget(source)
        self._clear()
