"""Schemas of many kinds, composed at random: the shapes of public suites of JSON schemas, not their text."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = [
    *(r"^[a-z]{2,8}$", r"^\d{3}-\d{4}$", r"[0-9]+", r"^(foo|bar)+$", r"^\w+@\w+\.com$", r"^[A-Z][a-z]*( [A-Z][a-z]*){0,2}$", r"^\D{3}$"),
    *(r"^\S+$", r"^[^\d\s]{1,5}$", r"^#[0-9a-fA-F]{6}$", r"^a.c$", r"^$|^x", r"^\W?[\w-]{4}$", r"^/([a-z]+/)*$", r"^\u00e9+$"),
]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
NAMES = ["name", "age", "id", "is valid", "größe", 'quo"te', "a/b", "x-1", "naïve", "", "$type", "日本"]
VALUES: list[Any] = ["red", 'a "b" \\ c\n', "", "日本", 0, 1, -7, 2.5, 1e20, True, False, None, [], [1, "a"], {}, {"k": [None]}]


def any_schema(rng: random.Random, depth: int) -> Any:
    leaves = [string, integer, number, simple, literal]
    return rng.choice(leaves + ([array, tuple_, object_, object_, map_, union, exclusive, merged, several] if depth else []))(rng, depth)


def string(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    kind = rng.randrange(5)
    if kind == 0:
        schema["pattern"] = rng.choice(PATTERNS)
    elif kind == 1:
        schema["format"] = rng.choice(FORMATS)
    elif kind > 2:
        low = rng.randrange(6)
        schema |= rng.choice([{"minLength": low}, {"maxLength": low}, {"minLength": low, "maxLength": low + rng.randrange(5)}])
    return schema


def integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.choice([-1000, -5, -1, 0, 1, 3, 99, 10**6])
    high = low + rng.choice([2, 10, 999])
    bounds = [
        {},
        {"minimum": low},
        {"maximum": high},
        {"minimum": low, "maximum": high},
        {"exclusiveMinimum": low, "exclusiveMaximum": high},
    ]
    schema = {"type": "integer", **rng.choice(bounds)}
    return schema | ({"multipleOf": rng.choice([2, 5, 10])} if len(schema) == 1 and rng.random() < 0.5 else {})


def number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.choice([-10.5, -1, 0, 0.25, 3, 1e3])
    high = low + rng.choice([0.5, 1, 100])
    bounds = [
        {},
        {"minimum": low},
        {"exclusiveMaximum": high},
        {"minimum": low, "maximum": high},
        {"exclusiveMinimum": low, "maximum": high},
    ]
    schema = {"type": "number", **rng.choice(bounds)}
    return schema | ({"multipleOf": rng.choice([0.5, 0.01, 3])} if len(schema) == 1 and rng.random() < 0.5 else {})


def simple(rng: random.Random, depth: int) -> Any:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": "boolean", "description": "yes?"}, {"type": ["boolean", "null"]}])


def literal(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.4:
        return {"const": rng.choice(VALUES)}
    return {"enum": rng.sample(VALUES, rng.randint(1, 5))}


def several(rng: random.Random, depth: int) -> dict[str, Any]:
    """Keywords of several types in one schema."""
    types = rng.sample(["string", "integer", "null", "boolean", "array"], rng.randint(2, 3))
    return {"type": types, "minimum": -3, "maximum": 12, "maxLength": 6, "maxItems": 2, "items": any_schema(rng, depth - 1)}


def array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(3)
    sizes = rng.choice([{"maxItems": low + 2}, {"minItems": low, "maxItems": low + 1}, {"minItems": 1, "maxItems": 3}])
    return {"type": "array", "items": any_schema(rng, depth - 1), **sizes}


def tuple_(rng: random.Random, depth: int) -> dict[str, Any]:
    prefix = [any_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    rest = rng.choice([{"items": False}, {"items": any_schema(rng, depth - 1), "maxItems": len(prefix) + 2}, {"maxItems": len(prefix)}])
    return {"type": "array", "prefixItems": prefix, **rest, **rng.choice([{}, {"minItems": len(prefix)}, {"minItems": 1}])}


def object_(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: any_schema(rng, depth - 1) for name in names}}
    if rng.random() < 0.8:
        schema["required"] = rng.sample(names, rng.randint(0, len(names)))
    extra = rng.randrange(5)
    if extra == 0:
        schema["additionalProperties"] = False
    elif extra == 1:
        schema["additionalProperties"] = any_schema(rng, 0)
    elif extra == 2:
        schema["description"], schema["title"], schema["x-order"] = "A thing.", "Thing", 3
    return schema


def map_(rng: random.Random, depth: int) -> dict[str, Any]:
    value = any_schema(rng, depth - 1)
    return rng.choice(
        [
            {"type": "object", "additionalProperties": value, "maxProperties": 2},
            {"type": "object", "patternProperties": {"^[a-z]{1,3}$": value}, "additionalProperties": False, "maxProperties": 2},
            {"type": "object", "additionalProperties": value, "minProperties": 1, "maxProperties": 3},
        ]
    )


def union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [any_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def exclusive(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"oneOf": [string(rng, 0), integer(rng, 0), {"type": "null"}][: rng.randint(1, 3)]}
    kinds = rng.sample(["circle", "square", "line"], 2)
    shapes = [
        {"type": "object", "properties": {"kind": {"const": kind}, "size": any_schema(rng, depth - 1)}, "required": ["kind"]}
        for kind in kinds
    ]
    return {"oneOf": shapes}


def merged(rng: random.Random, depth: int) -> dict[str, Any]:
    first, second = (
        {"type": "object", "properties": {name: any_schema(rng, depth - 1)}, "required": [name]} for name in rng.sample(NAMES, 2)
    )
    return rng.choice(
        [
            {"allOf": [first, second], "maxProperties": 2},
            {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 30}]},
            {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 5}, {"pattern": "^[a-m]*$"}]},
            {"type": "string", "anyOf": [{"maxLength": 3}, {"pattern": "^z+$"}]},
        ]
    )


def recursive(rng: random.Random) -> dict[str, Any]:
    tree = {"type": "object", "properties": {"value": any_schema(rng, 0), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}}
    tree |= {"required": ["value"], "additionalProperties": False}
    if rng.random() < 0.5:
        tree["properties"]["children"] = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}  # type: ignore[index]
    return rng.choice(
        [
            {"$ref": "#/$defs/node", "$defs": {"node": tree}},
            {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2, "$defs": {"node": tree}},
        ]
    )


def referring(rng: random.Random) -> dict[str, Any]:
    kinds = {
        kind: {"type": "object", "properties": {"kind": {"const": kind}, "of": any_schema(rng, 1)}, "required": ["kind", "of"]}
        for kind in "abc"
    }
    options = [{"$ref": f"#/$defs/{kind}"} for kind in kinds]
    union = rng.choice([{"anyOf": options}, {"oneOf": options, "discriminator": {"propertyName": "kind"}}])
    return {
        "type": "object",
        "properties": {"one": union, "two": {"$ref": "#/definitions/x~1y"}},
        "required": ["one"],
        "$defs": kinds,
        "definitions": {"x/y": any_schema(rng, 1)},
    }


def schemas(count: int) -> list[Any]:
    found: list[Any] = []
    for seed in range(count):
        rng = random.Random(seed)
        found.append(recursive(rng) if seed % 10 == 0 else referring(rng) if seed % 10 == 1 else any_schema(rng, 1 + seed % 3))
    return found


SHAPES: list[Any] = [
    {"$anchor": "here", "type": "array", "items": {"$ref": "#here"}, "maxItems": 2},
    {"$id": "http://example.com/schema", "type": "array", "items": {"$ref": "#"}, "maxItems": 1},
    {"definitions": {"a/b~c": {"const": 3}}, "$ref": "#/definitions/a~1b~0c"},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "string", "maxLength": 3}], "items": False},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "minItems": 2},
    {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}, {"minimum": 3}]},
    {"allOf": [{"$ref": "#/$defs/x"}, {"maxLength": 4}], "$defs": {"x": {"type": "string", "minLength": 2}}},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"maximum": 5}, "b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    {"type": "integer", "maximum": 5, "anyOf": [{"minimum": 3}, {"type": "string"}]},
    {"type": "object", "properties": {"a": {}, "b": True, "c": False}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["z"]},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"], "minProperties": 2},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.001},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": -1},
    {"type": "integer", "minimum": -(10**30), "exclusiveMaximum": 10**30},
    {"type": "string", "minLength": 3, "maxLength": 3, "pattern": "^[é🎉]+$"},
    {"type": "string", "format": "date", "pattern": "^2"},
    *[{"type": "string", "format": "date", "pattern": "-02-[23]"}] * 8,
    {"enum": [1, 1.0, "1", None, [1], {"a": 1}]},
    {"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}, "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    {"type": "object", "propertyNames": {"$ref": "#/$defs/x"}, "additionalProperties": {"const": 1}, "$defs": {"x": {"enum": ["a", "b"]}}},
    {"type": "object", "propertyNames": {"type": "string", "pattern": "^x[0-9]$"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "propertyNames": {"format": "date"}, "maxProperties": 2},
]
"""Forms that chance does not compose."""


REFUSED: list[tuple[str, Any]] = [
    ("uniqueItems", {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
    ("uniqueItems", {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}),
    ("not", {"not": {"type": "string"}}),
    ("if", {"if": {"type": "string"}, "then": {"minLength": 2}}),
    ("contains", {"type": "array", "contains": {"type": "integer"}}),
    ("propertyNames", {"type": "object", "propertyNames": {"maxLength": 3, "pattern": "^a"}}),
    ("propertyNames", {"type": "object", "propertyNames": {"not": {"const": "a"}}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("dependentSchemas", {"anyOf": [{"dependentSchemas": {"a": {}}}]}),
    ("dependencies", {"type": "object", "dependencies": {"a": ["b"]}}),
    ("unevaluatedProperties", {"type": "object", "unevaluatedProperties": False}),
    ("unevaluatedItems", {"type": "array", "unevaluatedItems": False}),
    ("$dynamicRef", {"$dynamicRef": "#node"}),
    ("minProperties", {"type": "object", "minProperties": 2}),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    ("oneOf", {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": {"type": "object"}, "b": {"type": "object"}}}),
    ("look-around", {"type": "string", "pattern": "^(?!x)"}),
    ("backreferences", {"type": "string", "pattern": r"(a)\1"}),
    ("format: binary", {"type": "string", "format": "binary"}),
    ("http://example.com/other", {"$ref": "http://example.com/other"}),
    ("/$defs/missing", {"$ref": "#/$defs/missing"}),
    ("type: number-ish", {"type": "number-ish"}),
    (
        "requires itself",
        {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}},
    ),
    ("requires itself", {"type": "array", "minItems": 1, "items": {"$ref": "#"}}),
    ("schema is false", False),
    ("minimum (5) is greater than maximum (1)", {"type": "integer", "minimum": 5, "maximum": 1}),
    ("anyOf is empty", {"enum": []}),
    (
        "at #/properties/a/items: Unsatisfiable",
        {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": []}, "minItems": 1}}, "required": ["a"]},
    ),
    ("at #/$defs/a/properties/b: regex parse error", {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {"pattern": "("}}}}}),
    ("#/items: 'minimum' 1e+30 is beyond 9e+18", {"type": "array", "items": {"type": "integer", "minimum": 10**30}}),
    ("#: 'maximum' 1e+300 is beyond 9e+18, the furthest bound; leave it out", {"type": "number", "minimum": 0, "maximum": 1e300}),
    ("#: 'minimum' of hundreds of digits is beyond 9e+18", {"type": "integer", "minimum": 10**400}),
    ("required", {"type": "object", "required": "name"}),
    ("multipleOf", {"type": "number", "multipleOf": "a"}),
    ("properties", {"type": "object", "properties": [1]}),
]
