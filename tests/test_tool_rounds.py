"""Tools that are called while a request runs: the branches, with a model that says what it is told to."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from fake_model import call, scripted_model, wait_until_idle

from pymistral import Constraint, Function, Model, RequestBuilder, Tool
from pymistral.blocking import BlockingModel
from pymistral.errors import ModelError
from pymistral.responses import CalledFunction, CompletionTokensDetails, PromptTokensDetails, Usage
from pymistral.tool_rounds import Toolbox, ToolCallback, _sum

ADD = Tool(function=Function(name="add", description="Add", parameters={"type": "object", "properties": {"a": {"type": "integer"}}}))
OTHER = Tool(function=Function(name="other"))


def model_with(*replies: str, callback: Any = lambda function: "42", tool: Tool | None = ADD, **options: Any) -> Model:
    return scripted_model(*replies, toolbox=Toolbox({"add": ToolCallback(function=callback, tool=tool, **options)}))


async def contents(model: Model, request: Any) -> list[str]:
    """What the model was told by each of its tools."""
    response = await model.send_chat_request(request)
    assert response.choices[0].message.content == "done"
    return [record.result_content for record in response.agentic_tool_calls or []]


async def test_calls_are_answered_and_the_model_goes_on() -> None:
    seen: list[CalledFunction] = []

    def add(function: CalledFunction) -> int:
        seen.append(function)
        return 42

    async with model_with(call("add", a=1), call("add", a=2), "done", callback=add) as model:
        response = await model.send_chat_request("Add")
    assert [(function.name, function.arguments) for function in seen] == [("add", '{"a": 1}'), ("add", '{"a": 2}')]
    (choice,) = response.choices
    assert (choice.message.content, choice.finish_reason) == ("done", "stop")
    assert [(r.round, r.name, r.arguments, r.result_content) for r in response.agentic_tool_calls or []] == [
        (0, "add", '{"a": 1}', "42"),
        (1, "add", '{"a": 2}', "42"),
    ]
    usage = response.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 100
    assert usage.avg_compl_tok_per_sec > 0


async def test_the_conversation_that_the_model_sees() -> None:
    prompts: list[list[int]] = []

    def look(logits: Any, tokens: list[int]) -> Any:
        if tokens[-1] == 1:
            prompts.append(list(tokens))
        return logits

    async with model_with(call("add", a=1), "done") as model:
        request = RequestBuilder().add_message("user", "Add").add_logits_processor(look)
        await model.send_chat_request(request)
        assert len(request.messages) == 1, "the caller's request stays as it was"
        texts = [await model.detokenize(prompt) for prompt in prompts]
    assert texts[0] == "[add]<user>Add<assistant>\x01"
    assert texts[1].startswith('[add]<user>Add<assistant><tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    assert texts[1].endswith("<tool>42<assistant>\x01")


async def test_the_same_in_a_stream() -> None:
    async with model_with("Wait. " + call("add", a=1), "done") as model:
        chunks = [chunk async for chunk in model.stream_chat_request("Add")]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Wait.done"
    assert not any(chunk.choices[0].delta.tool_calls for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 60


def test_the_same_without_await() -> None:
    async def add(function: CalledFunction) -> str:
        await asyncio.sleep(0)
        return "42"

    for callback in (lambda function: "42", add):
        with BlockingModel(model_with(call("add", a=1), "done", call("add", a=1), "done", callback=callback)) as model:
            response = model.send_chat_request("Add")
            assert response.choices[0].message.content == "done"
            assert [record.result_content for record in response.agentic_tool_calls or []] == ["42"]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in model.stream_chat_request("Add")) == "done"


async def test_calls_of_other_tools_are_the_callers() -> None:
    request = RequestBuilder().add_message("user", "Add").set_tools([OTHER])
    both = call("add", a=1) + "\n" + call("other")
    for stream in (False, True):
        async with model_with(call("add", a=1), both) as model:
            if stream:
                chunks = [chunk async for chunk in model.stream_chat_request(request)]
                deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
                names = [delta.function.name for delta in deltas if delta.function.name]
                reason = chunks[-1].choices[0].finish_reason
                assert "".join(delta.function.arguments for delta in deltas) == '{"a": 1}{}'
            else:
                response = await model.send_chat_request(request)
                names = [c.function.name for c in response.choices[0].message.tool_calls or []]
                reason = response.choices[0].finish_reason
                assert len(response.agentic_tool_calls or []) == 1
        assert names == ["add", "other"]
        assert reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_max_tool_rounds(stream: bool) -> None:
    for rounds in (0, 2):
        called: list[str] = []
        request = RequestBuilder().add_message("user", "Add").set_max_tool_rounds(rounds)
        async with model_with(*[call("add", a=1)] * 3, callback=lambda function, called=called: called.append("x")) as model:
            if stream:
                chunks = [chunk async for chunk in model.stream_chat_request(request)]
                assert sum(bool(d.function.name) for c in chunks for d in c.choices[0].delta.tool_calls or []) == 1
                assert chunks[-1].choices[0].finish_reason == "tool_calls"
            else:
                response = await model.send_chat_request(request)
                assert response.choices[0].message.tool_calls
                assert len(response.agentic_tool_calls or []) == rounds
        assert len(called) == rounds


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("result", ["42", "long " * 10_000])
async def test_a_model_that_calls_until_its_context_is_full(stream: bool, result: str) -> None:
    """It ends with the calls that were made, and the one that was not."""
    called: list[str] = []
    async with model_with(*[call("add", a=1)] * 200, callback=lambda function: called.append("x") or result) as model:
        if stream:
            chunks = [chunk async for chunk in model.stream_chat_request("Add")]
            assert sum(bool(d.function.name) for c in chunks for d in c.choices[0].delta.tool_calls or []) == 1
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
        else:
            response = await model.send_chat_request("Add")
            assert response.choices[0].finish_reason == "tool_calls"
            assert len(response.agentic_tool_calls or []) == len(called)
            assert response.usage.prompt_tokens > 0
    assert 2 <= len(called) < 200


async def test_a_callback_without_tool_serves_requests_that_list_it() -> None:
    async with model_with("plain", call("add", a=1), "done", tool=None) as model:
        assert await model.chat("Hi") == "plain"
        request = RequestBuilder().add_message("user", "Add").set_tools([ADD])
        assert await contents(model, request) == ["42"]


async def test_a_demanded_call_is_demanded_once() -> None:
    async with model_with(call("add", a=1), "done") as model:
        assert await contents(model, RequestBuilder().add_message("user", "Add").set_tool_choice("required")) == ["42"]


async def test_where_no_tools_are_wanted() -> None:
    async with model_with("yes", "no tools", "one", "two") as model:
        request = RequestBuilder().add_message("user", "Hi").set_constraint(Constraint.regex("yes|no"))
        assert (await model.send_chat_request(request)).choices[0].message.content == "yes"
        request = RequestBuilder().add_message("user", "Hi").set_tool_choice("none")
        assert (await model.send_chat_request(request)).choices[0].message.content == "no tools"


async def test_sources_are_asked_with_each_request() -> None:
    async with scripted_model("plain", call("add", a=1), "done") as model:

        def source(request: RequestBuilder) -> dict[str, ToolCallback]:
            wanted = "sum" in request.messages[-1]["content"]
            return {"add": ToolCallback(function=lambda function: "3", tool=ADD)} if wanted else {}

        model._toolbox.sources.append(source)
        assert await model.chat("Hi") == "plain"
        assert await contents(model, "A sum") == ["3"]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


def raising(error: BaseException) -> Any:
    def callback(function: CalledFunction) -> Any:
        raise error

    return callback


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such city"), "Error: add failed: ValueError: no such city"),
        (StopIteration(), "Error: add failed: RuntimeError: coroutine raised StopIteration"),
        (SystemExit(2), "Error: add failed: RuntimeError: SystemExit: 2"),
        (asyncio.CancelledError(), "Error: add failed: RuntimeError: CancelledError: "),
        (Unprintable(), "Error: add failed: Unprintable"),
        (ValueError("half \ud83d"), "Error: add failed: ValueError: half \ufffd"),
        (ValueError("x" * 10_000), "Error: add failed: ValueError: " + "x" * 1976),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_a_tool_that_raises(error: BaseException, said: str) -> None:
    async with model_with(call("add"), "done", callback=raising(error)) as model:
        assert await contents(model, "Add") == [said]


async def test_an_async_tool_that_is_cancelled_or_exits() -> None:
    async def cancelled(function: CalledFunction) -> str:
        raise asyncio.CancelledError

    async def exits(function: CalledFunction) -> str:
        raise SystemExit(3)

    for callback, said in ((cancelled, "Error: add was cancelled"), (exits, "Error: add failed: SystemExit: 3")):
        async with model_with(call("add"), "done", callback=callback) as model:
            assert await contents(model, "Add") == [said]


async def test_a_tool_that_hangs() -> None:
    release = threading.Event()

    async def stubborn(function: CalledFunction) -> str:
        while not release.is_set():
            try:
                await asyncio.sleep(0.5)
            except asyncio.CancelledError:  # noqa: PERF203
                release.set()
                await asyncio.sleep(0.2)
        return "late"

    for callback in (lambda function: release.wait(30), stubborn):
        async with model_with(call("add"), "done", callback=callback, timeout=0.1) as model:
            begin = time.monotonic()
            assert await contents(model, "Add") == ["Error: add did not answer within 0.1 s"]
            assert time.monotonic() - begin < 10
    release.set()


def test_a_thread_that_hangs_does_not_hold_up_blocking_code() -> None:
    release = threading.Event()
    with BlockingModel(model_with(call("add"), "done", callback=lambda function: release.wait(60), timeout=0.1)) as model:
        begin = time.monotonic()
        assert model.chat("Add") == "done"
        assert time.monotonic() - begin < 30
    release.set()


async def test_many_calls_that_never_end_do_not_fill_a_pool() -> None:
    release = threading.Event()
    replies = [call("add")] * 20
    async with model_with(*replies, "done", callback=lambda function: release.wait(60), timeout=0.01) as model:
        assert len(await contents(model, "Add")) == 20
    release.set()


async def test_results_that_are_too_long_are_cut() -> None:
    async with model_with(call("add"), "done", callback=lambda function: "é" * 5_000_000) as model:
        (told,) = await contents(model, "Add")
    assert "of 5000000 characters]" in told
    assert set(told.split("\n")[0]) == {"é"}
    assert 500 < len(told) < 2000


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        ({"a": [1, 2.5]}, '{"a":[1,2.5]}'),
        (complex(1, 2), '"1+2j"'),
        (float("nan"), "NaN"),
        ("half \ud83d", "half \ufffd"),
        ({"a": ["half \ud83d", "é", 1]}, '{"a":["half \ufffd","é",1]}'),
        ({"é": [{"half \ud83d": (1,)}]}, '{"é":[{"half \ufffd":[1]}]}'),
        ("", ""),
    ],
)
async def test_what_a_tool_returns(value: Any, said: str) -> None:
    async with model_with(call("add"), "done", callback=lambda function: value) as model:
        assert await contents(model, "Add") == [said]


async def test_what_has_no_json_form() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value in (circle, b"\xff"):
        async with model_with(call("add"), "done", callback=lambda function, value=value: value) as model:
            (told,) = await contents(model, "Add")
            assert told.startswith("Error: add failed: ")


async def test_calls_of_a_turn_run_side_by_side_and_keep_their_order() -> None:
    both = threading.Barrier(2, timeout=10)

    def meet(function: CalledFunction) -> str:
        both.wait()
        time.sleep(0.1 if '"a": 1' in function.arguments else 0)
        return function.arguments

    async with model_with(call("add", a=1) + "\n" + call("add", a=2), "done", callback=meet) as model:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        assert await contents(model, "Add") == ['{"a": 1}', '{"a": 2}']
        ticking.cancel()
        assert ticks > 5, "the event loop went on meanwhile"


@pytest.mark.parametrize("stream", [False, True])
async def test_all_rounds_have_the_time_of_the_request(stream: bool) -> None:
    async def slow(function: CalledFunction) -> str:
        await asyncio.sleep(0.4)
        return "42"

    async with model_with(call("add", a=1), "Never said.", callback=slow) as model:
        request = RequestBuilder().add_message("user", "Go").with_timeout(0.3)
        with pytest.raises(ModelError, match="time for the request was over"):  # noqa: PT012
            if stream:
                async for _ in model.stream_chat_request(request):
                    pass
            await model.send_chat_request(request)


async def test_cancelling_while_a_tool_runs() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def slow(function: CalledFunction) -> str:
        began.set()
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()
        return ""

    async with model_with(call("add"), "fine", callback=slow) as model:
        task = asyncio.ensure_future(model.send_chat_request("Add"))
        await asyncio.wait_for(began.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(ended.wait(), 10)
        wait_until_idle(model)
        assert await model.chat("Hi") == "fine"


async def test_closing_a_stream_while_a_tool_runs() -> None:
    began, release = asyncio.Event(), asyncio.Event()

    async def slow(function: CalledFunction) -> str:
        began.set()
        await release.wait()
        return ""

    async with model_with(call("add"), "never said", callback=slow) as model:
        stream = model.stream_chat_request("Add")

        async def read() -> list[Any]:
            return [chunk async for chunk in stream]

        reading = asyncio.ensure_future(read())
        await asyncio.wait_for(began.wait(), 10)
        await stream.aclose()
        release.set()
        assert await asyncio.wait_for(reading, 10) == []
        wait_until_idle(model)


async def test_closing_the_model_closes_what_its_tools_hold() -> None:
    closed: list[int] = []
    toolbox = Toolbox()
    toolbox.closing.callback(closed.append, 1)
    model = scripted_model(toolbox=toolbox)
    await model.close()
    await model.close()
    assert closed == [1]


def test_the_usage_of_all_rounds_counts_guesses() -> None:
    def usage(drafted: int, accepted: int) -> Usage:
        numbers = dict.fromkeys(Usage.model_fields, 1) | {"prompt_tokens_details": PromptTokensDetails()}
        details = CompletionTokensDetails(drafted_tokens=drafted, accepted_tokens=accepted)
        return Usage.model_validate(numbers | {"completion_tokens_details": details})

    details = _sum(usage(5, 3), usage(7, 0)).completion_tokens_details
    assert (details.drafted_tokens, details.accepted_tokens) == (12, 3)
