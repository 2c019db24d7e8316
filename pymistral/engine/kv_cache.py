"""The pool of KV-cache blocks: reference counts, and a prefix cache of the blocks that nobody uses at the moment.

Layers come in groups (`Runner.windows`), and a sequence has a block table for each. A group without a window keeps all positions; one
with a window keeps what the next token sees of them, and gives back the blocks behind it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block: a digest of its tokens and of all before it.

    A cryptographic digest, since whoever could make two prompts collide would read another's cache.
    """
    return blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Hands out physical blocks.

    A block is *used* while a sequence refers to it, *idle* when none does but its contents are known by a key, else *blank*. Idle blocks
    are given away last, the least recently used first. Only a block with one reference and no key may be written.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.keys: list[Hashable | None] = [None] * num_blocks
        self.by_key: dict[Hashable, int] = {}
        self.blank = list(range(num_blocks - 1, -1, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.idle)

    def allocate(self) -> int:
        """A block to write to. The caller has made sure that one is free."""
        if self.blank:
            block = self.blank.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            self._forget(block)
        self.references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are used or idle."""
        for block in blocks:
            if self.references[block] == 0:
                del self.idle[block]
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block of a table. The end of it goes first: a prefix is worth more than what follows it."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                if self.keys[block] is None:
                    self.blank.append(block)
                else:
                    self.idle[block] = None

    def register(self, block: int, key: Hashable) -> None:
        """Let later prompts find a full block. If another block with the same contents is known, this one stays private."""
        if key not in self.by_key:
            self.by_key[key] = block
            self.keys[block] = key

    def count_idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are free now, and would not be once shared."""
        return sum(self.references[block] == 0 for block in blocks)

    def clear_cache(self) -> None:
        """Forget all contents, for instance because the weights have changed."""
        self.blank.extend(self.idle)
        self.idle.clear()
        for block in list(self.by_key.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self.keys[block]
        assert key is not None
        del self.by_key[key]
        self.keys[block] = None


class BlockTables:
    """Where the positions of one sequence lie: a block table for each group of layers, all of one length.

    Entries before ``firsts`` stand for blocks that were given back.
    """

    __slots__ = ("firsts", "tables")

    def __init__(self, tables: Sequence[array[int]], firsts: Sequence[int]) -> None:
        self.tables, self.firsts = tuple(tables), list(firsts)

    def __len__(self) -> int:
        return len(self.tables[0])

    def held(self, start: int = 0) -> list[int]:
        """The blocks that are held of those from ``start`` on, by position."""
        if len(self.tables) == 1:
            return list(self.tables[0][max(start, self.firsts[0]) :])
        rows = range(max(start, min(self.firsts)), len(self))
        return [table[row] for row in rows for table, first in zip(self.tables, self.firsts, strict=True) if row >= first]


class PagedCache:
    """Block tables over a pool.

    Parameters
    ----------
    windows
        How many of the latest positions the layers of each group see; ``None``: all.
    most_tokens
        The most tokens of a sequence that are computed at once.
    """

    def __init__(self, pool: BlockPool, block_size: int, windows: Sequence[int | None], most_tokens: int) -> None:
        self.pool, self.block_size, self.windows, self.most_tokens = pool, block_size, tuple(windows), most_tokens
        self.slides = any(window is not None for window in windows)

    def new_tables(self) -> BlockTables:
        return BlockTables([array("i") for _ in self.windows], [0] * len(self.windows))

    def first(self, window: int | None, position: int) -> int:
        """The first block that a group must hold so that a sequence can go on at a position, or at the block boundary before it.

        The boundary counts since a prefix that is shared ends there.
        """
        return 0 if window is None else max(0, position // self.block_size * self.block_size - window + 1) // self.block_size

    def most_blocks(self, length: int) -> int:
        """The most blocks that a sequence holds at once until it has ``length`` positions."""
        size, every = self.block_size, -(-length // self.block_size)
        in_flight = -(-self.most_tokens // size) + 1
        return sum(every if window is None else min(every, -(-(window - 1) // size) + in_flight) for window in self.windows)

    def capacity(self, most: int) -> int:
        """The length, up to ``most``, that a sequence may have if it has the pool to itself."""
        size = self.block_size
        blocks = bisect_right(range(-(-most // size) + 1), self.pool.num_blocks, key=lambda blocks: self.most_blocks(blocks * size)) - 1
        return min(most, blocks * size)

    def grow(self, tables: BlockTables, end: int) -> bool:
        """Add blocks until the tables cover ``end`` positions, as far as free ones reach; whether they do."""
        groups = len(self.windows)
        for _ in range(-(-end // self.block_size) - len(tables)):
            if self.pool.num_free < groups:
                return False
            for table in tables.tables:
                table.append(self.pool.allocate())
        return True

    def slide(self, tables: BlockTables, computed: int) -> None:
        """Give back what no token after ``computed`` positions sees."""
        for group, window in enumerate(self.windows):
            first = self.first(window, computed)
            if first > tables.firsts[group]:
                self.pool.release(tables.tables[group][tables.firsts[group] : first])
                tables.firsts[group] = first

    def cut(self, tables: BlockTables, end: int) -> None:
        """Give back the blocks that lie behind ``end`` positions."""
        used = -(-end // self.block_size)
        self.pool.release(tables.held(used))
        for table in tables.tables:
            del table[used:]

    def register(self, tables: BlockTables, block: int, key: bytes) -> None:
        """Let later prompts find a full block of each group."""
        for group, (table, first) in enumerate(zip(tables.tables, tables.firsts, strict=True)):
            if block >= first:
                self.pool.register(table[block], (group, key))

    def find(self, keys: Sequence[bytes]) -> BlockTables:
        """Tables of the longest prefix of which all is known that a sequence needs to go on behind it; no reference is taken."""
        by_key, count = self.pool.by_key, len(keys)
        for group, window in enumerate(self.windows):
            if window is None:
                count = next((block for block in range(count) if (group, keys[block]) not in by_key), count)
        while (gap := self._gap(keys, count)) >= 0:
            count = gap
        firsts = [self.first(window, count * self.block_size) for window in self.windows]
        known = ([by_key[group, key] for key in keys[first:count]] for group, first in enumerate(firsts))
        return BlockTables([array("i", [0] * first + blocks) for first, blocks in zip(firsts, known, strict=True)], firsts)

    def _gap(self, keys: Sequence[bytes], count: int) -> int:
        """The last block that a prefix of ``count`` blocks needs for its windows and that is not known, else -1.

        No longer prefix than up to there can do without it.
        """
        by_key, end = self.pool.by_key, count * self.block_size
        gaps = (
            next((block for block in range(count - 1, self.first(window, end) - 1, -1) if (group, keys[block]) not in by_key), -1)
            for group, window in enumerate(self.windows)
            if window is not None
        )
        return max(gaps, default=-1)

    def prefix(self, tables: BlockTables, count: int) -> BlockTables:
        """Tables of the first ``count`` blocks, for another sequence; no reference is taken."""
        firsts = [self.first(window, count * self.block_size) for window in self.windows]
        return BlockTables([table[:count] for table in tables.tables], firsts)
