"""The command ``pymistral``. Every command is a module here; what they need is imported when they run, so that ``--help`` is instant."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C."""
    try:
        from . import commands  # here, so that Ctrl-C while it is imported ends as it does later

        return commands.run_command(argv)
    except KeyboardInterrupt:
        return 130
