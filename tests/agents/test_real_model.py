"""The documentation's code on agents and callbacks, on the real SmolLM2: it is small, so that calls are demanded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest

from pymistral import (
    AgentBuilder,
    AgentComplete,
    AgentStopReason,
    AgentTextDelta,
    AgentToolCalls,
    AgentToolResult,
    CalledFunction,
    Function,
    Model,
    ModelBuilder,
    RequestBuilder,
    Tool,
    ToolChoice,
    tool,
)
from pymistral.blocking import BlockingAgent, BlockingModel

SYSTEM = "You are a helpful assistant with tools."
QUESTION = "What's the weather in London?"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CITY_TEMPERATURE = Tool(function=Function(name="city_temperature", description="The temperature in a city", parameters=PARAMETERS))


@tool(description="Get the current weather for a location")
def get_weather(city: Annotated[str, "The city name"]) -> str:
    return f"Sunny, 72F in {city}"


def city_temperature(function: CalledFunction) -> str:
    return f"It is 72 degrees in {json.loads(function.arguments)['city']}."


@pytest.fixture(scope="module")
def blocking(smollm2_path: Path) -> Iterator[BlockingModel]:
    builder = ModelBuilder(smollm2_path).with_tool_callback("city_temperature", city_temperature)
    with BlockingModel.from_builder(builder) as model:
        yield model


@pytest.fixture
def model(blocking: BlockingModel) -> Model:
    return blocking.inner


def builder(model: object) -> AgentBuilder:
    return AgentBuilder(model).with_system_prompt(SYSTEM).with_tool(get_weather).with_max_iterations(10)


async def test_an_agent(model: Model) -> None:
    agent = builder(model).with_tool_choice(ToolChoice.REQUIRED).build()
    response = await agent.run(QUESTION)
    first = response.steps[0]
    assert [(call.function.name, json.loads(call.function.arguments)) for call in first.tool_calls] == [("get_weather", {"city": "London"})]
    assert [result.content for result in first.tool_results] == ["Sunny, 72F in London"]
    assert response.stop_reason is AgentStopReason.TEXT_RESPONSE
    assert "sunny" in (response.final_text or "").lower()


async def test_an_agent_streams(model: Model) -> None:
    agent = builder(model).with_tool_choice("required").build()
    events = [event async for event in agent.run_stream(QUESTION)]
    assert any(isinstance(event, AgentToolCalls) for event in events)
    assert [event.result.content for event in events if isinstance(event, AgentToolResult)] == ["Sunny, 72F in London"]
    assert isinstance(events[-1], AgentComplete)
    assert "".join(event.text for event in events if isinstance(event, AgentTextDelta)) == events[-1].response.final_text


def test_an_agent_without_await(blocking: BlockingModel) -> None:
    agent = BlockingAgent.from_builder(builder(blocking).with_tool_choice("required"))
    assert "sunny" in (agent.run(QUESTION).final_text or "").lower()
    assert agent.messages[-1]["role"] == "assistant"


async def test_sync_and_async_tools(model: Model) -> None:
    async def later(function: CalledFunction) -> str:
        return city_temperature(function)

    for agent in (
        AgentBuilder(model).with_system_prompt(SYSTEM).with_sync_tool(CITY_TEMPERATURE, city_temperature),
        AgentBuilder(model).with_system_prompt(SYSTEM).with_async_tool(CITY_TEMPERATURE, later),
    ):
        response = await agent.with_tool_choice(CITY_TEMPERATURE).with_max_iterations(2).build().run("How warm is it in Paris?")
        assert response.steps[0].tool_results[0].content == "It is 72 degrees in Paris."


def request() -> RequestBuilder:
    messages = RequestBuilder().add_message("system", SYSTEM).add_message("user", "What is the temperature in Paris?")
    return messages.set_tools([CITY_TEMPERATURE]).set_tool_choice("required").set_max_tool_rounds(2)


async def test_a_callback(model: Model) -> None:
    response = await model.send_chat_request(request())
    assert (response.agentic_tool_calls or [])[0].result_content == "It is 72 degrees in Paris."
    assert response.choices[0].finish_reason == "stop"
    assert "72" in (response.choices[0].message.content or "")


async def test_a_callback_in_a_stream(model: Model, blocking: BlockingModel) -> None:
    chunks = [chunk async for chunk in model.stream_chat_request(request())]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "72" in text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in blocking.stream_chat_request(request())) == text
