"""Sampling on a GPU: descriptions and what they name go in with one copy, tokens and log probabilities come out with another."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import memmove

import numpy as np
from numpy.typing import NDArray

from ..kernels.cpu import sampling_layout as at
from ..kernels.cuda import sampling
from ..kernels.cuda.launch import Launch
from .cuda_gpu import GpuLike
from .memory import address
from .sampling import SamplingRow

# Words of a row that name lists of four bytes to an item, with the words that say how many there are.
_INPUTS = (
    (at.DRY_IDS, at.DRY_SIZE),
    (at.DRY_VALUES, at.DRY_SIZE),
    (at.COUNT_IDS, at.COUNT_SIZE),
    (at.COUNT_VALUES, at.COUNT_SIZE),
    (at.BIAS_IDS, at.BIAS_SIZE),
    (at.BIAS_VALUES, at.BIAS_SIZE),
)
_OUTPUTS = (at.TOP_IDS, at.TOP_VALUES)
_COUNT_BYTES = 256  # in front of the descriptions
_LISTS_BYTES = 1 << 20  # for lists and masks, at first


class GpuSampling:
    """Samples up to ``max_rows`` rows of ``vocab_size`` logits that lie on a GPU. One call at a time."""

    def __init__(self, gpu: GpuLike, vocab_size: int, max_rows: int) -> None:
        self.gpu, self.vocab_size, self.max_rows = gpu, vocab_size, max_rows
        self._mask_bytes = 4 * -(-vocab_size // 32)
        self._scratch = gpu.allocate(4 * sampling.scratch_floats(vocab_size, max_rows))
        self._make_room(_LISTS_BYTES)

    def _make_room(self, lists: int) -> None:
        """One piece of memory here and there: how many rows, their descriptions, then lists. What was there before is dropped."""
        size = _COUNT_BYTES + 8 * at.ROW_WORDS * self.max_rows + lists
        self._host: NDArray[np.uint8] = self.gpu.pinned(size)
        self._device = self.gpu.allocate(size)
        self._rows = self._host[_COUNT_BYTES:][: 8 * at.ROW_WORDS * self.max_rows].view(np.int64).reshape(self.max_rows, at.ROW_WORDS)
        self._launches = {
            rows: self.gpu.capture([self._launch(rows)]) for rows in {1, self.max_rows}
        }  # of one row, as in a chat, and of any number

    def _launch(self, rows: int) -> Launch:
        return sampling.sample(self._device + _COUNT_BYTES, self.vocab_size, self._scratch, count=self._device, max_rows=rows)

    def run(self, rows: Sequence[SamplingRow], logits: Sequence[int]) -> None:
        """Sample rows whose logits are at these addresses of the device, each into its own results."""
        if not rows:
            return
        lists = sum(self._list_bytes(row) for row in rows)
        if lists > self._host.nbytes - _COUNT_BYTES - self._rows.nbytes:
            self._make_room(2 * lists)
        self._host[:8].view(np.int64)[0] = len(rows)
        end = _COUNT_BYTES + self._rows.nbytes
        tops: list[tuple[int, int, int]] = []  # where here, where to, bytes
        for index, (row, source) in enumerate(zip(rows, logits, strict=True)):
            end = self._describe(index, row, source, end, tops)
        self.gpu.copy_in(self._device, self._host[:end])
        self._launches[1 if len(rows) == 1 else self.max_rows]()
        start = _COUNT_BYTES
        stop = end if tops else start + 8 * at.ROW_WORDS * len(rows)
        self.gpu.copy_out(self._host[start:stop], self._device + start)
        self.gpu.synchronize()
        for row, words in zip(rows, self._rows[: len(rows), at.TOKEN :].tolist(), strict=True):
            for offset, word in enumerate(words):
                row.words[at.TOKEN + offset] = word
        for here, target, nbytes in tops:
            memmove(target, address(self._host) + here, nbytes)

    def _list_bytes(self, row: SamplingRow) -> int:
        words = row.words
        sizes = sum(_padded(4 * words[size]) for _, size in _INPUTS)
        return int(sizes + _padded(self._mask_bytes) + 2 * _padded(4 * max(0, words[at.TOP_N])))

    def _describe(self, index: int, row: SamplingRow, logits: int, end: int, tops: list[tuple[int, int, int]]) -> int:
        """Copy a row's description, with addresses of the device, and its lists behind ``end``; returns their new end."""
        words = self._rows[index]
        words[:] = row.words
        words[at.LOGITS] = logits
        parts = [(word, 4 * int(words[size])) for word, size in _INPUTS]
        parts.append((at.MASK, self._mask_bytes if words[at.MASK] else 0))
        for word, nbytes in parts:
            if nbytes:
                memmove(address(self._host) + end, int(words[word]), nbytes)
                words[word] = self._device + end
                end += _padded(nbytes)
        if words[at.TOP_N] > 0:
            for word in _OUTPUTS:
                nbytes = 4 * int(words[at.TOP_N])
                tops.append((end, int(words[word]), nbytes))
                words[word] = self._device + end
                end += _padded(nbytes)
        return end


def _padded(nbytes: int) -> int:
    return -(-nbytes // 16) * 16
