"""Weight matrices in tiles: which tiles a type becomes, where they lie, and how they are packed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..kernels.cpu.compiler import load_kernels
from ..kernels.cpu.tiles import ROWS, FloatFormat, TileFormat
from ..quantization.types import Tensor
from .memory import address, forget, madvise_address, mapping_of, zeros
from .pool import EXECUTOR_KERNELS, ThreadPool, thread_pool
from .quantize import (
    PART_BYTES,
    Launch,
    blocks_of,
    kernels_for,
    launch_all,
    multiplied_format,
    parts,
    repacker,
    rows_within,
    stored_blocks,
)

BATCH_BYTES = 32 << 20  # of weights in one program: steps of other models wait for it
_CHUNK_BYTES = 512 << 10  # of weights that a thread claims at once: what it forgets takes a call of the system


class Matrix(NamedTuple):
    tensor: Tensor
    format: TileFormat | FloatFormat
    tiles: NDArray[Any]
    address: int  # of the tiles

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
    """The matrices of a program in one piece of memory, in their order."""

    def __init__(self, matrices: list[Tensor], format_of: Callable[[Tensor], TileFormat | FloatFormat] = multiplied_format) -> None:
        formats = [format_of(tensor) for tensor in matrices]
        sizes = [format.nbytes(*tensor.shape) for format, tensor in zip(formats, matrices, strict=True)]
        starts = [0, *accumulate(-(-size // 64) * 64 for size in sizes)]  # each in whole cache lines
        self.arena: NDArray[Any] = zeros(starts[-1], np.uint8, huge_pages=True)
        self.nbytes = sum(sizes)
        arena = address(self.arena)
        self._matrices = {
            id(tensor): Matrix(tensor, format, self.arena[start : start + size], arena + start)
            for tensor, format, start, size in zip(matrices, formats, starts, sizes, strict=False)
        }
        needs = [[*kernels_for(matrix.tensor), repacker(matrix.tensor, matrix.format)] for matrix in self._matrices.values()]
        self.packers = list(dict.fromkeys([*EXECUTOR_KERNELS, *chain.from_iterable(needs)]))
        """The kernels that `pack` needs."""
        self._packing: Packing | None = None

    def __getitem__(self, tensor: Tensor) -> Matrix:
        return self._matrices[id(tensor)]

    def begin(self, threads: int) -> Packing:
        """Pack in a thread of its own, unless that was begun already: most of it needs no Python."""
        if self._packing is None:
            self._packing = Packing(self.pack, threads)
        return self._packing

    def pack(self, pool: Callable[[], ThreadPool], check: Callable[[], None] = lambda: None) -> None:
        """Blocks to tiles, forgotten when done: the file and the tiles are never in memory together.

        ``pool`` gives the threads for each batch; ``check`` may end it with an error.

        Raises
        ------
        ModelLoadError
            A weight cannot be quantised, or is not a number.
        """
        kernels = load_kernels(self.packers)
        batch = _Batch(pool, check)
        for matrix in self._matrices.values():
            tensor = matrix.tensor
            repack = kernels[repacker(tensor, matrix.format)]
            if tensor.isq is None and tensor.scales is None:
                _add_stored(batch, matrix, repack)
                continue
            target = matrix.address
            for part in parts(tensor):
                batch.make_room(part.data.nbytes, PART_BYTES)
                blocks = stored_blocks(part) if part.isq is None else blocks_of(part, kernels, pool())
                # of a tensor in another order the part is a copy
                source = part.data if tensor.order is None else tensor.data
                slots, units = (address(blocks), target, *part.shape, matrix.tile_bytes, 0, 0), -(-part.shape[0] // ROWS)
                batch.add(part.data.nbytes, Launch(repack, slots, units), blocks, forgets=source)
                target += part.shape[0] // ROWS * matrix.tile_bytes
        batch.run()


class Packing:
    """Work on weights in a thread of its own. It does not keep a process from ending."""

    def __init__(self, work: Callable[[Callable[[], ThreadPool], Callable[[], None]], None], threads: int) -> None:
        self._threads, self._fewer = threads, ThreadPool(max(1, threads - 1))
        self._done: Future[None] = Future()
        self._awaited = self._stopped = False
        threading.Thread(target=self._run, args=(work,), name="pymistral-pack", daemon=True).start()

    def _run(self, work: Callable[[Callable[[], ThreadPool], Callable[[], None]], None]) -> None:
        try:
            work(self.pool, self.check)
        except BaseException as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)
        self._fewer.close()

    def pool(self) -> ThreadPool:
        """The threads that pack: until somebody waits, one less, because Python has enough to do for a core."""
        return thread_pool(self._threads) if self._awaited else self._fewer

    def wait(self) -> None:
        """Return when it is done, or raise its error. Who is interrupted here wants it no more."""
        self._awaited = True
        try:
            self._done.result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it at the next `check`."""
        self._stopped = True

    def check(self) -> None:
        """Raises ModelLoadError if it was stopped."""
        if self._stopped:
            raise ModelLoadError("loading was given up before all weights were packed")


def _add_stored(batch: _Batch, matrix: Matrix, repack: int) -> None:
    """A matrix that is packed from the file's own bytes, which the kernel itself puts in order and forgets."""
    tensor, (rows, columns) = matrix.tensor, matrix.tensor.shape
    row_bytes = tensor.data.nbytes // rows
    order = None if tensor.order is None else np.ascontiguousarray(tensor.order, np.int64)
    mapping, forgets = mapping_of(tensor.data), (0, 0, 0)
    if mapping is not None:
        start = address(np.frombuffer(mapping, np.uint8))
        forgets = (madvise_address(), start, start + len(mapping))
    chunk = -(-_CHUNK_BYTES // (row_bytes * ROWS))
    step = rows_within(BATCH_BYTES, row_bytes)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        batch.make_room(count * row_bytes, BATCH_BYTES)
        source, order_at = address(tensor.data), 0
        if order is None:
            source += first * row_bytes
        else:
            order_at = address(order) + 8 * first
        target, units = matrix.address + first // ROWS * matrix.tile_bytes, -(-count // ROWS)
        slots = (source, target, count, columns, matrix.tile_bytes, order_at, *forgets)
        batch.add(count * row_bytes, Launch(repack, slots, units, chunk), (tensor, order))


class _Batch:
    """Parts of tensors that one program packs."""

    def __init__(self, pool: Callable[[], ThreadPool], check: Callable[[], None]) -> None:
        self.pool = pool
        self.check = check
        self._clear()

    def _clear(self) -> None:
        self.nbytes = 0
        self.launches: list[Launch] = []
        self.alive: list[Any] = []
        self.sources: dict[int, NDArray[Any]] = {}

    def make_room(self, nbytes: int, most: int) -> None:
        """Pack what is there if it would be too much with so many bytes more."""
        if self.nbytes + nbytes > most:
            self.run()

    def add(self, nbytes: int, launch: Launch, needs: Any, *, forgets: NDArray[Any] | None = None) -> None:
        self.nbytes += nbytes
        self.launches.append(launch)
        self.alive.append(needs)
        if forgets is not None:
            self.sources[address(forgets)] = forgets

    def run(self) -> None:
        self.check()
        launch_all(self.pool(), self.launches)
        for source in self.sources.values():
            forget(source)
        self._clear()
