"""GPT-OSS: messages with channels; a call is a message to ``functions.name``."""

from __future__ import annotations

import re

from .dialect import CallTrigger, Dialect, Handlers, Mark, Schemas, alternatives, arguments, quoted, text_until
from .reading import Reading, Scanner

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class Harmony(Dialect):
    """``<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}``; reasoning is the channel ``analysis``."""

    marks = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)

    def __init__(self, source: str, mark: Mark) -> None:
        super().__init__(source, mark)
        self.reasoning = None

    def keep(self, calls: bool) -> tuple[str, ...]:
        return tuple(self.marks)

    def calls_begin(self, reasons: bool) -> str | None:
        return None

    def content_begins(self, reasons: bool) -> str | None:
        return r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"

    def read(self, scanner: Scanner, tools: Schemas) -> Reading:
        # The prompt ends with ``<|start|>assistant``: an answer begins inside a header. Text without any markup is content.
        while True:
            header: list[str] = []
            taken: list[str] = []
            yield from scanner.until((MESSAGE,), header.append, taken)
            head = "".join(header)
            if not taken:
                scanner.plain("" if head.lstrip().startswith((START, CHANNEL)) else head)
                return
            yield from self._body(scanner, head)
            if scanner.ended and not scanner.text:
                return

    def _body(self, scanner: Scanner, head: str) -> Reading:
        recipient = _RECIPIENT.search(head)
        channel = re.search(r"<\|channel\|>\s*(\w+)", head)
        if recipient and recipient[1] != "assistant":
            scanner.call(recipient[1])
            emit = scanner.arguments
        elif channel and channel[1] == "analysis":
            emit = scanner.reasoning
        else:
            emit = scanner.plain
        taken: list[str] = []
        yield from scanner.until((*ENDS, START), emit, taken)
        if taken == [START]:
            scanner.text = START + scanner.text

    def handlers(self, tools: Schemas) -> Handlers:
        return {}

    def triggers(self, schemas: Schemas) -> list[CallTrigger]:
        rest = r"(?:\s[^<]*)?(?:<\|channel\|>[^<]*)?(?:<\|constrain\|>[^<]*)?<\|message\|>"
        return [CallTrigger(rf"to=functions\.{re.escape(name)}{rest}", f"start: {arguments(schema)}") for name, schema in schemas.items()]

    def required(self, schemas: Schemas) -> str:
        end = f"{self.mark(CONSTRAIN)} {quoted('json')} {self.mark(MESSAGE)}"
        calls = alternatives(schemas, lambda name, arguments: f"{quoted(f'commentary to=functions.{name} ')} {end} {arguments}")
        text, rule = text_until(self.mark("<|end|>"), "text")
        thought = f'{self.mark(CHANNEL)} "analysis" {self.mark(MESSAGE)} {text} {self.mark(START)} "assistant"'
        return f"start: ({thought})? {self.mark(CHANNEL)} {calls}\n{rule}"
