"""The JSON schema of a Python type: what pydantic would read into it from JSON, and no more than that."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticSerializationError, SchemaValidator, to_json

from .json_schema import BASE64URL, IPV4, ONE_BYTE, REFUSED, TWO_BYTES

EXACT_DIGITS = 15
"""Of a decimal number that goes through a float."""
MOST_PLACES = 9
"""That llguidance's multipleOf can tell."""
MOST_MULTIPLE = 8_000_000
"""Beyond 2^23 pydantic takes floats for no multiples of 0.1 and the like: it allows a distance of 1e-9, and floats are further apart."""
_NO_PATH = "what files there are on this machine cannot be enforced while generating; give pathlib.Path, and look for the file then"
_FRACTION = "^-?[0-9]{1,15}(?:/[1-9][0-9]{0,14})?$"
_SIZE = r"^[0-9]{1,15}(?:\.[0-9]{1,3})? ?(?:[KMGTP]i?)?B$"
_OWN: dict[str, JsonSchemaValue] = {
    "ByteSize._validate": {"anyOf": [{"type": "string", "pattern": _SIZE}, {"type": "integer", "minimum": 0}]},
    "EncodedStr.decode_str": {REFUSED: "base64 of text, and only of text, cannot be enforced while generating; give str, or Base64Bytes"},
    "ImportString._serialize": {
        REFUSED: "an answer may not say what is imported; give Literal of the names that may be chosen, and import then"
    },
    "PathType.validate_file": {REFUSED: _NO_PATH},
    "PathType.validate_directory": {REFUSED: _NO_PATH},
    "PathType.validate_new": {REFUSED: _NO_PATH},
    "fraction_validator": {"type": "string", "pattern": _FRACTION},  # before pydantic 2.13, which has a schema of its own for them
}
"""What to ask for where pydantic's own types are validated, or written, by these functions of its: its schemas tell less."""
_HOOKS = ("pydantic_js_functions", "pydantic_js_annotation_functions")
_SCALARS = ["null", "boolean", "number", "string"]
_LAST_DAY = datetime.date.max.toordinal()
_BOUNDS = ("gt", "ge", "lt", "le", "now_op")
_LABEL = "[A-Za-z0-9]{1,20}(?:-[A-Za-z0-9]{1,20}){0,2}"
_HOST = rf"(?:(?:{_LABEL}\.)*[A-Za-z]{_LABEL}|{IPV4})"
_PATH = r"/[\w.~!$&'()*+,;=:@/?%#-]*"


class TypeSchema(GenerateJsonSchema):
    """Pydantic's own schemas are a little wider than its validation in places, which costs nothing but here."""

    def generate_inner(self, schema: Any) -> JsonSchemaValue:
        """What `_OWN` says takes the place of pydantic's own schema, and of nothing that a user said, as with WithJsonSchema."""
        if own := _own(schema):
            metadata = dict(schema.get("metadata", {}))
            for key in _HOOKS:
                hooks = metadata.get(key, [])
                metadata[key] = [hook for hook in hooks if not hook.__module__.startswith(("pydantic.types", "pydantic._internal"))]
            schema = {**schema, "type": "any", "own": own, "metadata": metadata}
        return super().generate_inner(schema)

    def any_schema(self, schema: Any) -> JsonSchemaValue:
        return dict(_OWN[schema["own"]]) if "own" in schema else super().any_schema(schema)

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        """A default says nothing of what may be answered, and need not have a form in JSON."""
        return self.generate_inner(schema["schema"])

    def definitions_schema(self, schema: Any) -> JsonSchemaValue:
        self._defined = {definition["ref"]: definition for definition in schema["definitions"]}
        return super().definitions_schema(schema)

    def float_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().float_schema(schema)
        if Fraction(schema.get("multiple_of", 1)).denominator > 1024:  # no binary fraction
            found["minimum"] = max(found.get("minimum", -MOST_MULTIPLE), -MOST_MULTIPLE)
            found["maximum"] = min(found.get("maximum", MOST_MULTIPLE), MOST_MULTIPLE)
        return found

    def fraction_schema(self, schema: Any) -> JsonSchemaValue:
        """Digits over digits; not a number as well, which could be beyond floats."""
        return _refused_if(schema, (*_BOUNDS, "multiple_of"), {"type": "string", "pattern": _FRACTION})

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        """A number: the string that pydantic takes as well could hold anything."""
        found: JsonSchemaValue = {"type": "number"}
        names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum", "multiple_of": "multipleOf"}
        found |= {name: float(schema[bound]) for bound, name in names.items() if bound in schema}
        places, digits = schema.get("decimal_places"), schema.get("max_digits")
        if "multiple_of" in schema and places is None:
            places = max(0, -int(Decimal(schema["multiple_of"]).as_tuple().exponent))
        if places is None:
            what = "max_digits of a decimal cannot be enforced while generating without decimal_places; give both"
            return found if digits is None else {REFUSED: what}
        told = min(places, MOST_PLACES)
        found.setdefault("multipleOf", float(f"1e-{told}"))
        whole = EXACT_DIGITS - told
        most = 10.0 ** (whole if digits is None else min(whole, digits - places))
        if "minimum" not in found:
            found["exclusiveMinimum"] = max(found.get("exclusiveMinimum", -most), -most)
        if "maximum" not in found:
            found["exclusiveMaximum"] = min(found.get("exclusiveMaximum", most), most)
        return found

    def complex_schema(self, schema: Any) -> JsonSchemaValue:
        number = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
        return {"type": "string", "pattern": f"^-?{number}[+-]{number}j$"}

    def bytes_schema(self, schema: Any) -> JsonSchemaValue:
        coding = getattr(self._config, "val_json_bytes", "utf8")
        least, most = schema.get("min_length", 0), schema.get("max_length")  # of bytes, where JSON counts characters
        if most is not None and least > most:
            return {REFUSED: f"no bytes are at least {least} and at most {most}; change its bounds"}
        if least == 0 and most is None and coding != "hex":
            return {"type": "string", "format": "base64url" if coding == "base64" else "binary"}
        return {"type": "string", "pattern": f"^{_coded(coding, least, most)}$"}

    def date_schema(self, schema: Any) -> JsonSchemaValue:
        found = {"type": "string", "format": "date"}  # without what pydantic before 2.9 adds of bounds, which is no JSON
        if not any(bound in schema for bound in _BOUNDS):
            return found
        today, now = datetime.date.today(), schema.get("now_op")
        after = [bound for bound in (schema.get("gt"), today if now == "future" else None) if bound]
        before = [bound for bound in (schema.get("lt"), today if now == "past" else None) if bound]
        first = max(schema.get("ge", datetime.date.min).toordinal(), *[bound.toordinal() + 1 for bound in after], 1)
        last = min(schema.get("le", datetime.date.max).toordinal(), *[bound.toordinal() - 1 for bound in before], _LAST_DAY)
        if first > last:
            return {REFUSED: "no date lies within its bounds; change them"}
        days = [str(datetime.date.fromordinal(day)) for day in (first, last)]
        return {**found, "pattern": f"^{_between(*days)}$"}

    def time_schema(self, schema: Any) -> JsonSchemaValue:
        return _refused_if(schema, _BOUNDS, _zoned(schema, super().time_schema(schema)))

    def datetime_schema(self, schema: Any) -> JsonSchemaValue:
        return _refused_if(schema, _BOUNDS, _zoned(schema, super().datetime_schema(schema)))

    def timedelta_schema(self, schema: Any) -> JsonSchemaValue:
        none_is_less = schema.get("ge") == datetime.timedelta(0)
        return _refused_if(schema, set(_BOUNDS) - ({"ge"} if none_is_less else set()), super().timedelta_schema(schema))

    def set_schema(self, schema: Any) -> JsonSchemaValue:
        return self._of_hashable(schema, super().set_schema(schema))

    def frozenset_schema(self, schema: Any) -> JsonSchemaValue:
        return self._of_hashable(schema, super().frozenset_schema(schema))

    def custom_error_schema(self, schema: Any) -> JsonSchemaValue:
        if schema["custom_error_type"] == "is_hashable":
            return {"type": _SCALARS}
        return super().custom_error_schema(schema)

    def url_schema(self, schema: Any) -> JsonSchemaValue:
        return self._of_schemes(schema, super().url_schema(schema))

    def multi_host_url_schema(self, schema: Any) -> JsonSchemaValue:
        return self._of_schemes(schema, super().multi_host_url_schema(schema))

    def json_schema(self, schema: Any) -> JsonSchemaValue:
        return self.handle_invalid_for_json_schema(schema, "JSON text within a string; leave out Json, and give the type of what it holds")

    def enum_schema(self, schema: Any) -> JsonSchemaValue:
        return self._readable(schema, [member.value for member in schema["members"]], super().enum_schema(schema))

    def literal_schema(self, schema: Any) -> JsonSchemaValue:
        return self._readable(schema, schema["expected"], super().literal_schema(schema))

    def is_subclass_schema(self, schema: Any) -> JsonSchemaValue:
        return self.handle_invalid_for_json_schema(schema, f"a class ({schema['cls'].__name__} or one of its subclasses)")

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        return self._with_keys(schema, super().dict_schema(schema))

    def ordered_dict_schema(self, schema: Any) -> JsonSchemaValue:
        return self._with_keys(schema, super().ordered_dict_schema(schema))

    def counter_schema(self, schema: Any) -> JsonSchemaValue:
        return self._with_keys(schema, super().counter_schema(schema))

    def model_field_schema(self, schema: Any) -> JsonSchemaValue:
        return self._field(schema, super().model_field_schema(schema))

    def typed_dict_field_schema(self, schema: Any) -> JsonSchemaValue:
        return self._field(schema, super().typed_dict_field_schema(schema))

    def dataclass_field_schema(self, schema: Any) -> JsonSchemaValue:
        return self._field(schema, super().dataclass_field_schema(schema))

    def _of_hashable(self, schema: Any, found: JsonSchemaValue) -> JsonSchemaValue:
        items = schema.get("items_schema", {"type": "any"})
        if items["type"] == "any":
            return {**found, "items": {"type": _SCALARS}}
        if name := self._unhashable(items):
            return {
                REFUSED: f"a set cannot hold {name}, which has no hash; give a list, or items that have one, as tuples and frozen models"
            }
        return found

    def _unhashable(self, schema: Any) -> str | None:
        """What in a set's items pydantic cannot put into a set."""
        waiting, seen = [schema], set()
        while waiting:
            part = waiting.pop()
            kind = part["type"]
            if kind in ("list", "set", "dict", "typed-dict", "any"):
                return str(kind)
            if kind in ("model", "dataclass") and part["cls"].__hash__ is None:
                return str(part["cls"].__name__)
            if kind == "definition-ref" and part["schema_ref"] not in seen:
                seen.add(part["schema_ref"])
                waiting.append(self._defined[part["schema_ref"]])
            if kind in ("nullable", "default"):
                waiting.append(part["schema"])
            if kind == "tuple":
                waiting += part["items_schema"]
            if kind in ("union", "tagged-union"):
                choices = part["choices"].values() if kind == "tagged-union" else part["choices"]
                waiting += [choice[0] if isinstance(choice, tuple) else choice for choice in choices]
        return None

    def _of_schemes(self, schema: Any, found: JsonSchemaValue) -> JsonSchemaValue:
        if schemes := schema.get("allowed_schemes"):
            del found["format"]
            where = _PATH if schemes == ["file"] else f"{_HOST}(?::[1-9][0-9]{{0,3}})?(?:{_PATH})?"
            found["pattern"] = f"^(?:{'|'.join(map(re.escape, schemes))})://{where}$"
        return found

    def _readable(self, schema: Any, values: list[Any], found: JsonSchemaValue) -> JsonSchemaValue:
        """The schema of some values, if JSON can hold them all: bytes, and an enum's tuples, come back as something else."""
        validator = SchemaValidator(schema)
        if unread := [value for value in values if not _reads(validator, value)]:
            raise PydanticInvalidForJsonSchema(f"the value {unread[0]!r} cannot be read from JSON, which has strings and numbers")
        return found

    def _with_keys(self, schema: Any, found: JsonSchemaValue) -> JsonSchemaValue:
        """Pydantic reads keys that are no strings from strings, but its schema lets any string through."""
        if "keys_schema" not in schema:
            return found
        found.pop("propertyNames", None)
        patterns = found.pop("patternProperties", {})
        found.setdefault("additionalProperties", next(iter(patterns.values()), True))
        keys = self.generate_inner(schema["keys_schema"])
        if REFUSED in keys:
            return {REFUSED: f"its keys: {keys[REFUSED]}"}
        found["propertyNames"] = self._key(keys)
        return found

    def _key(self, keys: JsonSchemaValue) -> JsonSchemaValue:
        options = keys.get("anyOf", [keys])
        if not keys or {"type": "string"} in [{key: value for key, value in option.items() if key != "title"} for option in options]:
            return {}
        exact = {"integer": r"^(?:0|-?[1-9][0-9]{0,14})$", "number": r"^-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?$"}
        kind = keys.get("type")
        if keys == {"type": "boolean"}:
            return {"enum": ["true", "false"]}
        if kind == "integer" and {"minimum", "maximum"} <= keys.keys() and keys["maximum"] - keys["minimum"] < 1000:
            return {"enum": [str(key) for key in range(keys["minimum"], keys["maximum"] + 1)]}
        if kind in exact and keys.keys() == {"type"}:
            return {"pattern": exact[kind]}
        return keys

    def _field(self, schema: Any, found: JsonSchemaValue) -> JsonSchemaValue:
        alias = schema.get("validation_alias", "")
        paths = alias if not alias or isinstance(alias[0], list) else [alias]
        if not isinstance(alias, str) and all(len(path) > 1 for path in paths):
            path = ".".join(map(str, paths[0]))
            raise PydanticInvalidForJsonSchema(
                f"a validation_alias that is a path ({path}) cannot be asked for; give the field a plain name, too, with AliasChoices"
            )
        return found


def _own(schema: Any) -> str | None:
    """The function of a schema that `_OWN` names."""
    for described in (schema.get("function"), schema.get("serialization"), schema.get("lax_schema", {}).get("function")):
        function: Any = described.get("function") if isinstance(described, dict) else None
        name: str = getattr(function, "__qualname__", "")
        if name in _OWN and function.__module__.startswith("pydantic."):
            return name
    return None


def _reads(validator: SchemaValidator, value: Any) -> bool:
    try:
        validator.validate_json(to_json(value))
    except (ValidationError, PydanticSerializationError):
        return False
    return True


def _refused_if(schema: Any, names: Iterable[str], found: JsonSchemaValue) -> JsonSchemaValue:
    """What was found, unless the type has one of these bounds."""
    if given := [name for name in names if name in schema]:
        what = schema["now_op"] if given[0] == "now_op" else given[0]
        return {REFUSED: f"{what!r} of a {schema['type']} cannot be enforced while generating; leave it out, and check the answer for it"}
    return found


def _coded(coding: str, least: int, most: int | None) -> str:
    """A pattern of so many bytes; those of text are ASCII's."""
    if coding == "utf8":
        return f"[ -~]{_times(least, most)}"
    if coding == "hex":
        return f"(?:[0-9a-f]{{2}}){_times(least, most)}"
    tails = {0: "", 1: BASE64URL + ONE_BYTE, 2: f"{BASE64URL}{{2}}{TWO_BYTES}"}
    whole = {n: (max(0, -(-(least - n) // 3)), most if most is None else (most - n) // 3) for n in tails}
    possible = {n: _times(*times) for n, times in whole.items() if times[1] is None or times[0] <= times[1]}
    return f"(?:{'|'.join(f'(?:{BASE64URL}{{4}}){times}{tails[n]}' for n, times in possible.items())})"


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _between(first: str, last: str) -> str:
    """A pattern of the texts from one to another, both of the same form, in which digits differ and nothing else does."""
    if first[:1] == last[:1]:
        return first and first[0] + _between(first[1:], last[1:])
    least, most = re.sub("[0-9]", "0", first[1:]), re.sub("[0-9]", "9", first[1:])
    anything = re.sub("[0-9]", "[0-9]", first[1:])
    options = []
    low, high = int(first[0]), int(last[0])
    if first[1:] != least:
        options.append(f"{low}{_between(first[1:], most)}")
        low += 1
    if last[1:] != most:
        options.append(f"{high}{_between(least, last[1:])}")
        high -= 1
    if low <= high:
        options.append(f"[{low}-{high}]{anything}")
    return f"(?:{'|'.join(options)})"


def _zoned(schema: Any, found: JsonSchemaValue) -> JsonSchemaValue:
    """``date-time`` and ``time`` demand a time zone."""
    return {**found, "format": f"local-{found['format']}"} if schema.get("tz_constraint") == "naive" and "format" in found else found
