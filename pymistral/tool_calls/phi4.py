"""Phi-4: an array of calls between ``<|tool_call|>`` and ``<|/tool_call|>``, or after ``functools``."""

from __future__ import annotations

import json
import re
from typing import Any

from .dialect import CallTrigger, Dialect, Handlers, Schemas, alternatives, json_call
from .json_calls import call_object
from .reading import Reading, Scanner

BEGIN, END, FUNCTOOLS = "<|tool_call|>", "<|/tool_call|>", "functools["


class Phi4(Dialect):
    """``<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>``."""

    marks = (BEGIN, END)

    @property
    def _bare(self) -> bool:
        return BEGIN not in self.source and "functools" in self.source

    def handlers(self, tools: Schemas) -> Handlers:
        return {BEGIN: _read_calls, FUNCTOOLS: _read_functools}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        return [
            CallTrigger(re.escape(BEGIN), f'start: "[" {self._list(schemas, self.mark(END))}'),
            CallTrigger(re.escape(FUNCTOOLS), f"start: {self._list(schemas, '')}"),
        ]

    def required(self, schemas: Schemas) -> str:
        if self._bare:
            return f'start: "functools[" {self._list(schemas, "")}'
        return f'start: {self.mark(BEGIN)} "[" {self._list(schemas, self.mark(END))}'

    def _list(self, schemas: Schemas, end: str) -> str:
        return f'call (", " call)* "]" {end}\ncall: {alternatives(schemas, json_call())}'

    def adapt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], Any]:
        """The template finds tools in the system message, and calls as the text that they were."""
        if re.search(r"\btool_calls\b", self.source):
            return super().adapt(messages, tools)
        messages = [_with_calls_as_text(message) for message in messages]
        if tools and re.search(r"\[['\"]tools['\"]\]|message\.tools", self.source):
            functions = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
            if not messages or messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": "You are a helpful assistant with some tools."})
            messages[0] = {**messages[0], "tools": functions}
        return messages, tools


def _with_calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
    text = f"{message.get('content') or ''}{BEGIN}{json.dumps(calls, ensure_ascii=False)}{END}"
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}


def _read_calls(scanner: Scanner) -> Reading:
    yield from scanner.skip_space()
    array = scanner.text[:1] == "["
    scanner.text = scanner.text.removeprefix("[")
    yield from _read_list(scanner, BEGIN + "[" * array)
    yield from scanner.need(len(END))
    scanner.text = scanner.text.removeprefix(END)
    yield from scanner.skip_space()


def _read_functools(scanner: Scanner) -> Reading:
    yield from _read_list(scanner, FUNCTOOLS)


def _read_list(scanner: Scanner, opening: str) -> Reading:
    while True:
        yield from scanner.skip_space()
        if not (yield from call_object(scanner)):
            scanner.plain(opening)
            return
        opening = ""
        yield from scanner.skip_space()
        symbol = scanner.take(1)
        if symbol != ",":
            scanner.text = symbol.removeprefix("]") + scanner.text
            yield from scanner.skip_space()
            return
