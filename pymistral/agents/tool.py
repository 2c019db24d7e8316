"""Python functions as tools."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Any, Generic, ParamSpec, TypeVar, get_args, get_origin, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError
from pydantic.fields import FieldInfo
from typing_extensions import get_type_hints  # in Python 3.10 typing's hides an Annotated whose default is None

from ..errors import RequestValidationError, ToolArgumentsError
from ..requests import Function, Tool
from ..requests.json_schema import map_subschemas
from ..responses import CalledFunction
from ..threads import in_thread, run_to_end
from ..tool_rounds import DEFAULT_TOOL_TIMEOUT, ToolCallback, checked_timeout, is_async, refuse_generator, result_text
from .docstrings import read_docstring

P = ParamSpec("P")
R = TypeVar("R")


@overload
def tool(function: Callable[P, R], /) -> FunctionTool[P, R]: ...


@overload
def tool(
    *, name: str | None = None, description: str | None = None, strict: bool | None = None
) -> Callable[[Callable[P, R]], FunctionTool[P, R]]: ...


def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    strict: bool | None = None,
) -> FunctionTool[P, R] | Callable[[Callable[P, R]], FunctionTool[P, R]]:
    """Make a function a tool that a model can call. It stays callable as before; its `Tool` is the attribute ``tool``.

    The schema of the arguments comes from the type hints, as pydantic reads them. What the parameters mean is said by ``Annotated``, else
    by the docstring (NumPy, Google or Sphinx style).

    Parameters
    ----------
    name
        What the model calls it; None: the function's name.
    description
        What it does; None: what the docstring says before its sections.
    strict
        As `Function.strict`.

    Raises
    ------
    RequestValidationError
        A parameter has no JSON schema: ``*args``, or a type that pydantic does not know. Or the function yields.

    Examples
    --------
    >>> @tool(description="Get the current weather for a location")
    ... def get_weather(city: Annotated[str, "The city name"], unit: str = "celsius") -> str:
    ...     return f"Sunny, 72F in {city}"
    >>> get_weather("Paris")
    'Sunny, 72F in Paris'
    """

    names = sys._getframe(1).f_locals  # hints may name classes that are defined where the function is

    def decorate(function: Callable[P, R]) -> FunctionTool[P, R]:
        return FunctionTool(function, name=name, description=description, strict=strict, names=names)

    return decorate if function is None else decorate(function)


class FunctionTool(Generic[P, R]):
    """A function that a model can call; made by `tool`."""

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None = None,
        description: str | None = None,
        strict: bool | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(function) or isinstance(function, type):  # a class says nothing of how it is called to `get_type_hints`
            raise RequestValidationError(f"@tool takes a function, got {function!r}")
        if name is not None and (not isinstance(name, str) or not name):
            raise RequestValidationError(f"the name of a tool must be a non-empty string, got {name!r}")
        refuse_generator(function)
        functools.update_wrapper(self, function)
        self._function = function
        self._options: dict[str, Any] = {"name": name, "description": description, "strict": strict, "names": names}
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self.is_async = is_async(function)
        if not _is_method(function, self._signature):
            _ = self.tool  # a function that cannot be a tool is an error where it is defined
        if not _in_class(function):
            self._options["names"] = None  # read by now; they would keep all variables of the function around it alive

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._function(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> FunctionTool[..., R]:
        """In a class: the tool of the bound method."""
        if instance is None:
            return self
        return FunctionTool(self._function.__get__(instance, owner), **self._options)

    @cached_property
    def tool(self) -> Tool:
        """The tool as the model is told of it."""
        description = self._options["description"] or self._documentation[0] or None
        return Tool(function=Function(name=self.name, description=description, parameters=self._parameters, strict=self._options["strict"]))

    def bind(self, arguments: str | Mapping[str, Any]) -> inspect.BoundArguments:
        """The arguments of a call, validated and converted to the types of the parameters.

        Parameters
        ----------
        arguments
            JSON text, as a model writes it, or what it says.

        Raises
        ------
        ToolArgumentsError
            They are no JSON, or not what the function takes.
        """
        try:
            if isinstance(arguments, str):
                values = self._model.model_validate_json(arguments or "{}")
            else:
                values = self._model.model_validate(dict(arguments))
        except ValidationError as error:
            raise ToolArgumentsError(self._complaint(error)) from error
        bound = self._signature.bind_partial()
        for index, (name, parameter) in enumerate(self._signature.parameters.items()):
            if f"argument_{index}" in values.model_fields_set or _leaves_default_to_pydantic(parameter):
                bound.arguments[name] = getattr(values, f"argument_{index}")
        bound.apply_defaults()
        return bound

    def call(self, arguments: str | Mapping[str, Any]) -> str:
        """Call the function with a model's arguments; return the result as the model reads it. Waits for an async function.

        Raises
        ------
        ToolArgumentsError
            The arguments are not what the function takes. Whatever the function itself raises goes on as it is.
        """
        bound = self.bind(arguments)
        result: Any = self._function(*bound.args, **bound.kwargs)
        return result_text(run_to_end(_awaited(result)) if inspect.isawaitable(result) else result)

    async def call_async(self, arguments: str | Mapping[str, Any]) -> str:
        """As `call`, without holding up the event loop: a function that is not async runs in a thread of its own."""
        bound = self.bind(arguments)
        if self.is_async:
            result: Any = await self._function(*bound.args, **bound.kwargs)  # type: ignore[misc]
        else:
            result = await in_thread(self._function, *bound.args, **bound.kwargs)
            if inspect.isawaitable(result):
                result = await result
        return result_text(result)

    def __reduce__(self) -> str:
        """Pickled and copied as functions are: by its name."""
        return str(getattr(self, "__qualname__", self.name))

    def __repr__(self) -> str:
        return f"<tool {self.name}>"

    @cached_property
    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self._function)
        except (TypeError, ValueError) as error:  # some of what is written in C has none
            raise RequestValidationError(
                f"the parameters of the tool {self.name!r} cannot be read: {error}; wrap it in a function"
            ) from error

    @cached_property
    def _documentation(self) -> tuple[str, dict[str, str]]:
        return read_docstring(self._function.__doc__)

    @cached_property
    def _model(self) -> type[BaseModel]:
        """What validates the arguments. Its fields have names of their own, since parameters may be called anything."""
        try:
            target = self._function if inspect.isroutine(self._function) else type(self._function).__call__
            hints = get_type_hints(target, localns=dict(self._options["names"] or {}), include_extras=True)
        except (NameError, TypeError) as error:
            raise RequestValidationError(f"the type hints of the tool {self.name!r} cannot be read: {error}") from error
        fields: dict[str, Any] = {}
        for index, (name, parameter) in enumerate(self._signature.parameters.items()):
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
                raise RequestValidationError(f"the tool {self.name!r} takes {stars}{name}, which has no schema; give each parameter a name")
            hint = hints.get(name, Any)
            if isinstance(parameter.default, FieldInfo):
                hint = Annotated[hint, parameter.default]
            fields[f"argument_{index}"] = (hint, self._field(name, hint, parameter))
        try:
            return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)
        except (PydanticSchemaGenerationError, PydanticUserError) as error:
            raise RequestValidationError(f"the tool {self.name!r} has a parameter of a type without a schema: {error}") from error

    def _field(self, name: str, hint: Any, parameter: inspect.Parameter) -> Any:
        metadata = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        said = next((item.description for item in metadata if isinstance(item, FieldInfo) and item.description), None)
        said = said or next((item for item in metadata if isinstance(item, str)), None) or self._documentation[1].get(name)
        if _leaves_default_to_pydantic(parameter):
            return Field(alias=name, description=said)
        return Field(default=parameter.default, alias=name, description=said)

    @cached_property
    def _parameters(self) -> dict[str, Any]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a default that JSON does not know is left out
                schema = self._model.model_json_schema()
        except (PydanticInvalidForJsonSchema, PydanticUserError) as error:
            raise RequestValidationError(f"the tool {self.name!r} has a parameter of a type without a schema: {error}") from error
        return {"properties": {}, **_untitled(schema, "#")}

    def _complaint(self, error: ValidationError) -> str:
        """The error for the model to read, which will then try again."""
        problems = []
        for problem in error.errors(include_url=False, include_context=False):
            place = ".".join(map(str, problem["loc"]))
            got = "" if problem["type"] in ("missing", "json_invalid") else f", got {_shortened(problem['input'])}"
            problems.append(f"{place}: {problem['msg']}{got}" if place else problem["msg"])
        return f"The arguments of {self.name} are not valid. {'; '.join(problems)}. Call it again with arguments that follow its schema."


def _in_class(function: Callable[..., Any]) -> bool:
    """Whether a function stands in a class body."""
    where = getattr(function, "__qualname__", "").rpartition(".")[0]
    return bool(where) and not where.endswith("<locals>")


def _is_method(function: Callable[..., Any], signature: inspect.Signature) -> bool:
    """Whether a function's first parameter is yet to be bound."""
    return _in_class(function) and not inspect.ismethod(function) and list(signature.parameters)[:1] == ["self"]


def _leaves_default_to_pydantic(parameter: inspect.Parameter) -> bool:
    """Whether only pydantic knows a default: that of ``= Field(...)``, or of a ``Field`` among the hints."""
    return parameter.default is inspect.Parameter.empty or isinstance(parameter.default, FieldInfo)


def _untitled(schema: Any, place: str) -> Any:
    """Without the titles that pydantic makes up from names: the model has to read all this."""
    if not isinstance(schema, dict):
        return schema
    return map_subschemas({key: value for key, value in schema.items() if key != "title"}, place, _untitled)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def tool_callback(callback: Any, tool: Tool | None = None, timeout: float | None = DEFAULT_TOOL_TIMEOUT) -> ToolCallback:
    """What runs a tool: from a function that `tool` decorates, or one that takes the `CalledFunction`."""
    checked_timeout(timeout)
    if isinstance(callback, ToolCallback):
        return callback
    if isinstance(callback, FunctionTool):
        function_tool: FunctionTool[..., Any] = callback

        async def call(function: CalledFunction) -> str:
            return await function_tool.call_async(function.arguments)

        return ToolCallback(function=call, tool=tool, timeout=timeout)
    if not callable(callback):
        raise RequestValidationError(f"a tool callback is a function of the CalledFunction, or one with @tool; got {callback!r}")
    return ToolCallback(function=callback, tool=tool, timeout=timeout)
