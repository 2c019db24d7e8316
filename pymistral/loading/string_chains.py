"""Arrays of strings as GGUF files hold them: before each stands its length, in eight bytes, so that each has to be read to find the next.

A loop over them takes longer than anything else about a vocabulary. Where all are shorter than 256 bytes, every length ends in seven zero
bytes: these are found at C speed, and are right if each leads to the next. A chain that is otherwise is walked.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LENGTH = struct.Struct("<Q")
_BLOCK = 1 << 16  # bytes that are looked at together: what is made of them stays in the cache


def chain_end(buffer: bytes | mmap.mmap, start: int, count: int) -> int:
    """Where a chain of ``count`` strings ends; beyond the buffer's end if it does not fit."""
    rest = np.frombuffer(buffer, np.uint8)[start:]
    starts = _starts(rest, count)
    if starts is None:
        return _walk(buffer, start, count)
    return start + int(starts[-1]) + _LENGTH.size + int(rest[starts[-1]])


def strings_of(chain: bytes, count: int) -> list[str]:
    """The strings of a chain, whose end is where it was found to be. Raises UnicodeDecodeError."""
    return _cut(chain, count) or [string.decode() for string in raw_strings(chain, count)]


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


def _cut(chain: bytes, count: int) -> list[str] | None:
    """None if the strings have to be walked."""
    text = np.frombuffer(chain, np.uint8).copy()
    starts = _starts(text, count)
    if starts is None:
        return None
    kept = np.ones(len(text), bool)
    for byte in range(1, _LENGTH.size):
        kept[starts + byte] = False
    text[starts] = 0
    strings = text[kept].tobytes().decode().split("\0")
    return strings[1:] if len(strings) == count + 1 else None  # else a string holds a zero
