"""Ranks of merges: what a dictionary of the strings would say."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pymistral.loading import merges as module
from pymistral.loading.merges import ranker
from pymistral.loading.string_index import index_of

SYMBOLS = ["".join(letters) for count in (1, 2, 3) for letters in product("ab", repeat=count)]
PAIR = st.tuples(st.sampled_from(SYMBOLS), st.sampled_from(SYMBOLS)).map(" ".join)
ODD = st.sampled_from(["", " ", "a", "a ", " a", "a b a", "a  b", "a\0b", "\0"])


def check(merges: list[str], tokens: list[str]) -> None:
    expected = {merge: place for place, merge in reversed(list(enumerate(merges)))}
    rank = ranker(merges, tokens, index_of(tokens))
    for left, right in product(SYMBOLS, repeat=2):
        assert rank(left, right) == expected.get(f"{left} {right}"), (left, right)


@given(st.lists(PAIR | ODD, max_size=12), st.lists(st.sampled_from([*SYMBOLS, "a b", "", "a\0b"]), max_size=12))
def test_any_vocabulary(merges: list[str], tokens: list[str]) -> None:
    """Merges that make one token twice, make none, are there twice, or are no merges at all."""
    check(merges, tokens)


@given(
    st.lists(PAIR | ODD, max_size=12),
    st.lists(st.sampled_from(["x", "", "ab", "\0"]), max_size=3),
    st.lists(st.sampled_from(["y", ""]), max_size=3),
)
@example(["a b", "b a"], ["x"], ["y"])
@example(["a b", "ba "], [], [])
@example(["a b", "bb  a", "ba"], [], [])
@example(["a b"], ["ab"], [])
def test_a_vocabulary_in_the_order_of_its_merges(merges: list[str], before: list[str], behind: list[str]) -> None:
    check(merges, [*before, *(merge.replace(" ", "") for merge in merges), *behind])


def test_such_a_vocabulary_has_no_dictionary_of_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ["a", "b", "é", "ab", "éab", "<end>"]
    ids = index_of(tokens)
    monkeypatch.setattr(module, "index_of", None)
    rank = ranker(["a b", "é ab"], tokens, ids)
    assert [rank("a", "b"), rank("é", "ab"), rank("éa", "b"), rank("é", "a"), rank("<en", "d>"), rank("", "a")] == [
        0,
        1,
        None,
        None,
        None,
        None,
    ]
