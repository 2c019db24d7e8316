"""Every kernel by tile format and shape: GB/s, GMAC/s, and per cent of what this machine can do.

The limits come first (`limits`): memory bandwidth, int8 dot products, float FMAs, and pairs and tiles of bfloat16 where the
CPU has them, all threads together. A kernel's bound is the time that its bytes need at that bandwidth or its multiplications at
that peak, whichever is longer; "% of bound" is the bound over the measured time.

Matrices are read cold, as a model's weights are: as many copies take turns as exceed the last-level cache four times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pymistral.kernels.cpu.geometry import multiplies_bf16
from pymistral.kernels.cpu.tiles import FLOAT_FORMATS

from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.errors import ModelLoadError
from pymistral.nn import Array, Batch, Rope, record
from pymistral.nn import functional as F
from pymistral.nn.pool import Launches, available_threads, thread_pool
from pymistral.nn.quantize import tile_format
from pymistral.quantization.types import BLOCK_SIZES, GgmlType, Tensor, tensor_nbytes

from .limits import Limits, cold_bytes, measure_limits, passes_of
from .report import Report, arguments, median

COLUMNS = {
    "kernel": "kernel",
    "type": "type",
    "shape": "shape",
    "tokens": "tokens",
    "microseconds": "µs",
    "gb_per_sec": "GB/s",
    "gmac_per_sec": "GMAC/s",
    "bound": "bound by",
    "percent": "% of bound",
}
# Rows by columns: SmolLM2-135M's MLP and its output matrix, Llama-3.2-1B's MLP, Llama-3.1-8B's.
SHAPES = ("1536x576", "49152x576", "8192x2048", "14336x4096")
TOKENS = (1, 4, 16, 128, 512)


@dataclass(frozen=True)
class Settings:
    """How long and how much to measure."""

    threads: int
    passes: int
    seconds: float
    cold: int


@dataclass(frozen=True)
class Work:
    """What a launch has to do: bytes from memory, and multiplications."""

    bytes: float
    macs: float = 0.0
    peak: str = "int8"  # which of the limits multiplications have

    def bound(self, limits: Limits) -> tuple[str, float]:
        """What bounds it, and the seconds that it needs at least."""
        memory, compute = self.bytes / limits.read / 1e9, self.macs / getattr(limits, self.peak) / 1e9
        return ("memory", memory) if memory >= compute else (self.peak, compute)


# ---- weights and programs -------------------------------------------------------------------------------------------


def random_matrix(type: GgmlType, rows: int, columns: int, name: str = "weight") -> Tensor:
    """Blocks of random bytes, 0x30 to 0x3b: whatever is a float in them is a small positive one, and no product is subnormal, for which
    some CPUs take 50 times as long."""
    size = tensor_nbytes(type, (rows, columns))
    data = np.random.default_rng(size).integers(0x30, 0x3C, size, np.uint8)
    return Tensor(name, type, (rows, columns), data)


def copies_of(matrix: Tensor, count: int) -> list[Tensor]:
    """The same blocks under other names: each becomes tiles of its own."""
    return [Tensor(f"{matrix.name}{i}", matrix.type, matrix.shape, matrix.data) for i in range(count)]


def supported_types() -> list[GgmlType]:
    """The GGUF types that have tiles."""

    def has_tiles(type: GgmlType) -> bool:
        try:
            tile_format(Tensor("", type, (0, BLOCK_SIZES[type][0]), np.zeros(0, np.uint8)))
        except ModelLoadError:
            return False
        return True

    return [type for type in GgmlType if has_tiles(type)]


def runner_of(operations: Callable[[Batch], Array], settings: Settings, context: int = 512) -> CpuRunner:
    """A program of these operations. A tiny matrix makes the logits that a program has to end with; it is quantised, as models are."""

    def model(batch: Batch) -> Array:
        x = operations(batch)
        return F.linear(x[batch.output_rows], random_matrix(GgmlType.Q8_0, 16, x.columns))

    return CpuRunner(record(model), max_position_embeddings=context, threads=settings.threads, max_num_seqs=1, cache_tokens=context)


def embedded(batch: Batch, columns: int) -> Array:
    """Rows of this many columns."""
    return F.embedding(batch.tokens, random_matrix(GgmlType.F32, 16, columns))


def prepare(runner: CpuRunner, tokens: int, start: int = 0) -> None:
    """Run the programs on ``tokens`` tokens after ``start`` others; their inputs stay in place for more."""
    table = list(range(runner.num_blocks))
    for at in range(0, start, runner.max_batch_tokens):
        runner.forward([Segment([1] * min(runner.max_batch_tokens, start - at), at, table, 0)])
    for generated in (0, tokens):
        runner.forward([Segment([1] * tokens, start, table, 0, generated)])


def launch_seconds(runner: CpuRunner, kernels: Sequence[str], settings: Settings, count: int | None = None) -> list[float]:
    """Seconds of one launch of the first of these kernels, and what goes with it of the others, in each pass.

    The launches run in a row, as they stand in the program, each waiting for the one before it.
    """
    program = runner.program if kernels[0] in runner.program.names else runner.prompt_program
    table = [row.tolist() for name, row in zip(program.names, program._launches.table, strict=False) if name in kernels][:count]
    records = [[*row[:5], 1, *row[6:]] for row in table]
    repeats = count or program.names.count(kernels[0])
    if not table:
        raise RuntimeError(f"the program has no launch of {kernels[0]}: {', '.join(sorted(set(program.names)))}")
    launches, pool = Launches(records, settings.threads), thread_pool(settings.threads)
    return [seconds / repeats for seconds in passes_of(lambda: pool.run(launches), settings.passes, settings.seconds)]


# ---- what is measured -----------------------------------------------------------------------------------------------


def matrices(
    report: Report, limits: Limits, settings: Settings, types: Sequence[GgmlType], shapes: Sequence[str], tokens: Sequence[int]
) -> None:
    """Products with one matrix, and with the pair of a gated MLP."""
    for type in types:
        for shape in shapes:
            rows, columns = map(int, shape.split("x"))
            if columns % BLOCK_SIZES[type][0]:
                continue
            weight = random_matrix(type, rows, columns)
            format = tile_format(weight)
            size = format.nbytes(rows, columns)
            count = max(2, -(-settings.cold // size))
            is_float = format.name in FLOAT_FORMATS

            def products(batch: Batch, weight: Tensor = weight, count: int = count) -> Array:
                x = embedded(batch, weight.shape[1])
                for copy in copies_of(weight, count):
                    F.linear(x, copy)
                return x

            def gated(batch: Batch, weight: Tensor = weight, count: int = count) -> Array:
                x = embedded(batch, weight.shape[1])
                copies = copies_of(weight, count)
                for gate, up in zip(copies[::2], copies[1::2], strict=False):
                    F.gated_linear(x, gate, up, "silu")
                return x

            pairs = multiplies_bf16(format.name, columns)
            name = "bf16_matmul.matmul" if pairs else "matmul.float_matmul" if is_float else "matmul.matmul"
            peak = "pairs" if pairs else "fma" if is_float else "int8"
            cases = [(products, name, count, 1)]
            if not is_float and shape == shapes[0]:
                cases.append((gated, "matmul.gated_matmul", count // 2, 2))
            for operations, kernel, launches, each in cases:
                runner = runner_of(operations, settings)
                for n in tokens:
                    prepare(runner, n)
                    work = Work(each * size, each * rows * columns * n, peak)
                    if kernel in runner.program.names:
                        add(report, limits, kernel, type.name, shape, n, work, launch_seconds(runner, [kernel], settings, launches))
                    wide = f"amx.{kernel.removeprefix('bf16_').removeprefix('matmul.').removeprefix('float_')}"
                    if n > 1 and wide in runner.prompt_program.names:
                        work = replace(work, peak="tiles")
                        add(report, limits, wide, type.name, shape, n, work, launch_seconds(runner, [wide], settings, launches))


def attentions(report: Report, limits: Limits, settings: Settings, quick: bool) -> None:
    """Rotation with the write to the cache, and attention, for heads as SmolLM2's and Llama-3's."""
    cases = [(1, 128), (1, 2000), (512, 0), (512, 1536)]
    for heads, kv_heads, head_dim in [(9, 3, 64)] if quick else [(9, 3, 64), (32, 8, 128)]:
        for tokens, start in cases[:2] if quick else cases:
            end = start + tokens
            size = 2 * 2 * end * kv_heads * head_dim
            count = min(64, max(1, settings.cold // size))

            def operations(
                batch: Batch, count: int = count, q: int = heads * head_dim, kv: int = kv_heads * head_dim, dim: int = head_dim
            ) -> Array:
                for _ in range(count):
                    x = F.attention(*(embedded(batch, columns) for columns in (q, kv, kv)), head_dim=dim, scale=dim**-0.5, rope=rope(dim))
                return x

            runner = runner_of(operations, settings, context=end)
            prepare(runner, tokens, start)
            shape = f"{heads}/{kv_heads} heads of {head_dim}, from {start}"
            seen = tokens * start + tokens * (tokens + 1) // 2
            kernel = next(name for name in runner.program.names if name.endswith("attention.attention"))
            peak = {"attention.attention": "pairs", "amx_attention.attention": "tiles"}.get(kernel, "fma")
            attention = Work(size, 2 * heads * head_dim * seen, peak)
            add(
                report,
                limits,
                kernel,
                "BF16",
                shape,
                tokens,
                attention,
                launch_seconds(runner, [kernel, "attention.merge"], settings),
            )
            seconds = launch_seconds(runner, ["rope.rope_and_cache"], settings)
            add(report, limits, "rope.rope_and_cache", "BF16", shape, tokens, None, seconds)


def rope(head_dim: int) -> Rope:
    """A plain rotation."""
    return Rope.from_config({"rope_theta": 10000.0, "max_position_embeddings": 4096}, head_dim)


def small_kernels(report: Report, limits: Limits, settings: Settings, types: Sequence[GgmlType]) -> None:
    """What is neither a matrix product nor attention: it fits the caches, so only its time says something."""
    norm_weight = Tensor("norm", GgmlType.F32, (2048,), np.ones(2048, np.float32).view(np.uint8))
    quantised = random_matrix(GgmlType.Q8_0, 16, 2048)

    def operations(batch: Batch) -> Array:
        x = embedded(batch, 2048)
        F.linear(x, quantised)
        F.rms_norm(x, norm_weight, 1e-5)
        return x

    runner = runner_of(operations, settings)
    for tokens in (1, 512):
        prepare(runner, tokens)
        for kernel in ("quantize.quantize", "norm.norm"):
            add(report, limits, kernel, "F32", "2048", tokens, None, launch_seconds(runner, [kernel], settings))
    for type in types:
        table = random_matrix(type, 4096, 2048)
        runner = runner_of(lambda batch, table=table: F.embedding(batch.tokens, table), settings)  # type: ignore[misc]
        prepare(runner, 512)
        add(
            report,
            limits,
            "embedding.embedding",
            type.name,
            "4096x2048",
            512,
            None,
            launch_seconds(runner, ["embedding.embedding"], settings),
        )


def empty_launches(report: Report, limits: Limits, settings: Settings) -> None:
    """What the executor itself takes: launches without work, threads meeting at each."""
    count = 256
    runner = runner_of(lambda batch: [embedded(batch, 64) for _ in range(count)][-1], settings)
    prepare(runner, 1)
    runner.program.state.counts[0] = 0
    add(report, limits, "executor", None, "empty launch", 0, None, launch_seconds(runner, ["embedding.embedding"], settings))


def add(
    report: Report,
    limits: Limits,
    kernel: str,
    type: str | None,
    shape: str,
    tokens: int,
    work: Work | None,
    samples: Sequence[float],
) -> None:
    """One row. ``work`` is None where no bound applies."""
    seconds = median(samples)
    row: dict[str, Any] = {"kernel": kernel, "type": type, "shape": shape, "tokens": tokens, "microseconds": seconds * 1e6}
    if work is not None:
        bound, least = work.bound(limits)
        row |= {
            "gb_per_sec": work.bytes / seconds / 1e9,
            "gmac_per_sec": work.macs / seconds / 1e9,
            "bound": bound,
            "percent": 100 * least / seconds,
            "macs_per_byte": work.macs / work.bytes,
        }
    report.add(**row, best_microseconds=min(samples) * 1e6)


# ---- the plot -------------------------------------------------------------------------------------------------------


def plot_roofline(report: Report, path: Path) -> None:
    """GMAC/s over MACs per byte, under the roof that bandwidth and peaks make."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    limits = report.machine["limits"]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    intensity = np.logspace(-1, 4, 200)
    roofs = (
        ("tiles", "bfloat16 tiles", "-."),
        ("int8", "int8 dot products", "-"),
        ("pairs", "bfloat16 pairs", ":"),
        ("fma", "float FMAs", "--"),
    )
    for key, label, style in (roof for roof in roofs if limits[roof[0]]):
        roof = np.minimum(limits["read"] * intensity, limits[key])
        axes.plot(intensity, roof, style, color="black", linewidth=1, label=f"{label}: {limits[key]:.0f} GMAC/s; {limits['read']:.0f} GB/s")
    for kind in sorted({(str(row["kernel"]), str(row["type"])) for row in report.rows if row.get("percent")}):
        points = [row for row in report.rows if (row["kernel"], row["type"]) == kind]
        marker = {
            "matmul.matmul": "o",
            "matmul.gated_matmul": "s",
            "matmul.float_matmul": "^",
            "bf16_matmul.matmul": "v",
            "amx.matmul": "P",
            "amx.gated_matmul": "D",
        }.get(kind[0], "x")
        name = kind[0].removeprefix("matmul.")
        axes.plot(
            [p["macs_per_byte"] for p in points], [p["gmac_per_sec"] for p in points], marker, markersize=5, label=f"{name} {kind[1]}"
        )
    axes.set(
        xscale="log", yscale="log", xlabel="multiplications per byte of weights or cache", ylabel="GMAC/s", title=report.machine["cpu"]
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    figure.savefig(path, dpi=150)


# ---- the command ----------------------------------------------------------------------------------------------------


def chosen(names: str | None) -> Iterator[GgmlType]:
    """Types by name; all that are supported without one."""
    supported = {type.name: type for type in supported_types()}
    for name in names.upper().split(",") if names else supported:
        if name not in supported:
            raise SystemExit(f"--types: {name} has no tiles; these have: {', '.join(supported)}")
        yield supported[name]


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__ or "")
    parser.add_argument("-t", "--threads", type=int, default=available_threads(), metavar="N", help="threads (default: one per core)")
    parser.add_argument("--types", metavar="NAMES", help="such as Q4_1,Q4_K (default: all)")
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="RxC", help=f"rows by columns (default: {','.join(SHAPES)})")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), metavar="N", help=f"tokens (default: {','.join(map(str, TOKENS))})")
    args = parser.parse_args()
    types, shapes, tokens = list(chosen(args.types)), args.shapes.split(","), [int(n) for n in args.tokens.split(",")]
    settings = Settings(args.threads, passes=5, seconds=0.1, cold=cold_bytes())
    if args.quick:
        settings = Settings(args.threads, passes=1, seconds=0.001, cold=1 << 20)
        types, shapes, tokens = types if args.types else types[:6], ["512x256"], [1, 16]
    limits = measure_limits(args.threads, quick=args.quick)
    report = Report("kernels", COLUMNS, plot=plot_roofline)
    report.machine["threads"] = args.threads
    report.machine["limits"] = {name: round(value, 1) for name, value in asdict(limits).items()}
    empty_launches(report, limits, settings)
    matrices(report, limits, settings, types, shapes, tokens)
    attentions(report, limits, settings, args.quick)
    small_kernels(report, limits, settings, types)
    report.finish(args)


if __name__ == "__main__":
    main()
