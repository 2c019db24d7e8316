"""Functions as tools."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import json
import pickle
import weakref
from collections.abc import AsyncIterator, Iterator
from enum import Enum
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field

from pymistral import Tool, tool
from pymistral.agents.docstrings import read_docstring
from pymistral.agents.tool import FunctionTool
from pymistral.errors import RequestValidationError, ToolArgumentsError


@tool(description="Get the current weather for a location")
def get_weather(city: Annotated[str, "The city name"], unit: str = "celsius") -> str:
    return f"Sunny, 72F in {city} ({unit})"


class Unit(Enum):
    METRE = "m"
    MILE = "mi"


class Place(BaseModel):
    name: str
    latitude: float = Field(ge=-90, le=90)


@dataclasses.dataclass
class Route:
    stops: list[str]


def test_it_stays_callable() -> None:
    assert get_weather("Rome") == "Sunny, 72F in Rome (celsius)"
    assert get_weather(city="Rome", unit="F") == "Sunny, 72F in Rome (F)"
    assert get_weather.__name__ == "get_weather"
    assert isinstance(get_weather, FunctionTool)


def test_it_is_pickled_and_copied_as_functions_are() -> None:
    assert pickle.loads(pickle.dumps(get_weather)) is get_weather
    assert copy.deepcopy([get_weather]) == [get_weather]

    @tool
    def local() -> str:
        return "here"

    assert copy.copy(local) is local
    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(local)


def test_its_tool() -> None:
    assert get_weather.tool.to_dict() == {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather for a location",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city name"},
                    "unit": {"type": "string", "default": "celsius"},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }


def test_all_kinds_of_parameters() -> None:
    @tool(name="plan", strict=True)
    def function(
        place: Place,
        unit: Unit,
        mode: Literal["car", "bike"],
        route: Route,
        schema: dict[str, int] | None = None,
        model_config: Annotated[int, Field(gt=0, description="from Field")] = 3,
        *,
        tags: set[str] = frozenset(),  # type: ignore[assignment]
        anything: Any = None,
        bare=object(),  # type: ignore[no-untyped-def]  # noqa: B008
    ) -> dict[str, Any]:
        """Plan it."""
        return {"place": place, "unit": unit, "route": route, "schema": schema, "n": model_config, "tags": sorted(tags)}

    plan = function.tool.function
    assert (plan.name, plan.description, plan.strict) == ("plan", "Plan it.", True)
    parameters = plan.parameters
    assert parameters is not None
    jsonschema.Draft202012Validator.check_schema(parameters)
    assert parameters["required"] == ["place", "unit", "mode", "route"]
    assert parameters["properties"]["model_config"] == {"type": "integer", "exclusiveMinimum": 0, "default": 3, "description": "from Field"}
    assert parameters["properties"]["mode"] == {"enum": ["car", "bike"], "type": "string"}
    assert "title" not in json.dumps(parameters)
    arguments = {"place": {"name": "Rome", "latitude": 41.9}, "unit": "mi", "mode": "car", "route": {"stops": ["a"]}, "tags": ["b", "a"]}
    bound = function.bind(arguments)
    assert bound.arguments["place"] == Place(name="Rome", latitude=41.9)
    assert bound.arguments["unit"] is Unit.MILE
    assert bound.arguments["route"] == Route(["a"])
    result = json.loads(function.call(json.dumps(arguments)))
    assert result == {"place": arguments["place"], "unit": "mi", "route": {"stops": ["a"]}, "schema": None, "n": 3, "tags": ["a", "b"]}


def test_a_field_as_a_default() -> None:
    @tool
    def search(
        query: str = Field(description="What to look for", min_length=2),
        limit: int = Field(3, ge=1),
        tags: list[str] = Field(default_factory=list),  # noqa: B008
        *,
        page: Annotated[int, Field(default_factory=lambda: 7)],
    ) -> list[Any]:
        return [query, limit, tags, page]

    parameters = search.tool.function.parameters
    assert parameters is not None
    assert parameters["required"] == ["query"]
    assert parameters["properties"] == {
        "query": {"type": "string", "minLength": 2, "description": "What to look for"},
        "limit": {"type": "integer", "minimum": 1, "default": 3},
        "tags": {"type": "array", "items": {"type": "string"}},
        "page": {"type": "integer"},
    }
    assert search.call('{"query": "cats"}') == '["cats",3,[],7]'
    assert search.call('{"query": "cats", "limit": 1, "tags": ["a"], "page": 2}') == '["cats",1,["a"],2]'
    with pytest.raises(ToolArgumentsError, match="limit: Input should be greater than or equal to 1, got 0"):
        search.call('{"query": "cats", "limit": 0}')


def test_positional_only_parameters_and_no_parameters() -> None:
    @tool
    def power(base: int, exponent: int = 2, /) -> int:
        return base**exponent

    @tool
    def now() -> str:
        return "noon"

    assert power.call('{"base": 3}') == "9"
    assert power.call({"base": 3, "exponent": 3}) == "27"
    assert now.call("") == now.call("{}") == "noon"
    assert now.tool.function.parameters == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("{", "Invalid JSON"),
        ("[]", "valid dictionary|an object"),
        ("{}", "city: Field required"),
        ('{"city": 3}', "city: Input should be a valid string, got 3"),
        ('{"city": "Rome", "planet": "Mars"}', "planet: Extra inputs are not permitted, got 'Mars'"),
        ({"city": ["x" * 1000]}, r"got \['xxx.*\.\.\."),
    ],
)
def test_bad_arguments_are_explained_to_the_model(arguments: Any, complaint: str) -> None:
    with pytest.raises(ToolArgumentsError, match=complaint) as error:
        get_weather.call(arguments)
    assert str(error.value).startswith("The arguments of get_weather are not valid. ")
    assert "https://" not in str(error.value)
    assert len(str(error.value)) < 400


async def test_async_functions() -> None:
    @tool
    async def double(x: int) -> int:
        """Double it."""
        await asyncio.sleep(0)
        return 2 * x

    assert await double(4) == 8
    assert double.is_async
    assert await double.call_async('{"x": 5}') == "10"
    assert double.call('{"x": 6}') == "12"  # in a running loop, which it holds up
    assert await get_weather.call_async({"city": "Rome"}) == "Sunny, 72F in Rome (celsius)"

    @tool
    async def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        fails.call({})


def test_async_functions_without_a_loop() -> None:
    @tool
    async def double(x: int) -> int:
        return 2 * x

    assert double.call('{"x": 6}') == "12"


def test_methods() -> None:
    class Counter:
        def __init__(self) -> None:
            self.total = 0

        @tool
        def add(self, n: int) -> int:
            """Add to the total."""
            self.total += n
            return self.total

    counter, other = Counter(), Counter()
    assert counter.add(2) == 2
    assert counter.add.call({"n": 3}) == "5"
    assert list(counter.add.tool.function.parameters["properties"]) == ["n"]  # type: ignore[index]
    assert other.total == 0


def test_it_keeps_no_variables_of_the_function_around_it() -> None:
    def define() -> tuple[FunctionTool[..., int], weakref.ref[Place]]:
        place = Place(name="Rome", latitude=41.9)
        Count = Annotated[int, Field(ge=1)]

        @tool
        def count(number: Count) -> int:
            return number

        return count, weakref.ref(place)

    function, place = define()
    gc.collect()
    assert place() is None
    assert function.call('{"number": 3}') == "3"


def test_results() -> None:
    @tool
    def echo(kind: str) -> Any:
        return {
            "none": None,
            "text": "é",
            "list": [1, Unit.MILE],
            "model": Place(name="a", latitude=1),
            "odd": Ellipsis,
            "nan": float("nan"),
        }[kind]

    texts = [echo.call({"kind": kind}) for kind in ("none", "text", "list", "model", "odd", "nan")]
    assert texts == ["null", "é", '[1,"mi"]', '{"name":"a","latitude":1.0}', '"Ellipsis"', "NaN"]


def test_functions_that_cannot_be_tools() -> None:
    with pytest.raises(RequestValidationError, match=r"takes \*args, which has no schema"):

        @tool
        def many(*args: int) -> None: ...

    class Handle:
        pass

    with pytest.raises(RequestValidationError, match="'opened' has a parameter of a type without a schema"):

        @tool
        def opened(handle: Handle) -> None: ...

    with pytest.raises(RequestValidationError, match="type hints"):

        @tool
        def lost(x: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(RequestValidationError, match=r"the tool 'lines' yields.*; return a list or a text instead"):

        @tool
        def lines(path: str) -> Iterator[str]:
            yield path

    with pytest.raises(RequestValidationError, match="the tool 'events' yields"):

        @tool
        async def events(path: str) -> AsyncIterator[str]:
            yield path

    for wrong in (3, int, Handle):
        with pytest.raises(RequestValidationError, match="takes a function"):
            tool(wrong)  # type: ignore[call-overload]
    for unreadable in (max, dict.update):
        with pytest.raises(RequestValidationError, match=r"the parameters of the tool '\w+' cannot be read: .*; wrap it in a function"):
            tool(unreadable)  # type: ignore[type-var]
    for name in (5, ""):
        with pytest.raises(RequestValidationError, match="name of a tool must be a non-empty string"):
            tool(name=name)(len)  # type: ignore[call-overload]


NUMPY = """Get it.

    More of it.

    Parameters
    ----------
    city : str
        The city:
        its name.
    days, hours
        How long.

    Returns
    -------
    str
        city : nothing
    """
GOOGLE = """Get it.

    More of it.

    Args:
        city (str): The city:
            its name.
        days: How long.
        hours (int, optional): How long.

    Returns:
        city: nothing
    """
SPHINX = """Get it.

    More of it.

    :param city: The city:
        its name.
    :param int days: How long.
    :param hours: How long.
    :type city: str
    :returns: nothing
    """


@pytest.mark.parametrize("docstring", [NUMPY, GOOGLE, SPHINX], ids=["numpy", "google", "sphinx"])
def test_docstrings(docstring: str) -> None:
    description, parameters = read_docstring(docstring)
    assert description == "Get it.\n\nMore of it."
    assert parameters == {"city": "The city: its name.", "days": "How long.", "hours": "How long."}


def test_a_docstring_describes_the_parameters() -> None:
    def function(city: str, days: Annotated[int, "said here"] = 1, hours: int = 2) -> None: ...

    function.__doc__ = GOOGLE
    made = tool(function).tool
    assert isinstance(made, Tool)
    assert made.function.description == "Get it.\n\nMore of it."
    properties = made.function.parameters["properties"]  # type: ignore[index]
    assert [properties[name]["description"] for name in ("city", "days", "hours")] == ["The city: its name.", "said here", "How long."]


def test_a_default_of_none_hides_no_description() -> None:
    @tool
    def function(unit: Annotated[str | None, "The unit"] = None) -> None: ...

    assert (function.tool.function.parameters or {})["properties"]["unit"]["description"] == "The unit"


@pytest.mark.parametrize("docstring", [None, "", "One line.", "Note: this is text.\n\nArgs are not described."])
def test_docstrings_without_parameters(docstring: str | None) -> None:
    description, parameters = read_docstring(docstring)
    assert description == (docstring or "")
    assert parameters == {}
