"""What this machine can do at most, measured with the same tools that the kernels are made of: bandwidth, products of int8, float32 and
bfloat16.

No model needs these; benchmarks compare with them.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from . import register_tiles, vectors
from .int8_dots import add_groups
from .isa import current_isa
from .register_tiles import zero_tile, zero_words
from .simd import load_f32, load_f32x16, load_i8x64, load_i32x16, load_i64, splat_f32, splat_i32, store_f32x16, store_i32x16


def read() -> Any:
    """Read every byte once. Units are stretches of 4 KiB. Slots: 0 memory, 1 a line of 64 bytes for each thread."""

    def kernel(slots, begin, end, thread):
        first = second = third = fourth = splat_i32(0)
        base = load_i64(slots)
        for at in range(base + 4096 * begin, base + 4096 * end, 256):
            first = first | load_i32x16(at)
            second = second | load_i32x16(at + 64)
            third = third | load_i32x16(at + 128)
            fourth = fourth | load_i32x16(at + 192)
        store_i32x16(load_i64(slots + 8) + 64 * thread, first | second | third | fourth)

    return kernel


def copy() -> Any:
    """Copy with plain stores. Units are stretches of 4 KiB. Slots: 0 from, 1 to."""

    def kernel(slots, begin, end, thread):
        source, target = load_i64(slots), load_i64(slots + 8)
        for at in range(4096 * begin, 4096 * end, 64):
            store_f32x16(target + at, load_f32x16(source + at))

    return kernel


def dot_accumulators() -> int:
    """Vectors that `int8_dots` adds to: a matrix kernel's, but enough to hide the instruction's latency."""
    isa = current_isa()
    return isa.tokens if isa.name == "avx2" else max(8, isa.tokens)  # AVX2's registers hold no more


DOTS_IN_UNIT = 4096
FMAS_IN_UNIT = 4096


@intrinsic(prefer_literal=True)
def _dot_all(typing_context, tile, weights, address):
    """``tile[t] += dot(weights, the 64 bytes at address + 64 t)``, eight times, with other weights each time."""

    def codegen(context, b, sig, values):
        total, quants, base = values

        def of_group(group):
            return _small(b, quants, 3 * group)

        def activations(group, t):
            return vectors.load(b, vectors.row_address(b, base, 64, t), vectors.i8x64.llvm)

        return add_groups(b, total, range(8), of_group, activations, largest=15, signed=False)

    return tile(tile, vectors.i8x64, types.intp), codegen


@intrinsic
def _store_integers(typing_context, tile, address):
    def codegen(context, b, sig, values):
        for t in range(sig.args[0].count):
            vectors.store(b, vectors.row_address(b, values[1], 64, t), b.extract_value(values[0], t))
        return context.get_dummy_value()

    return types.void(tile, types.intp), codegen


def _small(b, value, step):
    """Different bytes of 0 to 15, so that no product can be computed once and for all."""
    return b.and_(b.add(value, vectors.constant(value.type, step)), vectors.constant(value.type, 15))


@vectors.operation(vectors.i8x64, vectors.i8x64)
def _another(b, value):
    return _small(b, value, 1)


def int8_dots() -> Any:
    """Dot products of bytes out of the first-level cache: `DOTS_IN_UNIT` times 64 for each unit and accumulator.

    Slots: 0 scratch, 1 bytes of scratch for a thread (64 for each accumulator), zeroed.
    """
    accumulators = dot_accumulators()

    def kernel(slots, begin, end, thread):
        scratch = load_i64(slots) + thread * load_i64(slots + 8)
        weights = load_i8x64(scratch)
        total = zero_words(accumulators)
        for _ in range((end - begin) * DOTS_IN_UNIT // 8):
            total = _dot_all(total, weights, scratch)
            weights = _another(weights)
        _store_integers(total, scratch)

    return kernel


@intrinsic
def _multiply_add_all(typing_context, tile, factor, summand):
    """``tile[t] = tile[t] * factor + summand``."""

    def codegen(context, b, sig, values):
        vector = vectors.f32x16.llvm
        return register_tiles.each(b, values[0], lambda t, x: vectors.call(b, "llvm.fmuladd.v16f32", vector, x, values[1], values[2]))

    return tile(tile, vectors.f32x16, vectors.f32x16), codegen


def fma_accumulators() -> int:
    """Vectors that `float_fmas` works on."""
    return 12 if current_isa().has_avx512 else 5


def float_fmas() -> Any:
    """Multiplications with addition in registers: `FMAS_IN_UNIT` times 16 for each unit and accumulator. Slots as `int8_dots`."""
    accumulators = fma_accumulators()

    def kernel(slots, begin, end, thread):
        scratch = load_i64(slots) + thread * load_i64(slots + 8)
        factor = splat_f32(load_f32(scratch))
        total = zero_tile(accumulators)
        for _ in range((end - begin) * FMAS_IN_UNIT):
            total = _multiply_add_all(total, factor, factor)
        register_tiles.store_tile(total, scratch, 64)

    return kernel


def bf16_dots() -> Any:
    """Products of pairs of bfloat16, added to float32, as many vectors of them as `float_fmas` makes. Slots as `int8_dots`."""
    accumulators = fma_accumulators()

    def kernel(slots, begin, end, thread):
        scratch = load_i64(slots) + thread * load_i64(slots + 8)
        pairs = load_i32x16(scratch)
        total = zero_tile(accumulators)
        for _ in range((end - begin) * FMAS_IN_UNIT):
            total = register_tiles.dot_pairs_grid(total, accumulators, (pairs,), scratch, 64)
        register_tiles.store_tile(total, scratch, 64)

    return kernel
