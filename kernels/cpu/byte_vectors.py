"""64 bytes at once: shifts of each, and look-ups."""

from __future__ import annotations

from llvmlite import ir

from .isa import current_isa
from .vectors import I16, call, constant, halves, i8x64, join


def shift_bytes(b, value, right):
    """Shift each byte; bits that cross into a neighbour are the caller's to mask."""
    words = ir.VectorType(I16, 32)
    value = b.bitcast(value, words)
    if right > 0:
        value = b.lshr(value, constant(words, right))
    elif right < 0:
        value = b.shl(value, constant(words, -right))
    return b.bitcast(value, i8x64.llvm)


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
