"""Products of 4-bit quants by int8 activations with fewer multiplications: Winograd's inner products (S. Winograd, "A new algorithm for
inner product", IEEE Transactions on Computers C-17, 1968).

Two columns with the weights ``p`` and ``q`` and the activations ``x`` and ``y``: ``p x + q y = (p + y) (q + x) - p q - x y``. The last two
products belong to the weights alone and to the activations alone. Those are made once for all tokens of a pass, these once for all rows;
what is left for each row and token is one multiplication in place of two, and two additions, which pipes of their own have time for.

Here ``p`` and ``q`` are bytes of two neighbouring groups (see `tiles`): quants less 8. With activations of up to 120 (see
`geometry.largest_activation`) both sums are bytes again. The left one, which ``vpdpbusd`` takes without a sign, is 128 more, so that the
products of the weights are ``(p + 128) q`` and those of the activations ``x (y + 128)``. All is exact: what comes out are the same integers
as with all multiplications.

The last four of a block's eight groups are multiplied as ever. So both kinds of pipes are about as busy: 16 rows by 32 columns take a token
8 multiplications (6 of groups, 2 for the scale) and 6 other operations, where it would be 10 and 1. With two groups fewer it would be 7 and
8, which is less for many tokens; but the weights are unpacked beside, in 20 other operations for the tokens of a pass, which may be 8.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .helpers import inline
from .int8_dots import dot
from .isa import current_isa
from .register_tiles import add_paired_dots, add_scaled_dots, scalar_row
from .tiles import GROUPS, TILE_FORMATS, panel_offsets
from .unpack import group_of, pair_vector, scale_vector
from .vectors import F32, I16, I32, call, constant, i8x64, i32x16, operation

_SUMMED = GROUPS - 4  # groups
_ZERO = 8  # what is taken from each quant
_BYTES, _INTS = i8x64.llvm, i32x16.llvm
_AT_ONCE = 4  # tokens: with the sums of 16 and the quants of a block, what 32 registers hold


@operation(i32x16, i32x16, i32x16)
def products_of_activations(b, low, high):
    """What a token's sums have too much, in lanes that are to be added: the products of its own quants, and 8 times the last of them."""
    total = constant(_INTS, 0)
    swapped = [lane ^ 4 for lane in range(16)]  # a group's four columns change places with those of its neighbour
    for start, quants in ((0, low), (4, high)):
        others = b.shuffle_vector(quants, quants, ir.Constant(ir.VectorType(I32, 16), swapped))
        groups = [start + lane // 4 for lane in range(16)]
        first = ir.Constant(_INTS, [-1 if group < _SUMMED and group % 2 == 0 else 0 for group in groups])
        last = ir.Constant(_INTS, [0 if group < _SUMMED else _ZERO for group in groups])
        factors = b.or_(b.and_(b.add(others, constant(_INTS, 128)), first), last)
        words = [b.bitcast(value, ir.VectorType(I16, 32)) for value in (quants, factors)]  # of a factor the upper half is 0
        total = b.add(total, call(b, "llvm.x86.avx512.pmaddw.d.512", _INTS, *words))
    return total


@intrinsic(prefer_literal=True)
def summands(typing_context, layout, block):
    """A block's eight groups of quants, as they are multiplied: less 8, every other one 128 more, the last four as they are stored."""
    format = TILE_FORMATS[layout.literal_value]

    def codegen(context, b, sig, values):
        groups = ir.Constant(ir.ArrayType(_BYTES, GROUPS), ir.Undefined)
        for group in range(GROUPS):
            quants = group_of(b, format, values[1], group)
            if group < _SUMMED:
                quants = b.add(quants, constant(_BYTES, -_ZERO if group % 2 else 128 - _ZERO))
            groups = b.insert_value(groups, quants, group)
        return groups

    return types.UniTuple(i8x64, GROUPS)(layout, types.intp), codegen


@intrinsic
def products_of_weights(typing_context, groups):
    """What the sums of each row have too much: the products of its own `summands`."""

    def codegen(context, b, sig, values):
        total = constant(_INTS, 0)
        for group in range(0, _SUMMED, 2):
            total = dot(b, total, b.extract_value(values[0], group), b.extract_value(values[0], group + 1), signed=False)
        return total

    return i32x16(groups), codegen


@intrinsic(prefer_literal=True)
def add_summed_block(typing_context, tile, layout, groups, own, scales, x):
    """The tile of a whole panel plus the products of a block, whose `summands`, their products and scales (or pairs) are given, with the
    activations' record at ``x``."""
    offsets = panel_offsets(current_isa().tokens)
    format = TILE_FORMATS[layout.literal_value]
    starts_at, add = (offsets[6], add_paired_dots) if format.has_pairs else (offsets[7], add_scaled_dots)

    def codegen(context, b, sig, values):
        total, _, groups_value, own_value, scale, address = values
        weights = [b.extract_value(groups_value, group) for group in range(GROUPS)]

        def shared(at, kind=I32):
            return scalar_row(b, address, at, 1, kind)

        def activations(t, group):
            return b.bitcast(shared(32 * t + 4 * group), _BYTES)

        for first in range(0, tile.count, _AT_ONCE):
            # LLVM would load the activations of all tokens at once, and have no registers for that.
            b.call(ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", side_effect=True), [])
            tokens = range(first, min(first + _AT_ONCE, tile.count))
            early = first > 0  # the first tokens need not wait for the weights' products
            sums = [b.sub(shared(starts_at + 4 * t), own_value) if early else shared(starts_at + 4 * t) for t in tokens]
            for group in range(_SUMMED, GROUPS):
                sums = [dot(b, s, weights[group], activations(t, group), signed=False) for s, t in zip(sums, tokens, strict=True)]
            for group in range(0, _SUMMED, 2):
                for i, t in enumerate(tokens):
                    left, right = b.add(weights[group], activations(t, group + 1)), b.add(weights[group + 1], activations(t, group))
                    sums[i] = dot(b, sums[i], left, right, signed=False)
            for dots, t in zip(sums, tokens, strict=True):
                dots = dots if early else b.sub(dots, own_value)
                scaled = add(b, b.extract_value(total, t), dots, scale, shared(offsets[0] + 4 * t, F32))
                total = b.insert_value(total, scaled, t)
        return total

    return tile(tile, layout, groups, i32x16, scales, types.intp), codegen


@cache
def summed_product(layout: str) -> tuple[Any, Any]:
    """Two functions: ``(block, header, factors) -> weights``, what a block has for all tokens, and ``(tile, weights, record) -> tile``,
    which adds its products with a panel's record."""

    @inline
    def of_pairs(block, header, factors):
        groups = summands(layout, block)
        return groups, products_of_weights(groups), pair_vector(layout, block, factors)

    @inline
    def of_scales(block, header, factors):
        groups = summands(layout, block)
        return groups, products_of_weights(groups), scale_vector(layout, block, header, 0)

    @inline
    def add(tile, weights, x):
        groups, own, scales = weights
        return add_summed_block(tile, layout, groups, own, scales, x)

    return of_pairs if TILE_FORMATS[layout].has_pairs else of_scales, add
