"""Which place each string has in a vocabulary: a dict's answers without its memory, which for 262,000 strings is 35 MB."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .string_chains import JoinedStrings

FACTOR, PRIME = 2654435769, (1 << 32) - 5
_TOGETHER = 1 << 12  # strings whose numbers stay in the cache


class StringIndex(Mapping[str, int]):
    """The place of each string, the first of equals.

    A string's hash is its UTF-8 as a little-endian number, times a factor that spreads short ones, modulo a prime: NumPy computes it for
    all at once, Python for one. Places are sorted by hash, and cut into slots by its highest bits.
    """

    def __init__(self, strings: JoinedStrings) -> None:
        count = len(strings)
        bits = count.bit_length()
        self._longest = int(np.diff(np.array(strings.bounds)).max())  # bytes, with the zero behind them
        keys = np.sort(_hashes(strings, self._longest) << np.uint64(32) | np.arange(count, dtype=np.uint64))
        hashes, places = (keys >> np.uint64(32)).astype(np.int64), keys.astype(np.uint32)
        sizes = np.bincount(hashes >> 32 - bits, minlength=1 << bits)
        self._strings = strings
        self._shift = 32 - bits
        self._places: array[int] = array("I", places.tobytes())
        self._slots = array("I", np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint32).tobytes())
        self._place = lru_cache(1 << 14)(self._find)
        same = np.flatnonzero(hashes[1:] == hashes[:-1])
        rivals = np.union1d(places[same], places[same + 1]).tolist()
        self._distinct = count - len(rivals) + len({strings[place] for place in rivals})

    def _find(self, key: str) -> int | None:
        try:
            utf8 = key.encode()
        except UnicodeEncodeError:  # a lone surrogate, which no string holds
            return None
        slot = int.from_bytes(utf8, "little") * FACTOR % PRIME >> self._shift
        bounds, all_utf8 = self._strings.bounds, self._strings.utf8
        for at in range(self._slots[slot], self._slots[slot + 1]):
            place = self._places[at]
            if all_utf8[bounds[place] + 1 : bounds[place + 1]] == utf8:
                return place
        return None

    def get(self, key: str, default: Any = None) -> Any:  # a Mapping's own would raise and catch an error for what is not there
        place = self._place(key) if len(key) < self._longest else None  # longer ones are not worth remembering
        return default if place is None else place

    def __getitem__(self, key: str) -> int:
        place: int | None = self.get(key)
        if place is None:
            raise KeyError(key)
        return place

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._strings))

    def __len__(self) -> int:
        return self._distinct


def index_of(strings: Sequence[str]) -> Mapping[str, int]:
    """The place of each string, the first of equals."""
    if isinstance(strings, JoinedStrings):
        return StringIndex(strings)
    return {string: place for place, string in reversed(list(enumerate(strings)))}


def _hashes(strings: JoinedStrings, longest: int) -> NDArray[np.uint64]:
    bounds = np.array(strings.bounds)
    utf8 = np.frombuffer(strings.utf8 + b"\0", np.uint8)[: bounds[-1] + 1]
    powers = np.array([FACTOR * pow(256, place, PRIME) % PRIME for place in range(longest)], np.uint64)
    found = np.empty(len(strings), np.uint64)
    for first in range(0, len(strings), _TOGETHER):
        ends = bounds[first : first + _TOGETHER + 1]
        starts = ends[:-1] - ends[0]
        places = np.arange(ends[-1] - ends[0]) - np.repeat(starts, np.diff(ends))
        found[first : first + len(starts)] = np.add.reduceat(utf8[ends[0] + 1 : ends[-1] + 1] * powers[places], starts)
    found %= np.uint64(PRIME)
    return found
