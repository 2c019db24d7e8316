"""What the machine can do at most: bandwidth, and products of int8, float32 and bfloat16, by kernels made of the same parts as the real
ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymistral.kernels.cpu.compiler import load_kernels, spec
from pymistral.kernels.cpu.isa import current_isa

from pymistral.nn.memory import address, zeros
from pymistral.nn.pool import Launches, thread_pool

from .report import last_level_cache

_STRETCH = 4096  # bytes in a unit of the bandwidth probes
_CACHED = 512 << 10  # bytes that a core's own cache holds


@dataclass(frozen=True)
class Limits:
    """Of ``threads`` threads together."""

    threads: int
    read: float
    """GB/s read from memory."""
    copy: float
    """GB/s read plus GB/s written."""
    cached_read: float
    """GB/s read from the cores' own caches."""
    int8: float
    """Billion multiplications with addition of bytes in a second."""
    fma: float
    """Billion multiplications with addition of floats in a second."""
    pairs: float
    """Of bfloat16 in vectors; 0 if the CPU multiplies no pairs of it."""
    tiles: float
    """Of bfloat16 on tile registers; 0 if the CPU has none."""


def cold_bytes() -> int:
    """What has to be read before the same byte may be read again, so that it comes from memory."""
    return max(256 << 20, 4 * last_level_cache())


def measure_limits(threads: int, *, quick: bool = False) -> Limits:
    """The best of several passes, each long enough to see the clock settle."""
    # Only a kernel that needs Numba to compile imports it; the accumulators' number is part of the probe.
    from pymistral.kernels.cpu import amx, probes

    pool = thread_pool(threads)
    kernels = [spec(f"probes.{name}") for name in ("read", "copy", "int8_dots", "float_fmas")]
    read, copy, dots, fmas = load_kernels(kernels).values()
    pairs = load_kernels([spec("probes.bf16_dots")]).popitem()[1] if current_isa().has_bf16 else None
    tiles = load_kernels([spec("amx.tile_products")]).popitem()[1] if current_isa().has_amx else None
    passes, seconds = (3, 0.02) if quick else (7, 0.2)

    def rate(kernel: int, slots: NDArray[Any], units: int, chunk: int, work: float) -> float:
        launches = Launches([(kernel, address(slots), address(one), units, chunk, 0)], threads)
        return work / best(lambda: pool.run(launches), passes, seconds) / 1e9

    one = np.ones(1, np.int64)
    size = (64 << 20) if quick else cold_bytes()
    memory, target = (zeros(size, np.uint8, huge_pages=True) for _ in range(2))
    memory.fill(1)
    target.fill(1)
    scratch = zeros((threads, 1024 + 64 * max(probes.dot_accumulators(), probes.fma_accumulators())), np.uint8)
    reading = np.array([address(memory), address(scratch)], np.int64)
    copying = np.array([address(memory), address(target)], np.int64)
    computing = np.array([address(scratch), scratch.shape[1]], np.int64)
    units = 8 * threads
    return Limits(
        threads,
        read=rate(read, reading, size // _STRETCH, 4, size),
        copy=rate(copy, copying, size // _STRETCH, 4, 2 * size),
        cached_read=rate(read, reading, threads * _CACHED // _STRETCH, _CACHED // _STRETCH, threads * _CACHED),
        int8=rate(dots, computing, units, 1, units * probes.DOTS_IN_UNIT * probes.dot_accumulators() * 64),
        pairs=rate(pairs, computing, units, 1, units * probes.FMAS_IN_UNIT * probes.fma_accumulators() * 32) if pairs else 0.0,
        tiles=rate(tiles, computing, units, 1, units * amx.TILES_IN_UNIT * 4 * 16 * 16 * 32) if tiles else 0.0,
        fma=rate(fmas, computing, units, 1, units * probes.FMAS_IN_UNIT * probes.fma_accumulators() * 16),
    )


def bandwidth_probe(threads: int, *, quick: bool = False) -> Callable[[], float]:
    """A function that measures GB/s read from memory, now: neighbours of a virtual machine change it from second to second."""
    read = load_kernels([spec("probes.read")]).popitem()[1]
    size = (64 << 20) if quick else cold_bytes()
    memory, scratch, one = zeros(size, np.uint8, huge_pages=True), zeros((threads, 4096), np.uint8), np.ones(1, np.int64)
    memory.fill(1)
    slots = np.array([address(memory), address(scratch)], np.int64)
    launches, pool = Launches([(read, address(slots), address(one), size // _STRETCH, 4, 0)], threads), thread_pool(threads)

    def probe(_alive: object = (memory, scratch, one, slots)) -> float:
        return size / min(passes_of(lambda: pool.run(launches), 3, 0.05)) / 1e9

    return probe


def passes_of(run: Callable[[], None], passes: int, seconds: float) -> list[float]:
    """Seconds of one ``run`` in each pass; a pass lasts about ``seconds``."""
    run()
    start = time.perf_counter()
    run()
    times = max(1, round(seconds / max(1e-7, time.perf_counter() - start)))
    results = []
    for _ in range(passes):
        start = time.perf_counter()
        for _ in range(times):
            run()
        results.append((time.perf_counter() - start) / times)
    return results


def best(run: Callable[[], None], passes: int, seconds: float) -> float:
    """Of the passes, the shortest: for limits, which nothing exceeds."""
    return min(passes_of(run, passes, seconds))
