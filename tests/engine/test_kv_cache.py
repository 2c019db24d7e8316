from __future__ import annotations

from collections import Counter
from itertools import takewhile

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pymistral.engine.kv_cache import BlockPool, chain_key


def check_pool(pool: BlockPool, tables: list[list[int]]) -> None:
    """No block is lost, counted wrongly or in two places."""
    expected = Counter(block for table in tables for block in table)
    assert pool.references == [expected[block] for block in range(pool.num_blocks)]
    free = [*pool.blank, *pool.idle]
    assert sorted(free) == [block for block in range(pool.num_blocks) if expected[block] == 0]
    assert all(pool.keys[block] is None for block in pool.blank)
    assert all(pool.keys[block] is not None for block in pool.idle)
    assert pool.by_key == {key: block for block, key in enumerate(pool.keys) if key is not None}


class PoolMachine(RuleBasedStateMachine):
    """Tables of blocks come and go, over few tokens so that prefixes recur."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.tables: list[tuple[list[int], list[bytes]]] = []
        self.contents: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 1), max_size=4))
    def start(self, tokens: list[int]) -> None:
        keys: list[bytes] = []
        for token in tokens:
            keys.append(chain_key(keys[-1] if keys else b"", [token]))
        found = [self.pool.by_key[key] for key in takewhile(self.pool.by_key.__contains__, keys)]
        assert all(self.contents[block] == key for block, key in zip(found, keys, strict=False)), "evicted contents were found"
        if self.pool.num_free - self.pool.count_idle(found) < len(tokens) - len(found):
            return
        self.pool.share(found)
        table = [*found, *(self.pool.allocate() for _ in tokens[len(found) :])]
        for block, key in list(zip(table, keys, strict=True))[len(found) :]:
            assert self.pool.references[block] == 1
            assert self.pool.keys[block] is None
            self.contents[block] = key
            self.pool.register(block, key)
        self.tables.append((table, keys))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()

    @invariant()
    def consistent(self) -> None:
        check_pool(self.pool, [table for table, _ in self.tables])


TestPool = PoolMachine.TestCase


def test_least_recently_used_goes_first_and_the_end_of_a_prefix_before_its_start() -> None:
    pool = BlockPool(4)
    table = [pool.allocate() for _ in range(4)]
    keys = [bytes([i]) for i in range(4)]
    for block, key in zip(table, keys, strict=True):
        pool.register(block, key)
    pool.release(table[2:])
    pool.release(table[:2])
    assert [pool.allocate() for _ in range(4)] == [table[3], table[2], table[1], table[0]]
    assert not pool.by_key


def test_keys_depend_on_all_that_comes_before() -> None:
    first = chain_key(b"", [1, 2])
    assert first == chain_key(b"", [1, 2])
    assert first != chain_key(b"", [2, 1])
    assert chain_key(first, [3]) != chain_key(chain_key(b"", [2, 2]), [3])
