"""The JSON schema of a Python type: what pydantic would read into it from JSON, and no more than that."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticSerializationError, SchemaValidator, to_json

from .json_schema import IPV4

EXACT_DIGITS = 15
"""Of a decimal number that goes through a float."""
MOST_PLACES = 9
"""That llguidance's multipleOf can tell."""
_LABEL = "[A-Za-z0-9]{1,20}(?:-[A-Za-z0-9]{1,20}){0,2}"
_HOST = rf"(?:(?:{_LABEL}\.)*[A-Za-z]{_LABEL}|{IPV4})"
_PATH = r"/[\w.~!$&'()*+,;=:@/?%#-]*"


class TypeSchema(GenerateJsonSchema):
    """Pydantic's own schemas are a little wider than its validation in places, which costs nothing but here."""

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        """A default says nothing of what may be answered, and need not have a form in JSON."""
        return self.generate_inner(schema["schema"])

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        """A number: the string that pydantic takes as well could hold anything."""
        found: JsonSchemaValue = {"type": "number"}
        names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum", "multiple_of": "multipleOf"}
        found |= {name: float(schema[bound]) for bound, name in names.items() if bound in schema}
        places, digits = schema.get("decimal_places"), schema.get("max_digits")
        if places is None and digits is None:
            return found
        if places is not None and places <= MOST_PLACES:
            found.setdefault("multipleOf", float(f"1e-{places}"))
        whole = EXACT_DIGITS - min(places or 0, MOST_PLACES)
        most = 10.0 ** (whole if digits is None else min(whole, digits - (places or 0)))
        if "minimum" not in found:
            found["exclusiveMinimum"] = max(found.get("exclusiveMinimum", -most), -most)
        if "maximum" not in found:
            found["exclusiveMaximum"] = min(found.get("exclusiveMaximum", most), most)
        return found

    def complex_schema(self, schema: Any) -> JsonSchemaValue:
        number = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
        return {"type": "string", "pattern": f"^-?{number}[+-]{number}j$"}

    def bytes_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().bytes_schema(schema)
        coding = getattr(self._config, "val_json_bytes", "utf8")
        if coding == "hex":
            return {**found, "pattern": "^(?:[0-9a-f]{2})*$"}
        return {**found, "format": "base64url" if coding == "base64" else "binary"}

    def time_schema(self, schema: Any) -> JsonSchemaValue:
        return _zoned(schema, super().time_schema(schema))

    def datetime_schema(self, schema: Any) -> JsonSchemaValue:
        return _zoned(schema, super().datetime_schema(schema))

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
        found["propertyNames"] = self._key(self.generate_inner(schema["keys_schema"]))
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


def _reads(validator: SchemaValidator, value: Any) -> bool:
    try:
        validator.validate_json(to_json(value))
    except (ValidationError, PydanticSerializationError):
        return False
    return True


def _zoned(schema: Any, found: JsonSchemaValue) -> JsonSchemaValue:
    """``date-time`` and ``time`` demand a time zone."""
    return {**found, "format": f"local-{found['format']}"} if schema.get("tz_constraint") == "naive" and "format" in found else found
