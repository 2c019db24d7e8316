"""JSON schemas as llguidance can enforce them token by token: what it would miss is refused by name, what it need not see is removed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import RequestValidationError

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes: models know it well, and what a schema forces takes no sampling. A weak model cannot get lost in white space."""

# Enforcing these would need to look back at what has been generated, or to negate.
UNSUPPORTED = frozenset(
    {"uniqueItems", "not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames", "dependentRequired"}
    | {"dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"}
)
KNOWN = UNSUPPORTED | frozenset(
    {"anyOf", "oneOf", "allOf", "$ref", "const", "enum", "type", "items", "additionalItems", "prefixItems", "minItems", "maxItems"}
    | {"properties", "additionalProperties", "patternProperties", "required", "minProperties", "maxProperties", "minLength", "maxLength"}
    | {"pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    | {"$anchor", "$defs", "definitions", "$schema", "$id", "x-guidance"}
)
REFUSED = "x-refused"
"""In the schema of a type that cannot be enforced: why, and what to write instead."""
MOST_EXACT = 2**53 - 1
FURTHEST_BOUND = 9 * 10**18
ONE = ("additionalProperties", "items", "additionalItems")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
TYPES = ("null", "boolean", "number", "string", "array", "object")

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_ZONE = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_COUNT = "[0-9]{1,5}"
_HOURS = f"T(?:{_COUNT}H(?:{_COUNT}M)?(?:{_COUNT}S)?|{_COUNT}M(?:{_COUNT}S)?|{_COUNT}S)"
_DAYS = f"(?:{_COUNT}Y(?:{_COUNT}M)?(?:{_COUNT}D)?|{_COUNT}M(?:{_COUNT}D)?|{_COUNT}D)"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_IPV6 = "(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}"
_ANY_IP = f"(?:{IPV4}|{_IPV6})"
_NETWORK4 = rf"{_BYTE}(?:\.0\.0\.0/8|\.{_BYTE}(?:\.0\.0/16|\.{_BYTE}(?:\.0/24|\.{_BYTE}(?:/32)?)))"  # of those whose host part is zero
_INTERFACE4, _INTERFACE6 = f"{IPV4}(?:/(?:[12]?[0-9]|3[0-2]))?", f"{_IPV6}(?:/(?:[1-9]?[0-9]|1[01][0-9]|12[0-8]))?"
BASE64URL, ONE_BYTE, TWO_BYTES = "[A-Za-z0-9_-]", "[AQgw]==", "[AEIMQUYcgkosw048]="  # a character; how the last one or two bytes end
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}{_ZONE}$",
    "date-time": f"^{_DATE}T{_TIME}{_ZONE}$",
    "local-time": f"^{_TIME}$",
    "local-date-time": f"^{_DATE}T{_TIME}$",
    "duration": f"^P(?:{_DAYS}(?:{_HOURS})?|{_HOURS}|{_COUNT}W)$",
    "base64": f"^(?:[A-Za-z0-9+/]{{4}})*(?:[A-Za-z0-9+/]{ONE_BYTE}|[A-Za-z0-9+/]{{2}}{TWO_BYTES})?$",
    "base64url": f"^(?:{BASE64URL}{{4}})*(?:{BASE64URL}{ONE_BYTE}|{BASE64URL}{{2}}{TWO_BYTES})?$",
    "ipvanyaddress": f"^{_ANY_IP}$",
    "ipv4interface": f"^{_INTERFACE4}$",
    "ipv6interface": f"^{_INTERFACE6}$",
    "ipv4network": f"^{_NETWORK4}$",
    "ipv6network": f"^{_IPV6}(?:/128)?$",
    "ipvanynetwork": f"^(?:{_NETWORK4}|{_IPV6}(?:/128)?)$",
    "ipvanyinterface": f"^(?:{_INTERFACE4}|{_INTERFACE6})$",
    "uuid": "^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
    **{f"uuid{n}": f"^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{n}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}$" for n in range(1, 9)},
}
"""Only dates that exist, no leap seconds, which Python's datetime does not know, and no more days than its timedelta holds. The names that
are not JSON schema's own are pydantic's."""
SUPPORTED_FORMATS = FORMATS.keys() | {"email", "hostname", "ipv4", "ipv6", "uri"}


def prepared_schema(schema: Any) -> Any:
    """The schema with our layout and closed objects, ready for llguidance.

    Raises
    ------
    RequestValidationError
        It uses a feature that cannot be enforced; the message says which, and where.
    """
    if isinstance(schema, bool):
        return schema
    try:
        schema = closed_schema(schema)
        prepared = _Schema(schema).prepare(schema, "#")
    except (TypeError, AttributeError) as error:  # a list where a dict belongs, or the like
        raise RequestValidationError(f"the JSON schema is malformed: {error}") from error
    except RecursionError:
        raise RequestValidationError("the JSON schema is nested too deeply") from None
    prepared.setdefault("x-guidance", LAYOUT)
    return prepared


def can_end(schema: Any) -> bool:
    """Whether some finite value can satisfy the schema, as far as its required parts tell."""
    return not isinstance(schema, dict) or _Schema(schema)._can_end(schema, frozenset())


class _Schema:
    """One document, in which references point."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self._text = json.dumps(root, ensure_ascii=False)

    def prepare(self, schema: Any, place: str) -> Any:
        if not isinstance(schema, dict):
            return schema
        schema = self._with_named_keys({key: value for key, value in schema.items() if self._matters(key, schema)})
        if found := sorted(UNSUPPORTED & schema.keys()):
            raise refusal(place, f"{found[0]!r} cannot be enforced while generating; leave it out, and check the answer for it")
        self._check_min_properties(schema, place)
        if not self._can_end(schema, frozenset()):
            raise refusal(place, "it requires itself without end, so no finite JSON satisfies it")
        if "oneOf" in schema and self._exclusive(schema["oneOf"], place):
            schema = {("anyOf" if key == "oneOf" and "anyOf" not in schema else key): value for key, value in schema.items()}
        if schema.get("format") in FORMATS and _allows(schema, "string"):
            schema = _with_pattern(schema, FORMATS[schema["format"]])
        schema = _within_reach(schema, place)
        schema = _without_touching_bounds(schema)
        if _unbounded_integer(schema):
            schema = _bounded(schema, MOST_EXACT)
        elif _decimal(schema):
            schema = _bounded(schema, FURTHEST_BOUND)
        if isinstance(schema.get("pattern"), str):
            schema["pattern"] = common_pattern(schema["pattern"])
        return map_subschemas(schema, place, self.prepare)

    def _with_named_keys(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema with ``propertyNames`` as properties, or as a pattern of their names, where they can be that."""
        names = self._resolve(schema.get("propertyNames"))
        if not isinstance(names, dict) or {"properties", "patternProperties", "required"} & schema.keys():
            return schema
        others = {key: value for key, value in schema.items() if key not in ("propertyNames", "additionalProperties")}
        value = schema.get("additionalProperties", True)
        names = {key: names[key] for key in names if key in KNOWN and (key, names[key]) != ("type", "string")}
        values = _values(names)
        if not names:
            return {**others, "additionalProperties": value}
        if values is not None and all(isinstance(name, str) for name in values) and names.keys() <= {"const", "enum"}:
            return {**others, "properties": dict.fromkeys(values, value), "additionalProperties": False}
        pattern = _pattern_of(names)
        return schema if pattern is None else {**others, "patternProperties": {pattern: value}, "additionalProperties": False}

    def _matters(self, key: str, schema: dict[str, Any]) -> bool:
        """Annotations go: llguidance takes what it does not know for a sibling that changes a reference. Targets of references stay."""
        if key in KNOWN:
            return not _says_nothing(key, schema)
        return f'"#/{key}/' in self._text

    def _check_min_properties(self, schema: dict[str, Any], place: str) -> None:
        """Keys that are not named in ``properties`` may come twice: their number is not the number of properties."""
        least = schema.get("minProperties", 0)
        if (
            isinstance(least, int)
            and least > max(1, len(set(schema.get("required", ()))))
            and schema.get("additionalProperties") is not False
        ):
            remedy = "leave it out, or name the keys in 'properties' and 'required'"
            raise refusal(place, f"'minProperties' {least} cannot be enforced for keys that the schema does not name; {remedy}")

    def target(self, reference: object) -> Any:
        """What a local reference points at, or None: llguidance reports what does not exist."""
        node: Any = self.root
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        for part in reference[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            else:
                return None
        return node

    def _can_end(self, schema: Any, seen: frozenset[str]) -> bool:
        """Whether some finite value can satisfy the schema, as far as its required parts tell."""
        if not isinstance(schema, dict):
            return True
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference in seen:
                return False
            if not self._can_end(self.target(reference), seen | {reference}):
                return False
        for key, enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            if isinstance(schema.get(key), list) and schema[key] and not enough(self._can_end(option, seen) for option in schema[key]):
                return False
        if schema.get("type") == "object":
            properties = schema.get("properties", {})
            return all(self._can_end(properties.get(name), seen) for name in schema.get("required", ()) if isinstance(properties, dict))
        if schema.get("type") == "array":
            least = schema.get("minItems", 0)
            prefix = schema.get("prefixItems", [])
            needed = [*prefix[:least], *([schema.get("items")] if least > len(prefix) else [])] if isinstance(least, int) else []
            return all(self._can_end(item, seen) for item in needed)
        return True

    def _exclusive(self, options: Any, place: str) -> bool:
        """Whether no value fits two of the options of a ``oneOf``, which makes it an ``anyOf``."""
        if not isinstance(options, list):
            return False
        resolved = [self._resolve(option) for option in options]
        if all(self._disjoint(a, b) for i, a in enumerate(resolved) for b in resolved[i + 1 :]):
            return True
        raise refusal(place, "'oneOf' with options that may overlap cannot be enforced; write 'anyOf', or give each a 'const' property")

    def _resolve(self, schema: Any) -> Any:
        for _ in range(32):
            if not isinstance(schema, dict) or "$ref" not in schema:
                return schema
            schema = self.target(schema["$ref"])
        return schema

    def _disjoint(self, a: Any, b: Any, depth: int = 0) -> bool:
        if a is False or b is False:
            return True
        if not isinstance(a, dict) or not isinstance(b, dict) or depth > 8:
            return False
        if not _types(a) & _types(b):
            return True
        values, others = _values(a), _values(b)
        if values is not None and others is not None:
            return not any(_same(value, other) for value in values for other in others)
        for one, two in ((a, b), (b, a)):
            if isinstance(one.get("anyOf"), list):
                return all(self._disjoint(self._resolve(option), two, depth + 1) for option in one["anyOf"])
        if _types(a) & _types(b) != {"object"}:
            return False
        ours, theirs = a.get("properties", {}), b.get("properties", {})
        shared = set(a.get("required", ())) | set(b.get("required", ()))
        both = (name for name in shared if name in ours and name in theirs)
        return any(self._disjoint(self._resolve(ours[name]), self._resolve(theirs[name]), depth + 1) for name in both)


def closed_schema(schema: Any) -> Any:
    """The schema with no properties but those that it names, where it does not speak of others; a model asked for three would add thirty.

    A schema that puts objects together from parts stays as it is, since each part leaves room for the others.
    """
    return schema if _composes(schema) else _closed(schema, "#")


_PARTS = frozenset({"allOf", "anyOf", "oneOf", "$ref"})


def _composes(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_composes, schema))
    if not isinstance(schema, dict):
        return False
    mixed = "properties" in schema and _PARTS & schema.keys()
    return "allOf" in schema or bool(mixed) or any(map(_composes, schema.values()))


def _closed(schema: Any, place: str) -> Any:
    if not isinstance(schema, dict):
        return schema
    named = schema.get("properties")
    open_ended = {"additionalProperties", "patternProperties", "minProperties"} & schema.keys()
    if isinstance(named, dict) and not open_ended and set(schema.get("required", ())) <= named.keys():
        schema = {**schema, "additionalProperties": False}
    return map_subschemas(schema, place, _closed)


def _pattern_of(names: dict[str, Any]) -> str | None:
    """A schema of strings as a pattern, if it is no more than that."""
    if names.keys() == {"pattern"}:
        return str(names["pattern"])
    if names.keys() == {"format"}:
        return FORMATS.get(names["format"])
    if names.keys() <= {"minLength", "maxLength"}:
        return f"^[\\s\\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    return None  # two of them would have to hold at once


def refusal(place: str, what: str) -> RequestValidationError:
    return RequestValidationError(f"the JSON schema at {place}: {what}")


def map_subschemas(schema: dict[str, Any], place: str, change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """A copy of a schema with each of the schemas directly inside it changed."""
    changed = dict(schema)
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            changed[key] = {name: change(sub, f"{place}/{key}/{name}") for name, sub in value.items()}
        elif key in LISTS and isinstance(value, list):
            changed[key] = [change(sub, f"{place}/{key}/{index}") for index, sub in enumerate(value)]
        elif key in ONE:
            changed[key] = change(value, f"{place}/{key}")
    return changed


def _says_nothing(key: str, schema: dict[str, Any]) -> bool:
    if key == "uniqueItems":
        return schema[key] is False or schema.get("maxItems") in (0, 1)
    return key in ("then", "else") and "if" not in schema


def _allows(schema: dict[str, Any], kind: str) -> bool:
    return kind in _types(schema)


def _with_pattern(schema: dict[str, Any], pattern: str) -> dict[str, Any]:
    """The schema with a pattern in place of its format, beside a pattern that it has already."""
    schema = {key: value for key, value in schema.items() if key != "format"}
    if "pattern" not in schema:
        return {**schema, "pattern": pattern}
    return {**schema, "allOf": [*schema.get("allOf", ()), {"pattern": pattern}]}


def _within_reach(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """llguidance's bounds have 64 bits: those of whole numbers that allow more are drawn in, and the others are refused."""
    kinds = set(_types({"type": schema.get("type", TYPES)}))
    for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        bound = schema.get(key)
        if "number" not in kinds or not isinstance(bound, int | float) or abs(bound) <= FURTHEST_BOUND:
            continue
        if not _unbounded_integer(schema) or (bound > 0) == key.lower().endswith("minimum"):
            value = f"{bound:g}" if abs(bound) < 1e308 else "of hundreds of digits"
            raise refusal(place, f"{key!r} {value} is beyond {FURTHEST_BOUND:g}, the furthest bound; leave it out, or change the unit")
        schema = {**schema, key: FURTHEST_BOUND if bound > 0 else -FURTHEST_BOUND}
    return schema


def _without_touching_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """llguidance 1.9 lets an excluded whole number through if the other bound is less than one away: go a little inside instead."""
    low, high = _bound(schema, "Minimum"), _bound(schema, "Maximum")
    if schema.get("type") == "integer" or low is None or high is None or not 0 < high - low < 1:
        return schema
    step = (high - low) / 1024
    for key, other, inside in (("exclusiveMinimum", "minimum", low + step), ("exclusiveMaximum", "maximum", high - step)):
        if key in schema:
            schema = {**{name: value for name, value in schema.items() if name != key}, other: inside}
    return schema


def _unbounded_integer(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type")
    integers = kinds == "integer" or (isinstance(kinds, list) and "integer" in kinds and "number" not in kinds)
    return integers and not {"const", "enum"} & schema.keys()


def _decimal(schema: dict[str, Any]) -> bool:
    """Whether llguidance writes the numbers of a schema without an exponent, as all that are bounded or multiples of something."""
    kinds = schema.get("type")
    numbers = kinds == "number" or (isinstance(kinds, list) and "number" in kinds)
    limited = "multipleOf" in schema or _bound(schema, "Minimum") is not None or _bound(schema, "Maximum") is not None
    return numbers and limited and not {"const", "enum"} & schema.keys()


def _bounded(schema: dict[str, Any], most: int) -> dict[str, Any]:
    """The numbers no further from zero than the most: a weak model would write digits without end.

    Of integers, the most is what every reader of JSON reads exactly (RFC 7493); of others, hundreds of digits would read as infinity.
    """
    low, high = _bound(schema, "Minimum"), _bound(schema, "Maximum")
    bounds = {}
    if low is None and (high is None or high > -most):
        bounds["minimum"] = -most
    if high is None and (low is None or low < most):
        bounds["maximum"] = most
    return {**schema, **bounds}


def _bound(schema: dict[str, Any], name: str) -> float | None:
    """The bound, excluded or not; None if there is none."""
    value = schema.get(f"exclusive{name}", schema.get(name.lower()))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _types(schema: dict[str, Any]) -> set[str]:
    types = schema.get("type", TYPES)
    named = {types} if isinstance(types, str) else set(types)
    values = _values(schema)
    if values is not None and "type" not in schema:
        named = {_type_of(value) for value in values}
    return {"number" if name == "integer" else name for name in named}


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int | float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "object")


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """All values that a schema lists, if it lists them."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _same(a: object, b: object) -> bool:
    """JSON's equality, to which true is not 1."""
    return _type_of(a) == _type_of(b) and a == b


# What a class means in ECMAScript, and in Python and Rust, differs outside ASCII. A string is generated so that both agree.
_NARROW = {"d": "0-9", "w": "0-9A-Za-z_", "s": r" \t\n\r\f\v"}
_WIDE = {"d": r"\p{Nd}", "w": r"\p{Alphabetic}\p{M}\p{N}\p{Pc}\p{Join_Control}", "s": r"\s\x1c-\x1f\ufeff"}


def common_pattern(pattern: str) -> str:
    r"""The pattern with ``\d \w \s`` in their narrowest meaning, and their negations in the meaning that excludes most.

    What a class excludes takes NUL along: with a NUL in it, llguidance 1.9 lets the escapes of what the class excludes through.
    """
    return "".join(_pieces(pattern))


def _pieces(pattern: str) -> Iterator[str]:
    inside = negated = False
    before = ""
    for token in re.findall(r"\\.|\[\^?|[^\\]", pattern, re.DOTALL):
        last, before = before, token
        if not inside and token[0] == "[":
            inside, negated = True, token == "[^"
        elif inside and token == "]":
            inside = False
            token = r"\x00]" if negated and last != "[^" else token
        elif token[0] == "\\" and token[1] in "dws":
            members = (_WIDE if negated else _NARROW)[token[1]]
            yield members if inside else f"[{members}]"
            continue
        elif token[0] == "\\" and token[1] in "DWS" and not inside:
            yield f"[^{_WIDE[token[1].lower()]}]"
            continue
        yield token
