"""What changes from step to step, in the small arrays that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import address, zeros
from .rope import Rope


@dataclass(frozen=True)
class Limits:
    """Sizes that a program is recorded for.

    Attributes
    ----------
    max_tokens, max_outputs
        Tokens, and rows of logits, in one step.
    max_sequences
        Sequences in one step.
    block_size
        Positions in a block of the KV cache; a multiple of 16.
    num_blocks
        Blocks in the cache of each layer.
    max_blocks
        Blocks that one sequence may have.
    """

    max_tokens: int
    max_outputs: int
    max_sequences: int
    block_size: int
    num_blocks: int
    max_blocks: int

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.max_outputs, self.max_sequences, self.block_size, self.num_blocks, self.max_blocks) < 1:
            raise ValueError(f"all limits must be positive: {self}")
        if self.block_size % 16:
            raise ValueError(f"block_size={self.block_size}: must be a multiple of 16")


class State:
    """The arrays, and the tables that grow with the longest sequence."""

    def __init__(self, limits: Limits) -> None:
        self.counts: NDArray[Any] = zeros(4, np.int64)  # tokens, outputs, query tiles, one
        self.counts[3] = 1
        self.tokens: NDArray[Any] = zeros(limits.max_tokens, np.int32)
        self.positions: NDArray[Any] = zeros(limits.max_tokens, np.int32)
        self.cache_slots: NDArray[Any] = zeros(limits.max_tokens, np.int32)
        self.query_tiles: NDArray[Any] = zeros((limits.max_tokens, 3), np.int32)
        self.output_rows: NDArray[Any] = zeros(limits.max_outputs, np.int32)
        self.block_tables: NDArray[Any] = zeros((limits.max_sequences, limits.max_blocks), np.int32)
        self.ropes: list[Rope] = []
        self.caches: list[tuple[NDArray[Any], NDArray[Any]]] = []  # keys and values of each layer
        self.query_tile = limits.max_tokens  # tokens in a query tile, at most

    def count_address(self, name: str) -> int:
        return address(self.counts) + 8 * ("tokens", "outputs", "tiles", "one").index(name)
