"""Decoding beside what the memory allows: models of Llama 3's shapes with random weights.

The bound is the bytes that a token needs (all weights but the embeddings, of which it reads a row, and the KV cache that it looks at) over
what this machine's memory gives just before and after each run of 128 tokens.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from itertools import pairwise
from time import perf_counter
from typing import Any

from pymistral.kernels.cpu.geometry import usual_cache_type

from pymistral.engine.runner import CpuRunner, cache_token_bytes
from pymistral.engine.types import Segment
from pymistral.nn.graph import OUTPUTS, TOKENS, Graph
from pymistral.nn.pool import available_threads
from pymistral.nn.quantize import tile_format
from pymistral.quantization.types import GgmlType

from .limits import bandwidth_probe
from .random_llama import LLAMA_1B, LLAMA_8B, multiplied, random_llama
from .report import Report, arguments, median

COLUMNS = {
    "model": "model",
    "type": "type",
    "gb_per_token": "GB a token",
    "bandwidth": "GB/s, memory",
    "tokens_per_sec": "tok/s",
    "gb_per_sec": "GB/s",
    "percent": "% of bound",
}
MODELS: dict[str, dict[str, Any]] = {"Llama 3.2 1B": LLAMA_1B, "Llama 3.1 8B": LLAMA_8B}
FEWEST_PERCENT = 80


def bytes_per_token(graph: Graph, context: float) -> float:
    """What one token reads of weights, as they lie in memory, and of a KV cache of ``context`` tokens, of which windows see a part."""
    matrices = multiplied(graph, {TOKENS, OUTPUTS}).matrices
    total = sum(tile_format(tensor).nbytes(*tensor.shape) for tensor in matrices)
    for node in graph.nodes:
        if node.op == "attention":
            seen = min(context, node.attributes["window"] or context)
            total += seen * cache_token_bytes(Graph([node]), graph.cache_type(usual=usual_cache_type()))
    return total


def runs_of(graph: Graph, threads: int, tokens: int, runs: int, probe: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Of each run, the median of its tokens' seconds, and GB/s that the memory gave before and after it."""
    runner = CpuRunner(graph, max_position_embeddings=2 * tokens, threads=threads, max_num_seqs=1, cache_tokens=2 * tokens)
    table = list(range(runner.num_blocks))

    def run() -> float:
        times = []
        for position in range(tokens):
            begin = perf_counter()
            runner.forward([Segment([position], position, table, 1, 1)])
            times.append(perf_counter() - begin)
        return median(times)

    run()  # takes the weights into memory
    bandwidths = [probe()]
    seconds = []
    for _ in range(runs):
        seconds.append(run())
        bandwidths.append(probe())
    return seconds, [(before + after) / 2 for before, after in pairwise(bandwidths)]


def main() -> None:
    parser: ArgumentParser = arguments(__doc__ or "")
    parser.add_argument("-t", "--threads", type=int, default=available_threads(), metavar="N", help="threads (default: one per core)")
    parser.add_argument("--type", default="Q4_K", choices=["Q4_K", "Q8_0", "BF16"], help="of all matrices (default: Q4_K)")
    parser.add_argument("-r", "--runs", type=int, default=5, metavar="N", help="runs of 128 tokens (default: 5)")
    args = parser.parse_args()
    tokens, models = 128, MODELS
    if args.quick:
        tokens, args.runs = 4, 1
        models = {"tiny": LLAMA_1B | {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}}
    report = Report("decode", COLUMNS)
    report.machine["threads"] = args.threads
    missed = []
    for name, config in models.items():
        graph = random_llama(config, GgmlType[args.type])
        probe = bandwidth_probe(args.threads, quick=args.quick)
        seconds, bandwidths = runs_of(graph, args.threads, tokens, args.runs, probe)
        nbytes = bytes_per_token(graph, tokens / 2) / 1e9
        percent = median([100 * nbytes / s / limit for s, limit in zip(seconds, bandwidths, strict=True)])
        report.add(
            model=name,
            type=args.type,
            gb_per_token=nbytes,
            bandwidth=median(bandwidths),
            tokens_per_sec=1 / median(seconds),
            gb_per_sec=nbytes / median(seconds),
            percent=percent,
        )
        missed += [name] if percent < FEWEST_PERCENT else []
    report.finish(args)
    if missed and not args.quick:
        raise SystemExit(f"below {FEWEST_PERCENT} % of the bound: {', '.join(missed)}")


if __name__ == "__main__":
    main()
