"""``pymistral bench``: tokens per second of prefill and decode, by the same tests as llama-bench."""

from __future__ import annotations

import argparse
import json
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import counted
from .options import MODEL_HELP, UsageError, add_cache_type, check_threads, checked, positive
from .terminal import status_line

if TYPE_CHECKING:
    from ..engine import Engine
    from ..engine.types import Runner

DESCRIPTION = """\
ppN is the prefill of a prompt of N tokens, tgN the greedy generation of N tokens from an empty context. Every option except -r takes a
list, such as -p 128,512 or -t 1,2; every combination is measured, after one warm-up."""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    from ..loading.hub import DEFAULT_MODEL

    parser = commands.add_parser("bench", help="measure tokens per second", description=DESCRIPTION)
    parser.add_argument("-m", "--model", action="append", metavar="MODEL", help=f"{MODEL_HELP}; may be repeated (default: {DEFAULT_MODEL})")
    parser.add_argument(
        "-p", "--n-prompt", type=_counts, default=[512], metavar="N", help="tokens to prefill (default: 512; 0: no such test)"
    )
    parser.add_argument(
        "-n", "--n-gen", type=_counts, default=[128], metavar="N", help="tokens to generate (default: 128; 0: no such test)"
    )
    parser.add_argument(
        "-t",
        "--threads",
        type=checked(_counts, _check_threads, "threads"),
        default=[0],
        metavar="N",
        help="threads (default: one per core)",
    )
    add_cache_type(parser)
    parser.add_argument("-r", "--repetitions", type=positive, default=5, metavar="N", help="how often each test is measured (default: 5)")
    parser.add_argument("--json", action="store_true", help="print a JSON list with every sample")
    parser.set_defaults(handler=bench, default_model=DEFAULT_MODEL)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 128,512") from None
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"{min(counts)} is less than 0")
    return counts


def _check_threads(counts: Sequence[int]) -> None:
    for threads in counts:
        if threads:  # 0: one per core
            check_threads(threads)


@dataclass
class Result:
    """One row of the table."""

    model: str
    size: int
    threads: int | None
    test: str
    samples: list[float]  # tokens per second
    mean: float = field(init=False)
    sd: float = field(init=False)
    median: float = field(init=False)

    def __post_init__(self) -> None:
        import statistics

        self.mean = statistics.fmean(self.samples)
        self.sd = statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0
        self.median = statistics.median(self.samples)


def bench(args: argparse.Namespace) -> int:
    """Measure every combination and print the table."""
    tests = [*(("pp", n, prefill) for n in args.n_prompt if n), *(("tg", n, decode) for n in args.n_gen if n)]
    if not tests:
        raise UsageError("there is nothing to measure: -p and -n are both 0")
    if not args.json:
        _print_header()
    results: list[Result] = []
    for model in args.model or [args.default_model]:
        for threads in args.threads:
            results += measure_model(model, threads or None, tests, args.repetitions, args.pa_cache_type, None if args.json else _print_row)
    if args.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    return 0


Test = tuple[str, int, "Callable[[Runner, int], None]"]


def measure_model(
    model: str, threads: int | None, tests: Sequence[Test], repetitions: int, cache_type: str | None, show: Callable[[Result], None] | None
) -> list[Result]:
    """Load the model and run all tests on it."""
    from ..loading.hub import resolve
    from .run import load

    with status_line():
        path = resolve(model)
    results = []
    with load(str(path), threads, cache_type) as loaded:
        engine: Engine = loaded.inner._engine
        for name, count, test in tests:
            _check_fits(engine, count)
            samples = measure(engine, test, count, repetitions)
            results.append(Result(path.name, _size(path), threads, f"{name}{count}", samples))
            if show:
                show(results[-1])
    return results


def measure(engine: Engine, test: Callable[[Runner, int], None], count: int, repetitions: int) -> list[float]:
    """Tokens per second of each repetition. The clock runs on the engine's thread, around the work alone."""

    def timed(runner: Runner) -> float:
        start = time.perf_counter()
        test(runner, count)
        return count / (time.perf_counter() - start)

    engine.call(lambda runner: test(runner, min(count, 64)), clear_cache=True).result()
    engine.call(timed, clear_cache=True).result()
    return [engine.call(timed, clear_cache=True).result() for _ in range(repetitions)]


def _check_fits(engine: Engine, count: int) -> None:
    def room_of(runner: Runner) -> int:
        return min(runner.max_sequence_length, runner.num_blocks // len(runner.windows) * runner.block_size)

    room = engine.call(room_of).result()
    if count > room:
        raise UsageError(f"this model's context of {room} has no room for {counted(count, 'token')}")


def prefill(runner: Runner, count: int) -> None:
    """Prefill ``count`` tokens, in chunks as large as the runner takes."""
    from ..engine.types import Segment

    table = _block_table(runner, count)
    tokens = [(7919 * position + 13) % runner.vocab_size for position in range(count)]
    for start in range(0, count, runner.max_batch_tokens):
        chunk = tokens[start : start + runner.max_batch_tokens]
        runner.forward([Segment(chunk, start, table, 1 if start + len(chunk) == count else 0)])


def decode(runner: Runner, count: int) -> None:
    """Generate ``count`` tokens one by one, always the likeliest."""
    from ..engine.types import Segment

    table = _block_table(runner, count)
    token = min(1, runner.vocab_size - 1)
    for position in range(count):
        token = int(runner.read_logits(runner.forward([Segment([token], position, table, 1)]))[0].argmax())


def _block_table(runner: Runner, count: int) -> array[int]:
    return array("i", range(-(-count // runner.block_size)))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


_ROW = "| {:<36} | {:>9} | {:>7} | {:>6} | {:>19} | {:>9} |"


def _print_header() -> None:
    print(_ROW.format("model", "size", "threads", "test", "tok/s (mean ± sd)", "median"))
    print(_ROW.format("-" * 36, "-" * 8 + ":", "-" * 6 + ":", "-" * 5 + ":", "-" * 18 + ":", "-" * 8 + ":"), flush=True)


def _print_row(result: Result) -> None:
    size, speed = f"{result.size / 2**20:.0f} MiB", f"{result.mean:.1f} ± {result.sd:.1f}"
    print(_ROW.format(result.model[-36:], size, result.threads or "auto", result.test, speed, f"{result.median:.1f}"), flush=True)
