"""What changes from step to step, in the small arrays that the kernels read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.cpu.geometry import ATTENTION_CHUNK, panel_tokens
from .memory import address, zeros
from .rope import Rope

SPLIT_TOKENS = 8  # whose positions are dealt out to threads, at most
READ_BLOCKS = 255  # of the cache, at most, that a step of many sequences fetches ahead

_COUNTS = ("tokens", "outputs", "items", "merges", "output_items", "one")


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
        Positions in a block of the KV cache; a multiple of 32.
    num_blocks
        Blocks in the cache: what each layer of a group has room for.
    max_blocks
        Blocks that one sequence may have, in one group of layers.
    groups
        Groups of layers whose blocks come from one pool, each with block tables of its own (see `cache_groups`).
    cache_type
        Of keys and values, as `Graph.cache_type` takes it.
    """

    max_tokens: int
    max_outputs: int
    max_sequences: int
    block_size: int
    num_blocks: int
    max_blocks: int
    groups: int = 1
    cache_type: str = "auto"

    def __post_init__(self) -> None:
        sizes = (self.max_tokens, self.max_outputs, self.max_sequences, self.block_size, self.num_blocks, self.max_blocks, self.groups)
        if min(sizes) < 1:
            raise ValueError(f"all limits must be positive: {self}")
        if self.block_size % 32:
            raise ValueError(f"block_size={self.block_size}: must be a multiple of 32")


class State:
    """The arrays, and the tables that grow with the longest sequence.

    All arrays lie in ``memory``, the block tables last, so that one copy of its first bytes brings a step to a device.
    """

    def __init__(
        self, limits: Limits, allocate: Callable[[int], NDArray[Any]] | None = None, *, item_words: int = 5, lanes: int = 0
    ) -> None:
        # attention: [first token, tokens, row of the block table], on the CPU with [chunk or -1, partial result] behind, and those with
        # output rows before all others; merges, on the CPU: [token, first partial result, how many]
        self.block_size = limits.block_size
        self.max_partials = SPLIT_TOKENS * -(-limits.max_blocks * limits.block_size // ATTENTION_CHUNK)
        self.table_width = limits.max_blocks + 2  # attention looks at up to 64 positions at once
        per_token = (limits.max_tokens,)
        shapes: dict[str, tuple[int, ...]] = {
            "counts": (2 * len(_COUNTS),),  # int64, in the order of _COUNTS
            "tokens": per_token,
            "positions": per_token,
            "cache_slots": (limits.groups, limits.max_tokens),
            "table_rows": per_token,
            "output_rows": (limits.max_outputs,),
            "items": (limits.max_tokens + self.max_partials, item_words),
            "merges": (SPLIT_TOKENS, 3),
            "block_tables": (limits.groups, limits.max_sequences, self.table_width),
        }
        starts, size = {}, 0
        for name, shape in shapes.items():
            starts[name] = size
            size += -(-4 * prod(shape) // 64) * 64
        self.memory: NDArray[Any] = allocate(size) if allocate else zeros(size, np.uint8)

        def part(name: str) -> NDArray[Any]:
            shape = shapes[name]
            return self.memory[starts[name] :][: 4 * prod(shape)].view(np.int32).reshape(shape)

        self.counts: NDArray[Any] = part("counts").view(np.int64)
        self.counts[_COUNTS.index("one")] = 1
        self._counts_address = address(self.counts)
        self.tokens, self.positions, self.cache_slots = part("tokens"), part("positions"), part("cache_slots")
        self.output_rows, self.items, self.merges = part("output_rows"), part("items"), part("merges")
        self.table_rows, self.block_tables = part("table_rows"), part("block_tables")
        # on the CPU, of the step and of each lane: how many blocks of a group are read, and which
        self.read_blocks: NDArray[Any] = zeros((1 + lanes, limits.groups, 1 + READ_BLOCKS), np.int32)
        self.most_read = READ_BLOCKS  # of one lane
        # lanes (see `cpu_lanes`): of each, the rows of its tokens, and its sequences: the first, the one behind the last, how many
        self.lanes: NDArray[Any] = zeros((lanes, 2, 3), np.int64)
        self.panels_in_lane = self.sequences_in_lane = 0
        panels = lanes * panel_tokens()
        self.most_panels = min(limits.max_sequences // panels, limits.max_tokens // panels - 1) if lanes else 0
        self.ropes: list[Rope] = []
        self.caches: list[tuple[NDArray[Any], NDArray[Any]]] = []  # keys and values of each layer
        self.parts_of_block = 1  # what the numbers of blocks are multiplied by (see `cpu_caches`)
        self.query_tile = limits.max_tokens  # tokens in a query tile, at most

    def used_bytes(self, sequences: int) -> int:
        """Of `memory`, for a step of so many sequences."""
        return address(self.block_tables) - address(self.memory) + sequences * 4 * self.table_width

    def write_table(self, group: int, row: int, blocks: Sequence[int]) -> None:
        """The blocks of the pool that hold a sequence's positions, for the layers of a group."""
        numbers = self.block_tables[group, row, : len(blocks)]
        numbers[:] = blocks
        numbers *= self.parts_of_block

    def slots(self, row: int, positions: NDArray[Any]) -> NDArray[np.int32]:
        """Where a sequence's keys and values go, int32 ``[groups, positions]``, once its tables are written."""
        slots: NDArray[np.int32] = self.block_tables[:, row, positions // self.block_size] * self.block_size + positions % self.block_size
        return slots

    def set_lanes(self, sequences: int, panels: int) -> None:
        """Give each lane so many panels of a step's sequences; with 0 there are no lanes."""
        self.panels_in_lane, self.sequences_in_lane = panels, panels * panel_tokens()
        for lane in range(len(self.lanes) if panels else 0):
            first = min(sequences, lane * self.sequences_in_lane)
            count = min(sequences - first, self.sequences_in_lane)
            row = lane * (panels + 1) * panel_tokens()
            self.lanes[lane] = (row, row + count, count), (first, first + count, count)

    def next_row(self, row: int, sequence: int) -> int:
        """Where a sequence's first token goes: behind the ``row`` tokens before it, but a lane begins a panel later."""
        begins_lane = self.panels_in_lane and sequence and sequence % self.sequences_in_lane == 0
        return row + panel_tokens() if begins_lane else row

    def count(self, name: str) -> int:
        return int(self.counts[_COUNTS.index(name)])

    def count_address(self, name: str) -> int:
        return self._counts_address + 8 * _COUNTS.index(name)
