"""The engine with its thread: many callers, cancellation at any moment, closing while requests run."""

from __future__ import annotations

import logging
import os
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from pymistral.engine import ChoiceFinished, Delta, Engine, EngineRequest, RequestFailed, RequestFinished, RequestHandle
from pymistral.errors import EngineClosedError, RequestValidationError

from .fakes import EOS, ByteTokenizer, Collector, FakeRunner, Params, logits_of
from .test_core import check_invariants, greedy_alone

pytestmark = pytest.mark.timeout(60)


def make_engine(runner: FakeRunner | None = None, **options: Any) -> Engine:
    return Engine(runner or FakeRunner(), ByteTokenizer(), **{"eos_token_ids": [EOS], **options})


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine()
    yield engine
    engine.close()


class Waiter(Collector):
    """A collector that a thread can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()

    def __call__(self, event: Any) -> None:
        super().__call__(event)
        if self.end is not None:
            self.done.set()

    def wait(self) -> Waiter:
        assert self.done.wait(30)
        return self


def submit(engine: Engine, prompt: bytes, waiter: Waiter, **params: Any) -> RequestHandle:
    return engine.submit(EngineRequest(list(prompt), Params(**params)), waiter)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pymistral-engine")]


def assert_at_rest(engine: Engine) -> None:
    """Everything is freed; asked on the engine's thread, so after all that was under way."""
    engine.call(lambda runner: check_invariants(engine._core)).result(30)
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.free_blocks) == (0, 0, stats.num_blocks)


def test_events_come_in_order_on_the_engine_thread(engine: Engine) -> None:
    seen: queue.Queue[Any] = queue.Queue()
    engine.submit(EngineRequest(list(b"hello"), Params(max_len=5)), lambda event: seen.put((event, threading.current_thread())))
    events = []
    while not events or not isinstance(events[-1], RequestFinished):
        event, thread = seen.get(timeout=30)
        assert thread.name == "pymistral-engine-model"
        events.append(event)
    assert all(isinstance(event, Delta) for event in events[:5])
    assert events[5] == ChoiceFinished(0, "length", "".join(event.text for event in events[:5]))
    assert_at_rest(engine)


def test_many_threads_get_their_own_answers(engine: Engine) -> None:
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for round_ in range(10):
                prompt = b"client %d says %d" % (number, round_)
                waiter = Waiter()
                submit(engine, prompt, waiter, max_len=12)
                waiter.wait()
                assert waiter.tokens[0] == greedy_alone(prompt, 12, 128, 0.0)[0]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not failures
    assert engine.stats().finished == 160
    assert_at_rest(engine)


def test_cancel_at_any_moment() -> None:
    rng = random.Random(0)
    engine = make_engine(FakeRunner(num_blocks=12, max_num_seqs=3, max_sequence_length=48, delay=0.0002))
    waiters = []
    for number in range(100):
        waiter, prompt = Waiter(), b"prompt %d" % number
        handle = submit(engine, prompt, waiter, max_len=10, n_choices=rng.choice([1, 2]))
        waiters.append((waiter, prompt))
        if rng.random() < 0.7:
            timer = threading.Timer(rng.random() * 0.05, handle.cancel)
            timer.start()
            if rng.random() < 0.3:
                handle.cancel()
    for waiter, prompt in waiters:
        waiter.wait()
        assert isinstance(waiter.end, RequestFinished)
        whole = greedy_alone(prompt, 10, 48, 0.0)[0]
        for choice, finished in waiter.finished.items():
            made = waiter.tokens.get(choice, [])
            assert made == (whole[: len(made)] if finished.reason == "canceled" else whole)
    assert_at_rest(engine)
    assert engine.stats().canceled > 10
    engine.close()


def test_canceling_takes_effect_within_a_step() -> None:
    runner = FakeRunner(delay=0.01, max_sequence_length=1000, num_blocks=300)
    engine = make_engine(runner)
    waiter = Waiter()
    handle = submit(engine, b"x", waiter)
    time.sleep(0.05)
    handle.cancel()
    steps = len(runner.steps)
    waiter.wait()
    assert len(runner.steps) <= steps + 1
    handle.cancel()
    assert waiter.finished[0].reason == "canceled"
    assert_at_rest(engine)
    engine.close()


def test_a_receiver_may_call_the_engine(engine: Engine) -> None:
    second = Waiter()
    handles: list[RequestHandle] = []

    class First(Waiter):
        def __call__(self, event: Any) -> None:
            super().__call__(event)
            if len(self.events) == 3:
                submit(engine, b"again", second, max_len=2)
                handles[0].cancel()

    first = First()
    gate = engine.call(lambda runner: time.sleep(0.05))
    handles.append(submit(engine, b"first", first, max_len=100))
    gate.result(30)
    first.wait()
    second.wait()
    assert first.finished[0].reason == "canceled"
    assert second.finished[0].reason == "length"


def test_closing_ends_everything_with_an_error_and_leaves_no_thread() -> None:
    before = engine_threads()
    engine = make_engine(FakeRunner(delay=0.002, max_num_seqs=2))
    waiters = [Waiter() for _ in range(10)]
    handles = [submit(engine, b"prompt", waiter, max_len=100) for waiter in waiters]
    while not waiters[0].texts:
        time.sleep(0.001)
    engine.close()
    assert engine_threads() == before
    for waiter in waiters:
        assert isinstance(waiter.end, RequestFailed)
        assert isinstance(waiter.end.error, EngineClosedError)
        assert waiter.end.texts == [waiter.texts.get(0, "")]
    assert waiters[0].end.texts[0]
    for handle in handles:
        handle.cancel()
    engine.close()
    with pytest.raises(EngineClosedError, match="model has been closed"):
        submit(engine, b"late", Waiter())
    with pytest.raises(EngineClosedError):
        engine.call(lambda runner: None)
    assert engine.stats().free_blocks == 64


def test_closing_while_others_submit() -> None:
    for trial in range(20):
        engine = make_engine(FakeRunner(delay=0.0003))
        accepted: list[Waiter] = []
        refused = threading.Event()

        def client(engine: Engine = engine, accepted: list[Waiter] = accepted, refused: threading.Event = refused) -> None:
            while True:
                waiter = Waiter()
                try:
                    submit(engine, b"prompt", waiter, max_len=3)
                except EngineClosedError:
                    refused.set()
                    return
                accepted.append(waiter)
                time.sleep(0.0002)

        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.002 * trial)
        engine.close()
        for thread in threads:
            thread.join(30)
        assert refused.is_set()
        for waiter in accepted:
            waiter.wait()


def test_a_receiver_may_close_the_engine() -> None:
    engine = make_engine()
    waiter = Waiter()

    def receive(event: Any) -> None:
        waiter(event)
        if len(waiter.events) == 2:
            engine.close()

    engine.submit(EngineRequest([65], Params(max_len=100)), receive)
    waiter.wait()
    assert isinstance(waiter.end, RequestFailed)
    engine.close()
    assert not any(thread is engine._thread for thread in engine_threads())


def test_a_receiver_may_close_an_engine_whose_step_waits_for_its_own() -> None:
    """As a collection of garbage on an engine's thread may, that finds a model which nobody closed."""

    class InTurn(FakeRunner):
        one_at_a_time = threading.Lock()

        def forward(self, segments: Sequence[Any], meanwhile: Callable[[], object] | None = None) -> np.ndarray:
            with self.one_at_a_time:
                return super().forward(segments, meanwhile)

    first, second = make_engine(InTurn(delay=0.01)), make_engine(InTurn(delay=0.01))
    waiter, closed = Waiter(), Waiter()

    def receive(event: Any) -> None:
        if len(waiter.events) == 4:
            second.close()
        waiter(event)

    submit(second, b"a", closed, max_len=1000)
    first.submit(EngineRequest(list(b"b"), Params(max_len=20)), receive)
    assert isinstance(closed.wait().end, RequestFailed)
    assert isinstance(waiter.wait().end, RequestFinished)
    first.close()
    second._thread.join(30)
    assert not engine_threads()


def test_exclusive_work_between_steps(engine: Engine) -> None:
    assert engine.call(lambda runner: runner.vocab_size).result(30) == 260
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda runner: 1 // 0).result(30)
    tokens = list(b"score this text, please, all of it, though it is longer than a step")
    waiter = Waiter()
    submit(engine, b"meanwhile", waiter, max_len=50)
    rows = engine.logits(tokens).result(30)
    np.testing.assert_array_equal(rows, np.stack([logits_of(tokens[: i + 1]) for i in range(len(tokens))]))
    with pytest.raises(RequestValidationError):
        engine.logits([]).result(30)
    assert waiter.wait().tokens[0] == greedy_alone(b"meanwhile", 50, 128, 0.0)[0]
    engine.call(lambda runner: None, clear_cache=True).result(30)
    assert engine.stats().cached_blocks == 0
    assert_at_rest(engine)


def test_an_engine_that_breaks_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._core.scheduler, "schedule", lambda: 1 // 0)
    waiter = Waiter()
    submit(engine, b"x", waiter)
    waiter.wait()
    assert isinstance(waiter.end.error, EngineClosedError)
    assert "ZeroDivisionError" in str(waiter.end.error)
    with pytest.raises(EngineClosedError):
        submit(engine, b"y", Waiter())


def test_an_idle_engine_burns_no_time(engine: Engine) -> None:
    waiter = Waiter()
    submit(engine, b"x", waiter, max_len=3)
    waiter.wait()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_throughput_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pymistral.engine"):
        engine = make_engine(throughput_logging=True)
        waiter = Waiter()
        submit(engine, b"x", waiter, max_len=3)
        waiter.wait()
        engine.call(lambda runner: None).result(30)
        engine.close()
    assert any("tokens/s generated" in message for message in caplog.messages)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_that_it_has_no_engine(engine: Engine) -> None:
    handle = submit(engine, b"hello", Waiter(), max_len=5)
    with engine._wake:  # the worst moment
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            status = 1
            try:
                with pytest.raises(EngineClosedError, match="forked from"):
                    submit(engine, b"hello", Waiter())
                with pytest.raises(EngineClosedError, match="forked from"):
                    engine.logits([1])
                handle.cancel()
                engine.close()
                status = 0
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    submit(engine, b"hello", waiter := Waiter(), max_len=5)
    waiter.wait()
