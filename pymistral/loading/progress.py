"""A progress bar on a terminal's stderr, one line in the log elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

logger = logging.getLogger("pymistral.progress")


class Bar:
    """How far a download is, in bytes; ``show`` is told of every change."""

    def __init__(self, show: Callable[[int], None] = lambda done: None) -> None:
        self.done = 0
        self._show = show

    def advance_to(self, done: int) -> None:
        if done > self.done:
            self.done = done
            self._show(done)


@contextlib.contextmanager
def download_bar(label: str, total: int | None, progress: bool | None = None) -> Iterator[Bar]:
    """A bar that shows bytes, speed and remaining time. ``progress`` ``None`` means: where stderr is a terminal."""
    if not (sys.stderr.isatty() if progress is None else progress):
        logger.info("fetching %s%s", label, f" ({total / 1e6:.0f} MB)" if total else "")
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield Bar(lambda done: bars.update(task, completed=done))


@contextlib.contextmanager
def counting_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield ``progress(done, total)``: a bar from its first call on where stderr is a terminal, a line in the log elsewhere."""
    with contextlib.ExitStack() as stack:
        show: list[Callable[[int, int], None]] = []

        def start() -> Callable[[int, int], None]:
            if not sys.stderr.isatty():
                logger.info(label)
                return lambda done, total: None
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            bars = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
            task = bars.add_task(label)
            return lambda done, total: bars.update(task, completed=done, total=total)

        def progress(done: int, total: int) -> None:
            if not show:
                show.append(start())
            show[0](done, total)

        yield progress
