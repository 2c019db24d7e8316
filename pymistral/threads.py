"""Between threads and event loops."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread of its own, without holding up the event loop.

    Unlike with `asyncio.to_thread` there is no pool that calls which never end could fill, and nobody waits for them when the loop closes.

    Raises
    ------
    RuntimeError
        The function raised what would end the loop or look like the cancelling of a task (``SystemExit``, ``CancelledError`` ...). Any
        other exception goes on as it is.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
    context = contextvars.copy_context()

    def finish(value: Any, error: BaseException | None) -> None:
        if not outcome.done():
            outcome.set_result((value, error))

    def run() -> None:
        value, error = None, None
        try:
            value = context.run(function, *args, **kwargs)
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed in the meantime
            loop.call_soon_threadsafe(finish, value, error)

    threading.Thread(target=run, name="pymistral-tool", daemon=True).start()
    value, error = await outcome
    if error is None:
        return value  # type: ignore[no-any-return]
    if isinstance(error, Exception):
        raise error
    raise RuntimeError(f"{type(error).__name__}: {error}") from error


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, from code that is not async, whether or not a loop runs in this thread. Ctrl-C cancels it."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()
    outcome: Future[T] = Future()

    async def main() -> T:
        task: asyncio.Task[T] | None = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        return await coroutine

    def run() -> None:
        try:
            outcome.set_result(asyncio.run(main()))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="pymistral-loop", daemon=True).start()
    try:
        return outcome.result()
    except BaseException:
        if not outcome.done():
            loop, task = started.result()
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
        raise


class Pumped(Iterator[T]):
    """The items of an async iterator, for code that is not async: it runs in a thread with an event loop of its own.

    Parameters
    ----------
    make
        Makes the async iterator, in that loop.
    """

    def __init__(self, make: Callable[[], AsyncIterator[T]]) -> None:
        self._make = make
        self._items: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] | None = None
        self._thread: threading.Thread | None = None
        self._reading = threading.Lock()
        self._ended = False

    def __next__(self) -> T:
        if not self._reading.acquire(blocking=False):
            raise RuntimeError("two threads read the same stream; give each its own")
        try:
            if self._ended:
                raise StopIteration
            if self._thread is None:
                self._start()
            item, error = self._items.get()
            if error is not None:
                raise error
        except BaseException:
            self.close()
            raise
        finally:
            self._reading.release()
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Cancel what is left, and wait until it has ended."""
        self._cancel()
        if self._thread is not None:
            self._thread.join()

    def __del__(self) -> None:
        self._cancel()

    def _start(self) -> None:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()
        make, items = self._make, self._items  # the thread does not refer to this object, whose end ends it

        async def pump() -> None:
            task = asyncio.current_task()
            assert task is not None
            started.set_result((asyncio.get_running_loop(), task))
            async for item in make():
                items.put((item, None))

        def run() -> None:
            error: BaseException = StopIteration()
            try:
                asyncio.run(pump())
            except BaseException as raised:
                error = raised
            items.put((None, error))

        self._started = started
        self._thread = threading.Thread(target=run, name="pymistral-loop", daemon=True)
        self._thread.start()

    def _cancel(self) -> None:
        self._ended = True
        if self._started is not None:
            loop, task = self._started.result()
            with suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(task.cancel)
