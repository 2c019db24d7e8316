"""Structured output and tools on a real model: the blocks of the documentation, with a model small enough to need every constraint."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, field_validator

from pymistral import Constraint, Function, Model, ModelBuilder, RequestBuilder, TextMessages, Tool, ToolChoice, ToolType
from pymistral.blocking import BlockingModel
from pymistral.errors import ModelError, RequestValidationError
from pymistral.responses import ToolCallDelta

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
}
TOOLS = [
    Tool(
        type=ToolType.FUNCTION,
        function=Function(name="get_weather", description="Get the weather for a location", parameters=PARAMETERS, strict=True),
    ),
    Tool(function=Function(name="get_time", description="Get the time")),
]


class City(BaseModel):
    name: str
    country: str
    population: int


@dataclasses.dataclass
class Point:
    x: int
    y: Literal[3, 4]


@pytest.fixture(scope="module")
def blocking(smollm2_path: Path) -> Iterator[BlockingModel]:
    with BlockingModel.from_builder(ModelBuilder(str(smollm2_path))) as model:
        yield model


@pytest.fixture
def model(blocking: BlockingModel) -> Model:
    return blocking.inner


async def test_generate_structured(model: Model) -> None:
    city = await model.generate_structured(City, TextMessages().add_message("user", "Give me info about Paris."))
    assert isinstance(city, City)
    assert city.name == "Paris"
    assert city.country == "France"


def test_generate_structured_blocking(blocking: BlockingModel) -> None:
    assert blocking.generate_structured(City, "Give me info about Paris.").country == "France"
    assert blocking.generate_structured(Literal["yes", "no"], "Is the sky blue?") in ("yes", "no")  # type: ignore[arg-type]
    points = blocking.generate_structured(list[Point], RequestBuilder().add_message("user", "Three points").set_sampler_max_len(300))
    assert all(isinstance(point, Point) for point in points)


async def test_an_answer_that_is_cut_is_an_error_with_what_there_was(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Give me info about Paris.").set_sampler_max_len(6)
    with pytest.raises(ModelError, match=r"cut after 6 tokens, before its constraint was satisfied; .*max_len") as error:
        await model.generate_structured(City, request)
    partial = error.value.partial_response
    assert partial is not None
    assert (partial.choices[0].message.content or "").startswith('{"name": "')
    with pytest.raises(ModelError):
        async for _ in model.stream_chat_request(request.set_constraint(Constraint.json_schema(City.model_json_schema()))):
            pass


async def test_a_validator_of_the_type_refuses(model: Model) -> None:
    class Odd(BaseModel):
        number: Literal[2]

        @field_validator("number")
        @classmethod
        def refuse(cls, number: int) -> int:
            raise ValueError("it must be odd")

    with pytest.raises(ModelError, match=r"^the answer is no valid Odd: number: Value error, it must be odd, got 2$") as error:
        await model.generate_structured(Odd, "A number?")
    assert error.value.partial_response is not None
    assert error.value.partial_response.choices[0].message.content == '{"number": 2}'


async def test_a_stop_that_cuts_the_object_is_named(model: Model, blocking: BlockingModel) -> None:
    request = RequestBuilder().add_message("user", "Give me info about Paris.").set_sampler_stop_toks(["country", "\n\n"])
    message = r"stop_toks \('country', '\\n\\n'\) cut the answer before it was a whole City; leave out"
    with pytest.raises(ModelError, match=message) as error:
        await model.generate_structured(City, request)
    assert error.value.partial_response is not None
    with pytest.raises(ModelError, match=message):
        blocking.generate_structured(City, request)


async def test_what_generate_structured_refuses(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Hi").set_constraint(Constraint.regex("a"))
    with pytest.raises(RequestValidationError, match="a constraint of its own"):
        await model.generate_structured(City, request)
    with pytest.raises(RequestValidationError, match="'not' cannot be enforced"):
        Constraint.json_schema({"not": {}})
    with pytest.raises(RequestValidationError, match="unclosed group"):
        await model.send_chat_request(request.set_constraint(Constraint.regex("(a")))


@pytest.mark.parametrize(
    ("constraint", "answers"),
    [
        (Constraint.regex("(yes|no)"), {"yes", "no"}),
        (Constraint.lark('start: "yes" | "no"'), {"yes", "no"}),
        (Constraint.llguidance({"grammars": [{"lark_grammar": 'start: "yes" | "no"'}]}), {"yes", "no"}),
        (Constraint.json_schema({"enum": ["yes", "no"]}), {'"yes"', '"no"'}),
    ],
    ids=lambda value: value.kind if isinstance(value, Constraint) else "",
)
async def test_constraints(model: Model, constraint: Constraint, answers: set[str]) -> None:
    request = RequestBuilder().add_message("user", "Is 7 a prime?").set_constraint(constraint).set_sampler_temperature(1.0)
    request.set_sampler_n_choices(3).return_logprobs()
    response = await model.send_chat_request(request)
    assert {choice.message.content for choice in response.choices} <= answers
    assert all(choice.finish_reason == "stop" for choice in response.choices)


async def test_many_constrained_requests_at_once(model: Model) -> None:
    request = (
        RequestBuilder().add_message("user", "A colour?").set_constraint(Constraint.json_schema({"enum": ["red", {"rgb": [1, 2, 3]}]}))
    )
    free = RequestBuilder().add_message("user", "A colour?").set_sampler_max_len(12)
    answers = await asyncio.gather(*(model.send_chat_request(free if i % 3 == 0 else request) for i in range(9)))
    texts = [answer.choices[0].message.content for answer in answers]
    assert {text for i, text in enumerate(texts) if i % 3} <= {'"red"', '{"rgb": [1, 2, 3]}'}
    assert len({text for i, text in enumerate(texts) if i % 3 == 0}) == 1


async def test_a_tool_call_and_its_result(model: Model) -> None:
    request = RequestBuilder().add_message("user", "What's the weather in NYC?").set_tools(TOOLS).set_tool_choice(ToolChoice.REQUIRED)
    response = await model.send_chat_request(request)
    message = response.choices[0].message
    assert message.tool_calls
    call = message.tool_calls[0]
    assert response.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("NYC", "New York", "New York City")
    request.add_message_with_tool_call("assistant", "", [call]).add_tool_message("Sunny, 72F", call.id).set_tool_choice(ToolChoice.NONE)
    answer = await model.send_chat_request(request.set_sampler_max_len(20))
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None
    prompt = await model.detokenize(await model.tokenize(request), skip_special_tokens=False)
    assert f'{{"name": "get_weather", "arguments": {call.function.arguments}}}' in prompt
    assert "Result of get_weather: Sunny, 72F" in prompt


@pytest.mark.parametrize("choice", [ToolChoice.tool("get_time"), TOOLS[1], {"type": "function", "function": {"name": "get_time"}}])
async def test_a_tool_by_name(model: Model, choice: Any) -> None:
    request = RequestBuilder().add_message("user", "What's the weather in NYC?").set_tools(TOOLS).set_tool_choice(choice)
    calls = (await model.send_chat_request(request)).choices[0].message.tool_calls
    assert calls is not None
    assert [(call.function.name, call.function.arguments) for call in calls] == [("get_time", "{}")]


async def test_the_model_may_answer_in_text(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Say hello.").set_tools(TOOLS).set_sampler_max_len(12)
    message = (await model.send_chat_request(request)).choices[0].message
    assert message.tool_calls is None
    assert message.content


async def test_a_call_that_the_model_begins_by_itself_is_held_to_the_grammar(model: Model) -> None:
    """A bias starts it with the bracket; from the tool's name on there is a grammar, and strict arguments."""
    start = '{"name": "get_weather"'
    tokens = await model.tokenize(start, add_special_tokens=False)

    def begin(logits: Any, seen: list[int]) -> Any:
        if len(seen) - prompt < len(tokens):
            logits[tokens[len(seen) - prompt]] = 100.0
        return logits

    request = RequestBuilder().add_message("user", "Weather in Rome?").set_tools(TOOLS).add_logits_processor(begin).set_sampler_max_len(80)
    prompt = len(await model.tokenize(request))
    choice = (await model.send_chat_request(request)).choices[0]
    assert choice.message.tool_calls
    arguments = json.loads(choice.message.tool_calls[0].function.arguments)
    assert arguments.keys() <= {"city", "unit"}
    assert choice.finish_reason in ("tool_calls", "length")


async def test_calls_are_streamed_as_deltas(model: Model) -> None:
    request = RequestBuilder().add_message("user", "What's the weather in NYC?").set_tools(TOOLS).set_tool_choice("required")
    chunks = [chunk async for chunk in model.stream_chat_request(request)]
    check_deltas([call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []])
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_calls_are_streamed_as_deltas_blocking(blocking: BlockingModel) -> None:
    request = RequestBuilder().add_message("user", "What's the weather in NYC?").set_tools(TOOLS).set_tool_choice("required")
    check_deltas([call for chunk in blocking.stream_chat_request(request) for call in chunk.choices[0].delta.tool_calls or []])


def check_deltas(deltas: list[ToolCallDelta]) -> None:
    first, *more = deltas
    assert first.id
    assert first.function.name == "get_weather"
    assert more
    assert all(delta.id is None and delta.function.name is None and delta.index == 0 for delta in more)
    arguments = "".join(delta.function.arguments for delta in deltas)
    assert json.loads(arguments)["city"]


async def test_tool_requests_that_cannot_be_served(model: Model) -> None:
    strict = Function(name="f", parameters={"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}, strict=True)
    request = RequestBuilder().add_message("user", "Hi").set_tools([Tool(function=strict)])
    with pytest.raises(RequestValidationError, match=r"parameters of 'f', which is strict: .*#/properties/x: 'uniqueItems'"):
        await model.send_chat_request(request)
    loose = dataclasses.replace(strict, strict=None)
    request.set_tools([Tool(function=loose)]).set_sampler_max_len(3)
    assert (await model.send_chat_request(request)).choices[0].message.content
    with pytest.raises(RequestValidationError, match="demands 'g'"):
        await model.send_chat_request(request.set_tool_choice(ToolChoice.tool("g")))
