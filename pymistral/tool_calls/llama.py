"""Llama 3.1 to 3.3: a bare JSON object as the whole answer, or one after ``<|python_tag|>``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from .dialect import CallTrigger, Dialect, Handlers, Schemas, alternatives, arguments, json_call
from .json_calls import call_object
from .reading import Reading, Scanner

TAG = "<|python_tag|>"


class Llama(Dialect):
    """``{"name": ..., "parameters": {...}}``; where there are several, with ``;`` between them."""

    marks: Sequence[str] = (TAG,)
    key = "parameters"

    def read(self, scanner: Scanner, tools: Schemas) -> Reading:
        if tools:
            yield from bare_calls(scanner, tools)
        yield from super().read(scanner, tools)

    def handlers(self, tools: Schemas) -> Handlers:
        def read_call(scanner: Scanner) -> Reading:
            yield from scanner.skip_space()
            if not (yield from call_object(scanner)):
                scanner.plain(TAG)
                return
            yield from bare_calls(scanner, tools)

        return {TAG: read_call}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        return [
            CallTrigger(re.escape(TAG), f"start: {alternatives(schemas, json_call(self.key))}"),
            *bare_triggers(schemas, self.key),
        ]

    def required(self, schemas: Schemas) -> str:
        return f"start: {alternatives(schemas, json_call(self.key))}"


def bare_triggers(schemas: Schemas, key: str, markup: str = re.escape(TAG)) -> list[CallTrigger]:
    """An object that begins with the name of a tool is taken for a call of it; any other JSON is an answer like any other."""
    return [
        CallTrigger(
            rf'[\s;,]*(?:```(?:json)?\s*)?(?:{markup}\s*)?\{{\s*"name"\s*:\s*{re.escape(json.dumps(name, ensure_ascii=False))}',
            f"start: {json_call(key, after_name=True)(name, arguments(schema))}",
            at_start=True,
        )
        for name, schema in schemas.items()
    ]


_LEAD = re.compile(r"[\s;,]*(?:```(?:json)?\s*)?(?=\{)")
_TAIL = re.compile(r"\s*```")


def bare_calls(scanner: Scanner, tools: Schemas) -> Reading:
    """Take calls that stand here one after the other, without markup or in a code fence."""
    while True:
        lead: list[re.Match[str]] = []
        yield from _lead(scanner, lead)
        if not lead:
            return
        before = scanner.take(lead[0].end())
        if not (yield from call_object(scanner, tools.__contains__)):
            scanner.text = before + scanner.text
            return
        if "```" in before:
            yield from scanner.match(_TAIL, 64, [])
        yield from _trailing_space(scanner)


def _lead(scanner: Scanner, into: list[re.Match[str]]) -> Reading:
    """Look whether a JSON object follows, at most behind a fence; take nothing."""
    while True:
        if match := _LEAD.match(scanner.text):
            into.append(match)
            return
        rest = scanner.text.lstrip(" \t\r\n;,")
        if scanner.ended or (rest and not "```json".startswith(rest) and not re.fullmatch(r"```(?:json)?\s*", rest)):
            return
        yield


def _trailing_space(scanner: Scanner) -> Reading:
    """White space at the end of the answer goes; before more text it stays, for what reads that."""
    while not scanner.text.strip() and not scanner.ended:
        yield
    if not scanner.text.strip():
        scanner.text = ""
