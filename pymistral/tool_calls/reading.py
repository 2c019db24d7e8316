"""Reading a model's answer as it comes: what is content, what is reasoning, what is a tool call.

Readers are generators over a `Scanner`: they read as if the whole text were there, and pause with ``yield`` where it is not yet. What they
find goes out as pieces as soon as it is certain, so that the pieces of a text are the same wherever the stream was cut.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import NamedTuple

Reading = Generator[None, None, None]

DEEPEST = 100
"""How deeply values may be nested."""

_ID_CHARACTERS = string.ascii_letters + string.digits


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """What the model thinks to itself."""

    text: str


class CallStart(NamedTuple):
    """The model calls a tool: its arguments follow."""

    id: str
    name: str


class CallArguments(NamedTuple):
    """More of the JSON text of the latest call's arguments."""

    text: str


Piece = Content | Reasoning | CallStart | CallArguments


def new_call_id() -> str:
    """Nine letters and digits: the only form that Mistral's templates accept, and the others do not care."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


class Scanner:
    """Text that arrives in parts, and the pieces that were found in it."""

    def __init__(self) -> None:
        self.text = ""
        """What has arrived and is not yet taken."""
        self.ended = False
        self.found: list[Piece] = []
        self._space = ""

    def take(self, count: int) -> str:
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def need(self, count: int) -> Reading:
        """Wait until there are so many characters, or no more will come."""
        while len(self.text) < count and not self.ended:
            yield

    def until(self, marks: Iterable[str], emit: Callable[[str], None], taken: list[str]) -> Reading:
        """Emit text up to the first of some marks, which is added to `taken`; up to the end if none comes."""
        marks = sorted(marks, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, marks))) if marks else None
        while True:
            match = pattern.search(self.text) if pattern else None
            if match:
                # A longer mark that begins before this one may still be on its way.
                start = self._partial(marks, match.start()) if not self.ended else match.start()
                if start >= match.start() and not self._may_grow(match, marks):
                    emit(self.take(match.start()))
                    taken.append(self.take(len(match[0])))
                    return
                emit(self.take(min(start, match.start())))
            else:
                emit(self.take(len(self.text) if self.ended else self._partial(marks, len(self.text))))
                if self.ended:
                    return
            yield

    def _partial(self, marks: Iterable[str], end: int) -> int:
        """Where an incomplete mark begins at the end of the text; `end` if none does."""
        text = self.text
        start = len(text)
        for mark in marks:
            for length in range(min(len(mark) - 1, len(text)), 0, -1):
                if text.endswith(mark[:length]):
                    start = min(start, len(text) - length)
                    break
        return min(start, end)

    def _may_grow(self, match: re.Match[str], marks: Iterable[str]) -> bool:
        rest = self.text[match.start() :]
        return not self.ended and any(len(mark) > len(rest) and mark.startswith(rest) for mark in marks)

    def match(self, pattern: re.Pattern[str], most: int, into: list[re.Match[str]]) -> Reading:
        """Take what a pattern matches at this place, waiting for `most` characters before it is given up or may be cut short."""
        while True:
            match = pattern.match(self.text)
            if match and (match.end() < len(self.text) or self.ended or len(self.text) >= most):
                self.take(match.end())
                into.append(match)
                return
            if self.ended or (not match and len(self.text) >= most):
                return
            yield

    def skip_space(self) -> Reading:
        while True:
            self.text = self.text.lstrip()
            if self.text or self.ended:
                return
            yield

    def content(self, text: str) -> None:
        """Emit content. White space waits: before a call, or at a place where one could have been, it is layout."""
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._emit(Content, kept)

    def plain(self, text: str) -> None:
        """Emit content as it is."""
        self._emit(Content, self._space + text)
        self._space = ""

    def drop_space(self) -> None:
        self._space = ""

    def keep_space(self) -> None:
        """No call follows: white space at the end is content after all."""
        self.plain("")

    def reasoning(self, text: str) -> None:
        self._emit(Reasoning, text)

    def call(self, name: str) -> None:
        self.drop_space()
        self.found.append(CallStart(new_call_id(), name))

    def arguments(self, text: str) -> None:
        self._emit(CallArguments, text)

    def _emit(self, kind: type[Content] | type[Reasoning] | type[CallArguments], text: str) -> None:
        if not text:
            return
        last = self.found[-1] if self.found else None
        if isinstance(last, kind):
            self.found[-1] = kind(last.text + text)
        else:
            self.found.append(kind(text))


class MessageReader:
    """Reads one answer.

    Parameters
    ----------
    reading
        The family's reader, over a scanner.
    """

    def __init__(self, reading: Callable[[Scanner], Reading]) -> None:
        self._scanner = Scanner()
        self._reading: Reading | None = reading(self._scanner)

    def push(self, text: str) -> list[Piece]:
        """The pieces that became certain with more text."""
        self._scanner.text += text
        return self._advance()

    def finish(self) -> list[Piece]:
        """The pieces that remain when no text follows."""
        self._scanner.ended = True
        found = self._advance()
        assert self._reading is None, "a reader waits for text after the end"
        return found

    def _advance(self) -> list[Piece]:
        if self._reading is not None:
            try:
                next(self._reading)
            except StopIteration:
                self._reading = None
        if self._reading is None and self._scanner.text:
            self._scanner.plain(self._scanner.take(len(self._scanner.text)))
        found, self._scanner.found = self._scanner.found, []
        return found


def plain_reader(scanner: Scanner) -> Reading:
    """All of it is content."""
    while True:
        scanner.plain(scanner.take(len(scanner.text)))
        if scanner.ended:
            return
        yield


def marked_reader(scanner: Scanner, handlers: Mapping[str, Callable[[Scanner], Reading]]) -> Reading:
    """Content, in which marks hand over to other readers."""
    while True:
        taken: list[str] = []
        yield from scanner.until(handlers, scanner.content, taken)
        if not taken:
            scanner.keep_space()
            return
        yield from handlers[taken[0]](scanner)


def tagged_reasoning(end: str, header: str = "") -> Callable[[Scanner], Reading]:
    """A reader of reasoning up to an end tag. Line ends around the reasoning, and before what follows it, are layout."""

    def read(scanner: Scanner) -> Reading:
        scanner.drop_space()
        if header:
            yield from scanner.need(len(header))
            scanner.text = scanner.text.removeprefix(header)
        yield from _skip_lines(scanner)
        held = [""]

        def emit(text: str) -> None:
            text = held[0] + text
            kept = text.rstrip("\n")
            held[0] = text[len(kept) :]
            scanner.reasoning(kept)

        yield from scanner.until([end], emit, [])
        yield from _skip_lines(scanner)

    return read


def _skip_lines(scanner: Scanner) -> Reading:
    while True:
        scanner.text = scanner.text.lstrip("\n")
        if scanner.text or scanner.ended:
            return
        yield
