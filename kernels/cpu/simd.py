"""Vectors in Numba: sixteen lanes wide in the source, whatever the machine has.

``f32x16`` and friends are Numba types whose LLVM value is a vector, and each function below is an intrinsic that
becomes one or a few LLVM instructions. On AVX-512 an ``f32x16`` is one register; on AVX2 LLVM splits it in two, on NEON and SSE in
four, so that a kernel is written once. Only what LLVM cannot express in general terms (the int8 dot product) asks which
instruction set it compiles for.

Addresses are plain integers. Loads and stores need no alignment.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from .isa import current_isa

LANES = 16

_EXP2 = (0.05517153441905975, 0.2426111102104187, 0.6932610273361206, 0.9999280571937561)

_ELEMENTS = {
    "f32": ir.FloatType(),
    "i1": ir.IntType(1),
    "i8": ir.IntType(8),
    "i16": ir.IntType(16),
    "i32": ir.IntType(32),
}


class Vector(types.Type):  # type: ignore[misc]
    """A SIMD vector of ``lanes`` elements."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        self.llvm = ir.VectorType(_ELEMENTS[element], lanes)
        super().__init__(name=f"{element}x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


f32x16 = Vector("f32", 16)
i32x16 = Vector("i32", 16)
i8x64 = Vector("i8", 64)
b1x16 = Vector("i1", 16)

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32, _F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_Emit = Callable[..., Any]


def _operation(result: types.Type, *parameters: types.Type) -> Callable[[_Emit], Any]:
    """Make a function for kernels from ``emit(builder, *values)``.

    Numba's `intrinsic` looks for new registrations whenever one is called; this is typed by a look at the number of arguments.
    """
    fixed = signature(result, *parameters)

    def decorate(emit: _Emit) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            value = emit(builder, *values)
            return context.get_dummy_value() if result == types.void else value

        class Template(AbstractTemplate):  # type: ignore[misc]
            key = emit

            def generic(self, arguments: Any, keywords: Any) -> Any:
                return None if keywords or len(arguments) != len(parameters) else fixed

        infer_global(emit, types.Function(Template))
        lower_builtin(emit, *parameters)(codegen)
        return emit

    return decorate


def _call(b: Any, name: str, result: Any, *values: Any) -> Any:
    function_type = ir.FunctionType(result, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), values)


def _pointer(b: Any, address: Any, llvm_type: Any) -> Any:
    return b.inttoptr(address, llvm_type.as_pointer())


def _load(b: Any, address: Any, llvm_type: Any) -> Any:
    value = b.load(_pointer(b, address, llvm_type))
    value.align = 1
    return value


def _store(b: Any, address: Any, value: Any) -> None:
    b.store(value, _pointer(b, address, value.type)).align = 1


def _splat(b: Any, scalar: Any, lanes: int = LANES) -> Any:
    vector = ir.VectorType(scalar.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


class _BFloatType(ir.Type):  # type: ignore[misc]
    """LLVM's ``bfloat``, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


_BFLOAT = _BFloatType()


def _row(b, base, stride, t):
    return b.add(base, ir.Constant(_I64, stride * t)) if t else base


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [value] * vector.count)


# ---- scalars --------------------------------------------------------------------------------------------------------


@_operation(types.int64, types.intp)
def load_i64(b, address):
    return _load(b, address, _I64)


@_operation(types.int64, types.intp)
def load_i32(b, address):
    return b.sext(_load(b, address, _I32), _I64)


@_operation(types.int64, types.intp)
def load_i8(b, address):
    return b.sext(_load(b, address, _I8), _I64)


@_operation(types.int64, types.intp)
def load_u8(b, address):
    return b.zext(_load(b, address, _I8), _I64)


@_operation(types.int64, types.intp)
def load_u16(b, address):
    return b.zext(_load(b, address, _I16), _I64)


@_operation(types.int64, types.intp)
def load_u32(b, address):
    return b.zext(_load(b, address, _I32), _I64)


@_operation(types.float32, types.intp)
def load_f32(b, address):
    return _load(b, address, _F32)


@_operation(types.float64, types.intp)
def load_f64(b, address):
    return _load(b, address, _F64)


@_operation(types.void, types.intp, types.int64)
def store_i64(b, address, value):
    _store(b, address, value)


@_operation(types.void, types.intp, types.int64)
def store_i32(b, address, value):
    _store(b, address, b.trunc(value, _I32))


@_operation(types.void, types.intp, types.int64)
def store_u16(b, address, value):
    _store(b, address, b.trunc(value, _I16))


@_operation(types.void, types.intp, types.int64)
def store_u8(b, address, value):
    _store(b, address, b.trunc(value, _I8))


@_operation(types.void, types.intp, types.float32)
def store_f32(b, address, value):
    _store(b, address, value)


@_operation(types.void, types.intp, types.float64)
def store_f64(b, address, value):
    _store(b, address, value)


@_operation(types.float32, types.int64)
def bits_to_f32(b, bits):
    return b.bitcast(b.trunc(bits, _I32), _F32)


@_operation(types.int64, types.float32)
def f32_to_bits(b, value):
    return b.zext(b.bitcast(value, _I32), _I64)


@_operation(types.void, types.intp)
def prefetch(b, address):
    """Ask for the cache line at ``address`` (read, keep in all levels)."""
    pointer = _pointer(b, address, _I8)
    flags = [ir.Constant(_I32, flag) for flag in (0, 3, 1)]
    function_type = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    b.call(cgutils.get_or_insert_function(b.module, function_type, "llvm.prefetch.p0"), [pointer, *flags])


# ---- loads and stores -----------------------------------------------------------------------------------------------


@_operation(f32x16, types.intp)
def load_f32x16(b, address):
    return _load(b, address, f32x16.llvm)


@_operation(i32x16, types.intp)
def load_i32x16(b, address):
    return _load(b, address, i32x16.llvm)


@_operation(i8x64, types.intp)
def load_i8x64(b, address):
    return _load(b, address, i8x64.llvm)


@_operation(i32x16, types.intp)
def load_i8x16(b, address):
    """Sixteen signed bytes, widened to int32."""
    return b.sext(_load(b, address, ir.VectorType(_I8, 16)), i32x16.llvm)


@_operation(i32x16, types.intp)
def load_u8x16(b, address):
    """Sixteen unsigned bytes, widened to int32."""
    return b.zext(_load(b, address, ir.VectorType(_I8, 16)), i32x16.llvm)


@_operation(f32x16, types.intp)
def load_f16x16(b, address):
    """Sixteen IEEE half floats, widened to float32."""
    return _load_halves(b, address)


def _load_halves(b, address):
    bits = _load(b, address, ir.VectorType(_I16, 16))
    if current_isa().has_f16:
        return b.fpext(b.bitcast(bits, ir.VectorType(_F16, 16)), f32x16.llvm)
    return _half_to_float(b, bits)


@_operation(f32x16, types.intp)
def load_bf16x16(b, address):
    """Sixteen bfloat16, widened to float32."""
    bits = b.zext(_load(b, address, ir.VectorType(_I16, 16)), i32x16.llvm)
    return b.bitcast(b.shl(bits, _constant(i32x16.llvm, 16)), f32x16.llvm)


@_operation(f32x16, types.intp)
def load_f8x16(b, address):
    """Sixteen FP8 (E4M3), widened to float32. There is no NaN among what we store."""
    return _f8_to_float(b, b.sext(_load(b, address, ir.VectorType(_I8, 16)), i32x16.llvm))


@_operation(types.float32, types.intp)
def load_f8(b, address):
    byte = b.sext(_load(b, address, _I8), _I32)
    return b.extract_element(_f8_to_float(b, _splat(b, byte)), ir.Constant(_I32, 0))


def _f8_to_float(b, bytes_):
    """Sign, exponent and mantissa go where a float has them; one multiplication rebiases the exponent (subnormals come out right)."""
    bits = b.and_(b.shl(bytes_, _constant(i32x16.llvm, 20)), _constant(i32x16.llvm, 0x87F00000 - (1 << 32)))
    return b.fmul(b.bitcast(bits, f32x16.llvm), _constant(f32x16.llvm, 2.0**120))


@_operation(types.void, types.intp, f32x16)
def store_f8x16(b, address, value):
    """Rounded to FP8 (E4M3), to nearest even. No value may round to more than 448."""
    integers = i32x16.llvm

    def const(number):
        return _constant(integers, number)

    bits = b.bitcast(value, integers)
    sign = b.and_(b.lshr(bits, const(24)), const(0x80))
    magnitude = b.and_(bits, const(0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, const(20)), const(1))
    normal = b.sub(b.lshr(b.add(magnitude, b.add(odd, const(0x7FFFF))), const(20)), const(120 << 3))
    # subnormals are multiples of 2**-9: adding 2**14 rounds to them, and leaves their number in the low bits
    steps = b.fadd(b.bitcast(magnitude, f32x16.llvm), _constant(f32x16.llvm, 2.0**14))
    small = b.and_(b.bitcast(steps, integers), const(0xF))
    result = b.select(b.icmp_unsigned("<", magnitude, const(121 << 23)), small, normal)
    _store(b, address, b.trunc(b.or_(result, sign), ir.VectorType(_I8, 16)))


@_operation(types.float32, types.intp)
def load_f16(b, address):
    bits = _load(b, address, _I16)
    if current_isa().has_f16:
        return b.fpext(b.bitcast(bits, _F16), _F32)
    vector = b.insert_element(ir.Constant(ir.VectorType(_I16, 16), ir.Undefined), bits, ir.Constant(_I32, 0))
    return b.extract_element(_half_to_float(b, vector), ir.Constant(_I32, 0))


@_operation(types.void, types.intp, f32x16)
def store_f32x16(b, address, value):
    _store(b, address, value)


@_operation(types.void, types.intp, i32x16)
def store_i32x16(b, address, value):
    _store(b, address, value)


@_operation(types.void, types.intp, i32x16)
def store_i8x16(b, address, value):
    """The low byte of each lane."""
    _store(b, address, b.trunc(value, ir.VectorType(_I8, 16)))


@_operation(types.void, types.intp, f32x16)
def store_f16x16(b, address, value):
    """Rounded to IEEE half floats, to nearest even."""
    halves = ir.VectorType(_F16, 16)
    if current_isa().has_f16:
        _store(b, address, b.fptrunc(value, halves))
    else:
        _store(b, address, _float_to_half(b, value))


@_operation(types.void, types.intp, types.float32)
def store_f16(b, address, value):
    """Rounded to IEEE half, to nearest even."""
    if current_isa().has_f16:
        _store(b, address, b.fptrunc(value, _F16))
    else:
        _store(b, address, b.extract_element(_float_to_half(b, _splat(b, value)), ir.Constant(_I32, 0)))


def _half_to_float(b, bits):
    """Half to float without F16C: shift the exponent into place and let one multiplication rebias it (subnormals come out right)."""
    integers = i32x16.llvm
    wide = b.zext(bits, integers)
    magnitude = b.shl(b.and_(wide, _constant(integers, 0x7FFF)), _constant(integers, 13))
    rebias = _constant(f32x16.llvm, 2.0**112)
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, f32x16.llvm), rebias), integers)
    infinite = b.icmp_unsigned(">=", magnitude, _constant(integers, 0x7C00 << 13))
    scaled = b.or_(scaled, b.select(infinite, _constant(integers, 0x7F800000), _constant(integers, 0)))
    sign = b.shl(b.and_(wide, _constant(integers, 0x8000)), _constant(integers, 16))
    return b.bitcast(b.or_(scaled, sign), f32x16.llvm)


def _float_to_half(b, value):
    """Float to half without F16C, to nearest even; what is too large becomes infinity."""
    integers = i32x16.llvm

    def const(number):
        return _constant(integers, number)

    bits = b.bitcast(value, integers)
    sign = b.and_(b.lshr(bits, const(16)), const(0x8000))
    magnitude = b.and_(bits, const(0x7FFFFFFF))
    # normal halves: rebias the exponent and round the 13 bits that go
    odd = b.and_(b.lshr(magnitude, const(13)), const(1))
    rounded = b.add(magnitude, b.add(const(0xFFF - (112 << 23)), odd))
    normal = b.lshr(rounded, const(13))
    # subnormal halves: adding 0.5 puts the bits where they belong, rounded by the addition
    half = _constant(f32x16.llvm, 0.5)
    small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, f32x16.llvm), half), integers), const(0x3F000000))
    result = b.select(b.icmp_unsigned("<", magnitude, const(113 << 23)), small, normal)
    result = b.select(b.icmp_unsigned(">=", magnitude, const(0x477FF000)), const(0x7C00), result)
    return b.trunc(b.or_(result, sign), ir.VectorType(_I16, 16))


# ---- making, converting, reducing -----------------------------------------------------------------------------------


@_operation(f32x16, types.float32)
def splat_f32(b, value):
    return _splat(b, value)


@_operation(i32x16, types.int64)
def splat_i32(b, value):
    return _splat(b, b.trunc(value, _I32))


@_operation(i8x64, types.intp)
def splat_bytes(b, address):
    """The four bytes at ``address``, sixteen times."""
    return b.bitcast(_splat(b, _load(b, address, _I32)), i8x64.llvm)


@_operation(i32x16)
def lane_numbers(b):
    """0, 1, ... 15."""
    return ir.Constant(i32x16.llvm, list(range(16)))


@_operation(f32x16, i32x16)
def to_f32(b, value):
    return b.sitofp(value, f32x16.llvm)


@_operation(i32x16, f32x16)
def round_to_i32(b, value):
    """To the nearest integer, ties to even; the value must fit."""
    return b.fptosi(_call(b, "llvm.rint.v16f32", f32x16.llvm, value), i32x16.llvm)


@_operation(f32x16, i32x16)
def as_f32(b, value):
    """The same bits, as float32."""
    return b.bitcast(value, f32x16.llvm)


@_operation(i32x16, f32x16)
def as_i32(b, value):
    """The same bits, as int32."""
    return b.bitcast(value, i32x16.llvm)


@_operation(f32x16, f32x16, f32x16, f32x16)
def fma(b, x, y, z):
    """``x * y + z``, fused where the machine can."""
    return _call(b, "llvm.fmuladd.v16f32", f32x16.llvm, x, y, z)


@_operation(f32x16, f32x16, f32x16)
def maximum(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@_operation(f32x16, f32x16, f32x16)
def minimum(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@_operation(f32x16, f32x16)
def absolute(b, x):
    return _call(b, "llvm.fabs.v16f32", f32x16.llvm, x)


@_operation(f32x16, f32x16)
def sqrt(b, x):
    return _call(b, "llvm.sqrt.v16f32", f32x16.llvm, x)


def _reduce(b, value, combine):
    """Fold the upper half onto the lower, four times: one order of operations on every machine."""
    width = LANES
    while width > 1:
        width //= 2
        indices = ir.VectorType(_I32, width)
        low = b.shuffle_vector(value, value, ir.Constant(indices, list(range(width))))
        high = b.shuffle_vector(value, value, ir.Constant(indices, list(range(width, 2 * width))))
        value = combine(low, high)
    return b.extract_element(value, ir.Constant(_I32, 0))


@_operation(types.float32, f32x16)
def first_lane(b, x):
    return b.extract_element(x, ir.Constant(_I32, 0))


@_operation(types.float32, f32x16)
def peak_lanes(b, x):
    """The largest magnitude; NaN if there is one. As integers, the bits of magnitudes are in their order, and NaN comes last."""
    bits = b.and_(b.bitcast(x, i32x16.llvm), _constant(i32x16.llvm, 0x7FFFFFFF))
    return b.bitcast(_reduce(b, bits, lambda low, high: b.select(b.icmp_signed(">", low, high), low, high)), _F32)


@_operation(f32x16, f32x16, f32x16)
def larger_magnitudes(b, x, y):
    """Of each lane the value of larger magnitude, without its sign; NaN if either is."""
    magnitudes = [b.and_(b.bitcast(value, i32x16.llvm), _constant(i32x16.llvm, 0x7FFFFFFF)) for value in (x, y)]
    return b.bitcast(b.select(b.icmp_signed(">", *magnitudes), *magnitudes), f32x16.llvm)


@_operation(types.float32, f32x16)
def sum_lanes(b, x):
    return _reduce(b, x, b.fadd)


@_operation(types.float32, f32x16)
def max_lanes(b, x):
    return _reduce(b, x, lambda low, high: b.select(b.fcmp_ordered(">", low, high), low, high))


@_operation(types.int64, i32x16)
def sum_lanes_i32(b, x):
    return b.sext(_reduce(b, x, b.add), _I64)


@_operation(f32x16, b1x16, f32x16, f32x16)
def select(b, mask, x, y):
    return b.select(mask, x, y)


@_operation(b1x16, i32x16, i32x16)
def less_i32(b, x, y):
    return b.icmp_signed("<", x, y)


@_operation(b1x16, f32x16, f32x16)
def greater(b, x, y):
    return b.fcmp_ordered(">", x, y)


@_operation(b1x16, f32x16, f32x16)
def at_least(b, x, y):
    return b.fcmp_ordered(">=", x, y)


@_operation(b1x16, f32x16, f32x16)
def unordered(b, x, y):
    """Whether one of the two is NaN."""
    return b.fcmp_unordered("uno", x, y)


@_operation(b1x16, b1x16, b1x16)
def both(b, x, y):
    return b.and_(x, y)


@_operation(b1x16, b1x16, b1x16)
def either(b, x, y):
    return b.or_(x, y)


@_operation(types.int64, b1x16)
def mask_bits(b, mask):
    """Bit ``i`` is lane ``i``."""
    return b.zext(b.bitcast(mask, _I16), _I64)


@_operation(b1x16, types.int64)
def bits_mask(b, bits):
    """Lane ``i`` is bit ``i``."""
    return b.bitcast(b.trunc(bits, _I16), b1x16.llvm)


@_operation(types.int64, i32x16)
def pair_sums(b, x):
    """The sum of the lanes 0 and 1 of each four, in the low half; of the lanes 2 and 3 in the high half."""
    half = b.add(*_halves(b, x))
    quarter = b.add(*_halves(b, half))
    pairs = b.add(quarter, b.shuffle_vector(quarter, quarter, ir.Constant(ir.VectorType(_I32, 4), [1, 0, 3, 2])))
    low, high = (b.extract_element(pairs, ir.Constant(_I32, lane)) for lane in (0, 2))
    return b.or_(b.zext(low, _I64), b.shl(b.zext(high, _I64), ir.Constant(_I64, 32)))


@_operation(types.int64, types.int64)
def hidden(b, x):
    """x, of which LLVM knows nothing: a loop over it is not unrolled."""
    return b.call(ir.InlineAsm(ir.FunctionType(_I64, [_I64]), "", "=r,0"), [x])


@_operation(types.int64, types.int64)
def count_trailing_zeros(b, x):
    return b.cttz(x, ir.Constant(ir.IntType(1), 0))


@_operation(types.int64, types.int64)
def count_ones(b, x):
    return b.ctpop(x)


@_operation(types.void, types.intp, b1x16, f32x16)
def store_selected(b, address, mask, value):
    """The lanes that the mask names, one after another. All 16 floats at ``address`` may be written."""
    if current_isa().has_avx512:
        _store(b, address, _call(b, "llvm.x86.avx512.mask.compress.v16f32", f32x16.llvm, value, value, mask))
        return
    for lane in range(LANES):
        index = ir.Constant(_I32, lane)
        _store(b, address, b.extract_element(value, index))
        address = b.add(address, b.shl(b.zext(b.extract_element(mask, index), _I64), ir.Constant(_I64, 2)))


@_operation(f32x16, f32x16)
def exp(b, x):
    """e**x, relative error under 3e-7: 2**n times a polynomial on [-ln2/2, ln2/2] (Cephes expf). Below -87 it is 1e-38, not 0."""
    floats, integers = f32x16.llvm, i32x16.llvm

    def const(number):
        return _constant(floats, number)

    def mul_add(p, q, r):
        return _call(b, "llvm.fmuladd.v16f32", floats, p, q, r)

    x = b.select(b.fcmp_ordered("<", x, const(-87.0)), const(-87.0), x)
    x = b.select(b.fcmp_ordered(">", x, const(88.0)), const(88.0), x)
    n = _call(b, "llvm.rint.v16f32", floats, b.fmul(x, const(1.44269504088896341)))
    r = mul_add(n, const(-0.693359375), x)
    r = mul_add(n, const(2.12194440e-4), r)
    p = const(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = mul_add(p, r, const(coefficient))
    p = mul_add(p, b.fmul(r, r), b.fadd(r, const(1.0)))
    exponent = b.shl(b.add(b.fptosi(n, integers), _constant(integers, 127)), _constant(integers, 23))
    return b.fmul(p, b.bitcast(exponent, floats))


@_operation(f32x16, f32x16)
def exp2(b, x):
    """2**x, relative error under 8e-5; below -126 it is 1e-38, not 0; x must be below 128.

    Adding 1.5 * 2**23 rounds x to an integer and leaves that in the low bits, to be added to the exponent; on what is left, between -1/2
    and 1/2, a polynomial that was fitted for the least relative error.
    """
    floats, integers = f32x16.llvm, i32x16.llvm
    lowest, magic = _constant(floats, -126.0), _constant(floats, 1.5 * 2**23)
    x = b.select(b.fcmp_ordered(">", x, lowest), x, lowest)
    shifted = b.fadd(x, magic)
    r = b.fsub(x, b.fsub(shifted, magic))
    p = _constant(floats, _EXP2[0])
    for coefficient in _EXP2[1:]:
        p = _call(b, "llvm.fmuladd.v16f32", floats, p, r, _constant(floats, coefficient))
    exponent = b.shl(b.bitcast(shifted, integers), _constant(integers, 23))
    return b.bitcast(b.add(b.bitcast(p, integers), exponent), floats)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def _shift_bytes(b, value, right):
    """Shift each byte; bits that cross into a neighbour are the caller's to mask."""
    words = ir.VectorType(_I16, 32)
    value = b.bitcast(value, words)
    if right > 0:
        value = b.lshr(value, _constant(words, right))
    elif right < 0:
        value = b.shl(value, _constant(words, -right))
    return b.bitcast(value, i8x64.llvm)


@_operation(i8x64, i8x64)
def low_nibbles(b, value):
    return b.and_(value, _constant(i8x64.llvm, 15))


@_operation(i8x64, i8x64)
def high_nibbles(b, value):
    return b.and_(_shift_bytes(b, value, 4), _constant(i8x64.llvm, 15))


@intrinsic(prefer_literal=True)
def take_bits(typing_context, value, start, count, at):
    """Of each byte, ``count`` bits from bit ``start``, moved to bit ``at``; all three are literals."""

    def codegen(context, b, sig, values):
        first, bits, target = (number.literal_value for number in sig.args[1:])
        shifted = _shift_bytes(b, values[0], first - target)
        return b.and_(shifted, _constant(i8x64.llvm, ((1 << bits) - 1) << target))

    return i8x64(i8x64, start, count, at), codegen


def _look_up(b, indices, values):
    """``values[index]`` for each of 64 bytes; up to sixteen values, constants from 0 to 255."""
    isa = current_isa()
    table = ir.Constant(i8x64.llvm, [*values, *[0] * (16 - len(values))] * 4)
    if isa.has_avx512:
        return _call(b, "llvm.x86.avx512.pshuf.b.512", i8x64.llvm, table, indices)
    if isa.name.startswith("avx"):
        return _join(
            b, [_call(b, "llvm.x86.avx2.pshuf.b", t.type, t, i) for t, i in zip(_halves(b, table), _halves(b, indices), strict=True)]
        )
    result = _constant(i8x64.llvm, 0)
    for index, value in enumerate(values):
        hit = b.icmp_unsigned("==", indices, _constant(i8x64.llvm, index))
        result = b.select(hit, _constant(i8x64.llvm, value), result)
    return result


def _halves(b, value):
    half = value.type.count // 2
    return [b.shuffle_vector(value, value, _consecutive(start, half)) for start in (0, half)]


def _join(b, parts):
    low, high = parts
    return b.shuffle_vector(low, high, _consecutive(0, 2 * low.type.count))


@functools.cache
def _consecutive(start: int, count: int) -> Any:
    return ir.Constant(ir.VectorType(_I32, count), list(range(start, start + count)))


# ---- bfloat16 pairs ------------------------------------------------------------------------------------------------


def _round_to_bf16(b, value):
    """The upper 16 bits of each float, rounded to nearest even, in the upper half of an int32."""
    integers = i32x16.llvm
    bits = b.bitcast(value, integers)
    odd = b.and_(b.lshr(bits, _constant(integers, 16)), _constant(integers, 1))
    return b.add(bits, b.add(odd, _constant(integers, 0x7FFF)))


@_operation(f32x16, f32x16)
def round_bf16(b, x):
    """To the nearest bfloat16, as float32."""
    integers = i32x16.llvm
    return b.bitcast(b.and_(_round_to_bf16(b, x), _constant(integers, -65536)), f32x16.llvm)


@_operation(types.void, types.intp, f32x16)
def store_bf16x16(b, address, x):
    """Rounded to bfloat16, to nearest even."""
    high = b.lshr(_round_to_bf16(b, x), _constant(i32x16.llvm, 16))
    _store(b, address, b.trunc(high, ir.VectorType(_I16, 16)))


@_operation(types.void, types.intp, f32x16, types.int64)
def scatter_bf16x16(b, address, x, stride):
    """Lane ``i``, rounded to bfloat16, goes to ``address + i * stride``."""
    high = b.trunc(b.lshr(_round_to_bf16(b, x), _constant(i32x16.llvm, 16)), ir.VectorType(_I16, 16))
    for lane in range(LANES):
        _store(b, b.add(address, b.mul(stride, ir.Constant(_I64, lane))), b.extract_element(high, ir.Constant(_I32, lane)))


@_operation(types.void, types.intp, f32x16, types.int64)
def scatter_bf16_pairs(b, address, x, stride):
    """Lanes ``2 i`` and ``2 i + 1``, rounded to bfloat16, go to ``address + i * stride``."""
    high = b.trunc(b.lshr(_round_to_bf16(b, x), _constant(i32x16.llvm, 16)), ir.VectorType(_I16, 16))
    pairs = b.bitcast(high, ir.VectorType(_I32, 8))
    for pair in range(LANES // 2):
        _store(b, b.add(address, b.mul(stride, ir.Constant(_I64, pair))), b.extract_element(pairs, ir.Constant(_I32, pair)))


# ---- operators ------------------------------------------------------------------------------------------------------


class _FirstTemplate(AbstractTemplate):  # type: ignore[misc]
    """An operator on the types that kernels use, which is asked before the many that Numba has for all types: it names its target."""

    metadata = {"target": "cpu"}  # noqa: RUF012
    results: dict[tuple[types.Type, ...], Any]

    def generic(self, arguments: Any, keywords: Any) -> Any:
        return self.results.get(arguments)


def _results(function: Any) -> dict[tuple[types.Type, ...], Any]:
    """By the types of its arguments, what the operator gives."""
    if function not in _FIRST:
        _FIRST[function] = {}
        infer_global(function)(type("Template", (_FirstTemplate,), {"results": _FIRST[function]}))
    return _FIRST[function]


_FIRST: dict[Any, dict[tuple[types.Type, ...], Any]] = {}


def _operator(function: Any, vector: Vector, method: str) -> None:
    _results(function)[vector, vector] = signature(vector, vector, vector)

    @lower_builtin(function, vector, vector)
    def _lower(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        return getattr(builder, method)(*values)


for _function, _method in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _operator(_function, f32x16, _method)
for _function, _method in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.mul, "mul"),
    (operator.and_, "and_"),
    (operator.or_, "or_"),
):
    _operator(_function, i32x16, _method)
for _function, _method in ((operator.and_, "and_"), (operator.or_, "or_")):
    _operator(_function, i8x64, _method)

# Numbers: Numba's own operators and results, found at once.
_INTEGERS, _FLOATS = (types.int64, types.uint64), (types.float32, types.float64)
_ARITHMETIC = ("add", "sub", "mul")
_BITWISE = ("and_", "or_", "xor", "lshift", "rshift")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
for _numbers, _names in (
    (_INTEGERS, (*_ARITHMETIC, *_BITWISE, "floordiv", "mod", *_COMPARISONS)),
    (_FLOATS, (*_ARITHMETIC, "truediv", *_COMPARISONS)),
):
    for _name, _number in itertools.product(_names, _numbers):
        _sig = signature(types.boolean if _name in _COMPARISONS else _number, _number, _number)
        _results(getattr(operator, _name))[_number, _number] = _sig
        if _name not in _COMPARISONS:
            _results(getattr(operator, f"i{_name.rstrip('_')}"))[_number, _number] = _sig
for _type in (types.boolean, *_INTEGERS, *_FLOATS):
    _results(bool)[(_type,)] = signature(types.boolean, _type)


def _smaller_or_larger(function: Any, number: types.Type, comparison: str) -> None:
    """`min` or `max` of two numbers as Numba has it: the second, if it is beyond the first. Numba compiles a function to do so."""
    _results(function)[number, number] = signature(number, number, number)

    @lower_builtin(function, number, number)
    def _lower(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        x, y = values
        compare = builder.icmp_signed if number is types.int64 else builder.fcmp_ordered
        return builder.select(compare(comparison, y, x), y, x)


for _number in (types.int64, *_FLOATS):
    _smaller_or_larger(min, _number, "<")
    _smaller_or_larger(max, _number, ">")
