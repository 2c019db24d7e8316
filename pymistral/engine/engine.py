"""The engine: a thread that steps while there is work, sleeps while there is none, and never lets a caller wait."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from time import perf_counter
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineClosedError, PymistralError
from .constraint import GrammarCompiler, GrammarTokenizer
from .core import EngineCore
from .sequence import Job
from .speculative import Speculation
from .types import EngineRequest, EngineStats, OnEvent, Runner, Tokenizer

T = TypeVar("T")
logger = logging.getLogger("pymistral.engine")
LOG_SECONDS = 5.0


class EngineThread(threading.Thread):
    """The thread of an engine. It waits for that of no other engine, since it may be within a step, for whose end that one may wait."""


class RequestHandle:
    """A submitted request."""

    __slots__ = ("_engine", "_job")

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._job = engine, job

    def cancel(self) -> None:
        """End the request before the next step. From any thread, at any time, any number of times."""
        if not self._job.done:
            self._engine._post(lambda: self._engine._core.cancel(self._job))

    def check_process(self) -> None:
        """Raises EngineClosedError in a child that was forked since: no event would ever come."""
        self._engine._check_process()


class Engine:
    """Serves any number of requests at once with one runner. All methods may be called from any thread.

    Parameters
    ----------
    runner, tokenizer
        The model, and what turns its tokens into text.
    eos_token_ids
        The tokens that end a text.
    max_num_seqs
        How many sequences may run at once; the runner's own limits hold as well.
    prefix_cache_n
        0 turns the prefix cache off. Otherwise every block that no sequence uses keeps its contents until the memory is needed.
    name
        Names the thread and the messages: the model's id.
    throughput_logging
        Log tokens per second, cache hits and queue lengths every five seconds while there is work.
    prefill_chunk
        How many prompt tokens may join a step while streams run; ``None`` adapts it so that streams slow down by at most a factor of 2.5.
    speculation
        Guesses tokens ahead; the texts stay the same.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        max_num_seqs: int = 32,
        prefix_cache_n: int = 16,
        name: str = "model",
        throughput_logging: bool = False,
        prefill_chunk: int | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.name = name
        self._core = EngineCore(
            runner,
            tokenizer,
            eos_token_ids=eos_token_ids,
            max_num_seqs=max_num_seqs,
            prefix_cache_n=prefix_cache_n,
            prefill_chunk=prefill_chunk,
            speculation=speculation,
        )
        self.grammars = GrammarCompiler(cast("GrammarTokenizer", tokenizer), runner.vocab_size, eos_token_ids)
        """Compiles what `EngineRequest.constraint` takes."""
        self._posted: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._process = os.getpid()
        self._log = ThroughputLog(self._core) if throughput_logging else None
        self._thread = EngineThread(target=self._run, name=f"pymistral-engine-{name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def max_sequence_length(self) -> int:
        """How many tokens a prompt may have: what the model and the cache both hold."""
        return self._core.max_length

    def submit(self, request: EngineRequest, on_event: OnEvent, wake: Callable[[], object] | None = None) -> RequestHandle:
        """Queue a request. Its events are passed to ``on_event`` on the engine's thread, which they should not keep busy.

        Parameters
        ----------
        request, on_event
            What to generate, and who gets it.
        wake
            Called on the engine's thread when all events of a step have been passed on: once a step for all requests that give the same
            function, since to wake a thread for each token of each stream would take longer than to make it. It must not raise.

        Raises
        ------
        RequestValidationError
            The request can never be served, for instance because its prompt is longer than the context.
        EngineClosedError
            The engine has been closed.
        """
        self._check_open()
        try:
            job = self._core.prepare(request, on_event, wake)
        except AttributeError:  # the runner is gone: it was closed meanwhile
            self._check_open()
            raise

        def add() -> None:
            self._core.add(job)
            if self._closing:
                self._core.fail(job, self._closed_error())

        self._post(add, must_be_open=True)
        return RequestHandle(self, job)

    def call(self, function: Callable[[Runner], T], *, clear_cache: bool = False) -> Future[T]:
        """Run a function on the engine's thread between two steps.

        It must not write to the cache (see `logits`). If it changes the weights, ``clear_cache`` makes the engine forget what it computed
        with the old ones.
        """

        def work() -> T:
            result = function(self._core.runner)
            if clear_cache:
                self._core.clear_cache()
            return result

        return self._future(work)

    def logits(self, tokens: Sequence[int]) -> Future[NDArray[np.float32]]:
        """The logits after each of the tokens, float32 ``[len(tokens), vocab_size]``, computed between two steps."""
        tokens = [int(token) for token in tokens]
        return self._future(lambda: self._core.logits(tokens))

    def stats(self) -> EngineStats:
        """The counters at this moment."""
        return replace(self._core.snapshot())

    def close(self) -> None:
        """End all requests with `EngineClosedError`, and the thread. A step that is being computed is finished first, for which a call
        on an engine's thread (such as a collection of garbage that ends another model) does not wait.
        """
        if self._left_behind:
            return
        with self._wake:
            self._closing = True
            self._wake.notify()
        atexit.unregister(self.close)
        if not isinstance(threading.current_thread(), EngineThread):
            self._thread.join()

    @property
    def _left_behind(self) -> bool:
        """Whether this is a forked child: it has no engine's thread, so nobody would ever answer, and its lock may be locked for ever."""
        return self._process != os.getpid()

    def _check_open(self) -> None:
        if self._closing:
            raise self._closed_error()
        self._check_process()

    def _check_process(self) -> None:
        if self._left_behind:
            raise EngineClosedError(f"the engine of {self.name} runs in the process that this one was forked from; build the model here")

    def _closed_error(self) -> EngineClosedError:
        return EngineClosedError(f"the engine of {self.name} has been closed; build the model again to use it")

    def _post(self, work: Callable[[], object], must_be_open: bool = False) -> None:
        if must_be_open:
            self._check_open()
        elif self._left_behind:
            return
        with self._wake:
            if must_be_open:
                self._check_open()
            self._posted.append(work)
            self._wake.notify()

    def _future(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                self._check_open()
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._post(run, must_be_open=True)
        return future

    def _run(self) -> None:
        error: Callable[[], PymistralError] = self._closed_error
        try:
            self._loop()
        except BaseException as failure:
            logger.exception("The engine of %s failed", self.name)
            message = f"the engine of {self.name} stopped because of {type(failure).__name__}: {failure}"
            error = lambda: EngineClosedError(message)  # noqa: E731
        with self._wake:
            self._closing = True
        self._core.fail_all(error)
        while self._posted:
            self._posted.popleft()()
        self._core.deliver()
        self._core.release()

    def _loop(self) -> None:
        core, posted, log = self._core, self._posted, self._log
        while not self._closing:
            if posted:
                core.deliver()  # before what may take long
            while posted:
                posted.popleft()()
            if core.jobs:
                core.step()
                if log is not None:
                    log.update()
                continue
            if log is not None:
                log.flush()
            core.deliver()
            with self._wake:
                while not posted and not self._closing:
                    self._wake.wait()
            if log is not None:
                log.restart()


class ThroughputLog:
    """Logs what the engine did in each period in which it did something."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._begin = perf_counter()
        self._last = replace(core.snapshot())

    def update(self) -> None:
        if perf_counter() - self._begin >= LOG_SECONDS:
            self.flush()

    def flush(self) -> None:
        now, s, last = perf_counter(), self._core.snapshot(), self._last
        seconds = now - self._begin
        prompt = s.prompt_tokens - last.prompt_tokens
        cached = s.cached_prompt_tokens - last.cached_prompt_tokens
        generated = s.completion_tokens - last.completion_tokens
        if prompt or generated:
            logger.info(
                "Throughput %.1f tokens/s generated, %.1f tokens/s of prompts, prefix cache hits %.0f %%, %d running, %d waiting",
                generated / seconds,
                (prompt - cached) / seconds,
                100.0 * cached / prompt if prompt else 0.0,
                s.running,
                s.waiting,
            )
        self._begin, self._last = now, replace(s)

    def restart(self) -> None:
        """Leave the time that the engine slept out of the account."""
        self._begin = perf_counter()
