"""The index of a vocabulary says what a dict would say."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pymistral.loading import string_index
from pymistral.loading.string_chains import JoinedStrings
from pymistral.loading.string_index import StringIndex, index_of


@given(st.lists(st.text("aé😀", max_size=3), min_size=1, max_size=60), st.text(max_size=3))
@example([""], "")
@example([f"{number % 8999:x}" for number in range(9000)], "x" * 1000)
def test_the_index_is_what_a_dict_says(strings: list[str], other: str) -> None:
    """With strings that are there twice: the first of equals counts."""
    index, expected = index_of(JoinedStrings("\0".join(strings).encode())), index_of(strings)
    assert isinstance(index, StringIndex)
    assert isinstance(expected, dict)
    assert dict(index) == expected
    assert len(index) == len(expected)
    for string in {*strings, other, "a\0a"}:
        assert index.get(string, -1) == expected.get(string, -1)
        assert (string in index) == (string in expected)
    with pytest.raises(KeyError):
        index["zz"]


def test_strings_of_one_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(string_index, "PRIME", 2)
    strings = ["b", "a", "c", "a", "é"]
    index = index_of(JoinedStrings("\0".join(strings).encode()))
    assert dict(index) == {"b": 0, "a": 1, "c": 2, "é": 4}
    assert len(index) == 4
    assert "d" not in index
    assert "\ud800" not in index
