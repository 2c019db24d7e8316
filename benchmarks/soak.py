"""A long run: many requests through a cache that holds few of them, and whether anything is left of them at the end.

    python -m benchmarks.soak --output results

"crowd" sends requests of random length at once through a cache with room for four, and compares each answer with the
one that it gives alone. "soak" then sends such requests, some of which are left early, until so many tokens have been
generated, and looks at the memory in use after each fifth of them: resident bytes, Python objects, blocks of the KV
cache. The exit code is 1 if an answer differs, a block is not free at the end, or the last four fifths grew.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from pathlib import Path
from random import Random
from time import perf_counter

from pymistral import ContextSize, Model, ModelBuilder, PagedAttentionMetaBuilder, RequestBuilder, SamplingParams
from pymistral.loading.hub import DEFAULT_MODEL, resolve

from .report import Report, arguments

WORDS = ("one", "two", "red", "green", "apple", "river", "stone", "cloud", "under", "over", "before", "after", "bring", "carry", "light")
LONGEST = 96  # tokens of prompt and answer together, or so
ROOM = 4 * LONGEST
FIFTHS = 5
MOST_MEGABYTES, MOST_OBJECTS = 4.0, 500  # that may come and go between two looks


def requests(count: int, random: Random) -> list[RequestBuilder]:
    """Prompts of up to 40 tokens, some of which begin alike, and answers of up to 50."""
    made = []
    for _ in range(count):
        words = [*WORDS[: random.choice([0, 0, 12])], *random.choices(WORDS, k=random.randint(1, 12))]
        sampling = SamplingParams(temperature=random.choice([0.0, 0.0, 0.8]), max_len=random.randint(1, 50), seed=random.randint(0, 9))
        made.append(RequestBuilder().add_message("user", " ".join(words)).with_sampling(sampling))
    return made


async def text_of(model: Model, request: RequestBuilder) -> str | None:
    return (await model.send_chat_request(request)).choices[0].message.content


async def crowd(path: Path, threads: int | None, count: int) -> tuple[int, int]:
    """How many answers differ from those that are given alone, and how often a sequence was preempted."""
    work = requests(count, Random(1))
    async with await build(path, threads, 1024, max_num_seqs=1, prefix_cache_n=None) as model:
        alone = [await text_of(model, request) for request in work]
    async with await build(path, threads, ROOM) as model:
        together = await asyncio.gather(*(text_of(model, request) for request in work))
        stats = model._engine.stats()
    assert (stats.waiting, stats.running, stats.free_blocks) == (0, 0, stats.num_blocks)
    return sum(one != other for one, other in zip(alone, together, strict=True)), stats.preemptions


async def build(path: Path, threads: int | None, tokens: int, **options: object) -> Model:
    cache = PagedAttentionMetaBuilder().with_gpu_memory(ContextSize(tokens)).build()
    return await ModelBuilder(path, threads=threads, paged_attn=cache, **options).build()  # type: ignore[arg-type]


async def one(model: Model, request: RequestBuilder, leave_after: int | None) -> None:
    """Read an answer; leave it after so many chunks."""
    async with model.stream_chat_request(request) as stream:
        async for _ in stream:
            if leave_after is not None:
                leave_after -= 1
                if leave_after <= 0:
                    break


async def serve(model: Model, tokens: int, random: Random) -> None:
    """Keep twelve requests under way until the engine has generated so many tokens."""

    async def client() -> None:
        while model._engine.stats().completion_tokens < tokens:
            (request,) = requests(1, random)
            await one(model, request, random.choice([None, None, None, random.randint(1, 20)]))

    await asyncio.gather(*(client() for _ in range(12)))


def resident() -> float:
    """Mebibytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def soak(path: Path, threads: int | None, tokens: int, report: Report) -> bool:
    """Generate so many tokens; whether nothing grew."""
    random, begin = Random(2), perf_counter()
    async with await build(path, threads, ROOM) as model:
        for fifth in range(1, FIFTHS + 1):
            await serve(model, tokens * fifth // FIFTHS, random)
            await asyncio.sleep(0.1)  # what was left is canceled before the next step
            gc.collect()
            stats = model._engine.stats()
            report.add(
                test="soak",
                tokens=stats.completion_tokens,
                requests=stats.finished + stats.canceled,
                canceled=stats.canceled,
                preemptions=stats.preemptions,
                used_blocks=stats.num_blocks - stats.free_blocks,
                resident=resident(),
                objects=len(gc.get_objects()),
                seconds=perf_counter() - begin,
            )
    after_first, *_, last = (row for row in report.rows if row["test"] == "soak")
    grown = [float(last[key] or 0) - float(after_first[key] or 0) for key in ("resident", "objects")]
    report.notes.append(f"Between the first fifth and the last, resident memory grew by {grown[0]:.1f} MiB and objects by {grown[1]:.0f}.")
    return grown[0] < MOST_MEGABYTES and grown[1] < MOST_OBJECTS and not any(row.get("used_blocks") for row in report.rows)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"a GGUF file or model id (default: {DEFAULT_MODEL})")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: one per core)")
    parser.add_argument("-n", "--tokens", type=int, default=50_000, metavar="N", help="tokens of the soak (default: 50000)")
    parser.add_argument("-r", "--requests", type=int, default=200, metavar="N", help="requests of the crowd (default: 200)")
    args = parser.parse_args()
    count, tokens = (12, 300) if args.quick else (args.requests, args.tokens)
    columns = {"test": "test", "tokens": "tokens", "requests": "requests", "canceled": "left early", "preemptions": "preempted"}
    more = {"different": "other answers", "used_blocks": "blocks in use", "resident": "resident, MiB", "objects": "objects", "seconds": "s"}
    report = Report("soak", {**columns, **more})
    path = resolve(args.model)
    begin = perf_counter()
    different, preemptions = asyncio.run(crowd(path, args.threads, count))
    report.add(test="crowd", requests=count, preemptions=preemptions, different=different, seconds=perf_counter() - begin)
    still = asyncio.run(soak(path, args.threads, tokens, report))
    report.finish(args)
    if different or not (still or args.quick):
        sys.exit(1)


if __name__ == "__main__":
    main()
