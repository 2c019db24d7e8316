"""An answer as it is generated, for code that runs in an event loop: from the engine's thread to the task that waits."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from .engine.types import Event
from .errors import RequestValidationError
from .responses import ChatCompletionChunkResponse, ChatCompletionResponse

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from .answer import Answer
    from .engine import RequestHandle
    from .tool_rounds import ToolRounds


class ChatStream:
    """An answer as it is generated: an async iterator of chunks, and a context manager that cancels what is left.

    The request is sent when the first chunk is asked for.
    """

    def __init__(self, submit: Callable[[ToolRounds], Awaitable[tuple[Inbox, Answer, RequestHandle]]], rounds: ToolRounds) -> None:
        self._submit = submit
        self._rounds = rounds
        self._answer: Answer | None = None
        self._inbox: Inbox | None = None
        self._handle: RequestHandle | None = None
        self._chunks: deque[ChatCompletionChunkResponse] = deque()
        self._reading = False
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatCompletionChunkResponse:
        if self._reading:
            raise RuntimeError("two tasks wait for the same stream; give each its own")
        self._reading = True
        try:
            while not self._chunks:
                if self._closed:
                    raise StopAsyncIteration
                await self._next_event()
        except BaseException:
            self._cancel()
            raise
        finally:
            self._reading = False
        return self._chunks.popleft()

    async def _next_event(self) -> None:
        if self._inbox is None or self._answer is None:
            self._inbox, answer, self._handle = await self._submit(self._rounds)
            self._answer = answer.continuing(self._answer)
        chunk = self._answer.chunk(await self._inbox.get())
        if chunk is None:
            return
        if not self._answer.complete:
            self._chunks.extend(self._rounds.shown(chunk))
        elif self._rounds.goes_on(response := self._answer.whole()):
            await self._rounds.run(response)
            self._inbox = None  # the next turn has one of its own
        else:
            self._chunks.extend(self._rounds.last_shown(chunk))
            self._closed = True

    def whole(self) -> ChatCompletionResponse:
        """The last turn as one response, once the stream has ended."""
        if self._answer is None or not self._answer.complete:
            raise RequestValidationError("the stream has not ended; read it to its end first")
        return self._answer.whole()

    async def aclose(self) -> None:
        """Stop: cancel the request if it still runs."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cancel()

    def __del__(self) -> None:
        # ``break`` drops the last reference to a stream that only ``async for`` holds. The engine refers to the inbox alone.
        self._cancel()

    def _cancel(self) -> None:
        self._closed = True
        self._chunks.clear()
        if self._handle is not None:
            self._handle.cancel()


class Alarm:
    """Wakes the tasks of an event loop that wait for events: all that a step has something for, at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self.sleepers: deque[Inbox] = deque()

    def ring(self) -> None:
        """Called on the engine's thread."""
        loop = self._loop()
        if self.sleepers and loop is not None:
            with suppress(RuntimeError):  # the loop was closed under the stream, whose end cancels the request
                loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        while self.sleepers:
            self.sleepers.popleft().wake()


class Inbox:
    """Events on their way from the engine's thread to a task. The engine never waits; a wake-up is scheduled only if the task does."""

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._waiting = False

    def put(self, event: Event) -> None:
        """Called on the engine's thread."""
        self._events.append(event)
        if self._waiting:
            self._waiting = False
            self._alarm.sleepers.append(self)

    async def get(self) -> Event:
        """The next event. Only one task may wait."""
        while not self._events:
            self._waiter = self._loop.create_future()
            self._waiting = True
            try:
                if not self._events:  # the engine may have put one before it could see that we wait
                    await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def wake(self) -> None:
        """Called in the event loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
