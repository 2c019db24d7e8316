"""Sampling: rows of logits in, tokens out, several rows at a time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.cpu.compiler import Progress, entry_point, load_kernels, spec
from ..kernels.cpu.sampling_layout import ROW_WORDS, scratch_bytes
from .memory import address, zeros
from .pool import Launches, thread_pool

SAMPLING_KERNEL = spec("sampling.sample")


class SamplingRow:
    """What to do with one row of logits, and what came of it, where the kernel reads and writes it.

    Attributes
    ----------
    words, numbers
        The same memory as integers and as floats; `kernels.cpu.sampling_layout` names the fields.
    """

    __slots__ = ("address", "numbers", "words")

    def __init__(self) -> None:
        memory: Any = zeros(ROW_WORDS, np.int64)
        self.address = address(memory)
        self.words = memoryview(memory)
        self.numbers = self.words.cast("B").cast("d")


class SamplingProgram:
    """Samples rows of ``vocab_size`` logits on the threads of the pool of that size. One call at a time."""

    def __init__(self, vocab_size: int, threads: int, progress: Progress | None = None) -> None:
        kernel = load_kernels([SAMPLING_KERNEL], progress)[SAMPLING_KERNEL]
        room = -(-scratch_bytes(vocab_size) // 64) * 64
        self._scratch = zeros(room * threads, np.uint8)
        self._slots = zeros(9, np.int64)
        self._slots[1:4] = vocab_size, address(self._scratch), room
        self._count = zeros(1, np.int64)
        self._call, self._slots_address = entry_point(kernel, 4), address(self._slots)
        self._pool = thread_pool(threads) if threads > 1 else None
        self._launches = Launches([(kernel, self._slots_address, address(self._count), 1, 1, 0)], threads)

    def expect(self, logits: NDArray[np.float32], maxima: NDArray[np.float32] | None) -> None:
        """Where rows of ``logits`` are sampled from, the largest of each `sampling_layout.BLOCK` will be in the same row of ``maxima``."""
        self._slots[4:] = 0
        if maxima is not None:
            begin, row_bytes = address(logits), logits.strides[0]
            self._slots[4:] = begin, begin + len(logits) * row_bytes, row_bytes, address(maxima), maxima.strides[0]

    def run(self, rows: Sequence[SamplingRow]) -> None:
        """Sample all rows, each into its own results. The logits that they name must lie in memory as float32."""
        addresses = array("q", [row.address for row in rows])
        self._slots[0] = addresses.buffer_info()[0]
        if self._pool is None or len(rows) == 1:
            self._call(self._slots_address, 0, len(rows), 0)
        else:
            self._count[0] = len(rows)
            self._pool.run(self._launches)
