"""What all families have in common: how a family writes tool calls and reasoning, in and out."""

from __future__ import annotations

import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..requests.json_schema import LAYOUT
from .reading import MessageReader, Reading, Scanner, marked_reader, plain_reader, tagged_reasoning

Schemas = Mapping[str, Any]
"""The JSON schema of each tool's arguments, by the tool's name."""
Handlers = dict[str, Callable[[Scanner], Reading]]
Mark = Callable[[str], str]
"""How Lark spells some markup: as the special token that it is, or as text."""


class CallTrigger(NamedTuple):
    """Where a call begins in free text, and the grammar of what follows."""

    pattern: str
    lark: str
    at_start: bool = False


@dataclass(frozen=True)
class ReasoningTags:
    """How a family marks its reasoning."""

    begin: str
    end: str
    header: str = ""
    """What may stand at its beginning, and is layout."""


REASONING_TAGS = (
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<|channel>", "<channel|>", "thought\n"),
)


class Dialect(ABC):
    """How one family of models writes tool calls.

    Parameters
    ----------
    source
        The chat template, whose markup tells what the model was trained on.
    mark
        How Lark spells markup of this vocabulary.
    """

    marks: Sequence[str] = ()
    """The family's markup: special tokens of these names stay in the text."""

    def __init__(self, source: str, mark: Mark) -> None:
        self.source, self.mark = source, mark
        self.reasoning = next((tags for tags in REASONING_TAGS if tags.begin in source or tags.end in source), None)

    def keep(self, calls: bool) -> tuple[str, ...]:
        """The special tokens that must stay in the text, with and without calls to look for."""
        return (*(self.marks if calls else ()), *((self.reasoning.begin, self.reasoning.end) if self.reasoning else ()))

    def reader(self, tools: Schemas, *, reasons: bool = False) -> MessageReader:
        """A reader for one answer.

        Parameters
        ----------
        tools
            The tools that may be called: the JSON schema of each one's arguments, by its name.
        reasons
            Whether the prompt ends inside the model's reasoning.
        """

        def read(scanner: Scanner) -> Reading:
            if reasons and self.reasoning:
                yield from self._read_reasoning(scanner)
            yield from self.read(scanner, tools)

        return MessageReader(read)

    def read(self, scanner: Scanner, tools: Schemas) -> Reading:
        """Read the answer from where its reasoning has ended, if it began with any."""
        handlers = self.handlers(tools) if tools else {}
        if self.reasoning:
            handlers[self.reasoning.begin] = self._read_reasoning
        return marked_reader(scanner, handlers) if handlers else plain_reader(scanner)

    def _read_reasoning(self, scanner: Scanner) -> Reading:
        assert self.reasoning is not None
        return tagged_reasoning(self.reasoning.end, self.reasoning.header)(scanner)

    def open_reasoning(self, prompt: str) -> bool:
        """Whether the prompt ends inside the model's reasoning."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning.begin)

    def content_begins(self, reasons: bool) -> str | None:
        """A pattern after which the answer proper begins; None if it begins at once."""
        return re.escape(self.reasoning.end) + r"\s*" if reasons and self.reasoning else None

    def calls_begin(self, reasons: bool) -> str | None:
        """A pattern after which `required` holds; None if it does so at once."""
        return self.content_begins(reasons)

    @abstractmethod
    def handlers(self, tools: Schemas) -> Handlers:
        """The readers of calls, by the marks that begin them."""

    @abstractmethod
    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        """Where a call begins, and its grammar."""

    @abstractmethod
    def required(self, schemas: Schemas) -> str:
        """The grammar of an answer that is one call or more."""

    def adapt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], Any]:
        """Messages and tools as the family's template can show them."""
        return (one_call_each(messages) if "tool_calls[0]" in self.source else messages), tools

    @property
    def tells_tools(self) -> bool:
        """Whether the template tells the model of the tools by itself."""
        return re.search(r"\btools\b", self.source) is not None


def one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call in a message of its own, its result behind it: some templates show the first call only, or refuse several."""
    turns: list[dict[str, Any]] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            turns.append(message)
            continue
        place = {call.get("id"): index for index, call in enumerate(calls)}
        results = list(itertools.takewhile(lambda following: following["role"] == "tool", rest))
        del rest[: len(results)]
        results.sort(key=lambda result: place.get(result.get("tool_call_id"), len(calls)))
        for index, call in enumerate(calls):
            turns += [{**message, "content": "" if index else message["content"], "tool_calls": [call]}, *results[index : index + 1]]
        turns += results[len(calls) :]
    return turns


def with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with a text at the end of the system message."""
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{text}".strip()}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def alternatives(schemas: Schemas, call: Callable[[str, str], str]) -> str:
    """Lark: one of the calls, each written by `call(name, arguments)`."""
    return "(" + " | ".join(f"({call(name, arguments(schema))})" for name, schema in schemas.items()) + ")"


def arguments(schema: Any) -> str:
    """Lark: JSON that follows a schema."""
    if isinstance(schema, dict):
        schema = {"x-guidance": LAYOUT, **schema}
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def quoted(text: str) -> str:
    """Lark: this text."""
    return json.dumps(text, ensure_ascii=False)


def text_until(mark: str, name: str) -> tuple[str, str]:
    """Lark: any text up to and with a mark, and the rule that this needs."""
    if mark.startswith("<["):  # a special token, which no text can contain
        return f"{name.upper()} {mark}", f"{name.upper()}: /(.|\\n)*/"
    return name, f"{name}[suffix={mark}]: /(.|\\n)*/"


def json_call(key: str = "arguments", after_name: bool = False) -> Callable[[str, str], str]:
    """Lark for ``{"name": ..., key: {...}}``, whole or from behind the name."""

    def call(name: str, arguments: str) -> str:
        head = "" if after_name else '{"name": ' + json.dumps(name, ensure_ascii=False)
        return f"{quoted(f'{head}, {json.dumps(key)}: ')} {arguments} {quoted('}')}"

    return call
