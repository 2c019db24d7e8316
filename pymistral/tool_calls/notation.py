"""Grammars of values that are not plain JSON, and what a schema says of a value that is bare text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .dialect import arguments, quoted

MOST_REFERENCES = 32
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}


class Notation:
    """Lark rules for values of a schema, as JSON writes them; families override what they write otherwise.

    What it cannot say of a schema it leaves open.
    """

    comma = ", "
    true, false, null = "true", "false", "null"

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        comma = quoted(self.comma)
        self.rules = [
            "any: string | NUMBER | BOOLEAN | NULL | array | object",
            *self.string_rules(),
            f'array: "[" (any ({comma} any)*)? "]"\nobject: "{{" (member ({comma} member)*)? "}}"',
            "NUMBER: /-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?/",
            f"BOOLEAN: {quoted(self.true)} | {quoted(self.false)}\nNULL: {quoted(self.null)}",
        ]

    def string_rules(self) -> list[str]:
        """The rules ``string``, for any string, and ``member``, for any member of an object."""
        return ['string: %json {"type": "string"}', 'member: string ": " any']

    def string(self, schema: Any) -> str:
        """A string that follows a schema."""
        return arguments(schema)

    def key(self, name: str) -> str:
        """What stands before a member's value."""
        return quoted(f"{json.dumps(name, ensure_ascii=False)}: ")

    def constant(self, value: Any) -> str:
        """One value."""
        return quoted(self._text(value))

    def value(self, schema: Any, root: Any) -> str:
        """A value that follows a schema, whose references point into `root`."""
        if not isinstance(schema, dict):
            return "any"
        if isinstance(reference := schema.get("$ref"), str):
            return self._reference(reference, root)
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return "(" + " | ".join(self.constant(value) for value in values) + ")"
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
            return f'("[" ({item} ({quoted(self.comma)} {item})*)? "]")'
        if types in ("integer", "number"):
            return arguments(schema)
        if types == "string":
            return self.string(schema)
        return {"boolean": "BOOLEAN", "null": "NULL"}.get(str(types), "any")

    def members(self, members: list[tuple[str, str]], required: set[str]) -> str:
        """Members in their order, the optional ones where they come at all; the comma depends on whether one came before."""
        comma = quoted(self.comma)
        options = []
        for index, (key, text) in enumerate(members):  # one alternative for each member that may be the first
            rest = (f" ({comma} {other})" + ("" if later in required else "?") for later, other in members[index + 1 :])
            options.append(text + "".join(rest))
            if key in required:
                break
        else:
            options.append('""')
        name = f"members_{len(self.rules)}"
        self.rules.append(f"{name}: " + " | ".join(options))
        return name

    def _object(self, schema: dict[str, Any], root: Any) -> str:
        properties = schema.get("properties")
        if not properties:
            return "object" if schema.get("additionalProperties", True) else '("{" "}")'
        members = [(name, f"{self.key(name)} {self.value(sub, root)}") for name, sub in properties.items()]
        return f'("{{" {self.members(members, set(schema.get("required", ())))} "}}")'

    def _text(self, value: Any) -> str:
        if value is None or isinstance(value, bool):
            return {None: self.null, True: self.true, False: self.false}[value]
        if isinstance(value, list):
            return f"[{self.comma.join(map(self._text, value))}]"
        if isinstance(value, dict):
            return "{" + self.comma.join(f"{self._text(key)}: {self._text(item)}" for key, item in value.items()) + "}"
        return json.dumps(value, ensure_ascii=False)

    def _reference(self, reference: str, root: Any) -> str:
        if reference in self.names:
            return self.names[reference]
        name = self.names[reference] = f"reference_{len(self.names)}"
        self.rules.append(f"{name}: {self.value(referenced(reference, root), root)}")
        return name


def referenced(reference: str, root: Any) -> Any:
    """What a reference within a schema points to; None if to nothing."""
    target = root
    for part in reference.lstrip("#").strip("/").split("/"):
        target = target.get(part) if isinstance(target, Mapping) else None
    return target


def options(schema: Any, root: Any, depth: int = 0) -> list[Mapping[str, Any]]:
    """The alternatives that a schema allows: constants, and schemas of one type or of any."""
    if not isinstance(schema, Mapping) or depth > MOST_REFERENCES:
        return [{}]
    if isinstance(reference := schema.get("$ref"), str):
        return options(referenced(reference, root), root, depth + 1)
    if "const" in schema:
        return [{"const": schema["const"]}]
    if isinstance(values := schema.get("enum"), list):
        return [{"const": value} for value in values]
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return [found for option in schema[key] for found in options(option, root, depth + 1)]
    types = schema.get("type")
    return [{**schema, "type": one} for one in types] if isinstance(types, list) else [schema]


def schema_types(schema: Any, root: Any) -> frozenset[str]:
    """The JSON types that a schema allows; empty if it says nothing of them."""
    found = options(schema, root)
    if not all("const" in option or "type" in option for option in found):
        return frozenset()
    return frozenset(json_type(option["const"]) if "const" in option else str(option["type"]) for option in found)


def json_type(value: Any) -> str:
    """The name of a value's type in JSON schemas."""
    return JSON_TYPES.get(type(value), "object")


def argument_types(tools: Mapping[str, Any], tool: str, argument: str) -> frozenset[str]:
    """The JSON types that a tool's argument may have; empty if its schema says nothing of them."""
    schema = tools.get(tool)
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return schema_types(properties.get(argument), schema) if isinstance(properties, Mapping) else frozenset()


def typed(text: str, types: frozenset[str]) -> Any:
    """The value that bare text stands for: the text itself, unless it reads as another type that is allowed."""
    if types == {"string"}:
        return text
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
    kind = json_type(value)
    return value if not types or kind in types or (kind == "integer" and "number" in types) else text


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
