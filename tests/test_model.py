from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from fake_model import ALPHABET, BOS, VOCAB_SIZE, make_model, wait_until_idle

from pymistral import Function, Model, RequestBuilder, SamplingParams, TextMessages, Tool
from pymistral.blocking import BlockingModel
from pymistral.errors import EngineClosedError, InferenceError, ModelError, ModelLoadError, RequestValidationError


@pytest_asyncio.fixture
async def model() -> AsyncIterator[Model]:
    async with make_model() as model:
        yield model


@pytest_asyncio.fixture
async def endless() -> AsyncIterator[Model]:
    async with make_model(endless=True, delay=0.001) as model:
        yield model


async def test_chat(model: Model) -> None:
    assert await model.chat("Hello!") == ALPHABET


@pytest.mark.parametrize(
    "request_",
    ["Hi", TextMessages().add_message("user", "Hi"), RequestBuilder().add_message("user", "Hi"), [{"role": "user", "content": "Hi"}]],
    ids=["str", "TextMessages", "RequestBuilder", "dicts"],
)
async def test_response_has_openais_shape(model: Model, request_: object) -> None:
    before = int(time.time())
    response = await model.send_chat_request(request_)  # type: ignore[arg-type]
    assert response.choices[0].message.content == ALPHABET
    assert response.choices[0].message.role == "assistant"
    assert (response.choices[0].finish_reason, response.choices[0].index) == ("stop", 0)
    assert response.object == "chat.completion"
    assert response.model == "alphabet"
    assert response.id.startswith("chatcmpl-")
    assert before <= response.created <= time.time()
    assert response.system_fingerprint
    usage = response.usage
    assert usage.prompt_tokens == len(await model.tokenize([{"role": "user", "content": "Hi"}]))
    assert usage.completion_tokens in (26, 27)  # whether the token that ends the text counts is the engine's affair
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.total_time_sec >= usage.total_completion_time_sec > 0
    assert usage.avg_compl_tok_per_sec > 0
    assert usage.avg_prompt_tok_per_sec > 0
    assert response.model_dump()["usage"]["prompt_tokens_details"] == {"cached_tokens": usage.prompt_tokens_details.cached_tokens}


async def test_what_a_pool_of_processes_is_told(model: Model) -> None:
    for whole in (model, BlockingModel(model), model.chat):
        with pytest.raises(TypeError, match=r"can be neither pickled nor copied: .*; build the model in each process"):
            pickle.dumps(whole)


async def test_two_requests_have_different_ids(model: Model) -> None:
    first, second = await asyncio.gather(model.send_chat_request("a"), model.send_chat_request("b"))
    assert first.id != second.id


async def test_cached_tokens_are_reported(model: Model) -> None:
    text = "a long prompt " * 10
    await model.chat(text)
    response = await model.send_chat_request(text)
    assert response.usage.prompt_tokens_details.cached_tokens >= 64


async def test_stream_adds_up_to_the_answer(model: Model) -> None:
    chunks = [chunk async for chunk in model.stream_chat_request("Hi")]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ALPHABET
    assert [len(chunk.choices) for chunk in chunks] == [1] * len(chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"


async def test_stream_of_several_choices_ends_each(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Hi").set_sampler_n_choices(3)
    texts, reasons = ["", "", ""], [None, None, None]
    async for chunk in model.stream_chat_request(request):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [ALPHABET] * 3
    assert reasons == ["stop"] * 3
    assert chunk.usage is not None


async def test_n_choices(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Hi").set_sampler_n_choices(2).return_logprobs()
    response = await model.send_chat_request(request)
    assert [choice.index for choice in response.choices] == [0, 1]
    assert all(choice.logprobs and len(choice.logprobs.content or []) >= 26 for choice in response.choices)


async def test_max_len_ends_with_length(model: Model) -> None:
    response = await model.send_chat_request(RequestBuilder().add_message("user", "Hi").set_sampler_max_len(3))
    assert (response.choices[0].message.content, response.choices[0].finish_reason) == ("abc", "length")


async def test_without_max_len_the_context_is_the_limit(endless: Model) -> None:
    response = await endless.send_chat_request("Hi")
    assert response.choices[0].finish_reason == "length"
    assert response.usage.total_tokens >= endless.max_sequence_length()


async def test_stop_string_is_not_part_of_the_answer(model: Model) -> None:
    response = await model.send_chat_request(RequestBuilder().add_message("user", "Hi").set_sampler_stop_toks(["def"]))
    assert (response.choices[0].message.content, response.choices[0].finish_reason) == ("abc", "stop")


async def test_logprobs(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Hi").return_logprobs().set_sampler_topn_logprobs(2).set_sampler_max_len(2)
    logprobs = (await model.send_chat_request(request)).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["a", "b"]
    assert logprobs.content[0].bytes == [97]
    assert logprobs.content[0].top_logprobs[0].token_id == 97
    assert logprobs.content[0].logprob == pytest.approx(0.0, abs=1e-4)
    streamed = [chunk.choices[0].logprobs async for chunk in model.stream_chat_request(request)]
    assert [entry for each in streamed if each for entry in each.content or []] == logprobs.content


async def test_without_return_logprobs_there_are_none(model: Model) -> None:
    assert (await model.send_chat_request("Hi")).choices[0].logprobs is None


async def test_logits_processor(model: Model) -> None:
    def forbid_b(logits: np.ndarray, tokens: object) -> np.ndarray:
        logits[ord("b")] = -np.inf
        logits[ord("x")] += 1
        return logits

    request = RequestBuilder().add_message("user", "Hi").add_logits_processor(forbid_b)
    assert await text_of(model, request) == "axyz"


async def test_failure_midway_gives_the_partial_response(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Hi").add_logits_processor(fail_after("c"))
    with pytest.raises(ModelError, match="the processor is broken") as caught:
        await model.send_chat_request(request)
    partial = caught.value.partial_response
    assert partial is not None
    assert (partial.choices[0].message.content, partial.choices[0].finish_reason) == ("abc", "canceled")
    assert partial.usage.completion_tokens == 3
    assert isinstance(caught.value.__cause__, InferenceError)
    assert await model.chat("still works") == ALPHABET


async def test_failure_midway_of_a_stream(model: Model) -> None:
    text = ""
    with pytest.raises(ModelError) as caught:  # noqa: PT012
        async for chunk in model.stream_chat_request(RequestBuilder().add_message("user", "Hi").add_logits_processor(fail_after("c"))):
            text += chunk.choices[0].delta.content or ""
    assert text == "abc"
    assert caught.value.partial_response is not None
    assert caught.value.partial_response.choices[0].message.content == "abc"


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), KeyboardInterrupt()])
async def test_a_processor_cannot_end_the_engine(model: Model, error: BaseException) -> None:
    def leave(logits: np.ndarray, tokens: object) -> np.ndarray:
        raise error

    with pytest.raises(ModelError, match=f"leave raised {type(error).__name__}"):
        await model.send_chat_request(RequestBuilder().add_message("user", "Hi").add_logits_processor(leave))
    assert await model.chat("still works") == ALPHABET


async def test_failure_before_any_text_has_no_partial_response(model: Model) -> None:
    with pytest.raises(ModelError) as caught:
        await model.send_chat_request(RequestBuilder().add_message("user", "Hi").add_logits_processor(fail_after(">")))
    assert caught.value.partial_response is None


async def test_prompt_over_the_context(model: Model) -> None:
    request = RequestBuilder().add_message("user", "x" * 2000)
    with pytest.raises(RequestValidationError, match=r"holds 1024; shorten it, or let it be cut with truncate_sequence$") as caught:
        await model.send_chat_request(request)
    assert caught.value.problem.endswith("shorten it")
    with pytest.raises(RequestValidationError):
        async for _ in model.stream_chat_request(request):
            pass
    assert await text_of(model, request.with_truncate_sequence().set_sampler_max_len(3)) == "abc"


async def test_validation_errors_come_before_the_engine(model: Model) -> None:
    with pytest.raises(RequestValidationError, match="no message"):
        await model.send_chat_request([])
    with pytest.raises(RequestValidationError, match="no message"):
        model.stream_chat_request(TextMessages())


async def test_no_chat_template() -> None:
    async with make_model(chat_template=None) as model:
        with pytest.raises(RequestValidationError, match="with_chat_template"):
            await model.chat("Hi")


async def test_tools_and_thinking_reach_the_template(model: Model) -> None:
    tools = [Tool(function=Function(name="get_weather"))]
    request = RequestBuilder().add_message("user", "Hi").set_tools(tools).enable_thinking(False)
    text = await model.detokenize(await model.tokenize(request), skip_special_tokens=False)
    assert text == "<bos>[get_weather ]<user>Hi\nthinking=False\n<assistant>"
    request.set_tool_choice("none")
    assert "get_weather" not in await model.detokenize(await model.tokenize(request))


# ---- leaving early --------------------------------------------------------------------------------


async def test_break_cancels(endless: Model) -> None:
    async for _ in endless.stream_chat_request("Hi"):
        break
    wait_until_idle(endless)


async def test_async_with_cancels(endless: Model) -> None:
    async with endless.stream_chat_request("Hi") as stream:
        await anext(stream)
    wait_until_idle(endless)
    assert [chunk async for chunk in stream] == []


async def test_aclose_cancels(endless: Model) -> None:
    stream = endless.stream_chat_request("Hi")
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    wait_until_idle(endless)


async def test_a_stream_that_is_kept_can_go_on_after_a_break(endless: Model) -> None:
    stream = endless.stream_chat_request("Hi")
    async for _ in stream:
        break
    assert (await anext(stream)).choices[0].delta.content
    await stream.aclose()


async def test_cancelling_the_task_that_waits_cancels(endless: Model) -> None:
    task = asyncio.create_task(endless.send_chat_request("Hi"))
    await busy(endless)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wait_until_idle(endless)


async def test_cancelling_the_task_that_streams_cancels() -> None:
    async with make_model(endless=True, delay=0.01) as endless:

        async def read() -> None:
            async for _ in endless.stream_chat_request("Hi"):
                pass

        task = asyncio.create_task(read())
        await busy(endless)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        wait_until_idle(endless)


async def test_timeout_cancels(endless: Model) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(endless.send_chat_request("Hi"), 0.02)
    wait_until_idle(endless)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_has_its_time(endless: Model, stream: bool) -> None:
    request = RequestBuilder().add_message("user", "Hi").with_timeout(0.4)
    begin = time.monotonic()
    with pytest.raises(ModelError, match=r"time for the request was over after 0\.\d+ s; \d+ tokens") as failure:  # noqa: PT012
        if stream:
            async for _ in endless.stream_chat_request(request):
                pass
        await endless.send_chat_request(request)
    assert time.monotonic() - begin < 5
    assert failure.value.partial_response.choices[0].message.content.startswith("abc")
    wait_until_idle(endless)
    for seconds in (0, 10**400):
        with pytest.raises(RequestValidationError, match="with_timeout takes a number of seconds above 0"):
            request.with_timeout(seconds)
    assert (await endless.send_chat_request(request.with_timeout(None).set_sampler_max_len(3))).choices[0].message.content == "abc"


async def test_an_exception_in_the_consumer_cancels(endless: Model) -> None:
    with pytest.raises(KeyError):  # noqa: PT012
        async for _ in endless.stream_chat_request("Hi"):
            raise KeyError("mine")
    wait_until_idle(endless)


async def test_a_stream_never_read_costs_nothing(endless: Model) -> None:
    endless.stream_chat_request("Hi")
    assert endless._engine.stats().prompt_tokens == 0


async def test_a_stream_is_freed_while_the_engine_works(endless: Model) -> None:
    stream = endless.stream_chat_request("Hi")
    await anext(stream)
    gone = weakref.ref(stream)
    del stream
    assert gone() is None
    wait_until_idle(endless)


async def test_two_tasks_on_one_stream() -> None:
    async with make_model(delay=0.05) as model, model.stream_chat_request("Hi") as stream:
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="two tasks"):
            await anext(stream)
        chunks = [await first, *[chunk async for chunk in stream]]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ALPHABET


async def test_two_tasks_begin_one_stream(model: Model) -> None:
    """The second sends no request of its own, which nobody could cancel, and does no harm to the first."""
    stream = model.stream_chat_request("Hi")
    first, second = await asyncio.gather(anext(stream), anext(stream), return_exceptions=True)
    assert "two tasks" in str(second)
    assert not isinstance(first, BaseException)
    chunks = [first, *[chunk async for chunk in stream]]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ALPHABET
    wait_until_idle(model)


# ---- loops and threads ----------------------------------------------------------------------------


async def test_slow_consumer_does_not_hold_up_the_engine(model: Model) -> None:
    async with model.stream_chat_request("Hi") as stream:
        await anext(stream)
        wait_until_idle(model)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ALPHABET[1:]


def test_one_model_in_many_loops_and_threads() -> None:
    model = make_model()
    answers: list[str] = []

    def work() -> None:
        async def run() -> None:
            chunks = [chunk async for chunk in model.stream_chat_request("Hi")]
            answers.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
            answers.extend(await asyncio.gather(*(model.chat("Hi") for _ in range(3))))

        for _ in range(3):
            asyncio.run(run())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.close_now()
    assert answers == [ALPHABET] * 36


def test_a_loop_that_dies_does_not_harm_the_engine() -> None:
    model = make_model(endless=True, delay=0.001)

    async def start() -> object:
        stream = model.stream_chat_request("Hi")
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(start())
    loop.close()
    time.sleep(0.02)
    del stream
    wait_until_idle(model)
    model.close_now()


async def test_the_loop_stays_free_while_a_long_text_is_tokenized(model: Model) -> None:
    text = "x" * 30_000
    assert len(await model.tokenize(text)) == 30_001


async def test_a_stream_keeps_the_model_alive() -> None:
    gc.collect()
    chunks = [chunk async for chunk in make_model().stream_chat_request("Hi")]
    assert chunks[-1].usage is not None


async def test_a_model_that_is_dropped_ends_its_thread() -> None:
    model = make_model()
    thread = model._engine._thread
    await model.chat("Hi")
    del model
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


# ---- closing --------------------------------------------------------------------------------------


async def test_close_ends_requests_with_an_error() -> None:
    model = make_model(endless=True, delay=0.001)
    waiting = asyncio.create_task(model.send_chat_request("Hi"))
    stream = model.stream_chat_request("Hi")
    await anext(stream)
    await model.close()
    await model.close()
    with pytest.raises(EngineClosedError):
        await waiting
    with pytest.raises(EngineClosedError):
        async for _ in stream:
            pass
    with pytest.raises(EngineClosedError):
        await model.chat("Hi")
    with pytest.raises(EngineClosedError):
        await model.logits([1])
    assert not model._engine._thread.is_alive()


# ---- what a model knows ---------------------------------------------------------------------------


async def test_tokenize(model: Model) -> None:
    assert await model.tokenize("ab") == [BOS, 97, 98]
    assert await model.tokenize("ab", add_special_tokens=False) == [97, 98]
    assert await model.tokenize("") == [BOS]
    messages = TextMessages().add_message("user", "Hi")
    assert await model.tokenize(messages) == [BOS, *b"<user>Hi\n<assistant>"]
    assert await model.tokenize(messages, add_generation_prompt=False) == [BOS, *b"<user>Hi\n"]
    assert await model.tokenize(messages, enable_thinking=True) == [BOS, *b"<user>Hi\nthinking=True\n<assistant>"]
    assert await model.tokenize(messages, tools=[{"type": "function", "function": {"name": "f"}}]) == [BOS, *b"[f ]<user>Hi\n<assistant>"]
    assert messages.thinking is None
    with pytest.raises(RequestValidationError, match="surrogate"):
        await model.tokenize("\ud800")


async def test_detokenize(model: Model) -> None:
    assert await model.detokenize([BOS, 97]) == "a"
    assert await model.detokenize([BOS, 97], skip_special_tokens=False) == "<bos>a"
    assert await model.detokenize(np.array([97, 98])) == "ab"  # type: ignore[arg-type]
    with pytest.raises(RequestValidationError, match="999"):
        await model.detokenize([999])


@pytest.mark.parametrize("tokens", [5, "abc", ["a"], [1.5], [True], None])
async def test_what_are_no_token_ids(model: Model, tokens: Any) -> None:
    with pytest.raises(RequestValidationError, match="token id"):
        await model.logits(tokens)
    with pytest.raises(RequestValidationError, match="token id"):
        await model.detokenize(tokens)


async def test_logits(model: Model) -> None:
    logits = await model.logits([*b"abz"])
    assert logits.shape == (3, VOCAB_SIZE)
    assert logits.dtype == np.float32
    assert logits.argmax(1).tolist() == [*b"bc", 256]
    assert (await model.logits(np.array([97]))).shape == (1, VOCAB_SIZE)  # type: ignore[arg-type]
    for bad in ([], [VOCAB_SIZE], [-1], [1] * 2000):
        with pytest.raises(RequestValidationError):
            await model.logits(bad)


async def test_config_is_a_copy(model: Model) -> None:
    model.config()["rope_scaling"]["factor"] = 3.0
    assert model.config()["rope_scaling"]["factor"] == 2.0
    assert model.max_sequence_length() == 1024
    assert repr(model) == "Model('alphabet')"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams.deterministic()),
        ({"eos_token_id": 1}, SamplingParams.deterministic()),
        ({"temperature": 0.7, "top_k": 64, "top_p": 0.95}, SamplingParams(temperature=0.7, top_k=64, top_p=0.95)),
        ({"temperature": 0.7, "do_sample": False}, SamplingParams.deterministic()),
        ({"temperature": 1, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, SamplingParams(temperature=1)),
        ({"repetition_penalty": 1.1}, SamplingParams(temperature=0, repetition_penalty=1.1)),
    ],
)
async def test_generation_defaults(config: dict[str, object], expected: SamplingParams) -> None:
    async with make_model(generation_config=config) as model:
        assert model.generation_defaults == expected


def test_impossible_generation_defaults_are_refused_by_name() -> None:
    with pytest.raises(ModelLoadError, match="top_p"):
        make_model(generation_config={"top_p": 7})


async def test_an_event_loop_wakes_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_model(endless=True, delay=0.002) as model:
        loop, wakes = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (wakes.append(1), wake(*args))[1])
        request = RequestBuilder().add_message("user", "Hi").set_sampler_max_len(100)

        async def read() -> int:
            return len([chunk async for chunk in model.stream_chat_request(request)])

        assert await asyncio.gather(*(read() for _ in range(6))) == [101] * 6
        assert len(wakes) <= model._engine.stats().steps + 10


async def text_of(model: Model, request: RequestBuilder) -> str | None:
    return (await model.send_chat_request(request)).choices[0].message.content


def fail_after(letter: str):  # type: ignore[no-untyped-def]
    def processor(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
        if tokens[-1] == ord(letter):
            raise ValueError("the processor is broken")
        return logits

    return processor


async def busy(model: Model) -> None:
    while not model._engine.stats().running:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
