"""Between threads and event loops."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
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
