"""Dot products of int8 activations with the weights' quants, as each instruction set has them.

The sums are integers, and exact on all of them. AVX2 multiplies bytes into 16-bit sums of two products, which saturate: how many of
them may be added before they are widened depends on how large the quants are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .isa import current_isa
from .register_tiles import each, scalar_row, tile_type
from .vectors import I16, I32, call, constant, halves, i32x16, join

SUMS_COUNT = 128 if current_isa().has_vnni else 1
"""What minus the sum of activations is stored times: the zero of 8-bit quants, of which sums can then start as they are."""

_WORDS = ir.VectorType(I16, 32)
_MOST, _PAIR = 32767, 2 * 127  # what 16 bits hold; two activations
_Quants = Callable[[int], Any]
_Activations = Callable[[int, int], Any]


def takes_signed(zero: int, item: int = 1) -> bool:
    """Whether quants are taken as int8, less 128: eight-bit ones, where a uint8 x int8 product would saturate."""
    return zero == 128 and item == 1 and not current_isa().has_vnni


def centre_of(groups: int, largest: int) -> int:
    """What to take from quants of up to ``largest`` on AVX2, so that the sums of pairs of all these groups fit 16 bits; 0: they fit anyway,
    or do not even so.

    Nothing is taken from the quants themselves. Sums that begin with minus the centre times the activations' sum may leave the 16 bits on
    the way, as they wrap around, if only the end is within them.
    """
    centre = (largest + 1) // 2
    if current_isa().name != "avx2" or groups * _PAIR * largest <= _MOST or groups * _PAIR * centre > _MOST:
        return 0
    return centre


def add_groups(
    b: Any,
    tile: Any,
    groups: range,
    quants: _Quants,
    activations: _Activations,
    *,
    largest: int,
    signed: bool,
    starts: list[Any] | None = None,
) -> Any:
    """A tile plus the products of groups of four columns: ``quants(group)``, of up to ``largest``, by ``activations(group, t)``.

    With ``starts`` (see `centre_of`) the sums of pairs begin at the 16 words ``starts[t]``, and all groups fit.
    """
    if current_isa().name != "avx2":
        for group in groups:
            weights = quants(group)
            tile = each(b, tile, lambda t, total: dot(b, total, weights, activations(group, t), signed=signed))  # noqa: B023
        return tile
    tokens = range(tile.type.count)
    together = len(groups) if starts else _MOST // (_PAIR * largest)
    runs = [groups[start : start + together] for start in range(0, len(groups), together)]
    if together > 2:
        for run in runs:
            sums = [[start, start] for start in starts or ()]
            for group in run:
                weights = quants(group)
                added = []
                for t in tokens:
                    products = _pair_products(b, weights, activations(group, t), signed)
                    added.append(_added(b, sums[t], products) if sums else products)
                sums = settled(b, added)
            tile = each(b, tile, lambda t, total: join(b, _added(b, halves(b, total), _widened(b, sums[t]))))  # noqa: B023
        return tile
    totals = [halves(b, b.extract_value(tile, t)) for t in tokens]
    for few in (tokens[start : start + 3] for start in range(0, len(tokens), 3)):  # what registers have room for beside a run's quants
        for run in runs:
            unpacked = [quants(group) for group in run]
            for t in few:
                words, *more = (_pair_products(b, w, activations(group, t), signed) for w, group in zip(unpacked, run, strict=True))
                for others in more:
                    words = _added(b, words, others)
                totals[t] = _added(b, totals[t], _widened(b, words))
            totals[few.start : few.stop] = settled(b, totals[few.start : few.stop])
    return each(b, tile, lambda t, _: join(b, totals[t]))


def _added(b: Any, x: list[Any], y: list[Any]) -> list[Any]:
    return [b.add(*both) for both in zip(x, y, strict=True)]


def _widened(b: Any, words: list[Any]) -> list[Any]:
    """Sums of two 16-bit lanes each, in 32 bits."""
    doubles = ir.VectorType(I32, 8)
    return [call(b, "llvm.x86.avx2.pmadd.wd", doubles, half, constant(half.type, 1)) for half in words]


def settled(b: Any, pairs: list[list[Any]]) -> list[list[Any]]:
    """The same vectors, by an empty piece of assembly that takes them all in registers.

    So what makes them comes before and what uses them comes after. LLVM would else finish one token before it starts the next, and keep the
    unpacked weights of a block in memory.
    """
    vectors = [vector for pair in pairs for vector in pair]
    kinds = [vector.type for vector in vectors]
    constraints = ",".join(["=x"] * len(vectors) + [str(i) for i in range(len(vectors))])
    settled = b.call(ir.InlineAsm(ir.FunctionType(ir.LiteralStructType(kinds), kinds), "", constraints, side_effect=True), vectors)
    return [[b.extract_value(settled, i), b.extract_value(settled, i + 1)] for i in range(0, len(vectors), 2)]


def _pair_products(b: Any, weights: Any, activations: Any, signed: bool) -> list[Any]:
    """AVX2: 16-bit sums of two products each, in two vectors."""
    products = []
    for w, a in zip(halves(b, weights), halves(b, activations), strict=True):
        if signed:  # |w| times a with w's sign
            a = call(b, "llvm.x86.avx2.psign.b", a.type, a, w)
            w = call(b, "llvm.abs.v32i8", w.type, w, ir.Constant(ir.IntType(1), 0))
        products.append(call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), w, a))
    return products


def dot(b: Any, total: Any, weights: Any, activations: Any, *, signed: bool = False) -> Any:
    """Each int32 lane of ``total`` plus four products: quants (uint8, or int8 if ``signed``) by int8 activations."""
    isa = current_isa()
    if isa.has_avx512:
        words = i32x16.llvm
        return call(b, "llvm.x86.avx512.vpdpbusd.512", words, total, b.bitcast(weights, words), b.bitcast(activations, words))
    if isa.name == "avxvnni":
        words = ir.VectorType(I32, 8)
        parts = zip(halves(b, total), halves(b, weights), halves(b, activations), strict=True)
        return join(b, [call(b, "llvm.x86.avx512.vpdpbusd.256", words, t, b.bitcast(w, words), b.bitcast(a, words)) for t, w, a in parts])
    if isa.name == "avx2":
        return join(b, _added(b, halves(b, total), _widened(b, _pair_products(b, weights, activations, signed))))
    if isa.has_usdot and not signed:
        return _neon(b, "usdot", total, weights, activations)
    if isa.has_sdot:
        return _neon(b, "sdot", total, weights, activations)  # quants of eight bits come signed, all others are below 128
    return b.add(total, _portable(b, weights, activations, signed))


def _quarters(b: Any, value: Any) -> list[Any]:
    return [quarter for half in halves(b, value) for quarter in halves(b, half)]


def _join_quarters(b: Any, parts: list[Any]) -> Any:
    return join(b, [join(b, parts[:2]), join(b, parts[2:])])


def _neon(b: Any, instruction: str, total: Any, weights: Any, activations: Any) -> Any:
    """AArch64: sixteen products at a time."""
    name = f"llvm.aarch64.neon.{instruction}.v4i32.v16i8"
    parts = zip(_quarters(b, total), _quarters(b, weights), _quarters(b, activations), strict=True)
    return _join_quarters(b, [call(b, name, t.type, t, w, a) for t, w, a in parts])


def has_sse2(b: Any) -> bool:
    """Whether code is made for x86-64, of which every one has SSE2."""
    return "x86_64" in b.module.triple


def sse2_pair_sums(b: Any, x: Any, y: Any) -> Any:
    """Sums of two products of 16-bit lanes."""
    narrow = ir.VectorType(I32, 4)
    parts = zip(_quarters(b, x), _quarters(b, y), strict=True)
    return _join_quarters(b, [call(b, "llvm.x86.sse2.pmadd.wd", narrow, p, q) for p, q in parts])


def _portable(b: Any, weights: Any, activations: Any, signed: bool) -> Any:
    """Products of 16-bit values, even and odd bytes apart, so that nothing is shuffled: no product leaves the 16 bits."""
    doubles = i32x16.llvm
    weights, activations = b.bitcast(weights, _WORDS), b.bitcast(activations, _WORDS)

    def even(value: Any, signed: bool) -> Any:
        return b.ashr(b.shl(value, constant(_WORDS, 8)), constant(_WORDS, 8)) if signed else b.and_(value, constant(_WORDS, 255))

    def odd(value: Any, signed: bool) -> Any:
        return b.ashr(value, constant(_WORDS, 8)) if signed else b.lshr(value, constant(_WORDS, 8))

    def pair_sums(x: Any, y: Any) -> Any:
        if has_sse2(b):
            return sse2_pair_sums(b, x, y)
        products = b.bitcast(b.mul(x, y), doubles)
        low = b.ashr(b.shl(products, constant(doubles, 16)), constant(doubles, 16))
        return b.add(low, b.ashr(products, constant(doubles, 16)))

    return b.add(pair_sums(even(weights, signed), even(activations, True)), pair_sums(odd(weights, signed), odd(activations, True)))


@intrinsic(prefer_literal=True)
def start_dot_tile(typing_context, tokens, zero, minus_sums, stride, times):
    """The int32 tile to accumulate on: ``zero`` times minus the activations' sum, which lies at ``minus_sums``, multiplied by ``times`` (a
    power of two), for each token.

    Starting there takes the weights' zero point off exactly, at the price of a shift where it is another power of two. All but the address
    are literals.
    """
    count = tokens.literal_value

    def codegen(context, b, sig, values):
        offset, step, unit = (sig.args[i].literal_value for i in (1, 3, 4))
        size, sums = abs(offset), i32x16.llvm
        tile = ir.Constant(ir.ArrayType(sums, count), ir.Undefined)

        def start(t, _):
            if offset == 0:
                return constant(sums, 0)
            total = scalar_row(b, values[2], step, t, I32)
            if offset < 0:
                total = b.neg(total)
            if size & (size - 1):
                return b.ashr(b.mul(total, constant(sums, size)), constant(sums, unit.bit_length() - 1))
            shift = size.bit_length() - unit.bit_length()
            return b.shl(total, constant(sums, shift)) if shift >= 0 else b.ashr(total, constant(sums, -shift))

        return each(b, tile, start)

    return tile_type(i32x16, count)(tokens, zero, types.intp, stride, times), codegen
