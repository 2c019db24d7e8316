"""Answers as Python objects: a type becomes a constraint, and the answer an object of that type."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isinf
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, get_args, get_origin

from ..errors import ModelError, RequestValidationError
from .constraint import Constraint
from .json_schema import KNOWN, REFUSED, SUPPORTED_FORMATS, map_subschemas, refusal
from .request import ChatRequest, RequestBuilder

if TYPE_CHECKING:
    from ..responses import ChatCompletionResponse

T = TypeVar("T")


class _NoJsonError(ValueError):
    """An answer is no JSON, as one that was cut short."""


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

        from .type_schema import TypeSchema

        self.name = _name(type)
        try:
            self._adapter: TypeAdapter[T] = type if isinstance(type, TypeAdapter) else TypeAdapter(type)
            schema = self._adapter.json_schema(schema_generator=TypeSchema)
        except Exception as error:  # pydantic takes text for the name of a type, a dict for a schema of its own, and runs what types define
            raise RequestValidationError(
                f"{self.name} has no JSON schema: {_in_a_line(error)}; give a type, as a class of BaseModel or list[str], "
                "or put a schema of your own into the request with set_constraint(Constraint.json_schema(...))"
            ) from error
        try:
            self.constraint = replace(Constraint.json_schema(_left_to_pydantic(schema, "#")), of=self.name)
        except RequestValidationError as error:
            raise RequestValidationError(f"{self.name}: {error}") from None

    def constrain(self, request: ChatRequest) -> RequestBuilder:
        """The request with the type's constraint.

        Raises
        ------
        RequestValidationError
            It has a constraint of its own.
        """
        builder = RequestBuilder.of(request)
        if builder.constraint is not None:
            problem = "the request has a constraint of its own, but generate_structured sets it from the type; leave it out"
            raise RequestValidationError(problem)
        return builder.set_constraint(self.constraint)

    def read(self, request: RequestBuilder, response: ChatCompletionResponse) -> T:
        """The object that the response to such a request is.

        Raises
        ------
        ModelError
            A stop string of the request cut it, or the type's own validation does not accept it.
        """
        text = response.choices[0].message.content or ""
        try:
            return self.parse(text)
        except ValueError as error:
            stops = ", ".join(map(repr, request.sampling.stop_toks or ()))
            if stops and isinstance(error, _NoJsonError):  # nothing else ends a constrained answer before it is whole
                problem = f"stop_toks ({stops}) cut the answer before it was a whole {self.name}; leave out what JSON of the type may hold"
                raise ModelError(problem, response) from error
            raise ModelError(f"the answer is no valid {self.name}: {error}", response) from error

    def parse(self, text: str) -> T:
        """The object that a JSON text says.

        Raises
        ------
        ValueError
            The type's own validation does not accept it; the message says where, and what there was.
        """
        from pydantic import ValidationError

        try:
            value = self._adapter.validate_json(text)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            kind = _NoJsonError if problems[0]["type"] == "json_invalid" else ValueError
            raise kind("; ".join(map(_told, problems))) from error
        json.loads(text, parse_float=_finite, parse_int=_finite)
        return value


def _told(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    got = "" if problem["type"] in ("missing", "json_invalid") else f", got {_shortened(problem['input'])}"
    return f"{place}: {problem['msg']}{got}" if place else f"{problem['msg']}{got}"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _finite(number: str) -> float:
    """JSON's numbers go further than Python's: its parsers would take 1e999 for infinity."""
    if isinf(value := float(number)):
        raise ValueError(f"the number {_shortened(number)[1:-1]} is beyond Python's floats; give the type bounds, as with Field(le=1e9)")
    return value


def _name(type: Any) -> str:
    """``dict[Color, int]`` rather than ``dict``."""
    if get_origin(type) is Annotated:
        return _name(get_args(type)[0])
    plain = None if get_args(type) else getattr(type, "__name__", None)
    return plain or str(type).replace("typing.", "")


def _in_a_line(error: Exception) -> str:
    """Pydantic's message without its link, and without the advice on classes that JSON could not say either."""
    message = str(getattr(error, "message", error)).partition(" Set `arbitrary_types_allowed=True`")[0]
    return " ".join(message.split()).rstrip(".")


def _left_to_pydantic(schema: Any, place: str) -> Any:
    """The schema without what no grammar can enforce but pydantic makes good, or checks, when it reads the answer."""
    if not isinstance(schema, dict):
        return schema
    if REFUSED in schema:
        raise refusal(place, schema[REFUSED])
    if schema.get("format") == "regex":
        raise refusal(place, "a regular expression cannot be enforced while generating; give str, and compile it then")
    schema = {key: value for key, value in schema.items() if key in KNOWN}  # examples need not have a form in JSON
    if schema.get("type") == "array":
        schema.pop("uniqueItems", None)  # a set drops what comes twice
    if schema.get("format") not in SUPPORTED_FORMATS:
        schema.pop("format", None)
    return map_subschemas(schema, place, _left_to_pydantic)
