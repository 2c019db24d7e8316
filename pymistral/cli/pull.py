"""``pymistral pull``: fetch a model, see whether it can be loaded, and print where it is."""

from __future__ import annotations

import argparse
from typing import Any

from ..loading.hub import DEFAULT_MODEL, resolve
from .options import MODEL_HELP, checked
from .terminal import status_line


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "pull", help="fetch a model into the cache", description="Fetch a model, unless it is there already, check it, and print its path."
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=f"{MODEL_HELP} (default: {DEFAULT_MODEL})")
    parser.add_argument("-f", "--file", action="append", metavar="NAME", help="only this file of the repository; may be repeated")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hugging Face repository")
    parser.add_argument(
        "--token-source",
        type=checked(str, _check_token_source, "token_source"),
        metavar="SOURCE",
        help="the Hugging Face token: cache (default), none, env:NAME, path:FILE, literal:TOKEN",
    )
    parser.add_argument("--offline", action="store_true", help="only look whether it is there")
    parser.set_defaults(handler=pull)


def _check_token_source(source: str) -> None:
    from ..builders import TokenSource

    TokenSource(source)


def pull(args: argparse.Namespace) -> int:
    """Fetch the model."""
    with status_line():
        path = resolve(args.model, files=args.file, revision=args.revision, token=args.token_source, offline=args.offline)
        if not args.file:  # which may be any part of a model
            from ..builders.load import open_checkpoint

            loader = open_checkpoint(path, None)
            loader.checkpoint(*loader.config_and_weights())
    print(path)
    return 0
