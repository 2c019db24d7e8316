"""Agents: the branches of the loop, with a model that says what it is told to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_model import call, make_model, scripted_model, wait_until_idle

from pymistral import (
    Agent,
    AgentBuilder,
    AgentComplete,
    AgentEvent,
    AgentStopReason,
    AgentTextDelta,
    AgentToolCalls,
    AgentToolResult,
    CalledFunction,
    Function,
    Model,
    ModelBuilder,
    Tool,
    tool,
)
from pymistral.blocking import BlockingAgent, BlockingModel
from pymistral.errors import EngineClosedError, RequestValidationError
from pymistral.tool_rounds import Toolbox, ToolCallback

ECHO = Tool(function=Function(name="echo", strict=False))


@tool
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


@tool
async def slow_add(a: int) -> int:
    """Add, slowly."""
    await asyncio.sleep(0.05)
    return a + 1


def agent_on(*replies: str, **more: Any) -> AgentBuilder:
    return AgentBuilder(scripted_model(*replies, **more)).with_tool(add).with_tool(slow_add)


async def test_a_run() -> None:
    agent = agent_on(call("add", a=1, b=2), "It is 3.").with_system_prompt("Be brief.").build()
    response = await agent.run("1 + 2?")
    assert (response.final_text, response.stop_reason, response.iterations) == ("It is 3.", AgentStopReason.TEXT_RESPONSE, 2)
    assert response.error is None
    first, last = response.steps
    assert [(c.function.name, c.function.arguments) for c in first.tool_calls] == [("add", '{"a": 1, "b": 2}')]
    assert [(r.tool_name, r.content, r.is_error, r.tool_call_id) for r in first.tool_results] == [
        ("add", "3", False, first.tool_calls[0].id)
    ]
    assert first.response.choices[0].finish_reason == "tool_calls"
    assert (last.tool_calls, last.tool_results) == ([], [])
    assert [message["role"] for message in agent.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert agent.messages[-1]["content"] == "It is 3."
    await agent.model.close()


async def test_events() -> None:
    agent = agent_on("Hm. " + call("add", a=1, b=2) + "\n" + call("slow_add", a=5), "Done.").build()
    events = [event async for event in agent.run_stream("1 + 2?")]
    kinds = [type(event) for event in events if not isinstance(event, AgentTextDelta)]
    assert kinds == [AgentToolCalls, AgentToolResult, AgentToolResult, AgentComplete]
    assert "".join(event.text for event in events if isinstance(event, AgentTextDelta)) == "Hm.Done."
    assert [event.result.content for event in events if isinstance(event, AgentToolResult)] == ["3", "6"]
    complete = events[-1]
    assert isinstance(complete, AgentComplete)
    assert complete.response.final_text == "Done."
    assert all(isinstance(event, AgentEvent) for event in events)
    await agent.model.close()


async def test_the_conversation_goes_on_and_can_be_reset() -> None:
    agent = agent_on("one", "two", "three").with_system_prompt("Count.").build()
    await agent.run("a")
    await agent.run("b")
    assert [message["content"] for message in agent.messages] == ["Count.", "a", "one", "b", "two"]
    agent.messages.clear()
    assert len(agent.messages) == 5, "what is given out is a copy"
    agent.reset()
    assert [message["content"] for message in agent.messages] == ["Count."]
    await agent.run("c")
    assert [message["content"] for message in agent.messages] == ["Count.", "c", "three"]
    await agent.model.close()


@pytest.mark.parametrize(("most", "rounds"), [(1, "1 round"), (2, "2 rounds")])
async def test_max_iterations(most: int, rounds: str) -> None:
    agent = agent_on(*[call("add", a=1)] * most, "fine").with_max_iterations(most).build()
    response = await agent.run("Go")
    assert (response.final_text, response.stop_reason, response.iterations) == (None, AgentStopReason.MAX_ITERATIONS, most)
    assert [result.content for step in response.steps for result in step.tool_results] == ["2"] * most
    assert [message["role"] for message in agent.messages][-2:] == ["tool", "assistant"]
    assert agent.messages[-1]["content"] == f"(stopped after {rounds} of tool calls)"
    assert (await agent.run("And now?")).final_text == "fine"
    await agent.model.close()


async def test_no_action() -> None:
    agent = agent_on("  ", "fine").build()
    response = await agent.run("Go")
    assert (response.final_text, response.stop_reason) == (None, AgentStopReason.NO_ACTION)
    assert (await agent.run("Go")).final_text == "fine"
    await agent.model.close()


async def test_an_error_leaves_no_trace() -> None:
    agent = agent_on("one", call("add", a=1)).build()
    await agent.run("a")
    before = agent.messages
    response = await agent.run("x" * 5000)
    assert response.stop_reason is AgentStopReason.ERROR
    assert isinstance(response.error, RequestValidationError)
    assert agent.messages == before
    await agent.model.close()
    response = await agent.run("b")
    assert isinstance(response.error, EngineClosedError)
    assert response.final_text is None
    assert agent.messages == before


async def test_a_choice_that_cannot_be_is_an_error() -> None:
    agent = AgentBuilder(scripted_model()).with_tool_choice("required").build()
    response = await agent.run("Go")
    assert "there are no tools" in str(response.error)
    await agent.model.close()


async def test_what_is_demanded_is_demanded_once() -> None:
    agent = agent_on(call("add", a=1), "done", call("add", a=2), "done").with_tool_choice("required").build()
    for expected in ("2", "3"):
        response = await agent.run("Go")
        assert response.steps[0].tool_results[0].content == expected
        assert response.final_text == "done"
    await agent.model.close()


async def test_bad_arguments_and_failures_go_back_to_the_model() -> None:
    def fail(function: CalledFunction) -> str:
        raise LookupError(function.arguments)

    replies = call("echo", x=1) + "\n" + call("add", a=2), "done"
    agent = agent_on(*replies).with_sync_tool(ECHO, fail).build()
    response = await agent.run("Go")
    bad, good = response.steps[0].tool_results
    assert (bad.is_error, bad.content) == (True, 'echo failed: LookupError: {"x": 1}')
    assert (good.is_error, good.content) == (False, "3")
    assert [m["content"] for m in agent.messages if m["role"] == "tool"] == ['Error: echo failed: LookupError: {"x": 1}', "3"]
    assert response.final_text == "done"
    await agent.model.close()


async def test_arguments_are_validated() -> None:
    loose = Tool(function=Function(name="add", strict=False))
    agent = AgentBuilder(scripted_model(call("add", a="many"), "done")).with_async_tool(loose, lambda_async(add.call_async)).build()
    (result,) = (await agent.run("Go")).steps[0].tool_results
    assert result.is_error
    assert result.content.startswith("The arguments of add are not valid. a: Input should be a valid integer")
    await agent.model.close()


def lambda_async(function: Any) -> Any:
    async def callback(called: CalledFunction) -> Any:
        return await function(called.arguments)

    return callback


async def test_a_tool_that_hangs_or_is_cancelled_by_itself() -> None:
    release = threading.Event()
    agent = agent_on(call("echo"), "done").with_sync_tool(ECHO, lambda function: release.wait(60), timeout=0.1).build()
    response = await agent.run("Go")
    assert response.steps[0].tool_results[0].content == "echo did not answer within 0.1 s"
    assert response.final_text == "done"
    release.set()
    await agent.model.close()


async def test_megabytes_are_cut() -> None:
    agent = agent_on(call("echo"), "done").with_sync_tool(ECHO, lambda function: "word " * 1_000_000).build()
    response = await agent.run("Go")
    content = response.steps[0].tool_results[0].content
    assert len(content) < 3000
    assert content.endswith("of 5000000 characters]")
    assert response.final_text == "done"
    await agent.model.close()


async def test_side_by_side_or_one_after_the_other() -> None:
    for parallel in (True, False):
        at_once, most = 0, 0

        def work(function: CalledFunction) -> str:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            time.sleep(0.2 if '"i": 0' in function.arguments else 0.1)
            at_once -= 1
            return function.arguments

        replies = "\n".join(call("echo", i=i) for i in range(3)), "done"
        agent = agent_on(*replies).with_sync_tool(ECHO, work).with_parallel_tool_execution(parallel).build()
        response = await agent.run("Go")
        assert [result.content for result in response.steps[0].tool_results] == ['{"i": 0}', '{"i": 1}', '{"i": 2}']
        assert (most > 1) == parallel
        await agent.model.close()


async def test_the_models_own_tools_are_the_agents_too() -> None:
    toolbox = Toolbox({"echo": ToolCallback(function=lambda function: "mine", tool=ECHO)})
    agent = agent_on(call("echo"), "done", toolbox=toolbox).build()
    response = await agent.run("Go")
    assert response.steps[0].tool_results[0].content == "mine"
    await agent.model.close()


async def endless_agent() -> tuple[Model, Agent]:
    model = make_model(endless=True, delay=0.001)
    return model, AgentBuilder(model).build()


async def test_leaving_a_run_early() -> None:
    model, agent = await endless_agent()
    async for _ in agent.run_stream("Go"):
        break
    await asyncio.sleep(0.05)
    wait_until_idle(model)
    async with agent.run_stream("Go") as stream:
        await stream.__anext__()
        with pytest.raises(RequestValidationError, match="at work on another prompt"):
            await agent.run("And this?")
    wait_until_idle(model)
    assert agent.messages == []
    await model.close()


async def test_cancelling_a_run() -> None:
    model, agent = await endless_agent()
    task = asyncio.ensure_future(agent.run("Go"))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wait_until_idle(model)
    assert agent.messages == []
    await model.close()


async def test_cancelling_while_a_tool_runs() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work(function: CalledFunction) -> str:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return ""

    agent = agent_on(call("echo"), "fine").with_async_tool(ECHO, work).build()
    task = asyncio.ensure_future(agent.run("Go"))
    await asyncio.wait_for(began.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(ended.wait(), 10)
    assert agent.messages == []
    assert (await agent.run("Hi")).final_text == "fine"
    await agent.model.close()


def test_blocking() -> None:
    with BlockingModel(scripted_model(call("slow_add", a=1), "It is 2.", call("add", a=1), "It is 2, too.", "last")) as model:
        agent = BlockingAgent.from_builder(AgentBuilder(model).with_tool(add).with_tool(slow_add))
        assert agent.run("1 + 1?").final_text == "It is 2."
        events = list(agent.run_stream("Again?"))
        assert isinstance(events[-1], AgentComplete)
        assert events[-1].response.steps[0].tool_results[0].content == "2"
        assert len(agent.messages) == 8
        agent.reset()
        assert agent.messages == []
        with agent.run_stream("One more") as stream:
            next(stream)
        assert agent.messages == []
        assert agent.model is model.inner


async def test_blocking_inside_a_running_loop() -> None:
    with BlockingModel(scripted_model(call("slow_add", a=1), "It is 2.")) as model:
        assert BlockingAgent.from_builder(AgentBuilder(model).with_tool(slow_add)).run("1 + 1?").final_text == "It is 2."


def test_leaving_a_blocking_run_early() -> None:
    with BlockingModel(make_model(endless=True, delay=0.001)) as model:
        agent = BlockingAgent(AgentBuilder(model).build())
        for _ in agent.run_stream("Go"):
            break
        wait_until_idle(model.inner)
        with agent.run_stream("Go") as stream:
            next(stream)
        wait_until_idle(model.inner)
        assert list(stream) == []


async def test_what_the_builder_refuses() -> None:
    model = scripted_model()
    builder = AgentBuilder(model).with_tool(add)

    async def callback(function: CalledFunction) -> str:
        return ""

    def letters(function: CalledFunction) -> Iterator[str]:
        yield from function.arguments

    for wrong, message in (
        (lambda: AgentBuilder("a model"), "takes a Model or a BlockingModel"),
        (lambda: builder.with_tool(add), "two tools are named 'add'"),
        (lambda: builder.with_tool(len), "with_tool takes a function with @tool"),
        (lambda: builder.with_sync_tool(ECHO, callback), "with_async_tool takes it"),
        (lambda: builder.with_async_tool(ECHO, len), "takes an async function"),
        (lambda: builder.with_sync_tool(ECHO, "x"), "a tool callback is a function"),
        (lambda: builder.with_sync_tool(ECHO, letters), "the tool 'letters' yields"),
        (lambda: builder.with_sync_tool("echo", len), "a tool must be a Tool"),
        (lambda: builder.with_sync_tool(add, len), "with_tool takes it"),
        (lambda: AgentBuilder(ModelBuilder("m")), "got a ModelBuilder; build it first"),
        (lambda: builder.with_sync_tool(ECHO, len, timeout=0), "a number of seconds above 0"),
        (lambda: builder.with_max_iterations(0), "at least 1"),
        (lambda: builder.with_tool_choice("perhaps"), "is not one of"),
        (lambda: builder.with_parallel_tool_execution("no"), "parallel_tool_execution must be True or False, got 'no'"),
        (lambda: builder.build().run_stream(3), "must be a string"),
    ):
        with pytest.raises(RequestValidationError, match=message):
            wrong()
    await model.close()
