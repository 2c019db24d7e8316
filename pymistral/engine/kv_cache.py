"""The pool of KV-cache blocks: reference counts, and a prefix cache of the blocks that nobody uses at the moment."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
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
        self.keys: list[bytes | None] = [None] * num_blocks
        self.by_key: dict[bytes, int] = {}
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

    def register(self, block: int, key: bytes) -> None:
        """Let later prompts find a full block. If another block with the same contents is known, this one stays private."""
        if key not in self.by_key:
            self.by_key[key] = block
            self.keys[block] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix; no reference is taken."""
        found: list[int] = []
        for key in keys:
            block = self.by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

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
