"""FunctionGemma and Gemma 4: ``call:name{key:value}``, in a notation of their own. (Gemma 3 has none: it gets plain JSON.)"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from .dialect import CallTrigger, Dialect, Handlers, Mark, Schemas, arguments, quoted, text_until
from .reading import Reading, Scanner


class Markup(NamedTuple):
    begin: str
    end: str
    quote: str


MARKUPS = (
    Markup("<start_function_call>", "<end_function_call>", "<escape>"),
    Markup("<|tool_call>", "<tool_call|>", '<|"|>'),
)


class Gemma(Dialect):
    """``<|tool_call>call:name{city:<|"|>Paris<|"|>,days:2}<tool_call|>``, one after the other."""

    def __init__(self, source: str, mark: Mark) -> None:
        super().__init__(source, mark)
        self.markup = next(markup for markup in MARKUPS if markup.begin in source)
        self.marks = self.markup

    def handlers(self, tools: Sequence[str]) -> Handlers:
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

    def object(self) -> Generator[None, None, dict[str, Any]]:
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
            members[key.strip().strip('"')] = yield from self.value()

    def array(self) -> Generator[None, None, list[Any]]:
        items: list[Any] = []
        while True:
            yield from self.scanner.skip_space()
            if not self.scanner.text or self.scanner.text[0] == "]":
                self.scanner.take(1)
                return items
            if self.scanner.text[0] == ",":
                self.scanner.take(1)
                continue
            items.append((yield from self.value()))

    def value(self) -> Generator[None, None, Any]:
        yield from self.scanner.skip_space()
        yield from self.scanner.need(len(self.quote))
        if self.scanner.text.startswith(self.quote):
            self.scanner.take(len(self.quote))
            return (yield from self._until((self.quote,)))
        if self.scanner.text[:1] == "{":
            self.scanner.take(1)
            return (yield from self.object())
        if self.scanner.text[:1] == "[":
            self.scanner.take(1)
            return (yield from self.array())
        word = yield from self._word()
        try:
            return json.loads(word)
        except ValueError:
            return word

    def _word(self) -> Generator[None, None, str]:
        while not (match := re.search(r"[,}\]]", self.scanner.text)) and not self.scanner.ended:
            yield
        return self.scanner.take(match.start() if match else len(self.scanner.text)).strip()

    def _until(self, marks: tuple[str, ...]) -> Generator[None, None, str]:
        parts: list[str] = []
        yield from self.scanner.until(marks, parts.append, [])
        return "".join(parts)


class _Notation:
    """Lark rules for values of a schema in this notation. What it cannot say of a schema it leaves open."""

    def __init__(self, quote: str) -> None:
        self.quote = quote
        self.names: dict[str, str] = {}
        text, rule = text_until(quote, "text")
        self.rules = [
            f"any: string | NUMBER | BOOLEAN | NULL | array | object\nstring: {quote} {text}\n{rule}",
            'array: "[" (any ("," any)*)? "]"\nobject: "{" (KEY ":" any ("," KEY ":" any)*)? "}"',
            "KEY: /[A-Za-z_][A-Za-z0-9_]*/\nNUMBER: /-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?/",
            'BOOLEAN: "true" | "false"\nNULL: "null"',
        ]

    def value(self, schema: Any, root: Any) -> str:
        if not isinstance(schema, dict):
            return "any"
        if isinstance(reference := schema.get("$ref"), str):
            return self._reference(reference, root)
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return "(" + " | ".join(self._constant(value) for value in values) + ")"
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                return "(" + " | ".join(self.value(option, root) for option in schema[key]) + ")"
        types = schema.get("type")
        if isinstance(types, list):
            return "(" + " | ".join(self.value({**schema, "type": one}, root) for one in types) + ")"
        if types == "object":
            return self._object(schema, root)
        if types == "array":
            item = self.value(schema.get("items"), root)
            return f'("[" ({item} ("," {item})*)? "]")'
        if types in ("integer", "number", "boolean", "null"):
            return arguments(schema)
        return "string" if types == "string" else "any"

    def _object(self, schema: dict[str, Any], root: Any) -> str:
        properties = schema.get("properties")
        if not properties:
            return "object" if schema.get("additionalProperties", True) else '("{" "}")'
        required = set(schema.get("required", ()))
        member = {name: f"{quoted(f'{name}:')} {self.value(sub, root)}" for name, sub in properties.items()}
        rule = self._members(list(member.items()), required)
        return f'("{{" {rule} "}}")'

    def _members(self, members: list[tuple[str, str]], required: set[str]) -> str:
        """The members in their order, the optional ones where they come at all; the comma depends on whether one came before."""
        options = []
        for index, (key, text) in enumerate(members):  # one alternative for each member that may be the first
            rest = (f' ("," {other})' + ("" if later in required else "?") for later, other in members[index + 1 :])
            options.append(text + "".join(rest))
            if key in required:
                break
        else:
            options.append('""')
        name = f"members_{len(self.rules)}"
        self.rules.append(f"{name}: " + " | ".join(options))
        return name

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"({self.quote} {quoted(value)} {self.quote})" if value else f"({self.quote} {self.quote})"
        return quoted(json.dumps(value))

    def _reference(self, reference: str, root: Any) -> str:
        if reference in self.names:
            return self.names[reference]
        target: Any = root
        for part in reference.lstrip("#").strip("/").split("/"):
            target = target.get(part) if isinstance(target, dict) else None
        name = self.names[reference] = f"reference_{len(self.names)}"
        self.rules.append(f"{name}: {self.value(target, root)}")
        return name
