"""How `benchmarks.engines` talks to the process of an engine: one JSON object a line. Standard library only: any interpreter runs it.

The first line out is ``{"version": ..., "note": ...}`` once the model is loaded; then each line in,
``{"test": "prefill" | "decode", "tokens": N, "context": N}``, is answered by ``{"tokens": N, "seconds": S}``, and ``"least_seconds"`` from
who knows what the machine allows. An engine may know further tests.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(
    version: str,
    prefill: Callable[[int], float | dict[str, float]],
    decode: Callable[[int, int], float | dict[str, float]],
    note: str = "",
    **others: Callable[[int, int], float],
) -> None:
    """Answer until the input ends.

    Parameters
    ----------
    version
        Of the engine.
    prefill
        ``prefill(tokens)``: process a prompt of so many tokens, return the seconds (or seconds and tokens, where the
        engine decides how many).
    decode
        ``decode(tokens, context)``: generate so many tokens after ``context`` others, return the seconds of the generation alone.
    note
        What a reader of the figures has to know.
    others
        Further tests by name, called as ``decode`` is.
    """
    answer(version=version, note=note)
    for line in sys.stdin:
        request = json.loads(line)
        test, tokens = request["test"], request["tokens"]
        result = prefill(tokens) if test == "prefill" else others.get(test, decode)(tokens, request["context"])
        answer(**result if isinstance(result, dict) else {"tokens": tokens, "seconds": result})


def quiet() -> None:
    """Keep standard output for the answers: engines write what they like to it, native code included."""
    global _answers
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def answer(**fields: Any) -> None:
    """One line out."""
    print(json.dumps(fields), file=_answers, flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prompt(tokens: int, vocab_size: int) -> list[int]:
    """Some tokens, the same for every engine."""
    return [(7919 * position + 13) % (vocab_size - 256) + 128 for position in range(tokens)]


_answers = sys.stdout
