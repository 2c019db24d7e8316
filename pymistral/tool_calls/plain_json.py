"""Models whose chat template knows no tools: they are told of them in the system prompt, and answer with plain JSON."""

from __future__ import annotations

import json
import re
from typing import Any

from .dialect import CallTrigger, Dialect, Handlers, Schemas, alternatives, json_call, with_system
from .llama import bare_calls, bare_triggers
from .reading import Reading, Scanner

INSTRUCTIONS = """You can call functions. These are their JSON schemas:
{functions}

To call one, answer with nothing but JSON in this form, one line for each call:
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
You are then told the result. If no function is needed, answer in plain text."""


AFTER_RESULTS = "\n\nIf you need no further call, answer in plain words."  # else a small model repeats its call


class PlainJson(Dialect):
    """``{"name": ..., "arguments": {...}}``, one after the other."""

    @property
    def takes_system(self) -> bool:
        """Whether the template takes a system message: Gemma 2 and the first Mistral refuse it."""
        if "system" not in self.source:
            return "raise_exception" not in self.source
        return re.search(r"system role not supported", self.source, re.IGNORECASE) is None

    def read(self, scanner: Scanner, tools: Schemas) -> Reading:
        if tools and self.reasoning is None:
            yield from bare_calls(scanner, tools)
        elif tools:
            yield from self._read_thought_and_calls(scanner, tools)
        yield from super().read(scanner, {})

    def _read_thought_and_calls(self, scanner: Scanner, tools: Schemas) -> Reading:
        assert self.reasoning is not None
        yield from scanner.skip_space()
        yield from scanner.need(len(self.reasoning.begin))
        if scanner.text.startswith(self.reasoning.begin):
            scanner.take(len(self.reasoning.begin))
            yield from self._read_reasoning(scanner)
        yield from bare_calls(scanner, tools)

    def handlers(self, tools: Schemas) -> Handlers:
        return {}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        triggers = bare_triggers(schemas, "arguments")
        if self.reasoning is None:
            return triggers
        end = re.escape(self.reasoning.end)
        return [*triggers, *(CallTrigger(end + trigger.pattern, trigger.lark) for trigger in triggers)]

    def required(self, schemas: Schemas) -> str:
        # One only: a model that was not trained for calls would not know when to stop.
        return f"start: {alternatives(schemas, json_call())}"

    def adapt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], Any]:
        if self.tells_tools:
            return super().adapt(messages, tools)
        messages = _as_turns(messages)
        if tools:
            functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            tell = with_system if self.takes_system else _before_the_first
            messages = tell(messages, INSTRUCTIONS.format(functions=functions))
        return messages, None


def _before_the_first(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    first, *others = messages
    return [{**first, "content": f"{text}\n\n{first['content']}"}, *others]


def _as_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls as the model wrote them, results as the user's words: all results of a turn in one message, since turns must alternate."""
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    results = False
    for message in messages:
        if message.get("tool_calls"):
            functions = [call["function"] for call in message["tool_calls"]]
            names |= {call.get("id", ""): call["function"]["name"] for call in message["tool_calls"]}
            calls = [json.dumps({"name": f["name"], "arguments": f["arguments"]}, ensure_ascii=False) for f in functions]
            turns.append({"role": message["role"], "content": "\n".join([*filter(None, [message.get("content")]), *calls])})
        elif message["role"] == "tool":
            text = f"Result of {names.get(message.get('tool_call_id', ''), 'the function')}: {message['content']}"
            if results:
                turns[-1]["content"] = f"{turns[-1]['content'].removesuffix(AFTER_RESULTS)}\n{text}{AFTER_RESULTS}"
            else:
                turns.append({"role": "user", "content": text + AFTER_RESULTS})
        else:
            turns.append(message)
        results = message["role"] == "tool"
    return turns
