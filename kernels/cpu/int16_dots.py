"""Dot products of int16: of activations with the weights' quants, for the likeliest logits, where 8 bits would show; and of attention.

Quants are bytes. Those of even and of odd columns become words by a mask and by a shift, and the activations lie in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .int8_dots import has_sse2, settled, sse2_pair_sums
from .isa import current_isa
from .register_tiles import each, scalar_row, tile_type
from .vectors import F32, I16, I32, call, constant, f32x16, halves, i32x16, join, operation, store

WORDS = ir.VectorType(I16, 32)
_ORDER = [4 * group + place for group in range(4) for place in (0, 2, 1, 3)]


@operation(types.void, types.intp, i32x16)
def store_words(b, address, values):
    """Sixteen columns as int16, in the order of the products."""
    order = ir.Constant(ir.VectorType(I32, 16), _ORDER)
    store(b, address, b.trunc(b.shuffle_vector(values, values, order), ir.VectorType(I16, 16)))


def add_word_groups(b: Any, tile: Any, groups: range, quants: Callable[[int], Any], activations: Callable[[int, int, int], Any]) -> Any:
    """A tile plus the products of groups of four columns: ``quants(group)``, uint8, by two pairs ``activations(group, pair, t)``."""
    for group in groups:
        for pair, words in enumerate(_words(b, quants(group))):
            tile = each(b, tile, lambda t, total: _dot(b, total, words, activations(group, pair, t)))  # noqa: B023
    return tile


@intrinsic(prefer_literal=True)
def add_words(typing_context, grid, rows, vectors, address, stride):
    """A grid is a tile of ``len(vectors) * rows`` vectors; add to vector ``[v][row]`` the products of the pairs of int16 in ``vectors[v]``
    with the pair at ``address + row * stride``, which all lanes share. ``rows`` and ``stride`` are literals."""

    def codegen(context, b, sig, values):
        tile, _, columns, base, _ = values
        count, step = sig.args[1].literal_value, sig.args[4].literal_value
        shared = [b.bitcast(scalar_row(b, base, step, row, I32), WORDS) for row in range(count)]
        words = [b.bitcast(b.extract_value(columns, v), WORDS) for v in range(sig.args[2].count)]
        tile = each(b, tile, lambda t, total: _dot(b, total, words[t // count], shared[t % count]))
        if current_isa().name != "avx2":
            return tile
        # LLVM would else add products to each other before it adds them to the sums, and have no registers left for that.
        sums = settled(b, [halves(b, b.extract_value(tile, t)) for t in range(tile.type.count)])
        return each(b, tile, lambda t, _: join(b, sums[t]))

    return grid(grid, rows, vectors, types.intp, stride), codegen


@intrinsic
def sum_words(typing_context, x, y):
    def codegen(context, b, sig, values):
        return each(b, values[0], lambda t, v: b.add(v, b.extract_value(values[1], t)))

    return x(x, y), codegen


@intrinsic(prefer_literal=True)
def scaled_floats(typing_context, grid, rows, scales):
    """A grid of int32 as float32, vector ``[v][row]`` times the float32 at ``scales + 4 row``. ``rows`` is a literal."""
    count = grid.count

    def codegen(context, b, sig, values):
        result = ir.Constant(ir.ArrayType(f32x16.llvm, count), ir.Undefined)
        of_rows = sig.args[1].literal_value

        def scaled(t, _):
            return b.fmul(b.sitofp(b.extract_value(values[0], t), f32x16.llvm), scalar_row(b, values[2], 4, t % of_rows, F32))

        return each(b, result, scaled)

    return tile_type(f32x16, count)(grid, rows, types.intp), codegen


@operation(types.void, types.intp, i32x16)
def store_i16x16(b, address, values):
    """Sixteen int32 that fit as int16."""
    store(b, address, b.trunc(values, ir.VectorType(I16, 16)))


def _words(b: Any, quants: Any) -> tuple[Any, Any]:
    """Even and odd columns."""
    columns = b.bitcast(quants, ir.VectorType(I16, quants.type.count // 2))
    return b.and_(columns, constant(columns.type, 255)), b.lshr(columns, constant(columns.type, 8))


def _dot(b: Any, total: Any, x: Any, y: Any) -> Any:
    """Each int32 lane of ``total`` plus two products."""
    isa = current_isa()
    if isa.has_avx512:
        return call(b, "llvm.x86.avx512.vpdpwssd.512", total.type, total, b.bitcast(x, total.type), b.bitcast(y, total.type))
    doubles = ir.VectorType(I32, 8)
    if isa.name == "avx2":
        parts = zip(halves(b, total), halves(b, x), halves(b, y), strict=True)
        return join(b, [b.add(t, call(b, "llvm.x86.avx2.pmadd.wd", doubles, p, q)) for t, p, q in parts])
    if isa.name == "avxvnni":
        parts = zip(halves(b, total), halves(b, x), halves(b, y), strict=True)
        name = "llvm.x86.avx512.vpdpwssd.256"
        return join(b, [call(b, name, doubles, t, b.bitcast(p, doubles), b.bitcast(q, doubles)) for t, p, q in parts])
    if has_sse2(b):
        return b.add(total, sse2_pair_sums(b, x, y))
    x, y = b.bitcast(x, total.type), b.bitcast(y, total.type)
    sixteen = constant(total.type, 16)
    low = b.mul(*(b.ashr(b.shl(value, sixteen), sixteen) for value in (x, y)))
    return b.add(total, b.add(low, b.mul(*(b.ashr(value, sixteen) for value in (x, y)))))
