"""FunctionGemma and Gemma 4: ``call:name{key:value}``, in a notation of their own. (Gemma 3 has none: it gets plain JSON.)"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any, NamedTuple

from .dialect import CallTrigger, Dialect, Handlers, Mark, Schemas, quoted, text_until, with_system
from .notation import Notation, typed
from .reading import DEEPEST, Reading, Scanner


class Markup(NamedTuple):
    begin: str
    end: str
    quote: str


FUNCTION_GEMMA = Markup("<start_function_call>", "<end_function_call>", "<escape>")
FUNCTION_GEMMA_SYSTEM = "You are a model that can do function calling with the following functions"  # as it was trained
MARKUPS = (FUNCTION_GEMMA, Markup("<|tool_call>", "<tool_call|>", '<|"|>'))


class Gemma(Dialect):
    """``<|tool_call>call:name{city:<|"|>Paris<|"|>,days:2}<tool_call|>``, one after the other."""

    def __init__(self, source: str, mark: Mark) -> None:
        super().__init__(source, mark)
        self.markup = next(markup for markup in MARKUPS if markup.begin in source)
        self.marks = self.markup

    def handlers(self, tools: Schemas) -> Handlers:
        return {self.markup.begin: self._read_call}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        return [CallTrigger(re.escape(self.markup.begin), f"start: {self._calls(schemas)}")]

    def required(self, schemas: Schemas) -> str:
        rules = self._calls(schemas)
        call, _, rest = rules.partition("\n")
        return f"start: call+\ncall: {self.mark(self.markup.begin)} {call}\n{rest}"

    def _calls(self, schemas: Schemas) -> str:
        notation = _Notation(self.mark(self.markup.quote))
        calls = " | ".join(f"({quoted(f'call:{name}')} {notation.value(schema, schema)})" for name, schema in schemas.items())
        return f"({calls}) {self.mark(self.markup.end)}\n" + "\n".join(notation.rules)

    def adapt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], Any]:
        """FunctionGemma calls functions only where a message before the user's says that it can."""
        messages, tools = super().adapt(messages, tools)
        if tools and self.markup is FUNCTION_GEMMA and messages[0]["role"] not in ("system", "developer"):
            messages = with_system(messages, FUNCTION_GEMMA_SYSTEM)
        return messages, tools

    def _read_call(self, scanner: Scanner) -> Reading:
        head: list[str] = []
        taken: list[str] = []
        yield from scanner.until(("{",), head.append, taken)
        name = "".join(head).strip().removeprefix("call:").strip()
        if not taken:
            scanner.plain(self.markup.begin + "".join(head))
            return
        scanner.call(name)
        value = yield from _Values(scanner, self.markup.quote).object()
        scanner.arguments(json.dumps(value, ensure_ascii=False))
        yield from scanner.until((self.markup.end,), lambda text: None, [])
        yield from scanner.skip_space()


class _Values:
    """Reads the notation: bare keys, strings between quote tokens, the rest as in JSON."""

    def __init__(self, scanner: Scanner, quote: str) -> None:
        self.scanner, self.quote = scanner, quote

    def object(self, depth: int = 0) -> Generator[None, None, dict[str, Any]]:
        """The members after an opening brace."""
        members: dict[str, Any] = {}
        while True:
            yield from self.scanner.skip_space()
            if not self.scanner.text or self.scanner.text[0] == "}":
                self.scanner.take(1)
                return members
            if self.scanner.text[0] == ",":
                self.scanner.take(1)
                continue
            key = yield from self._until((":",))
            members[key.strip().strip('"')] = yield from self.value(depth + 1)

    def array(self, depth: int) -> Generator[None, None, list[Any]]:
        items: list[Any] = []
        while True:
            yield from self.scanner.skip_space()
            if not self.scanner.text or self.scanner.text[0] == "}":  # which ends what the array is in
                return items
            if self.scanner.text[0] == "]":
                self.scanner.take(1)
                return items
            if self.scanner.text[0] == ",":
                self.scanner.take(1)
                continue
            items.append((yield from self.value(depth + 1)))

    def value(self, depth: int) -> Generator[None, None, Any]:
        yield from self.scanner.skip_space()
        yield from self.scanner.need(len(self.quote))
        if self.scanner.text.startswith(self.quote):
            self.scanner.take(len(self.quote))
            return (yield from self._until((self.quote,)))
        if self.scanner.text[:1] == "{" and depth < DEEPEST:
            self.scanner.take(1)
            return (yield from self.object(depth))
        if self.scanner.text[:1] == "[" and depth < DEEPEST:
            self.scanner.take(1)
            return (yield from self.array(depth))
        return typed((yield from self._word()), frozenset())

    def _word(self) -> Generator[None, None, str]:
        while not (match := re.search(r"[,}\]]", self.scanner.text)) and not self.scanner.ended:
            yield
        return self.scanner.take(match.start() if match else len(self.scanner.text)).strip()

    def _until(self, marks: tuple[str, ...]) -> Generator[None, None, str]:
        parts: list[str] = []
        yield from self.scanner.until(marks, parts.append, [])
        return "".join(parts)


class _Notation(Notation):
    """Bare keys, no blanks, and strings between quote tokens, of which no length is kept."""

    comma = ","

    def __init__(self, quote: str) -> None:
        self.quote = quote
        super().__init__()

    def string_rules(self) -> list[str]:
        text, rule = text_until(self.quote, "text")
        return [f"string: {self.quote} {text}\n{rule}", 'member: KEY ":" any\nKEY: /[A-Za-z_][A-Za-z0-9_]*/']

    def string(self, schema: Any) -> str:
        return "string"

    def key(self, name: str) -> str:
        return quoted(f"{name}:")

    def constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"({self.quote} {quoted(value)} {self.quote})" if value else f"({self.quote} {self.quote})"
        return super().constant(value)
