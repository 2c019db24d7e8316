"""DeepSeek V3 and R1 (a code fence for the arguments), V3.1 (none)."""

from __future__ import annotations

from .dialect import CallTrigger, Dialect, Handlers, Schemas, alternatives, quoted
from .json_calls import arguments
from .reading import Reading, Scanner

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```"


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
