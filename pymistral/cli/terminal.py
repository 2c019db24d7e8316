"""What the commands write to a terminal, and keep from one."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TextIO

# A model's text must not steer the terminal: control characters are shown as pictures, except tab and newline.
_HARMLESS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def harmless(text: str) -> str:
    """The text without control characters that a terminal would obey."""
    return text.translate(_HARMLESS)


def dim(text: str, stream: TextIO) -> str:
    """The text in a fainter colour, where the stream is a terminal that shows colours."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[2m{text}\x1b[22m"


class _StatusLine(logging.Handler):
    """Shows the latest log message in one line of the terminal, which the next one replaces; warnings stay."""

    def emit(self, record: logging.LogRecord) -> None:
        message = harmless(record.getMessage()).replace("\n", " ")
        if record.levelno >= logging.WARNING:
            print(f"{_CLEAR if sys.stderr.isatty() else ''}warning: {message}", file=sys.stderr, flush=True)
        elif sys.stderr.isatty():
            room = shutil.get_terminal_size().columns - 1
            print(_CLEAR + dim(message[:room], sys.stderr), end="", file=sys.stderr, flush=True)
        elif record.name == "pymistral.progress":  # what takes long is said wherever it is read
            print(message, file=sys.stderr, flush=True)


_CLEAR = "\r\x1b[K"


@contextlib.contextmanager
def status_line() -> Iterator[None]:
    """Show what pymistral logs, such as the compilation of kernels, while a model is loaded."""
    logger = logging.getLogger("pymistral")
    handler, level, propagate = _StatusLine(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        if sys.stderr.isatty():
            print(_CLEAR, end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """Keep what is typed during an answer, and the ^C that stops it, out of the answer."""
    import termios

    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
