"""Hermes 2 and 3, Qwen 2.5 and 3, and many others: JSON objects in ``<tool_call>`` tags."""

from __future__ import annotations

from .dialect import CallTrigger, Dialect, Handlers, Schemas, alternatives, json_call
from .json_calls import call_object
from .reading import Reading, Scanner

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(Dialect):
    """``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>``, one after the other."""

    marks = (BEGIN, END)

    def handlers(self, tools: Schemas) -> Handlers:
        return {BEGIN: read_call}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        return [CallTrigger(BEGIN, f"start: {self._body(schemas)}")]

    def required(self, schemas: Schemas) -> str:
        return f'start: call ("\\n" call)*\ncall: {self.mark(BEGIN)} {self._body(schemas)}'

    def _body(self, schemas: Schemas) -> str:
        return f'"\\n"? {alternatives(schemas, json_call())} "\\n"? {self.mark(END)}'


def read_call(scanner: Scanner) -> Reading:
    if not (yield from call_object(scanner)):
        scanner.plain(BEGIN)
        return
    yield from scanner.skip_space()
    yield from scanner.need(len(END))
    scanner.text = scanner.text.removeprefix(END)
    yield from scanner.skip_space()
