"""64 bytes at once: bits out of each, and look-ups."""

from __future__ import annotations

from llvmlite import ir
from numba.extending import intrinsic

from .isa import current_isa
from .vectors import I16, call, constant, halves, i8x64, join, operation


def shift_bytes(b, value, right):
    """Shift each byte; bits that cross into a neighbour are the caller's to mask."""
    words = ir.VectorType(I16, 32)
    value = b.bitcast(value, words)
    if right > 0:
        value = b.lshr(value, constant(words, right))
    elif right < 0:
        value = b.shl(value, constant(words, -right))
    return b.bitcast(value, i8x64.llvm)


@operation(i8x64, i8x64)
def low_nibbles(b, value):
    return b.and_(value, constant(i8x64.llvm, 15))


@operation(i8x64, i8x64)
def high_nibbles(b, value):
    return b.and_(shift_bytes(b, value, 4), constant(i8x64.llvm, 15))


@intrinsic(prefer_literal=True)
def take_bits(typing_context, value, start, count, at):
    """Of each byte, ``count`` bits from bit ``start``, moved to bit ``at``; all three are literals."""

    def codegen(context, b, sig, values):
        first, bits, target = (number.literal_value for number in sig.args[1:])
        shifted = shift_bytes(b, values[0], first - target)
        return b.and_(shifted, constant(i8x64.llvm, ((1 << bits) - 1) << target))

    return i8x64(i8x64, start, count, at), codegen


def look_up(b, indices, values):
    """``values[index]`` for each of 64 bytes; up to sixteen values, constants from 0 to 255."""
    isa = current_isa()
    table = ir.Constant(i8x64.llvm, [*values, *[0] * (16 - len(values))] * 4)
    if isa.has_avx512:
        return call(b, "llvm.x86.avx512.pshuf.b.512", i8x64.llvm, table, indices)
    if isa.name.startswith("avx"):
        return join(b, [call(b, "llvm.x86.avx2.pshuf.b", t.type, t, i) for t, i in zip(halves(b, table), halves(b, indices), strict=True)])
    result = constant(i8x64.llvm, 0)
    for index, value in enumerate(values):
        hit = b.icmp_unsigned("==", indices, constant(i8x64.llvm, index))
        result = b.select(hit, constant(i8x64.llvm, value), result)
    return result
