"""DeepSeek V3 and R1 (a code fence for the arguments), V3.1 (none)."""

from __future__ import annotations

import json
import re
from typing import Any

from .dialect import CallTrigger, Dialect, Handlers, Schemas, alternatives, quoted, with_system
from .json_calls import arguments
from .reading import Reading, Scanner

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```"

# The headings are those of the model card of V3.1, whose template leaves the tools to the system prompt.
INSTRUCTIONS = """## Tools
You have access to the following tools:

{functions}

To call tools, use exactly this format:
{call}"""
_CALLS_OR_TEXT = re.compile(r"== 'assistant' and message\['content'\] is none")


class DeepSeek(Dialect):
    """``function<sep>name``, then the arguments in a code fence; V3.1: ``name<sep>{...}``."""

    marks = (CALLS_BEGIN, CALLS_END, BEGIN, SEPARATOR, END)

    @property
    def fenced(self) -> bool:
        return FENCE in self.source

    def handlers(self, tools: Schemas) -> Handlers:
        return {CALLS_BEGIN: _layout, CALLS_END: _layout, BEGIN: _read_call}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        return [CallTrigger(BEGIN, f"start: {self._body(schemas)}")]

    def required(self, schemas: Schemas) -> str:
        between = '"\\n"? ' if self.fenced else ""
        return (
            f"start: {self.mark(CALLS_BEGIN)} call ({between}call)* {self.mark(CALLS_END)}\ncall: {self.mark(BEGIN)} {self._body(schemas)}"
        )

    def _body(self, schemas: Schemas) -> str:
        def call(name: str, arguments: str) -> str:
            if self.fenced:
                head = f"{quoted('function')} {self.mark(SEPARATOR)} {quoted(f'{name}{chr(10)}{FENCE}json{chr(10)}')}"
                return f"{head} {arguments} {quoted(f'{chr(10)}{FENCE}')} {self.mark(END)}"
            return f"{quoted(name)} {self.mark(SEPARATOR)} {arguments} {self.mark(END)}"

        return alternatives(schemas, call)

    def adapt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], Any]:
        """The templates of R1 and V3.1 say nothing of tools; that of R1 shows the calls of a message only if it has no text."""
        messages = [part for message in messages for part in self._parts(message)]
        if tools and not self.tells_tools:
            head, foot = (f"function{SEPARATOR}NAME\n{FENCE}json\n", f"\n{FENCE}") if self.fenced else (f"NAME{SEPARATOR}", "")
            call = f"{CALLS_BEGIN}{BEGIN}{head}ARGUMENTS{foot}{END}{CALLS_END}"
            messages = with_system(messages, INSTRUCTIONS.format(functions="\n\n".join(map(_described, tools)), call=call))
        return messages, tools

    def _parts(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        if not message.get("tool_calls") or not _CALLS_OR_TEXT.search(self.source):
            return [message]
        text = {key: value for key, value in message.items() if key != "tool_calls"}
        return [*([text] if message["content"] else []), {**message, "content": None}]


def _described(tool: dict[str, Any]) -> str:
    function = tool["function"]
    parameters = json.dumps(function.get("parameters", {}), ensure_ascii=False)
    return f"### {function['name']}\nDescription: {function.get('description', '')}\n\nParameters: {parameters}"


def _layout(scanner: Scanner) -> Reading:
    scanner.drop_space()
    yield from scanner.skip_space()


def _read_call(scanner: Scanner) -> Reading:
    head: list[str] = []
    taken: list[str] = []
    yield from scanner.until((SEPARATOR,), head.append, taken)
    if not taken:
        scanner.plain(BEGIN + "".join(head))
        return
    name = "".join(head).strip()
    if name == "function":
        line: list[str] = []
        yield from scanner.until(("\n", "{"), line.append, taken)
        name = "".join(line).strip()
        if taken[-1] == "{":
            scanner.text = "{" + scanner.text
        yield from _skip_fence(scanner)
    scanner.call(name)
    yield from arguments(scanner)
    yield from scanner.until((END,), lambda text: None, [])
    yield from scanner.skip_space()


def _skip_fence(scanner: Scanner) -> Reading:
    """Take what stands before the arguments."""
    taken: list[str] = []
    yield from scanner.until(("{", '"'), lambda text: None, taken)
    scanner.text = "".join(taken) + scanner.text
