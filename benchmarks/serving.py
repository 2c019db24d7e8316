"""Many streams at once: total rate, time to first token, and the gaps between tokens, as a program sees them through the public API.

    python -m benchmarks.serving --python llama_cpp=/path/to/venv/bin/python --output results

Streams of a test are tasks of one event loop. Rates count a time in which all of them run; a gap is the time between
two chunks of a stream. "first token" is a prompt of 1,000 tokens, unknown and with all but its last words in the prefix cache.
"arrival" is what running streams notice while a new prompt of 2,000 tokens is worked through, beside the same streams
just before. Figures are medians of the repetitions, each figure of a repetition being a median (or the 99th percentile)
of all its gaps.

llama-cpp-python runs in a process of its own and takes turns, through its C interface; it serves one stream, and reuses
the prefix of the prompt before. The exit code is 1 if a ratio misses what is wanted, except with --quick.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from pymistral import Model, ModelBuilder, RequestBuilder, SamplingParams
from pymistral.loading.hub import DEFAULT_MODEL, resolve
from pymistral.nn.pool import available_threads

from .engines import EngineError, Test, Worker, interpreters, start_all
from .report import PLAIN, Report, arguments, has_chat_template, median

STREAMS = (1, 2, 4, 8, 16, 32)
CROWDS = (1, 4, 16)  # streams that a new prompt meets
TAIL = 32  # tokens of a prompt that its prefix does not cover
FEWEST_TIMES, MOST_CACHED, MOST_STRETCH = 5.0, 0.1, 3.0


@dataclass
class Sizes:
    """Tokens: of the answers that are timed, of the shared and the new prompt, of the streams before a prompt arrives."""

    answer: int = 128
    prompt: int = 1000
    arrival: int = 2000
    before: int = 64


QUICK = Sizes(answer=8, prompt=100, arrival=150, before=8)


@dataclass
class Stream:
    """One request: when it was sent, when each chunk came, and what it cost."""

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    _goal: int = 0
    _reached: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, model: Model, prompt: str, max_len: int) -> None:
        never = dict.fromkeys(model._engine._core.eos_token_ids, -100.0)  # every answer is as long as it may be
        sampling = SamplingParams(temperature=0.0, max_len=max_len, logits_bias=never)
        request = RequestBuilder().add_message("user", prompt).with_sampling(sampling)
        self.sent = perf_counter()
        async for chunk in model.stream_chat_request(request):
            if chunk.choices[0].delta.content or not (self.times or chunk.usage is None):
                self.times.append(perf_counter())
                if len(self.times) == self._goal:
                    self._reached.set()
            if chunk.usage is not None:
                self.prompt_tokens = chunk.usage.prompt_tokens
                self.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens

    async def more(self, chunks: int) -> None:
        """Until so many more have come."""
        self._goal = len(self.times) + chunks
        self._reached.clear()
        await self._reached.wait()

    @property
    def first_token(self) -> float:
        return self.times[0] - self.sent

    def between(self, begin: float, end: float) -> list[float]:
        """The chunks that came then."""
        return [time for time in self.times if begin <= time <= end]


def gaps(streams: Sequence[Stream], begin: float, end: float) -> np.ndarray[Any, Any]:
    """Seconds between neighbouring chunks."""
    return np.concatenate([np.diff(stream.between(begin, end)) for stream in streams])


class Prompts:
    """Prompts of an exact number of tokens that share no prefix unless they are meant to."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    async def unknown(self, model: Model, tokens: int) -> str:
        """One that no cache knows."""
        return await self.after(model, f"{next(self._numbers)}.", tokens)

    async def after(self, model: Model, begin: str, tokens: int) -> str:
        """One that begins so."""
        missing = tokens - len(await model.tokenize([{"role": "user", "content": begin}]))
        text = begin + " word" * max(0, missing)
        if missing < 0 or len(await model.tokenize([{"role": "user", "content": text}])) != tokens:
            raise SystemExit(f"no prompt of exactly {tokens} tokens could be made for this model")
        return text


Figures = dict[str, float]


@dataclass
class Bench:
    """Measures one model. Each test returns figures by name, times in milliseconds."""

    model: Model
    sizes: Sizes
    prompts: Prompts = field(default_factory=Prompts)

    @asynccontextmanager
    async def crowd(self, count: int) -> AsyncIterator[list[Stream]]:
        """Streams that run, all of them, until they are left."""
        streams = [Stream() for _ in range(count)]
        texts = [await self.prompts.unknown(self.model, 40) for _ in streams]
        most = self.model.max_sequence_length() - 64
        tasks = [asyncio.create_task(stream.run(self.model, text, most)) for stream, text in zip(streams, texts, strict=True)]
        try:
            await asyncio.gather(*(stream.more(4) for stream in streams))
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def decode(self, count: int) -> Figures:
        """Streams that begin together."""
        async with self.crowd(count) as streams:
            begin = perf_counter()
            await asyncio.gather(*(stream.more(self.sizes.answer) for stream in streams))
            end = perf_counter()
        return {
            "tokens_per_sec": sum(len(stream.between(begin, end)) for stream in streams) / (end - begin),
            "first_token": 1e3 * median([stream.first_token for stream in streams]),
            **self._gaps(streams, begin, end),
        }

    async def first_token(self) -> tuple[Figures, Figures]:
        """A prompt that is unknown, and one of the same length that differs from it in its last words."""
        tokens = self.sizes.prompt
        shared = await self.prompts.unknown(self.model, tokens - TAIL)
        cold, cached = Stream(), Stream()
        await cold.run(self.model, await self.prompts.after(self.model, shared + " One", tokens), 1)
        await cached.run(self.model, await self.prompts.after(self.model, shared + " Two", tokens), 1)
        assert cold.cached_tokens < TAIL
        assert cached.cached_tokens > tokens - 3 * TAIL
        return {"first_token": 1e3 * cold.first_token}, {"first_token": 1e3 * cached.first_token}

    async def arrival(self, count: int) -> tuple[Figures, Figures]:
        """Streams alone, and while a long prompt is worked through."""
        new, late = await self.prompts.unknown(self.model, self.sizes.arrival), Stream()
        async with self.crowd(count) as streams:
            begin = perf_counter()
            await asyncio.gather(*(stream.more(self.sizes.before) for stream in streams))
            usual = self._gaps(streams, begin, perf_counter())
            await late.run(self.model, new, 1)
        during = self._gaps(streams, late.sent, late.times[0])
        return usual, {**during, "first_token": 1e3 * late.first_token}

    @staticmethod
    def _gaps(streams: Sequence[Stream], begin: float, end: float) -> Figures:
        found = 1e3 * gaps(streams, begin, end)
        return {"gap": float(np.median(found)), "gap_p99": float(np.percentile(found, 99))}


class Results:
    """The figures of all repetitions, by test, engine and streams, in the order in which they first came."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str, int], list[Figures]] = {}

    def add(self, test: str, figures: Figures, streams: int = 1, engine: str = "pymistral") -> None:
        self.samples.setdefault((test, engine, streams), []).append(figures)

    def median(self, name: str, test: str, streams: int = 1, engine: str = "pymistral") -> float:
        return median([figures[name] for figures in self.samples[test, engine, streams]])

    def ratio(self, name: str, upper: tuple[str, int], lower: tuple[str, int], lower_name: str | None = None) -> float:
        """Of two figures of one repetition, the median over the repetitions: what slows a machine down for a while slows both."""
        pairs = zip(self.samples[upper[0], "pymistral", upper[1]], self.samples[lower[0], "pymistral", lower[1]], strict=True)
        return median([above[name] / below[lower_name or name] for above, below in pairs])


def compare(worker: Worker, sizes: Sizes, results: Results) -> None:
    """The same of another engine, where it can do it. Raises EngineError."""
    shared = sizes.prompt - TAIL
    decoded = worker._measure(Test("decode", sizes.answer, 40))
    results.add("decode", {"tokens_per_sec": decoded["tokens"] / decoded["seconds"]}, engine=worker.engine)
    for test, context in (("first token, unknown prompt", 0), ("first token, cached prefix", shared)):
        seconds = worker._measure(Test("first_token", sizes.prompt, context))["seconds"]
        results.add(test, {"first_token": 1e3 * seconds}, engine=worker.engine)


async def measure(model: Model, sizes: Sizes, streams: Sequence[int], crowds: Sequence[int], worker: Worker | None, turns: int) -> Results:
    """All tests, once to warm up and then so many times."""
    bench = Bench(model, sizes)
    results = Results()
    for turn in range(turns + 1):
        if turn == 1:
            results = Results()
        for count in streams:
            results.add("decode", await bench.decode(count), count)
        cold, cached = await bench.first_token()
        results.add("first token, unknown prompt", cold)
        results.add("first token, cached prefix", cached)
        for count in crowds:
            usual, during = await bench.arrival(count)
            results.add("arrival: before", usual, count)
            results.add(f"arrival: {sizes.arrival} tokens", during, count)
        if worker is not None and not worker.failures:
            try:
                await asyncio.to_thread(compare, worker, sizes, results)
            except EngineError as error:
                worker.failures["serving"] = str(error)
    return results


def verdicts(results: Results, sizes: Sizes, streams: Sequence[int], crowds: Sequence[int]) -> list[tuple[str, bool]]:
    """The three ratios that matter, in words, and whether each is as wanted."""
    many = 16 if 16 in streams else max(streams)
    times = results.ratio("tokens_per_sec", ("decode", many), ("decode", 1))
    cached = results.ratio("first_token", ("first token, cached prefix", 1), ("first token, unknown prompt", 1))
    found = [
        (f"{many} streams generate {times:.2f} x as many tokens as one: at least {FEWEST_TIMES:g} x wanted", times >= FEWEST_TIMES),
        (
            f"first token of {sizes.prompt} tokens after {100 * cached:.1f} % of the time if the prefix is cached: "
            f"at most {100 * MOST_CACHED:g} % wanted",
            cached <= MOST_CACHED,
        ),
    ]
    new = f"arrival: {sizes.arrival} tokens"
    for count in crowds:
        before, during = ("arrival: before", count), (new, count)
        middle, worst = results.ratio("gap", during, before), results.ratio("gap_p99", during, before, "gap")
        found.append(
            (
                f"a new prompt of {sizes.arrival} tokens beside {count} streams: gaps {middle:.2f} x the usual "
                f"(99th percentile {worst:.2f} x): at most {MOST_STRETCH:g} x wanted",
                middle <= MOST_STRETCH,
            )
        )
    return found


def plot(report: Report, path: Path) -> None:
    """Rates, gaps, and first tokens against the number of streams."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows: list[Any] = report.rows
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    figure, grid = plt.subplots(len(models), 3, figsize=(13, 3.6 * len(models)), squeeze=False, layout="constrained")
    for (rate, gap, arrival), model in zip(grid, models, strict=True):
        own = [row for row in rows if row["model"] == model]
        decode = [row for row in own if row["test"] == "decode" and row["engine"] == "pymistral"]
        counts = [row["streams"] for row in decode]
        rate.plot(counts, [row["tokens_per_sec"] for row in decode], "o-", label="pymistral")
        for row in own:
            if row["test"] == "decode" and row["engine"] != "pymistral":
                rate.axhline(row["tokens_per_sec"], color="C1", linestyle="--", label=f"{row['engine']}, one stream")
        rate.set(title=f"{model}: all streams"[:44], ylabel="tokens per second", ylim=(0, None))
        gap.plot(counts, [row["gap"] for row in decode], "o-", label="median")
        gap.plot(counts, [row["gap_p99"] for row in decode], "o:", label="99th percentile")
        gap.set(title="gap between tokens", ylabel="ms", ylim=(0, None))
        for test in dict.fromkeys(row["test"] for row in own if row["test"].startswith("arrival")):
            some = [row for row in own if row["test"] == test]
            for kind, style in (("gap", "o-"), ("gap_p99", "o:")):
                label = f"{test.removeprefix('arrival: ')}, {'median' if kind == 'gap' else 'p99'}"
                color = "C0" if "before" in test else "C3"
                arrival.plot([row["streams"] for row in some], [row[kind] for row in some], style, color=color, label=label)
        arrival.set(title="gap while a prompt arrives", ylabel="ms", ylim=(0, None))
        for axes in (rate, gap, arrival):
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xlabel("streams")
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "-m", "--model", action="append", metavar="MODEL", help=f"a GGUF file or model id; may be repeated (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("-t", "--threads", type=int, default=available_threads(), metavar="N", help="threads (default: one per core)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="turns (default: 5)")
    parser.add_argument(
        "--python", action="append", default=[], metavar="ENGINE=PATH", help="the interpreter that has llama_cpp (default: this one)"
    )
    args = parser.parse_args()
    pythons = interpreters(args.python)
    sizes, streams, crowds, turns = (QUICK, (1, 4), (2,), 1) if args.quick else (Sizes(), STREAMS, CROWDS, args.repetitions)
    columns = {
        "model": "model",
        "test": "test",
        "engine": "engine",
        "streams": "streams",
        "tokens_per_sec": "tok/s, all",
        "low": "lowest",
        "high": "highest",
        "first_token": "first token, ms",
        "gap": "gap, ms",
        "gap_p99": "gap p99, ms",
    }
    report = Report("serving", {**columns, "runs": "runs"}, plot=plot)
    report.machine["threads"] = args.threads
    good = True
    for name in args.model or [DEFAULT_MODEL]:
        path = resolve(name)
        workers = start_all(["llama_cpp"], pythons, path, args.threads, 2 * sizes.prompt + sizes.answer, report.notes)
        try:
            results = asyncio.run(_run(path, args.threads, sizes, streams, crowds, workers[0] if workers else None, turns))
        finally:
            for worker in workers:
                worker.close()
        for (test, engine, count), samples in results.samples.items():
            row: dict[str, Any] = {key: median([figures[key] for figures in samples]) for key in samples[0]}
            if rates := [figures["tokens_per_sec"] for figures in samples if "tokens_per_sec" in figures]:
                row |= {"low": min(rates), "high": max(rates)}
            report.add(model=path.name, test=test, engine=engine, streams=count, runs=len(samples), **row)
        for text, fits in verdicts(results, sizes, streams, crowds):
            good &= fits
            report.notes.append(f"{path.name}: {text}: {'yes' if fits else 'NO'}")
        report.notes += [f"{path.name}: {worker.engine} failed: {worker.failures['serving']}" for worker in workers if worker.failures]
        report.machine["engines"] = ", ".join(f"{worker.engine} {worker.version}" for worker in workers)
    report.finish(args)
    if not (good or args.quick):
        sys.exit(1)


async def _run(
    path: Path, threads: int, sizes: Sizes, streams: Sequence[int], crowds: Sequence[int], worker: Worker | None, turns: int
) -> Results:
    template = None if has_chat_template(path) else PLAIN
    async with await ModelBuilder(path, threads=threads, max_num_seqs=max(streams), chat_template=template).build() as model:
        return await measure(model, sizes, streams, crowds, worker, turns)


if __name__ == "__main__":
    main()
