"""mistral.rs through its Python package. It takes text, so prompts have about as many tokens as asked for; it counts them itself.

Arguments: model file, threads, context.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.workers.protocol import quiet, serve  # noqa: E402


def main() -> None:
    path, threads = Path(sys.argv[1]), sys.argv[2]
    quiet()
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = threads
    from importlib.metadata import version

    import mistralrs

    runner = mistralrs.Runner(
        which=mistralrs.Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name), prefix_cache_n=0
    )
    numbers = itertools.count()

    def complete(words: int, tokens: int) -> Any:
        # a first word of its own, so that no prefix is found in a cache
        text = f"{next(numbers)}" + " word" * max(1, words - 2)
        request = mistralrs.CompletionRequest(model="default", prompt=text, max_tokens=tokens, temperature=0.0, top_k=1)
        return runner.send_completion_request(request).usage

    def prefill(tokens: int) -> dict[str, float]:
        usage = complete(tokens, 1)
        return {"tokens": usage.prompt_tokens, "seconds": usage.total_prompt_time_sec}

    def decode(tokens: int, context: int) -> dict[str, float]:
        usage = complete(context or 1, tokens)
        return {"tokens": usage.completion_tokens, "seconds": usage.total_completion_time_sec}

    serve(version("mistralrs"), prefill, decode, "prompts of about as many tokens")


main()
