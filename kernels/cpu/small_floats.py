"""Half floats, bfloat16 and FP8 (E4M3) in memory: loads widen them to float32, stores round."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from .isa import current_isa
from .vectors import BFLOAT, F16, F32, I8, I16, I32, I64, LANES, call, constant, f32x16, i32x16, load, operation, splat, store

# ---- half floats ----------------------------------------------------------------------------------------------------


@operation(f32x16, types.intp)
def load_f16x16(b, address):
    """Sixteen IEEE half floats, widened to float32."""
    return load_halves(b, address)


def load_halves(b, address):
    bits = load(b, address, ir.VectorType(I16, 16))
    if current_isa().has_f16:
        return b.fpext(b.bitcast(bits, ir.VectorType(F16, 16)), f32x16.llvm)
    return _half_to_float(b, bits)


@operation(types.float32, types.intp)
def load_f16(b, address):
    bits = load(b, address, I16)
    if current_isa().has_f16:
        return b.fpext(b.bitcast(bits, F16), F32)
    vector = b.insert_element(ir.Constant(ir.VectorType(I16, 16), ir.Undefined), bits, ir.Constant(I32, 0))
    return b.extract_element(_half_to_float(b, vector), ir.Constant(I32, 0))


@operation(types.void, types.intp, f32x16)
def store_f16x16(b, address, value):
    """Rounded to IEEE half floats, to nearest even."""
    halves = ir.VectorType(F16, 16)
    if current_isa().has_f16:
        store(b, address, b.fptrunc(value, halves))
    else:
        store(b, address, _float_to_half(b, value))


@operation(types.void, types.intp, types.float32)
def store_f16(b, address, value):
    """Rounded to IEEE half, to nearest even."""
    if current_isa().has_f16:
        store(b, address, b.fptrunc(value, F16))
    else:
        store(b, address, b.extract_element(_float_to_half(b, splat(b, value)), ir.Constant(I32, 0)))


def _half_to_float(b, bits):
    """Half to float without F16C: shift the exponent into place and let one multiplication rebias it (subnormals come out right)."""
    integers = i32x16.llvm
    wide = b.zext(bits, integers)
    magnitude = b.shl(b.and_(wide, constant(integers, 0x7FFF)), constant(integers, 13))
    rebias = constant(f32x16.llvm, 2.0**112)
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, f32x16.llvm), rebias), integers)
    infinite = b.icmp_unsigned(">=", magnitude, constant(integers, 0x7C00 << 13))
    scaled = b.or_(scaled, b.select(infinite, constant(integers, 0x7F800000), constant(integers, 0)))
    sign = b.shl(b.and_(wide, constant(integers, 0x8000)), constant(integers, 16))
    return b.bitcast(b.or_(scaled, sign), f32x16.llvm)


def _float_to_half(b, value):
    """Float to half without F16C, to nearest even; what is too large becomes infinity."""
    integers = i32x16.llvm

    def const(number):
        return constant(integers, number)

    bits = b.bitcast(value, integers)
    sign = b.and_(b.lshr(bits, const(16)), const(0x8000))
    magnitude = b.and_(bits, const(0x7FFFFFFF))
    # normal halves: rebias the exponent and round the 13 bits that go
    odd = b.and_(b.lshr(magnitude, const(13)), const(1))
    rounded = b.add(magnitude, b.add(const(0xFFF - (112 << 23)), odd))
    normal = b.lshr(rounded, const(13))
    # subnormal halves: adding 0.5 puts the bits where they belong, rounded by the addition
    half = constant(f32x16.llvm, 0.5)
    small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, f32x16.llvm), half), integers), const(0x3F000000))
    result = b.select(b.icmp_unsigned("<", magnitude, const(113 << 23)), small, normal)
    result = b.select(b.icmp_unsigned(">=", magnitude, const(0x477FF000)), const(0x7C00), result)
    return b.trunc(b.or_(result, sign), ir.VectorType(I16, 16))


# ---- FP8 ------------------------------------------------------------------------------------------------------------


@operation(f32x16, types.intp)
def load_f8x16(b, address):
    """Sixteen FP8 (E4M3), widened to float32. There is no NaN among what we store."""
    return _f8_to_float(b, b.sext(load(b, address, ir.VectorType(I8, 16)), i32x16.llvm))


@operation(types.float32, types.intp)
def load_f8(b, address):
    byte = b.sext(load(b, address, I8), I32)
    return b.extract_element(_f8_to_float(b, splat(b, byte)), ir.Constant(I32, 0))


def _f8_to_float(b, bytes_):
    """Sign, exponent and mantissa go where a float has them; one multiplication rebiases the exponent (subnormals come out right)."""
    bits = b.and_(b.shl(bytes_, constant(i32x16.llvm, 20)), constant(i32x16.llvm, 0x87F00000 - (1 << 32)))
    return b.fmul(b.bitcast(bits, f32x16.llvm), constant(f32x16.llvm, 2.0**120))


@operation(types.void, types.intp, f32x16)
def store_f8x16(b, address, value):
    """Rounded to FP8 (E4M3), to nearest even. No value may round to more than 448."""
    integers = i32x16.llvm

    def const(number):
        return constant(integers, number)

    bits = b.bitcast(value, integers)
    sign = b.and_(b.lshr(bits, const(24)), const(0x80))
    magnitude = b.and_(bits, const(0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, const(20)), const(1))
    normal = b.sub(b.lshr(b.add(magnitude, b.add(odd, const(0x7FFFF))), const(20)), const(120 << 3))
    # subnormals are multiples of 2**-9: adding 2**14 rounds to them, and leaves their number in the low bits
    steps = b.fadd(b.bitcast(magnitude, f32x16.llvm), constant(f32x16.llvm, 2.0**14))
    small = b.and_(b.bitcast(steps, integers), const(0xF))
    result = b.select(b.icmp_unsigned("<", magnitude, const(121 << 23)), small, normal)
    store(b, address, b.trunc(b.or_(result, sign), ir.VectorType(I8, 16)))


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


@operation(f32x16, types.intp)
def load_bf16x16(b, address):
    """Sixteen bfloat16, widened to float32."""
    bits = b.zext(load(b, address, ir.VectorType(I16, 16)), i32x16.llvm)
    return b.bitcast(b.shl(bits, constant(i32x16.llvm, 16)), f32x16.llvm)


@operation(i32x16, types.intp)
def load_bf16_pairs(b, address):
    """Two vectors of sixteen bfloat16, one behind the other, as sixteen pairs of one of each."""
    words = load(b, address, ir.VectorType(I16, 32))
    order = ir.Constant(ir.VectorType(I32, 32), [lane // 2 + lane % 2 * 16 for lane in range(32)])
    return b.bitcast(b.shuffle_vector(words, words, order), i32x16.llvm)


def _round_to_bf16(b, value):
    """The upper 16 bits of each float, rounded to nearest even, in the upper half of an int32."""
    integers = i32x16.llvm
    bits = b.bitcast(value, integers)
    odd = b.and_(b.lshr(bits, constant(integers, 16)), constant(integers, 1))
    return b.add(bits, b.add(odd, constant(integers, 0x7FFF)))


@operation(f32x16, f32x16)
def round_bf16(b, x):
    """To the nearest bfloat16, as float32."""
    integers = i32x16.llvm
    return b.bitcast(b.and_(_round_to_bf16(b, x), constant(integers, -65536)), f32x16.llvm)


@operation(types.void, types.intp, f32x16)
def store_bf16x16(b, address, x):
    """Rounded to bfloat16, to nearest even."""
    high = b.lshr(_round_to_bf16(b, x), constant(i32x16.llvm, 16))
    store(b, address, b.trunc(high, ir.VectorType(I16, 16)))


@operation(types.void, types.intp, f32x16, f32x16)
def store_bf16x32(b, address, low, high):
    """Thirty-two floats, rounded to bfloat16, to nearest even; for CPUs with instructions for it."""
    pairs = call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(BFLOAT, 32), high, low)
    store(b, address, b.bitcast(pairs, i32x16.llvm))


@operation(types.void, types.intp, f32x16, types.int64)
def scatter_bf16x16(b, address, x, stride):
    """Lane ``i``, rounded to bfloat16, goes to ``address + i * stride``."""
    high = b.trunc(b.lshr(_round_to_bf16(b, x), constant(i32x16.llvm, 16)), ir.VectorType(I16, 16))
    for lane in range(LANES):
        store(b, b.add(address, b.mul(stride, ir.Constant(I64, lane))), b.extract_element(high, ir.Constant(I32, lane)))


@operation(types.void, types.intp, f32x16, types.int64)
def scatter_bf16_pairs(b, address, x, stride):
    """Lanes ``2 i`` and ``2 i + 1``, rounded to bfloat16, go to ``address + i * stride``."""
    high = b.trunc(b.lshr(_round_to_bf16(b, x), constant(i32x16.llvm, 16)), ir.VectorType(I16, 16))
    pairs = b.bitcast(high, ir.VectorType(I32, 8))
    for pair in range(LANES // 2):
        store(b, b.add(address, b.mul(stride, ir.Constant(I64, pair))), b.extract_element(pairs, ir.Constant(I32, pair)))
