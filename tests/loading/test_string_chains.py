"""Chains of strings: found at C speed or by walking, they are the strings that were put there, and end where these end."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pymistral.loading import string_chains
from pymistral.loading.string_chains import JoinedStrings, find_chain, joined, raw_strings, strings_of


def chain(strings: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(string)) + string for string in strings)


ODD = [b"", b"\0", b"\0" * 8, b"\0" * 40, b"a\0\0\0\0\0\0\0\x01", b"\xff", "é".encode()]


@given(
    st.lists(st.binary(max_size=12) | st.binary(min_size=250, max_size=260) | st.sampled_from(ODD), max_size=30),
    st.binary(max_size=9),
    st.binary(max_size=40) | st.just(bytes(300)) | st.just(chain([b"more"] * 20)),
)
@example([b"a\0\0\0\0\0\0\0\x01"], b"", b"")
@example([b"x" * 255] * 1000, b"", b"")
@example([b"x" * 255] * 600 + [b"x" * 256] * 2, b"", b"")
def test_any_strings(strings: list[bytes], before: bytes, behind: bytes) -> None:
    data = chain(strings)
    end, starts = find_chain(before + data + behind, len(before), len(strings))
    assert end == len(before) + len(data)
    assert raw_strings(data, len(strings)) == strings
    try:
        expected = [string.decode() for string in strings]
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            strings_of(data, len(strings), starts)
    else:
        found = strings_of(data, len(strings), starts)
        assert list(found) == expected
        assert len(found) == len(expected)
        assert joined(found) == "\0".join(expected)


@given(st.lists(st.binary(max_size=12) | st.binary(min_size=250, max_size=260) | st.sampled_from(ODD), min_size=1, max_size=30), st.data())
def test_a_chain_that_is_cut(strings: list[bytes], data: st.DataObject) -> None:
    whole = chain(strings)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert find_chain(cut, 0, len(strings))[0] > len(cut)


@pytest.mark.parametrize("length", [1 << 32, (1 << 63) - 9, (1 << 64) - 1])
def test_a_length_beyond_all_offsets(length: int) -> None:
    data = chain([b"a"]) + struct.pack("<Q", length) + chain([b"b"])
    assert find_chain(data, 0, 3)[0] > len(data)


@pytest.mark.parametrize("length", [1, 8, 255])
def test_many_blocks(length: int) -> None:
    """Wherever a block ends: within a length, or between two."""
    for first in range(1, 20):
        strings = [b"f" * first, *[b"x" * length] * (200_000 // (length + 8))]
        data = chain(strings)
        end, starts = find_chain(data, 0, len(strings))
        assert end == len(data)
        assert list(strings_of(data, len(strings), starts)) == [string.decode() for string in strings]


@given(st.lists(st.text(min_size=1, max_size=60).filter(lambda string: "\0" not in string), min_size=1, max_size=30))
def test_ordinary_vocabularies_are_not_walked(strings: list[str]) -> None:
    data = chain([string.encode() for string in strings])
    with pytest.MonkeyPatch.context() as monkeypatch:
        for slow in ("_walk", "raw_strings"):
            monkeypatch.setattr(string_chains, slow, None)
        end, starts = find_chain(data, 0, len(strings))
        found = strings_of(data, len(strings), starts)
    assert end == len(data)
    assert isinstance(found, JoinedStrings)
    assert list(found) == strings
    assert found[-1] == strings[-1]
    assert found[1:] == strings[1:]
    assert found[::-2] == strings[::-2]
    with pytest.raises(IndexError):
        found[len(strings)]
