"""Arrays of strings as GGUF files hold them: before each stands its length, in eight bytes, so that each has to be read to find the next.

A loop over them takes longer than anything else about a vocabulary. Where all are shorter than 256 bytes, every length ends in seven zero
bytes: these are found at C speed, and are right if each leads to the next. A chain that is otherwise is walked.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_LENGTH = struct.Struct("<Q")
_BLOCK = 1 << 16  # bytes that are looked at together: what is made of them stays in the cache


class JoinedStrings(Sequence[str]):
    """One string or more, none with a zero: their ``utf8`` in one piece, with zeros between them. Each is cut when it is asked for."""

    def __init__(self, utf8: bytes) -> None:
        self.utf8 = utf8
        zeros = np.flatnonzero(np.frombuffer(utf8, np.uint8) == 0)
        # string i lies between the zeros at bounds[i] and bounds[i + 1], of which the outermost are thought
        self.bounds = array("q", np.concatenate([[-1], zeros, [len(utf8)]]).astype(np.int64).tobytes())

    @property
    def text(self) -> str:
        """All strings, with zeros between them."""
        return self.utf8.decode()

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        return self.utf8[self.bounds[place] + 1 : self.bounds[place + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return iter(self.text.split("\0"))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __eq__(self, other: object) -> bool:
        return self.utf8 == other.utf8 if isinstance(other, JoinedStrings) else list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


def joined(strings: Sequence[str]) -> str:
    """The strings in one text, with zeros between them."""
    return strings.text if isinstance(strings, JoinedStrings) else "\0".join(strings)


def code_points(text: str) -> NDArray[np.uint32]:
    """The characters of a text as numbers."""
    return np.array([text]).view(np.uint32)


def find_chain(buffer: bytes | mmap.mmap, start: int, count: int) -> tuple[int, NDArray[Any] | None]:
    """Where a chain of ``count`` strings ends, beyond the buffer's end if it does not fit; and where from its start on each length stands,
    unless it had to be walked.
    """
    rest = np.frombuffer(buffer, np.uint8)[start:]
    starts = _starts(rest, count)
    if starts is None:
        return _walk(buffer, start, count), None
    return start + int(starts[-1]) + _LENGTH.size + int(rest[starts[-1]]), starts


def strings_of(chain: bytes, count: int, starts: NDArray[Any] | None) -> Sequence[str]:
    """The strings of a chain, of which `find_chain` found the ``starts``. Raises UnicodeDecodeError."""
    strings = None if starts is None else _join(chain, starts)
    return strings or [string.decode() for string in raw_strings(chain, count)]


def raw_strings(chain: bytes, count: int) -> list[bytes]:
    """The strings as bytes, one after the other."""
    strings, position = [], 0
    for _ in range(count):
        start = position + _LENGTH.size
        position = start + _LENGTH.unpack_from(chain, position)[0]
        strings.append(chain[start:position])
    return strings


def _walk(buffer: bytes | mmap.mmap, position: int, count: int) -> int:
    unpack, size = _LENGTH.unpack_from, len(buffer)
    try:
        for _ in range(count):
            position += _LENGTH.size + unpack(buffer, position)[0]
    except (struct.error, OverflowError):  # the position ran past the end, or past what an offset can be
        return size + 1
    return position


def _starts(chain: NDArray[Any], count: int) -> NDArray[Any] | None:
    """Where the lengths of the first ``count`` strings stand; None if they have to be walked, or if there is none."""
    found: list[NDArray[Any]] = []
    position = 0
    while count:
        block = chain[position : position + _BLOCK]
        zeros = block == 0
        for shift in (1, 2, 3):  # the beginnings of 2, 4, 7 zeros
            zeros = zeros[:-shift] & zeros[shift:]
        starts = np.flatnonzero(zeros)[:count] - 1
        ends = starts + _LENGTH.size + block[starts]
        if not len(starts) or starts[0] or not np.array_equal(starts[1:], ends[:-1]):
            return None
        found.append(starts + position)
        position += int(ends[-1])
        count -= len(starts)
    return np.concatenate(found) if found else None


def _join(chain: bytes, starts: NDArray[Any]) -> JoinedStrings | None:
    """None if a string holds a zero."""
    text = np.frombuffer(chain, np.uint8).copy()
    kept = np.ones(len(text), bool)
    for byte in range(1, _LENGTH.size):
        kept[starts + byte] = False
    text[starts] = 0
    utf8 = text[kept][1:].tobytes()
    utf8.decode()  # or the error that tells
    return JoinedStrings(utf8) if utf8.count(0) == len(starts) - 1 else None
