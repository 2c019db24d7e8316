"""What the shell runs: the commands, and what becomes of their errors."""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from ..errors import PymistralError, RequestValidationError
from . import bench, doctor, pull, run
from .options import Parser, UsageError

COMMANDS = (run, pull, bench, doctor)


def run_command(argv: Sequence[str] | None) -> int:
    """Run the command that the arguments name and return the exit code. Ctrl-C is left to the caller."""
    _prepare_streams()
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` perhaps, has enough; stdout is pointed away so that the exit does not fail on it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("PYMISTRAL_DEBUG"):
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, (UsageError, RequestValidationError)) else 1


def _prepare_streams() -> None:
    """A stream that was closed swallows what is written; a character that an encoding lacks becomes a question mark, not an error.

    Where the locale is C, which names no encoding, text is UTF-8, as it is in what is piped in.
    """
    codecs.register_error("pymistral", _as_it_came)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    in_c_locale = isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "surrogateescape"  # Python says so there alone
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not isinstance(stream, TextIOWrapper):
            continue
        errors = "replace" if stream is sys.stdin else "pymistral"
        if in_c_locale:
            stream.reconfigure(encoding="utf-8", errors=errors)
        elif stream.errors == "strict" and stream is not sys.stdin:
            stream.reconfigure(errors=errors)


def _as_it_came(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes that the locale could not read, of a path mostly, go out as they came in; what else cannot be written is a question mark."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.replace_errors(error)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="pymistral", description="Run large language models on this machine.")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version

        print(f"pymistral {version('pymistral')}")
        return 0
    if "handler" not in args:
        parser.print_help(sys.stderr)
        return 2
    code: int = args.handler(args)
    return code


def _message(error: Exception) -> str:
    text = " ".join((error.problem if isinstance(error, PymistralError) else str(error)).split())
    # where repr() escaped a byte that the locale could not read
    text = re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda escape: chr(int(escape[1], 16)), text)
    if isinstance(error, (PymistralError, UsageError)):
        return text
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or text
    return f"internal error: {type(error).__name__}: {text} (PYMISTRAL_DEBUG=1 shows where; please report it)"
