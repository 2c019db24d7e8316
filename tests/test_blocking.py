from __future__ import annotations

import _thread
import asyncio
import inspect
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_model import ALPHABET, BOS, make_model, wait_until_idle

from pymistral import Model, ModelBuilder, RequestBuilder
from pymistral.blocking import BlockingModel
from pymistral.builders import common
from pymistral.errors import EngineClosedError, ModelError, ModelLoadError, RequestValidationError
from pymistral.threads import Pumped


@pytest.fixture
def model() -> Iterator[BlockingModel]:
    with BlockingModel(make_model()) as model:
        yield model


@pytest.fixture
def endless() -> Iterator[BlockingModel]:
    with BlockingModel(make_model(endless=True, delay=0.001)) as model:
        yield model


def test_it_has_the_methods_of_model() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_")}

    assert public(BlockingModel) == public(Model) - {"close_now"} | {"from_builder", "inner"}
    for name in public(Model) & public(BlockingModel):
        theirs, ours = inspect.getattr_static(Model, name), inspect.getattr_static(BlockingModel, name)
        assert isinstance(theirs, property) == isinstance(ours, property)
        if not isinstance(theirs, property):
            assert not inspect.iscoroutinefunction(ours)
            assert inspect.signature(theirs).parameters == inspect.signature(ours).parameters


def test_chat(model: BlockingModel) -> None:
    assert model.chat("Hi") == ALPHABET


def test_stream(model: BlockingModel) -> None:
    chunks = list(model.stream_chat_request("Hi"))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ALPHABET
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None


async def test_inside_a_running_loop(model: BlockingModel) -> None:
    assert model.chat("Hi") == ALPHABET
    assert len(list(model.stream_chat_request("Hi"))) > 20


def test_it_starts_no_thread_of_its_own(model: BlockingModel) -> None:
    before = threading.active_count()
    model.chat("Hi")
    assert threading.active_count() == before


def test_break_cancels(endless: BlockingModel) -> None:
    for _ in endless.stream_chat_request("Hi"):
        break
    wait_until_idle(endless.inner)


def test_with_and_close_cancel(endless: BlockingModel) -> None:
    with endless.stream_chat_request("Hi") as stream:
        next(stream)
    wait_until_idle(endless.inner)
    assert list(stream) == []
    stream = endless.stream_chat_request("Hi")
    next(stream)
    stream.close()
    wait_until_idle(endless.inner)


def test_a_second_thread_that_reads_a_stream_is_told(endless: BlockingModel) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
        entered.set()
        go_on.wait(60)
        return logits

    async def events() -> AsyncIterator[str]:
        entered.set()
        await asyncio.to_thread(go_on.wait, 60)
        yield "a"
        yield "b"

    request = RequestBuilder().add_message("user", "Hi").add_logits_processor(hold)
    for stream in (endless.stream_chat_request(request), Pumped(events)):  # that of an agent is Pumped
        entered.clear()
        go_on.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(next, stream)
            assert entered.wait(60)
            with pytest.raises(RuntimeError, match="two threads"):
                next(stream)
            go_on.set()
            assert first.result(60)
        assert next(stream)
        stream.close()


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_cancels(endless: BlockingModel, stream: bool) -> None:
    interrupted = []

    def interrupt(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
        if not interrupted:  # while the answer is waited for, however slow the machine is
            interrupted.append(True)
            _thread.interrupt_main()
        return logits

    request = RequestBuilder().add_message("user", "Hi").add_logits_processor(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(endless.stream_chat_request(request)) if stream else endless.send_chat_request(request)
    wait_until_idle(endless.inner)


def test_errors(model: BlockingModel) -> None:
    def fail(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
        if tokens[-1] == ord("b"):
            raise ValueError("broken")
        return logits

    request = RequestBuilder().add_message("user", "Hi").add_logits_processor(fail)
    with pytest.raises(ModelError, match="broken") as caught:
        model.send_chat_request(request)
    assert caught.value.partial_response is not None
    assert caught.value.partial_response.choices[0].message.content == "ab"
    with pytest.raises(ModelError):
        list(model.stream_chat_request(request))
    with pytest.raises(RequestValidationError):
        model.send_chat_request([])


def test_close_from_another_thread(endless: BlockingModel) -> None:
    def close_soon() -> None:
        time.sleep(0.02)
        endless.close()

    thread = threading.Thread(target=close_soon)
    thread.start()
    with pytest.raises(EngineClosedError):
        endless.chat("Hi")
    thread.join()
    with pytest.raises(EngineClosedError):
        next(endless.stream_chat_request("Hi"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_that_its_stream_has_no_engine(endless: BlockingModel) -> None:
    stream = endless.stream_chat_request("Hi")
    next(stream)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends it, should it hang
        status = 1
        try:
            with pytest.raises(EngineClosedError, match="forked from"):
                next(stream)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert next(stream)
    stream.close()


def test_what_a_model_knows(model: BlockingModel) -> None:
    assert model.tokenize("ab") == [BOS, 97, 98]
    assert model.detokenize([97, 98]) == "ab"
    assert model.logits([97, 98]).argmax(1).tolist() == [98, 99]
    assert model.config()["model_type"] == "fake"
    assert model.max_sequence_length() == 1024
    assert model.generation_defaults.temperature == 0
    assert repr(model) == "BlockingModel(Model('alphabet'))"


def test_from_what_is_no_builder() -> None:
    with pytest.raises(ModelLoadError, match="takes a builder"):
        BlockingModel.from_builder("model.gguf")  # type: ignore[arg-type]


def test_from_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[common.Builder] = []

    def load(builder: common.Builder) -> Model:
        seen.append(builder)
        return make_model()

    monkeypatch.setattr("pymistral.builders.common.load_model", load)
    builder = ModelBuilder("some/model").with_threads(2)
    with BlockingModel.from_builder(builder) as model:
        assert model.chat("Hi") == ALPHABET
    assert seen == [builder]
