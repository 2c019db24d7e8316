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
from .simd import _I16, _I32, _call, _constant, _each, _halves, _join, _scalar_row, _tile, i32x16

_WORDS = ir.VectorType(_I16, 32)
_Quants = Callable[[int], Any]
_Activations = Callable[[int, int], Any]


def takes_signed(zero: int) -> bool:
    """Whether quants are taken as int8, less 128: eight-bit ones, where a uint8 x int8 product would saturate."""
    return zero == 128 and not current_isa().has_vnni


def add_groups(b: Any, tile: Any, groups: range, quants: _Quants, activations: _Activations, *, largest: int, signed: bool) -> Any:
    """A tile plus the products of groups of four columns: ``quants(group)``, of up to ``largest``, by ``activations(group, t)``."""
    if current_isa().name != "avx2":
        for group in groups:
            weights = quants(group)
            tile = _each(b, tile, lambda t, total: dot(b, total, weights, activations(group, t), signed=signed))  # noqa: B023
        return tile
    together = 32767 // (2 * 127 * largest)
    totals = [half for t in range(tile.type.count) for half in _halves(b, b.extract_value(tile, t))]
    for start in range(0, len(groups), together):
        sums: list[Any] = []  # as the totals, two vectors for each token, but of words
        for group in groups[start : start + together]:
            weights = quants(group)
            products = [half for t in range(tile.type.count) for half in _pair_products(b, weights, activations(group, t), signed)]
            sums = [b.add(*pair) for pair in zip(sums, products, strict=True)] if sums else products
            if together > 1:
                sums = _settled(b, sums)
        totals = _settled(b, [_add_pairs(b, *pair) for pair in zip(totals, sums, strict=True)])
    return _each(b, tile, lambda t, _: _join(b, totals[2 * t : 2 * t + 2]))


def _settled(b: Any, vectors: list[Any]) -> list[Any]:
    """The same vectors, by an empty piece of assembly that takes them all in registers.

    So what makes them comes before and what uses them comes after. LLVM would else finish one token before it starts the next, and keep the
    unpacked weights of a block in memory.
    """
    kinds = [vector.type for vector in vectors]
    constraints = ",".join(["=x"] * len(vectors) + [str(i) for i in range(len(vectors))])
    settled = b.call(ir.InlineAsm(ir.FunctionType(ir.LiteralStructType(kinds), kinds), "", constraints, side_effect=True), vectors)
    return [b.extract_value(settled, i) for i in range(len(vectors))]


def _pair_products(b: Any, weights: Any, activations: Any, signed: bool) -> list[Any]:
    """AVX2: 16-bit sums of two products each."""
    products = []
    for w, a in zip(_halves(b, weights), _halves(b, activations), strict=True):
        if signed:  # |w| times a with w's sign
            a = _call(b, "llvm.x86.avx2.psign.b", a.type, a, w)
            w = _call(b, "llvm.abs.v32i8", w.type, w, ir.Constant(ir.IntType(1), 0))
        products.append(_call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(_I16, 16), w, a))
    return products


def _add_pairs(b: Any, total: Any, sums: Any) -> Any:
    """Eight int32 plus two of the 16-bit sums each."""
    return b.add(total, _call(b, "llvm.x86.avx2.pmadd.wd", total.type, sums, _constant(sums.type, 1)))


def dot(b: Any, total: Any, weights: Any, activations: Any, *, signed: bool = False) -> Any:
    """Each int32 lane of ``total`` plus four products: quants (uint8, or int8 if ``signed``) by int8 activations."""
    isa = current_isa()
    if isa.has_avx512:
        words = i32x16.llvm
        return _call(b, "llvm.x86.avx512.vpdpbusd.512", words, total, b.bitcast(weights, words), b.bitcast(activations, words))
    if isa.name == "avxvnni":
        words = ir.VectorType(_I32, 8)
        parts = zip(_halves(b, total), _halves(b, weights), _halves(b, activations), strict=True)
        return _join(b, [_call(b, "llvm.x86.avx512.vpdpbusd.256", words, t, b.bitcast(w, words), b.bitcast(a, words)) for t, w, a in parts])
    if isa.name == "avx2":
        products = _pair_products(b, weights, activations, signed)
        return _join(b, [_add_pairs(b, *pair) for pair in zip(_halves(b, total), products, strict=True)])
    if isa.has_usdot and not signed:
        return _neon(b, "usdot", total, weights, activations)
    if isa.has_sdot:
        return _neon(b, "sdot", total, weights, activations)  # quants of eight bits come signed, all others are below 128
    return b.add(total, _portable(b, weights, activations, signed))


def _quarters(b: Any, value: Any) -> list[Any]:
    return [quarter for half in _halves(b, value) for quarter in _halves(b, half)]


def _join_quarters(b: Any, parts: list[Any]) -> Any:
    return _join(b, [_join(b, parts[:2]), _join(b, parts[2:])])


def _neon(b: Any, instruction: str, total: Any, weights: Any, activations: Any) -> Any:
    """AArch64: sixteen products at a time."""
    name = f"llvm.aarch64.neon.{instruction}.v4i32.v16i8"
    parts = zip(_quarters(b, total), _quarters(b, weights), _quarters(b, activations), strict=True)
    return _join_quarters(b, [_call(b, name, t.type, t, w, a) for t, w, a in parts])


def _portable(b: Any, weights: Any, activations: Any, signed: bool) -> Any:
    """Products of 16-bit values, even and odd bytes apart, so that nothing is shuffled: no product leaves the 16 bits."""
    doubles = i32x16.llvm
    weights, activations = b.bitcast(weights, _WORDS), b.bitcast(activations, _WORDS)

    def even(value: Any, signed: bool) -> Any:
        return b.ashr(b.shl(value, _constant(_WORDS, 8)), _constant(_WORDS, 8)) if signed else b.and_(value, _constant(_WORDS, 255))

    def odd(value: Any, signed: bool) -> Any:
        return b.ashr(value, _constant(_WORDS, 8)) if signed else b.lshr(value, _constant(_WORDS, 8))

    def pair_sums(x: Any, y: Any) -> Any:
        if "x86_64" in b.module.triple:  # every one has SSE2
            narrow = ir.VectorType(_I32, 4)
            parts = zip(_quarters(b, x), _quarters(b, y), strict=True)
            return _join_quarters(b, [_call(b, "llvm.x86.sse2.pmadd.wd", narrow, p, q) for p, q in parts])
        products = b.bitcast(b.mul(x, y), doubles)
        low = b.ashr(b.shl(products, _constant(doubles, 16)), _constant(doubles, 16))
        return b.add(low, b.ashr(products, _constant(doubles, 16)))

    return b.add(pair_sums(even(weights, signed), even(activations, True)), pair_sums(odd(weights, signed), odd(activations, True)))


@intrinsic(prefer_literal=True)
def start_dot_tile(typing_context, tokens, zero, minus_sums, stride):
    """The int32 tile to accumulate on: ``zero`` times minus the activations' sum, which lies at ``minus_sums`` for each token.

    Starting there takes the weights' zero point off exactly, at the price of a shift where it is a power of two. All but the address are
    literals. Where the dot product is a signed one (`takes_signed`), the start is 0.
    """
    count = tokens.literal_value

    def codegen(context, b, sig, values):
        offset, step = sig.args[1].literal_value, sig.args[3].literal_value
        tile = ir.Constant(ir.ArrayType(i32x16.llvm, count), ir.Undefined)

        def start(t, _):
            if offset == 0 or takes_signed(offset):
                return _constant(i32x16.llvm, 0)
            total = _scalar_row(b, values[2], step, t, _I32)
            if offset & (offset - 1) == 0:
                return b.shl(total, _constant(i32x16.llvm, offset.bit_length() - 1))
            return b.mul(total, _constant(i32x16.llvm, offset))

        return _each(b, tile, start)

    return _tile(i32x16, count)(tokens, zero, types.intp, stride), codegen
