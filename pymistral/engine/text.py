"""From tokens to text that may be shown: incremental decoding and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from .types import DecodeStream


class TextStream:
    """The text of one choice. Holds back whatever may still turn out to be the beginning of a stop string."""

    __slots__ = ("_decoder", "_held", "_pieces", "matched", "stops")

    def __init__(self, decoder: DecodeStream, stops: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self.stops = tuple(stops)
        self._pieces: list[str] = []
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def push(self, token: int) -> str:
        """Add a token; return the text that became certain."""
        text = self._decoder.step(token)
        if not text:
            return ""
        if self.stops:
            text = self._filter(text)
        if text:
            self._pieces.append(text)
        return text

    def finish(self) -> str:
        """Return what was held back, once no token follows."""
        if self.matched is not None:
            return ""
        text = self._decoder.flush()
        if self.stops:
            text = self._filter(text)
            if self.matched is None:
                text += self._held
            self._held = ""
        if text:
            self._pieces.append(text)
        return text

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def _filter(self, text: str) -> str:
        text = self._held + text
        first = len(text)
        for stop in self.stops:
            found = text.find(stop)
            if 0 <= found < first:
                first, self.matched = found, stop
        if self.matched is not None:
            self._held = ""
            return text[:first]
        held = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How long the longest end of the text is that a stop string begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
