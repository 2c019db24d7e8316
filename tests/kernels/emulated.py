"""Instruction sets that this CPU lacks: their kernels, with other instructions in place of the few that it does not have.

LLVM splits vectors of 512 bits by itself. What the kernels name themselves (dot products, look-ups) is spelled out here, by Intel's
Software Developer's Manual, so that packing, loops and addresses are tested on any x86-64 machine with AVX2. Such kernels are slow, and
only this process has them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numba  # noqa: F401 (where it is loaded, kernels are compiled in this process, and not in children that know nothing of this)
from llvmlite import ir
from numba.core import cgutils
from pymistral.kernels.cpu import isa

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_INTS, _FLOATS = ir.VectorType(_I32, 16), ir.VectorType(ir.FloatType(), 16)
ZEN4 = "avx512vnni+zen4"
"""AVX-512 as `isa.Isa.adds_beside` has it; without it as `isa.Isa.two_pipes` has it."""


def emulate(name: str) -> None:
    """Make ``avx512vnni``, `ZEN4` or ``avxvnni`` the instruction set of this process, before anything else of the kernels is imported."""
    features = ",".join(f"+{feature}" for feature in isa._HASWELL)
    adds_beside, name = name == ZEN4, name.split("+")[0]
    has_bf16 = name == "avx512vnni"
    two_pipes = name == "avx512vnni" and not adds_beside
    common = (name, "haswell", features, True, True, has_bf16, isa._TOKENS[name])
    emulated = isa.Isa(*common, adds_beside=adds_beside, two_pipes=two_pipes)
    isa.current_isa = functools.cache(lambda: emulated)
    vectors = importlib.import_module("pymistral.kernels.cpu.vectors")
    original = vectors.call

    def call(b: Any, instruction: str, result: Any, *values: Any) -> Any:
        emulation = _INSTRUCTIONS.get(instruction)
        return emulation(b, *values) if emulation else original(b, instruction, result, *values)

    vectors.call = call


def _constant(vector: Any, number: int) -> Any:
    return ir.Constant(vector, [number] * vector.count)


def _lanes(b: Any, vector: Any, first: int, step: int, count: int) -> Any:
    mask = ir.Constant(ir.VectorType(_I32, count), list(range(first, first + step * count, step)))
    return b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _joined(b: Any, parts: list[Any]) -> Any:
    count = 2 * parts[0].type.count
    return b.shuffle_vector(*parts, ir.Constant(ir.VectorType(_I32, count), list(range(count))))


def _vpdpbusd(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    return _dot(b, total, unsigned, signed, b.zext, _I8, 4)


def _vpdpwssd(b: Any, total: Any, x: Any, y: Any) -> Any:
    return _dot(b, total, x, y, b.sext, _I16, 2)


def _dot(b: Any, total: Any, x: Any, y: Any, widen: Any, item: Any, each: int) -> Any:
    """32-bit lanes plus ``each`` products; y is signed, x as ``widen`` takes it."""
    lanes = total.type.count
    x, y = (b.bitcast(value, ir.VectorType(item, each * lanes)) for value in (x, y))
    for place in range(each):
        left, right = (_lanes(b, value, place, each, lanes) for value in (x, y))
        total = b.add(total, b.mul(widen(left, total.type), b.sext(right, total.type)))
    return total


def _vpmaddwd(b: Any, x: Any, y: Any) -> Any:
    return _dot(b, _constant(_INTS, 0), x, y, b.sext, _I16, 2)


def _vpmulhrsw(b: Any, x: Any, y: Any) -> Any:
    wide = ir.VectorType(_I32, x.type.count)
    products = b.ashr(b.mul(b.sext(x, wide), b.sext(y, wide)), _constant(wide, 14))
    return b.trunc(b.ashr(b.add(products, _constant(wide, 1)), _constant(wide, 1)), x.type)


def _vdpbf16ps(b: Any, total: Any, x: Any, y: Any) -> Any:
    x, y = b.bitcast(x, _INTS), b.bitcast(y, _INTS)
    for half in (lambda v: b.shl(v, _constant(_INTS, 16)), lambda v: b.and_(v, _constant(_INTS, -65536))):
        total = b.fadd(total, b.fmul(b.bitcast(half(x), _FLOATS), b.bitcast(half(y), _FLOATS)))
    return total


def _vcvtne2ps2bf16(b: Any, high: Any, low: Any) -> Any:
    parts = []
    for bits in (b.bitcast(value, _INTS) for value in (low, high)):
        odd = b.and_(b.lshr(bits, _constant(_INTS, 16)), _constant(_INTS, 1))
        rounded = b.add(bits, b.add(odd, _constant(_INTS, 0x7FFF)))
        parts.append(b.trunc(b.lshr(rounded, _constant(_INTS, 16)), ir.VectorType(_I16, 16)))
    return _joined(b, parts)


def _vpshufb(b: Any, table: Any, indices: Any) -> Any:
    """Within each 16 bytes; a byte whose top bit is set gives 0."""
    parts = []
    for start in range(0, 64, 16):
        quarters = [_lanes(b, value, start, 1, 16) for value in (table, indices)]
        kind = quarters[0].type
        shuffle = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind, kind]), "llvm.x86.ssse3.pshuf.b.128")
        parts.append(b.call(shuffle, quarters))
    return _joined(b, [_joined(b, parts[:2]), _joined(b, parts[2:])])


def _vcompressps(b: Any, value: Any, behind: Any, mask: Any) -> Any:
    result, filled = behind, ir.Constant(_I32, 0)
    for lane in range(16):
        chosen = b.extract_element(mask, ir.Constant(_I32, lane))
        result = b.select(chosen, b.insert_element(result, b.extract_element(value, ir.Constant(_I32, lane)), filled), result)
        filled = b.add(filled, b.zext(chosen, _I32))
    return result


_INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "llvm.x86.avx512.vpdpbusd.256": _vpdpbusd,
    "llvm.x86.avx512.vpdpbusd.512": _vpdpbusd,
    "llvm.x86.avx512.vpdpwssd.256": _vpdpwssd,
    "llvm.x86.avx512.vpdpwssd.512": _vpdpwssd,
    "llvm.x86.avx512.pmaddw.d.512": _vpmaddwd,
    "llvm.x86.avx512.pmul.hr.sw.512": _vpmulhrsw,
    "llvm.x86.avx512bf16.cvtne2ps2bf16.512": _vcvtne2ps2bf16,
    "llvm.x86.avx512bf16.dpbf16ps.512": _vdpbf16ps,
    "llvm.x86.avx512.pshuf.b.512": _vpshufb,
    "llvm.x86.avx512.mask.compress.v16f32": _vcompressps,
}
