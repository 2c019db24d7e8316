"""Mistral: ``[TOOL_CALLS]`` and an array of objects (tokenizers v2 to v7), or names with ``[ARGS]`` (v11 and later)."""

from __future__ import annotations

import itertools
import re
from typing import Any

from .dialect import CallTrigger, Dialect, Handlers, Schemas, alternatives, json_call, quoted
from .json_calls import arguments, call_object
from .reading import Reading, Scanner

BEGIN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class Mistral(Dialect):
    """``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``."""

    marks = (BEGIN, ARGUMENTS, CALL_ID)

    def handlers(self, tools: Schemas) -> Handlers:
        return {BEGIN: _read_calls}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        return [CallTrigger(re.escape(BEGIN), f"start: {self._body(schemas)}")]

    def required(self, schemas: Schemas) -> str:
        return f"start: {self.mark(BEGIN)} {self._body(schemas)}"

    def adapt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], Any]:
        messages, tools = super().adapt(messages, tools)
        return with_call_ids(messages), tools

    def _body(self, schemas: Schemas) -> str:
        call = alternatives(schemas, json_call())
        return f'" "? "[" call (", " call)* "]"\ncall: {call}'


class MistralNamed(Mistral):
    """``[TOOL_CALLS]name[ARGS]{...}``, one after the other; v11 has ``[CALL_ID]`` and an id behind the name."""

    def required(self, schemas: Schemas) -> str:
        return f"start: call+\ncall: {self.mark(BEGIN)} {self._body(schemas)}"

    def _body(self, schemas: Schemas) -> str:
        call_id = f"({self.mark(CALL_ID)} /[a-zA-Z0-9]{{9}}/)?" if CALL_ID in self.source else ""
        return alternatives(schemas, lambda name, arguments: f"{quoted(name)} {call_id} {self.mark(ARGUMENTS)} {arguments}")


def with_call_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a number in place of each id that has not the form that the templates demand, or is missing.

    It is the same whenever the conversation is shown, so that its beginning stays in the prefix cache.
    """
    numbers = itertools.count(1)
    new_ids: dict[str, str] = {}
    waiting: list[str] = []
    turns = []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                number, given = f"{next(numbers):09}", str(call.get("id"))
                new_id = given if re.fullmatch("[a-zA-Z0-9]{9}", given) else number
                new_ids[given] = new_id
                calls.append({**call, "id": new_id})
            message = {**message, "tool_calls": calls}
            waiting = [call["id"] for call in calls]
        elif message["role"] == "tool" and waiting:
            known = new_ids.get(message.get("tool_call_id", ""))
            answered = known if known in waiting else waiting[0]
            waiting.remove(answered)
            message = {**message, "tool_call_id": answered}
        turns.append(message)
    return turns


def _read_calls(scanner: Scanner) -> Reading:
    yield from scanner.skip_space()
    while not scanner.ended and any(mark.startswith(scanner.text) and mark != scanner.text for mark in (ARGUMENTS, CALL_ID)):
        yield  # an array and these marks begin alike
    if scanner.text[:1] == "[" and not scanner.text.startswith((ARGUMENTS, CALL_ID)):
        yield from _read_array(scanner)
    elif scanner.text[:1] == "{":
        if not (yield from call_object(scanner)):
            scanner.plain(BEGIN)
    else:
        yield from _read_named(scanner)


def _read_array(scanner: Scanner) -> Reading:
    opening = scanner.take(1)
    while True:
        yield from scanner.skip_space()
        if not (yield from call_object(scanner)):
            if opening:
                scanner.plain(BEGIN + opening)
            return
        opening = ""
        yield from scanner.skip_space()
        symbol = scanner.take(1)
        if symbol != ",":
            scanner.text = symbol.removeprefix("]") + scanner.text
            yield from scanner.skip_space()
            return


def _read_named(scanner: Scanner) -> Reading:
    name: list[str] = []
    taken: list[str] = []
    yield from scanner.until((ARGUMENTS, CALL_ID, "{"), name.append, taken)
    if not taken:
        scanner.plain(BEGIN + "".join(name))
        return
    scanner.call("".join(name).strip())
    if taken[0] == CALL_ID:
        yield from scanner.until((ARGUMENTS,), lambda text: None, [])
    elif taken[0] == "{":
        scanner.text = "{" + scanner.text
    yield from arguments(scanner)
    yield from scanner.skip_space()
