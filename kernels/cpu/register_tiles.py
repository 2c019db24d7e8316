"""Tiles of vectors that stay in registers: one vector for each of T tokens, as a tuple, and grids of several for each.

T is a literal, so that LLVM sees T values and no array.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .isa import current_isa
from .vectors import BFLOAT, F32, I16, I32, I64, Vector, call, constant, f32x16, i32x16, load, row_address, splat, store


def tile_type(vector: Vector, count: int) -> Any:
    return types.UniTuple(vector, count)


def each(b, tile, make):
    """A tile whose vector ``t`` is ``make(t, tile[t])``."""
    for t in range(tile.type.count):
        tile = b.insert_value(tile, make(t, b.extract_value(tile, t)), t)
    return tile


def scalar_row(b, address, stride, t, llvm_type):
    return splat(b, load(b, row_address(b, address, stride, t), llvm_type))


def _zeros(vector: Vector) -> Any:
    @intrinsic(prefer_literal=True)
    def zeros(typing_context, rows):
        """``rows`` (a literal) vectors of zeros."""
        count = rows.literal_value

        def codegen(context, b, sig, values):
            tile = ir.Constant(ir.ArrayType(vector.llvm, count), ir.Undefined)
            return each(b, tile, lambda t, _: constant(vector.llvm, 0))

        return tile_type(vector, count)(rows), codegen

    return zeros


zero_tile, zero_words = _zeros(f32x16), _zeros(i32x16)


@intrinsic(prefer_literal=True)
def sum_tile(typing_context, tokens, minus_sums, stride):
    """The activations' sums, in every lane: what minimums are multiplied with."""
    count = tokens.literal_value

    def codegen(context, b, sig, values):
        tile = ir.Constant(ir.ArrayType(i32x16.llvm, count), ir.Undefined)
        step = sig.args[2].literal_value
        return each(b, tile, lambda t, _: b.neg(scalar_row(b, values[1], step, t, I32)))

    return tile_type(i32x16, count)(tokens, types.intp, stride), codegen


def add_scaled_dots(b, total, dots, row_scale, scale):
    """``total + row_scale * scale * dots``, of int32 dots."""
    products = b.sitofp(dots, f32x16.llvm)
    return call(b, "llvm.fmuladd.v16f32", f32x16.llvm, b.fmul(row_scale, scale), products, total)


def add_paired_dots(b, total, dots, pairs, scale):
    """``total + scale * (dots.lower * pairs.lower + dots.upper * pairs.upper)``, of the halves of each lane."""
    words = ir.VectorType(I16, 32)
    both = call(b, "llvm.x86.avx512.pmaddw.d.512", i32x16.llvm, b.bitcast(dots, words), b.bitcast(pairs, words))
    return call(b, "llvm.fmuladd.v16f32", f32x16.llvm, b.sitofp(both, f32x16.llvm), scale, total)


@intrinsic(prefer_literal=True)
def scale_tile(typing_context, tile, dots, scale, scales, stride):
    """``tile[t] + scale * scales[t] * dots[t]``, the activations' scales at ``scales + t * stride``."""

    def codegen(context, b, sig, values):
        tile_value, integers, row_scale, base, _ = values
        step = sig.args[4].literal_value

        def add(t, total):
            return add_scaled_dots(b, total, b.extract_value(integers, t), row_scale, scalar_row(b, base, step, t, F32))

        return each(b, tile_value, add)

    return tile(tile, dots, f32x16, types.intp, stride), codegen


MAGIC = 1.5 * 2**23
"""The bits of this float32 plus an integer of up to 22 bits are those of the float32 of their sum. So an int32 sum that starts there is a
float without an instruction, where conversions take a turn from products (`Isa.two_pipes`)."""
MAGIC_BITS = 0x4B400000


@intrinsic(prefer_literal=True)
def start_magic(typing_context, tokens):
    """The int32 tile to accumulate on for `scale_magic_tile`; a panel has it less 128 times the activations' sums."""
    count = tokens.literal_value

    def codegen(context, b, sig, values):
        tile = ir.Constant(ir.ArrayType(i32x16.llvm, count), ir.Undefined)
        return each(b, tile, lambda t, _: constant(i32x16.llvm, MAGIC_BITS))

    return tile_type(i32x16, count)(tokens), codegen


@intrinsic(prefer_literal=True)
def scale_magic_tile(typing_context, tile, dots, scale, scales, stride, exact):
    """`scale_tile` of dots that started at `MAGIC_BITS`. If ``exact``, a literal, 1.5 times a scale is a float32: scales are no larger than
    1e30, and have some bits less than a float32 has."""

    def codegen(context, b, sig, values):
        tile_value, integers, row_scale, base, *_ = values
        step, is_exact, floats = sig.args[4].literal_value, sig.args[5].literal_value, f32x16.llvm
        too_much = b.fmul(row_scale, constant(floats, -MAGIC))

        def add(t, total):
            sums, scale = b.bitcast(b.extract_value(integers, t), floats), scalar_row(b, base, step, t, F32)
            if is_exact:
                products = call(b, "llvm.fma.v16f32", floats, sums, row_scale, too_much)
            else:
                products, scale = b.fsub(sums, constant(floats, MAGIC)), b.fmul(row_scale, scale)
            return call(b, "llvm.fma.v16f32", floats, products, scale, total)

        return each(b, tile_value, add)

    return tile(tile, dots, f32x16, types.intp, stride, exact), codegen


@intrinsic(prefer_literal=True)
def start_pairs(typing_context, tokens, starts, stride):
    """The int32 tile on which a block's sums begin that are taken in pairs, as the activations' panel has it."""
    count = tokens.literal_value

    def codegen(context, b, sig, values):
        tile = ir.Constant(ir.ArrayType(i32x16.llvm, count), ir.Undefined)
        step = sig.args[2].literal_value
        return each(b, tile, lambda t, _: scalar_row(b, values[1], step, t, I32))

    return tile_type(i32x16, count)(tokens, types.intp, stride), codegen


@intrinsic(prefer_literal=True)
def add_pairs(typing_context, tile, dots, pairs, scales, stride):
    """``tile[t] + scales[t] * (dots[t].lower * pairs.lower + dots[t].upper * pairs.upper)``, of the halves of each lane."""

    def codegen(context, b, sig, values):
        tile_value, sums, row_pairs, base, _ = values
        step = sig.args[4].literal_value

        def add(t, total):
            return add_paired_dots(b, total, b.extract_value(sums, t), row_pairs, scalar_row(b, base, step, t, F32))

        return each(b, tile_value, add)

    return tile(tile, dots, i32x16, types.intp, stride), codegen


@intrinsic(prefer_literal=True)
def fma_tile(typing_context, tile, vector, scalars, stride):
    """``tile[t] + vector * scalars[t]``, float32 scalars at ``scalars + t * stride``; the stride may be a run-time value."""

    def codegen(context, b, sig, values):
        tile_value, factor, base, step_value = values

        def address(t):
            if isinstance(sig.args[3], types.Literal):
                return row_address(b, base, sig.args[3].literal_value, t)
            return b.add(base, b.mul(step_value, ir.Constant(I64, t)))

        def add(t, total):
            scalar = splat(b, load(b, address(t), F32))
            return call(b, "llvm.fmuladd.v16f32", f32x16.llvm, factor, scalar, total)

        return each(b, tile_value, add)

    step_type = stride if isinstance(stride, types.Literal) else types.intp
    return tile(tile, f32x16, types.intp, step_type), codegen


@intrinsic(prefer_literal=True)
def tile_row(typing_context, tile, t):
    """Vector ``t`` (a literal) of a tile."""

    def codegen(context, b, sig, values):
        return b.extract_value(values[0], sig.args[1].literal_value)

    return tile.dtype(tile, t), codegen


@intrinsic
def store_tile(typing_context, tile, address, stride):
    """Vector ``t`` goes to ``address + t * stride``."""

    def codegen(context, b, sig, values):
        tile_value, base, step = values
        for t in range(sig.args[0].count):
            store(b, b.add(base, b.mul(step, ir.Constant(I64, t))), b.extract_value(tile_value, t))
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp), codegen


@intrinsic
def add_tiles(typing_context, x, y):
    def codegen(context, b, sig, values):
        return each(b, values[0], lambda t, v: b.fadd(v, b.extract_value(values[1], t)))

    return x(x, y), codegen


@intrinsic
def add_scaled(typing_context, x, y, vector):
    """``x[t] + y[t] * vector``."""

    def codegen(context, b, sig, values):
        total, tile, factor = values

        def add(t, sum_):
            return call(b, "llvm.fmuladd.v16f32", f32x16.llvm, b.extract_value(tile, t), factor, sum_)

        return each(b, total, add)

    return x(x, y, f32x16), codegen


@intrinsic
def multiply_tile(typing_context, tile, vector):
    """Every vector of the tile times one."""

    def codegen(context, b, sig, values):
        return each(b, values[0], lambda t, v: b.fmul(v, values[1]))

    return tile(tile, f32x16), codegen


@intrinsic(prefer_literal=True)
def multiply_grid(typing_context, grid, rows, vectors):
    """Vector ``[v][row]`` of a grid times ``vectors[v]``; ``rows`` is a literal."""

    def codegen(context, b, sig, values):
        count = sig.args[1].literal_value
        return each(b, values[0], lambda t, v: b.fmul(v, b.extract_value(values[2], t // count)))

    return grid(grid, rows, vectors), codegen


@intrinsic
def add_to_tile(typing_context, tile, address, stride):
    """``tile[t]`` plus the vector at ``address + t * stride``."""

    def codegen(context, b, sig, values):
        tile_value, base, step = values

        def add(t, total):
            return b.fadd(total, load(b, b.add(base, b.mul(step, ir.Constant(I64, t))), f32x16.llvm))

        return each(b, tile_value, add)

    return tile(tile, types.intp, types.intp), codegen


def _dot_pairs(b, total, x, y):
    """Each lane plus the two products of its bfloat16 pairs."""
    floats, integers = f32x16.llvm, i32x16.llvm
    if current_isa().has_bf16:
        pairs = ir.VectorType(BFLOAT, 32)
        return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", floats, total, b.bitcast(x, pairs), b.bitcast(y, pairs))

    def halves(value):
        low = b.bitcast(b.shl(value, constant(integers, 16)), floats)
        return low, b.bitcast(b.and_(value, constant(integers, -65536)), floats)

    (x_low, x_high), (y_low, y_high) = halves(x), halves(y)
    total = call(b, "llvm.fmuladd.v16f32", floats, x_high, y_high, total)
    return call(b, "llvm.fmuladd.v16f32", floats, x_low, y_low, total)


@intrinsic(prefer_literal=True)
def dot_pairs_grid(typing_context, grid, rows, vectors, address, stride):
    """A grid is a tile of ``len(vectors) * rows`` vectors; add to vector ``[v][row]`` the pair products of ``vectors[v]`` with the pair of
    bfloat16 at ``address + row * stride``, which all lanes share. ``rows`` and ``stride`` are literals."""

    def codegen(context, b, sig, values):
        total, _, columns, base, _ = values
        count, step = sig.args[1].literal_value, sig.args[4].literal_value
        for row in range(count):
            shared = scalar_row(b, base, step, row, I32)
            for v in range(sig.args[2].count):
                index = v * count + row
                product = _dot_pairs(b, b.extract_value(total, index), b.extract_value(columns, v), shared)
                total = b.insert_value(total, product, index)
        return total

    return grid(grid, rows, vectors, types.intp, stride), codegen


@intrinsic(prefer_literal=True)
def load_words(typing_context, rows, vectors, address, stride):
    """A grid of ``vectors * rows`` int32 vectors, ``[v][row]`` from ``address + row * stride + 64 * v``. Literals but for the address."""
    count = rows.literal_value * vectors.literal_value

    def codegen(context, b, sig, values):
        of_rows, step = sig.args[0].literal_value, sig.args[3].literal_value
        grid = ir.Constant(ir.ArrayType(i32x16.llvm, count), ir.Undefined)

        def loaded(t, _):
            return load(b, row_address(b, values[2], t % of_rows * step + t // of_rows * 64, 1), i32x16.llvm)

        return each(b, grid, loaded)

    return tile_type(i32x16, count)(rows, vectors, types.intp, stride), codegen


@intrinsic(prefer_literal=True)
def store_grid(typing_context, grid, rows, address, stride):
    """Vector ``[v][row]`` goes to ``address + row * stride + 64 * v``."""

    def codegen(context, b, sig, values):
        count, step = sig.args[1].literal_value, sig.args[3].literal_value
        for index in range(sig.args[0].count):
            offset = index % count * step + index // count * 64
            store(b, row_address(b, values[2], offset, 1), b.extract_value(values[0], index))
        return context.get_dummy_value()

    return types.void(grid, rows, types.intp, stride), codegen
