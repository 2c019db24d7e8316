"""Llama 4, and Llama 3.2 where its template asks for it: a list of calls in Python's syntax, ``[get_weather(city="Paris", days=2)]``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import Any

from .dialect import CallTrigger, Handlers, Schemas, quoted
from .llama import Llama, bare_calls, bare_triggers
from .notation import Notation, argument_types, json_type, typed
from .reading import DEEPEST, Reading, Scanner

BEGIN, END = "<|python_start|>", "<|python_end|>"
ASKED_FOR = re.compile(r"\[\w+\(\w+=")
"""Templates that want such calls show one. Other templates of Llama 4 ask for JSON, and the model may answer either way."""

_KEY = re.compile(r"\s*([^\s()\[\]{}=,'\"]+)\s*=(?!=)\s*")
_KEY_BEGINS = re.compile(r"\s*[^\s()\[\]{}=,'\"]*\s*=?\s*")
_ESCAPE = re.compile(r"(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[\s\S])")
_LONGEST_ESCAPE = 11
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}


class Pythonic(Llama):
    """``[name(key=value, ...), ...]``, bare or between ``<|python_start|>`` and ``<|python_end|>``."""

    marks = (BEGIN, END)

    def handlers(self, tools: Schemas) -> Handlers:
        def read_json(scanner: Scanner) -> Reading:
            scanner.drop_space()
            yield from scanner.skip_space()
            yield from bare_calls(scanner, tools)

        return {BEGIN: read_json, END: read_json, **{f"[{name}(": _list_reader(name, tools) for name in tools}}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        grammar = _PythonCalls(schemas)
        lists = [CallTrigger(re.escape(f"[{name}("), grammar.rest_of_list(name)) for name in schemas]
        return [*lists, *bare_triggers(schemas, self.key, markup=rf"{re.escape(BEGIN)}[^<]*{re.escape(END)}")]

    def required(self, schemas: Schemas) -> str:
        return _PythonCalls(schemas).list() if ASKED_FOR.search(self.source) else super().required(schemas)


class _PythonNotation(Notation):
    true, false, null = "True", "False", "None"


class _PythonCalls:
    """Lark for calls of some tools."""

    def __init__(self, schemas: Schemas) -> None:
        notation = _PythonNotation()
        notation.rules.append('argument: NAME "=" any\nNAME: /[A-Za-z_][A-Za-z0-9_]*/')
        self.arguments = {name: _keywords(notation, schema) for name, schema in schemas.items()}
        self.call = "call: " + " | ".join(f"({quoted(f'{name}(')} {arguments} {quoted(')')})" for name, arguments in self.arguments.items())
        self.rules = "\n".join(notation.rules)

    def list(self) -> str:
        return f'start: "[" call (", " call)* "]"\n{self.call}\n{self.rules}'

    def rest_of_list(self, name: str) -> str:
        """What follows ``[name(``."""
        return f'start: {self.arguments[name]} ")" (", " call)* "]"\n{self.call}\n{self.rules}'


def _keywords(notation: Notation, schema: Any) -> str:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if properties:
        members = [(key, f"{quoted(f'{key}=')} {notation.value(sub, schema)}") for key, sub in properties.items()]
        return notation.members(members, set(schema.get("required", ())))
    if isinstance(schema, dict) and schema.get("additionalProperties", True) is False:
        return '""'
    return '(argument (", " argument)*)?'


def _list_reader(name: str, tools: Schemas) -> Callable[[Scanner], Reading]:
    """Reads what follows ``[name(``. What goes on as no call does is given back as text."""

    def read(scanner: Scanner) -> Reading:
        if not (yield from _call_follows(scanner)):
            scanner.plain(f"[{name}(")
            return
        yield from _read_call(scanner, name, tools)
        while True:
            yield from scanner.skip_space()
            symbol = scanner.take(1)
            if symbol != ",":
                scanner.text = symbol.removeprefix("]") + scanner.text
                yield from scanner.skip_space()
                return
            head: list[str] = []
            taken: list[str] = []
            yield from scanner.until(("(", "]"), head.append, taken)
            if taken != ["("]:
                return
            yield from _read_call(scanner, "".join(head).strip(), tools)

    return read


def _call_follows(scanner: Scanner) -> Generator[None, None, bool]:
    """Whether keyword arguments, or the closing parenthesis, stand here. Takes nothing."""
    while True:
        rest = scanner.text.lstrip()
        if rest.startswith(")"):
            return True
        match = _KEY.match(scanner.text)
        if match and (match.end() < len(scanner.text) or scanner.ended):
            return True
        begins = _KEY_BEGINS.match(scanner.text)
        if scanner.ended or begins is None or begins.end() < len(scanner.text):
            return False
        yield


def _read_call(scanner: Scanner, name: str, tools: Schemas) -> Reading:
    """The arguments up to the closing parenthesis, passed on as JSON."""
    scanner.call(name)
    opening = "{"
    while (yield from _call_follows(scanner)):
        yield from scanner.skip_space()
        if scanner.text.startswith(")"):
            scanner.take(1)
            scanner.arguments("{}" if opening == "{" else "}")
            return
        match = _KEY.match(scanner.text)
        assert match is not None
        scanner.take(match.end())
        scanner.arguments(f"{opening}{json.dumps(match[1], ensure_ascii=False)}: ")
        opening = ", "
        yield from _argument(scanner, argument_types(tools, name, match[1]))
        yield from scanner.skip_space()
        scanner.text = scanner.text.removeprefix(",")


def _argument(scanner: Scanner, types: frozenset[str]) -> Reading:
    """A value, as JSON. A string is passed on while it comes, unless another type than it is wanted."""
    if scanner.text[:1] in ('"', "'") and (not types or "string" in types):
        scanner.arguments('"')
        if (yield from _string(scanner, lambda text: scanner.arguments(json.dumps(text, ensure_ascii=False)[1:-1]))):
            scanner.arguments('"')
        return
    value = yield from _value(scanner)
    if isinstance(value, str):
        value = typed(value, types)
    elif types and types <= {"string"} and json_type(value) != "string":
        value = json.dumps(value, ensure_ascii=False)
    scanner.arguments(json.dumps(value, ensure_ascii=False))


def _string(scanner: Scanner, emit: Callable[[str], None]) -> Generator[None, None, bool]:
    """The text of a string literal; whether it ended."""
    quote = scanner.take(1)
    while True:
        taken: list[str] = []
        yield from scanner.until((quote, "\\"), emit, taken)
        if taken != ["\\"]:
            return bool(taken)
        yield from scanner.need(_LONGEST_ESCAPE)
        escape = _ESCAPE.match(scanner.text)
        if not escape:
            return False
        emit(_unescaped(scanner.take(escape.end())))


def _unescaped(escape: str) -> str:
    if len(escape) == 1:
        return _ESCAPES.get(escape, escape)
    codes = [int(digits, 16) for digits in re.findall(r"[uUx]?([0-9a-fA-F]+)", escape)]
    if len(codes) == 2:  # a surrogate pair, as JSON writes characters beyond the first 65,536
        return chr(0x10000 + ((codes[0] - 0xD800) << 10) + (codes[1] - 0xDC00))
    return chr(codes[0]) if codes[0] < 0x110000 and not 0xD800 <= codes[0] < 0xE000 else "\ufffd"


def _value(scanner: Scanner, depth: int = 0) -> Generator[None, None, Any]:
    """Any literal. What is none, or nested beyond reason, is the text that it is."""
    yield from scanner.skip_space()
    first = scanner.text[:1]
    if first in ('"', "'"):
        parts: list[str] = []
        yield from _string(scanner, parts.append)
        return "".join(parts)
    if first and first in "[(" and depth < DEEPEST:
        return (yield from _items(scanner, depth))
    if first == "{" and depth < DEEPEST:
        return (yield from _members(scanner, depth))
    return typed((yield from _word(scanner)).strip(), frozenset())


def _items(scanner: Scanner, depth: int) -> Generator[None, None, list[Any]]:
    end = "]" if scanner.take(1) == "[" else ")"
    items: list[Any] = []
    while True:
        yield from scanner.skip_space()
        if not scanner.text or scanner.text[0] == end:
            scanner.take(1)
            return items
        if scanner.text[0] in ",)]}:":
            scanner.take(1)
            continue
        items.append((yield from _value(scanner, depth + 1)))


def _members(scanner: Scanner, depth: int) -> Generator[None, None, dict[str, Any]]:
    scanner.take(1)
    members: dict[str, Any] = {}
    while True:
        yield from scanner.skip_space()
        if not scanner.text or scanner.text[0] == "}":
            scanner.take(1)
            return members
        if scanner.text[0] in ",)]:":
            scanner.take(1)
            continue
        key = yield from _value(scanner, depth + 1)
        yield from scanner.skip_space()
        scanner.text = scanner.text.removeprefix(":")
        members[key if isinstance(key, str) else json.dumps(key)] = yield from _value(scanner, depth + 1)


def _word(scanner: Scanner) -> Generator[None, None, str]:
    while not (match := re.search(r"[,:}\])]", scanner.text)) and not scanner.ended:
        yield
    return scanner.take(match.start() if match else len(scanner.text))
