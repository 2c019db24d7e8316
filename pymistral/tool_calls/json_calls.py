"""Reading calls that are written in JSON, while they are being written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator

from .reading import Reading, Scanner

ARGUMENT_KEYS = ("arguments", "parameters")

_PLAIN = re.compile(r'[^"\\{}\[\],:\s]+')


class Malformed(Exception):
    """What was read is no call. Its text has been given back."""


def json_value(scanner: Scanner, emit: Callable[[str], None]) -> Reading:
    """Take one JSON value, passing its text on as it comes.

    Only its extent matters here: brackets and strings. What is inside them is the model's business.
    """
    yield from scanner.need(1)
    if scanner.text[:1] not in ('"', "{", "["):
        yield from _scalar(scanner, emit)
        return
    depth, inside, escaped = 0, False, False
    while True:
        for index, character in enumerate(scanner.text):
            if inside:
                if escaped:
                    escaped = False
                elif character == "\\":
                    escaped = True
                elif character == '"':
                    inside = False
            elif character == '"':
                inside = True
            elif character in "{[":
                depth += 1
            elif character in "}]":
                depth -= 1
            if depth == 0 and not inside:
                emit(scanner.take(index + 1))
                return
        emit(scanner.take(len(scanner.text)))
        if scanner.ended:
            return
        yield


def _scalar(scanner: Scanner, emit: Callable[[str], None]) -> Reading:
    while True:
        match = _PLAIN.match(scanner.text)
        emit(scanner.take(match.end() if match else 0))
        if scanner.text or scanner.ended:
            return
        yield


def arguments(scanner: Scanner) -> Reading:
    """Take the arguments of a call whose name is known: an object, or JSON text with an object in it."""
    yield from scanner.skip_space()
    if scanner.text[:1] != '"':
        yield from json_value(scanner, scanner.arguments)
        return
    parts: list[str] = []
    yield from json_value(scanner, parts.append)
    scanner.arguments(_unquoted("".join(parts)))


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def call_object(scanner: Scanner, known: Callable[[str], bool] | None = None) -> Generator[None, None, bool]:
    """Take ``{"name": ..., "arguments": {...}}``, in any order and with other keys; also inside ``{"function": ...}``.

    The arguments are passed on while they come if the name is known by then. Returns whether it was a call; if not, all that was taken
    is given back, so that it can be read as something else.
    """
    call = _CallObject(scanner, known)
    try:
        yield from call.read()
    except Malformed:
        scanner.text = "".join(call.taken) + scanner.text
        return False
    return True


class _CallObject:
    def __init__(self, scanner: Scanner, known: Callable[[str], bool] | None) -> None:
        self.scanner, self.known = scanner, known
        self.taken: list[str] = []
        """The text so far, while nothing has been passed on."""
        self.name: str | None = None
        self.early: str | None = None
        """Arguments that came before the name."""
        self.started = False

    def read(self) -> Reading:
        yield from self._object()
        if not self.started:
            if self.name is None:
                raise Malformed
            self._start()
            self.scanner.arguments(self.early or "{}")

    def _start(self) -> None:
        assert self.name is not None
        if self.known is not None and not self.known(self.name):
            raise Malformed
        self.scanner.call(self.name)
        self.started = True
        self.taken = []

    def _take(self, text: str) -> None:
        if not self.started:
            self.taken.append(text)

    def _symbol(self, expected: str) -> Generator[None, None, str]:
        """Take white space and one of some characters."""
        yield from self.scanner.need(1)
        while self.scanner.text[:1].isspace():
            self._take(self.scanner.take(1))
            yield from self.scanner.need(1)
        symbol = self.scanner.take(1)
        self._take(symbol)
        if not symbol or symbol not in expected:
            if self.started:  # too late to be anything else: the rest is read as what it may be
                return "}"
            raise Malformed
        return symbol

    def _value(self) -> Generator[None, None, str]:
        parts: list[str] = []

        def emit(text: str) -> None:
            parts.append(text)
            self._take(text)

        yield from self._space()
        yield from json_value(self.scanner, emit)
        return "".join(parts)

    def _space(self) -> Reading:
        yield from self.scanner.need(1)
        while self.scanner.text[:1].isspace():
            self._take(self.scanner.take(1))
            yield from self.scanner.need(1)

    def _object(self) -> Reading:
        yield from self._symbol("{")
        while True:
            yield from self._space()
            if self.scanner.text[:1] == "}":
                self._take(self.scanner.take(1))
                return
            key = yield from self._value()
            if (yield from self._symbol(":")) != ":":
                return
            yield from self._member(key)
            if (yield from self._symbol(",}")) == "}":
                return

    def _member(self, key: str) -> Reading:
        name = _unquoted(key)
        if name == "function" and not self.started:
            yield from self._space()
            if self.scanner.text[:1] == "{":
                yield from self._object()
            else:  # some write the name here
                self.name = _unquoted((yield from self._value()))
        elif name == "name" and not self.started:
            self.name = _unquoted((yield from self._value()))
            if self.early is not None:
                self._start()
                self.scanner.arguments(self.early)
        elif name in ARGUMENT_KEYS and not self.started:
            if self.name is None:
                self.early = yield from self._value()
            else:
                self._start()
                yield from arguments(self.scanner)
        else:
            yield from self._value()
