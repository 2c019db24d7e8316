"""Qwen3-Coder, Qwen 3.5 and others that learned from them: bare text in tags, ``<function=name>`` and ``<parameter=key>``."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

from .dialect import CallTrigger, Handlers, Schemas, quoted
from .hermes import BEGIN, END, Hermes, read_call
from .notation import Notation, argument_types, options, typed
from .reading import Reading, Scanner

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class QwenCoder(Hermes):
    """``<tool_call>\\n<function=name>\\n<parameter=key>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>``, one after the other.

    A value's type is not written: the tool's schema tells it.
    """

    def handlers(self, tools: Schemas) -> Handlers:
        def read_tagged(scanner: Scanner) -> Reading:
            yield from scanner.skip_space()
            yield from scanner.need(len(FUNCTION))
            if not scanner.text.startswith(FUNCTION):
                yield from read_call(scanner)  # these models know the form of their elders, too
                return
            scanner.take(len(FUNCTION))
            yield from _read_function(scanner, tools, BEGIN + FUNCTION)

        def read_bare(scanner: Scanner) -> Reading:
            yield from _read_function(scanner, tools, FUNCTION)

        return {BEGIN: read_tagged, FUNCTION: read_bare}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        return [CallTrigger(BEGIN, f"start: {self._body(schemas)}")]

    def required(self, schemas: Schemas) -> str:
        call, _, rules = self._body(schemas).partition("\n")
        return f'start: call ("\\n" call)*\ncall: {self.mark(BEGIN)} {call}\n{rules}'

    def _body(self, schemas: Schemas) -> str:
        notation = _Values()
        calls = [
            f"({quoted(f'{FUNCTION}{name}>')} {_parameters(notation, schema)} {quoted(f'{chr(10)}{FUNCTION_END}')})"
            for name, schema in schemas.items()
        ]
        return f'"\\n"? ({" | ".join(calls)}) "\\n" {self.mark(END)}\n' + "\n".join(notation.rules)


def _parameters(notation: _Values, schema: Any) -> str:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not properties:
        closed = isinstance(schema, dict) and schema.get("additionalProperties", True) is False
        return '""' if closed else "any_parameter*"
    required = set(schema.get("required", ()))
    parameters = (
        f"({quoted(f'{chr(10)}{PARAMETER}{key}>{chr(10)}')} {notation.bare(sub, schema)})" + ("" if key in required else "?")
        for key, sub in properties.items()
    )
    return " ".join(parameters)


class _Values(Notation):
    """Values as they stand between tags: strings bare, up to the end tag, and the rest as in JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.any_text = self._text_rule("*")
        self.rules.append(f'any_parameter: "\\n{PARAMETER}" NAME ">\\n" {self.any_text}\nNAME: /[^<>\\s]+/')

    def bare(self, schema: Any, root: Any) -> str:
        """A value that follows a schema, and the end tag."""
        return "(" + " | ".join(self._bare(option, root) for option in options(schema, root)) + ")"

    def _bare(self, schema: Any, root: Any) -> str:
        end = quoted(f"\n{PARAMETER_END}")
        if "const" in schema:
            value = schema["const"]
            return f"({quoted(value) if isinstance(value, str) else self.constant(value)} {end})" if value != "" else end
        if "type" not in schema:
            return self.any_text
        if schema["type"] == "boolean":  # some templates show Python's words
            return f'(("true" | "false" | "True" | "False") {end})'
        if schema["type"] == "string":
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            return self._text_rule(f"{{{least},{most}}}") if least or most != "" else self.any_text
        return f"({self.value(schema, root)} {end})"

    def _text_rule(self, count: str) -> str:
        name = f"text_{len(self.rules)}"
        self.rules.append(f"{name}[suffix={quoted(f'{chr(10)}{PARAMETER_END}')}]: /(.|\\n){count}/")
        return name


def _read_function(scanner: Scanner, tools: Schemas, opening: str) -> Reading:
    """What follows ``<function=``, its arguments passed on as JSON."""
    head: list[str] = []
    taken: list[str] = []
    yield from scanner.until((">", "\n"), head.append, taken)
    name = "".join(head).strip()
    if taken != [">"] or not name:
        scanner.plain(opening + "".join(head + taken))
        return
    scanner.call(name)
    before = "{"
    while True:
        taken.clear()
        yield from scanner.until((PARAMETER, FUNCTION_END, END), lambda text: None, taken)
        if taken != [PARAMETER]:
            break
        key: list[str] = []
        yield from scanner.until((">",), key.append, [])
        argument = "".join(key).strip()
        scanner.arguments(f"{before}{json.dumps(argument, ensure_ascii=False)}: ")
        before = ", "
        if not (yield from _read_value(scanner, argument_types(tools, name, argument))):
            return
    if taken:
        scanner.arguments("{}" if before == "{" else "}")
    if taken == [FUNCTION_END]:
        yield from scanner.skip_space()
        yield from scanner.need(len(END))
        scanner.text = scanner.text.removeprefix(END)
    yield from scanner.skip_space()


def _read_value(scanner: Scanner, types: frozenset[str]) -> Generator[None, None, bool]:
    """A value up to its end tag; whether there was one. What can only be a string is passed on while it comes."""
    yield from scanner.need(1)
    own_lines = scanner.text.startswith("\n")
    scanner.text = scanner.text.removeprefix("\n")
    if types == {"string"}:
        scanner.arguments('"')
        ended = yield from _value_text(scanner, own_lines, lambda text: scanner.arguments(json.dumps(text, ensure_ascii=False)[1:-1]))
        scanner.arguments('"' if ended else "")
    else:
        parts: list[str] = []
        ended = yield from _value_text(scanner, own_lines, parts.append)
        scanner.arguments(json.dumps(typed("".join(parts), types), ensure_ascii=False))
    return ended


def _value_text(scanner: Scanner, own_lines: bool, emit: Callable[[str], None]) -> Generator[None, None, bool]:
    """The text up to the end tag; whether there was one. In a value on lines of its own, a tag within a line may be part of the text."""
    while True:
        taken: list[str] = []
        yield from scanner.until((f"\n{PARAMETER_END}", PARAMETER_END), emit, taken)
        if taken != [PARAMETER_END] or not own_lines or (yield from _value_ends(scanner)):
            return bool(taken)
        emit(PARAMETER_END)


def _value_ends(scanner: Scanner) -> Generator[None, None, bool]:
    """Whether what follows, if anything, is what follows a value. Takes nothing."""
    marks = (PARAMETER, FUNCTION_END, END)
    while not (rest := scanner.text.lstrip()).startswith(marks):
        if scanner.ended or (rest and not any(mark.startswith(rest) for mark in marks)):
            return not rest
        yield
    return True
