"""pymistral, through the steps that its engine takes. Arguments: model file, threads, context."""

from __future__ import annotations

import sys
from array import array
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout, not this folder, which has a module of the same name

from benchmarks.workers.protocol import prompt, quiet, serve, timed  # noqa: E402


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    quiet()
    from benchmarks.decode import bytes_per_token
    from benchmarks.limits import bandwidth_probe
    from pymistral import ContextSize, ModelBuilder, PagedAttentionMetaBuilder, __version__
    from pymistral.blocking import BlockingModel
    from pymistral.builders.load import open_checkpoint
    from pymistral.engine.types import Segment
    from pymistral.models.registry import build_model
    from pymistral.nn import record

    cache = PagedAttentionMetaBuilder().with_gpu_memory(ContextSize(context)).build()
    model = BlockingModel.from_builder(ModelBuilder(path, threads=threads, paged_attn=cache))
    engine = model.inner._engine
    graph = record(build_model(*open_checkpoint(Path(path), None).config_and_weights()))
    probe = bandwidth_probe(threads)

    def fill(runner: Any, tokens: int) -> None:
        table, ids = array("i", range(runner.num_blocks)), prompt(tokens, runner.vocab_size)
        for start in range(0, tokens, runner.max_batch_tokens):
            chunk = ids[start : start + runner.max_batch_tokens]
            runner.forward([Segment(chunk, start, table, int(start + len(chunk) == tokens))])

    def prefill(tokens: int) -> float:
        return engine.call(lambda runner: timed(lambda: fill(runner, tokens)), clear_cache=True).result()

    def decode(tokens: int, context: int) -> dict[str, float]:
        def generate(runner: Any) -> None:
            table, token = array("i", range(runner.num_blocks)), 1
            for position in range(context, context + tokens):
                token = int(runner.forward([Segment([token], position, table, 1, 1)])[0].argmax())

        if context:
            engine.call(lambda runner: fill(runner, context), clear_cache=True).result()
        before = probe()
        seconds = engine.call(lambda runner: timed(lambda: generate(runner)), clear_cache=True).result()
        bandwidth = 1e9 * (before + probe()) / 2
        least = sum(bytes_per_token(graph, position) for position in range(context, context + tokens)) / bandwidth
        return {"tokens": tokens, "seconds": seconds, "least_seconds": least}

    serve(__version__, prefill, decode)


main()
