"""What a render of a chat template may use: time, characters, and operations that make much out of little, refused before they begin."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from string import Formatter
from typing import Any

MAX_SECONDS = 5.0  # of the rendering thread's own time: a busy machine fails nobody
MAX_CHARACTERS = 1 << 24  # written by one render, or held by one value
MAX_WIDTH = 10_000  # of a padding, an indentation, a group


class BudgetExceeded(Exception):
    """The template used more than a render may."""


class Budget(threading.local):
    """What is left of the time and the characters of the render on this thread."""

    def begin(self) -> None:
        self._deadline = time.thread_time() + MAX_SECONDS
        self._characters = MAX_CHARACTERS

    def tick(self, characters: int = 0) -> None:
        self._characters -= characters
        if self._characters < 0:
            raise BudgetExceeded(f"it writes more than {MAX_CHARACTERS} characters")
        if time.thread_time() > self._deadline:
            raise BudgetExceeded(f"it runs for more than {MAX_SECONDS:g} s")

    def allow(self, size: int) -> None:
        if size > MAX_CHARACTERS:
            raise BudgetExceeded(f"it builds a value of more than {MAX_CHARACTERS} characters")

    def check_width(self, width: int) -> None:
        if abs(width) > MAX_WIDTH:
            raise BudgetExceeded(f"it asks for a width of {width}, the most is {MAX_WIDTH}")


NODE = 32  # what an item counts besides its text: about its share of memory, in characters


def extent(value: Any, most: int = MAX_CHARACTERS, known: dict[int, int] | None = None) -> int:
    """About how many characters a value has when it is written, or something over `most`: shared parts count as often as they occur.

    They are walked through once: ``known`` has the extents of the containers met so far, by identity.
    """
    if isinstance(value, str | bytes | range):
        return len(value)
    if not isinstance(value, Mapping | list | tuple | set | frozenset):
        return NODE
    known = {} if known is None else known
    if id(value) not in known:
        size = NODE
        for item in chain.from_iterable(value.items()) if isinstance(value, Mapping) else value:
            if size > most:
                break
            size += extent(item, most - size, known)
        known[id(value)] = size
    return known[id(value)]


# Filters and methods whose result can be far longer than what they are given.
AMPLIFIERS = frozenset(
    {"batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "pprint", "replace", "rjust", "slice", "string"}
    | {"sum", "to_bytes", "tojson", "translate", "truncate", "urlize", "wordwrap", "xmlattr", "zfill"}
)


def check_amplifier(budget: Budget, name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Refuse a call whose result would be too long; called before it is made."""
    texts = [argument for argument in arguments if isinstance(argument, str)]
    for argument in arguments:
        if isinstance(argument, int):
            budget.check_width(argument)
    factors = [abs(argument) if isinstance(argument, int) else extent(argument) for argument in arguments]
    if name in ("format", "format_map"):
        check_format(budget, str(value), arguments)
    elif name == "replace" and isinstance(value, str) and len(texts) == 2:
        budget.allow(len(value) + value.count(texts[0]) * len(texts[1]))
    elif name == "join":
        pieces = arguments[0] if isinstance(value, str) and arguments else value
        separator = value if isinstance(value, str) and arguments and not isinstance(arguments[0], str) else "".join(texts)
        if isinstance(pieces, list | tuple | set | Mapping | range | str):
            budget.allow(extent(pieces) + len(pieces) * len(separator))
    elif name in ("center", "ljust", "rjust", "truncate", "zfill"):  # which add that much at most
        budget.allow(extent(value) + sum(factors))
    else:
        budget.allow(extent(value) * max([1, *factors]))


# A width of five digits, or one that is computed, behind a % or behind what may be the end of a name in brackets.
WIDE_PERCENT = re.compile(r"[%)][^a-zA-Z%)]*(?:\d{5}|\*)")
WIDE_SPECIFICATION = re.compile(r"\d{5}|\{")


def check_format(budget: Budget, template: str, arguments: Sequence[Any]) -> None:
    """Refuse widths that are large, or given by an argument, and fields that repeat a long argument."""
    fields = template.count("{") + template.count("%")
    budget.allow(len(template) + fields * max([0, *map(extent, arguments)]))
    if WIDE_PERCENT.search(template) or any(map(WIDE_SPECIFICATION.search, specifications(template))):
        raise BudgetExceeded("it formats a value to a width that is large or computed")


def specifications(template: str) -> Iterator[str]:
    """What `str.format` would read as the forms of fields, up to its first error."""
    with suppress(ValueError):
        for _, _, specification, _ in Formatter().parse(template):
            yield specification or ""
