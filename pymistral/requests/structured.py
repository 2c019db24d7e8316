"""Answers as Python objects: a type becomes a constraint, and the answer an object of that type."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

from ..errors import RequestValidationError
from .constraint import Constraint
from .json_schema import SUPPORTED_FORMATS, map_subschemas

T = TypeVar("T")


class StructuredOutput(Generic[T]):
    """What an answer must be.

    Parameters
    ----------
    type
        A pydantic model, dataclass, TypedDict, or anything else that pydantic's `TypeAdapter` takes.

    Raises
    ------
    RequestValidationError
        Pydantic has no JSON schema for the type, or the schema cannot be enforced while generating.
    """

    def __init__(self, type: type[T] | Any) -> None:
        from pydantic import TypeAdapter
        from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

        class Schema(GenerateJsonSchema):
            def decimal_schema(self, schema: Any) -> JsonSchemaValue:
                """A number: the string that pydantic takes as well could hold anything."""
                return self.float_schema(cast("Any", {**schema, "type": "float"}))

        self.name = getattr(type, "__name__", None) or str(type)
        try:
            self._adapter: TypeAdapter[T] = type if isinstance(type, TypeAdapter) else TypeAdapter(type)
            schema = self._adapter.json_schema(schema_generator=Schema)
        except Exception as error:  # pydantic takes text for the name of a type, a dict for a schema of its own, and runs what types define
            raise RequestValidationError(
                f"{self.name} has no JSON schema: {error}; give a type, as a class of BaseModel or list[str], "
                "or put a schema of your own into the request with set_constraint(Constraint.json_schema(...))"
            ) from error
        try:
            self.constraint = Constraint.json_schema(_left_to_pydantic(schema, "#"))
        except RequestValidationError as error:
            raise RequestValidationError(f"{self.name}: {error}") from None

    def parse(self, text: str) -> T:
        """The object that a JSON text says.

        Raises
        ------
        ValueError
            The type's own validation does not accept it; the message is pydantic's.
        """
        return self._adapter.validate_json(text)


def _left_to_pydantic(schema: Any, place: str) -> Any:
    """The schema without what no grammar can enforce but pydantic makes good, or checks, when it reads the answer."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.get("type") == "array":
        schema.pop("uniqueItems", None)  # a set drops what comes twice
    if schema.get("format") not in SUPPORTED_FORMATS:
        schema.pop("format", None)
    return map_subschemas(schema, place, _left_to_pydantic)
