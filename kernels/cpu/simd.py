"""Numbers and vectors in kernels: loads, stores, arithmetic. Each function becomes one or a few LLVM instructions.

Addresses are plain integers. Loads and stores need no alignment.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .isa import current_isa
from .vectors import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    LANES,
    b1x16,
    call,
    constant,
    f32x16,
    halves,
    i8x64,
    i32x16,
    load,
    operation,
    pointer,
    splat,
    store,
)

_EXP2 = (0.05517153441905975, 0.2426111102104187, 0.6932610273361206, 0.9999280571937561)

# ---- scalars --------------------------------------------------------------------------------------------------------


@operation(types.int64, types.intp)
def load_i64(b, address):
    return load(b, address, I64)


@operation(types.int64, types.intp)
def load_i32(b, address):
    return b.sext(load(b, address, I32), I64)


@operation(types.int64, types.intp)
def load_i8(b, address):
    return b.sext(load(b, address, I8), I64)


@operation(types.int64, types.intp)
def load_u8(b, address):
    return b.zext(load(b, address, I8), I64)


@operation(types.int64, types.intp)
def load_u16(b, address):
    return b.zext(load(b, address, I16), I64)


@operation(types.int64, types.intp)
def load_u32(b, address):
    return b.zext(load(b, address, I32), I64)


@operation(types.float32, types.intp)
def load_f32(b, address):
    return load(b, address, F32)


@operation(types.float64, types.intp)
def load_f64(b, address):
    return load(b, address, F64)


@operation(types.void, types.intp, types.int64)
def store_i64(b, address, value):
    store(b, address, value)


@operation(types.void, types.intp, types.int64)
def store_i32(b, address, value):
    store(b, address, b.trunc(value, I32))


@operation(types.void, types.intp, types.int64)
def store_u16(b, address, value):
    store(b, address, b.trunc(value, I16))


@operation(types.void, types.intp, types.int64)
def store_u8(b, address, value):
    store(b, address, b.trunc(value, I8))


@operation(types.void, types.intp, types.float32)
def store_f32(b, address, value):
    store(b, address, value)


@operation(types.void, types.intp, types.float64)
def store_f64(b, address, value):
    store(b, address, value)


@operation(types.float32, types.int64)
def bits_to_f32(b, bits):
    return b.bitcast(b.trunc(bits, I32), F32)


@operation(types.int64, types.float32)
def f32_to_bits(b, value):
    return b.zext(b.bitcast(value, I32), I64)


def _ask(b, address, locality, writes=0):
    line = pointer(b, address, I8)
    flags = [ir.Constant(I32, flag) for flag in (writes, locality, 1)]
    function_type = ir.FunctionType(ir.VoidType(), [line.type, I32, I32, I32])
    b.call(cgutils.get_or_insert_function(b.module, function_type, "llvm.prefetch.p0"), [line, *flags])


@operation(types.void, types.intp)
def prefetch(b, address):
    """Ask for the cache line at ``address`` (read, keep in all levels)."""
    _ask(b, address, 3)


@operation(types.void, types.intp)
def prefetch_to_l2(b, address):
    """As `prefetch`, but past the first-level cache, which has room for few requests."""
    _ask(b, address, 2)


@operation(types.void, types.intp)
def prefetch_to_write(b, address):
    """Ask for a line that will be written: a core that has read it must give it up first."""
    _ask(b, address, 3, writes=1)


# ---- loads and stores -----------------------------------------------------------------------------------------------


@operation(f32x16, types.intp)
def load_f32x16(b, address):
    return load(b, address, f32x16.llvm)


@operation(i32x16, types.intp)
def load_i32x16(b, address):
    return load(b, address, i32x16.llvm)


@operation(i8x64, types.intp)
def load_i8x64(b, address):
    return load(b, address, i8x64.llvm)


@operation(i32x16, types.intp)
def load_i8x16(b, address):
    """Sixteen signed bytes, widened to int32."""
    return b.sext(load(b, address, ir.VectorType(I8, 16)), i32x16.llvm)


@operation(types.void, types.intp, f32x16)
def store_f32x16(b, address, value):
    store(b, address, value)


@operation(types.void, types.intp, i32x16)
def store_i32x16(b, address, value):
    store(b, address, value)


@operation(types.void, types.intp, i32x16)
def store_i8x16(b, address, value):
    """The low byte of each lane."""
    store(b, address, b.trunc(value, ir.VectorType(I8, 16)))


# ---- making, converting, reducing -----------------------------------------------------------------------------------


@operation(f32x16, types.float32)
def splat_f32(b, value):
    return splat(b, value)


@operation(i32x16, types.int64)
def splat_i32(b, value):
    return splat(b, b.trunc(value, I32))


@operation(i32x16)
def lane_numbers(b):
    """0, 1, ... 15."""
    return ir.Constant(i32x16.llvm, list(range(16)))


@operation(f32x16, i32x16)
def to_f32(b, value):
    return b.sitofp(value, f32x16.llvm)


@operation(i32x16, f32x16)
def round_to_i32(b, value):
    """To the nearest integer, ties to even; the value must fit."""
    return b.fptosi(call(b, "llvm.rint.v16f32", f32x16.llvm, value), i32x16.llvm)


@operation(f32x16, i32x16)
def as_f32(b, value):
    """The same bits, as float32."""
    return b.bitcast(value, f32x16.llvm)


@operation(i32x16, f32x16)
def as_i32(b, value):
    """The same bits, as int32."""
    return b.bitcast(value, i32x16.llvm)


@operation(f32x16, f32x16, f32x16, f32x16)
def fma(b, x, y, z):
    """``x * y + z``, fused where the machine can."""
    return call(b, "llvm.fmuladd.v16f32", f32x16.llvm, x, y, z)


@operation(f32x16, f32x16, f32x16)
def maximum(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@operation(f32x16, f32x16, f32x16)
def minimum(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@operation(f32x16, f32x16)
def absolute(b, x):
    return call(b, "llvm.fabs.v16f32", f32x16.llvm, x)


@operation(f32x16, f32x16)
def sqrt(b, x):
    return call(b, "llvm.sqrt.v16f32", f32x16.llvm, x)


def _reduce(b, value, combine):
    """Fold the upper half onto the lower, four times: one order of operations on every machine.

    The last two times within a vector of four, which LLVM would else take apart into scalars.
    """
    width = LANES
    while width > 4:
        width //= 2
        indices = ir.VectorType(I32, width)
        low = b.shuffle_vector(value, value, ir.Constant(indices, list(range(width))))
        high = b.shuffle_vector(value, value, ir.Constant(indices, list(range(width, 2 * width))))
        value = combine(low, high)
    for order in ([2, 3, 0, 1], [1, 0, 3, 2]):
        value = combine(value, b.shuffle_vector(value, value, ir.Constant(ir.VectorType(I32, 4), order)))
    return b.extract_element(value, ir.Constant(I32, 0))


@operation(types.float32, f32x16)
def first_lane(b, x):
    return b.extract_element(x, ir.Constant(I32, 0))


@operation(types.float32, f32x16)
def peak_lanes(b, x):
    """The largest magnitude; NaN if there is one. As integers, the bits of magnitudes are in their order, and NaN comes last."""
    bits = b.and_(b.bitcast(x, i32x16.llvm), constant(i32x16.llvm, 0x7FFFFFFF))
    return b.bitcast(_reduce(b, bits, lambda low, high: b.select(b.icmp_signed(">", low, high), low, high)), F32)


@operation(f32x16, f32x16, f32x16)
def larger_magnitudes(b, x, y):
    """Of each lane the value of larger magnitude, without its sign; NaN if either is."""
    magnitudes = [b.and_(b.bitcast(value, i32x16.llvm), constant(i32x16.llvm, 0x7FFFFFFF)) for value in (x, y)]
    return b.bitcast(b.select(b.icmp_signed(">", *magnitudes), *magnitudes), f32x16.llvm)


@operation(types.float32, f32x16)
def sum_lanes(b, x):
    return _reduce(b, x, b.fadd)


@operation(types.float32, f32x16)
def max_lanes(b, x):
    return _reduce(b, x, lambda low, high: b.select(b.fcmp_ordered(">", low, high), low, high))


@operation(types.int64, i32x16)
def sum_lanes_i32(b, x):
    return b.sext(_reduce(b, x, b.add), I64)


@operation(f32x16, b1x16, f32x16, f32x16)
def select(b, mask, x, y):
    return b.select(mask, x, y)


@operation(b1x16, i32x16, i32x16)
def less_i32(b, x, y):
    return b.icmp_signed("<", x, y)


@operation(b1x16, f32x16, f32x16)
def greater(b, x, y):
    return b.fcmp_ordered(">", x, y)


@operation(b1x16, f32x16, f32x16)
def at_least(b, x, y):
    return b.fcmp_ordered(">=", x, y)


@operation(b1x16, f32x16, f32x16)
def unordered(b, x, y):
    """Whether one of the two is NaN."""
    return b.fcmp_unordered("uno", x, y)


@operation(b1x16, b1x16, b1x16)
def both(b, x, y):
    return b.and_(x, y)


@operation(b1x16, b1x16, b1x16)
def either(b, x, y):
    return b.or_(x, y)


@operation(types.int64, b1x16)
def mask_bits(b, mask):
    """Bit ``i`` is lane ``i``."""
    return b.zext(b.bitcast(mask, I16), I64)


@operation(b1x16, types.int64)
def bits_mask(b, bits):
    """Lane ``i`` is bit ``i``."""
    return b.bitcast(b.trunc(bits, I16), b1x16.llvm)


@operation(i32x16, i32x16, i32x16)
def in_halves(b, low, high):
    """Lanes of ``low + 65,536 high``."""
    return b.add(low, b.shl(high, constant(i32x16.llvm, 16)))


@operation(types.int64, i32x16)
def pair_sums(b, x):
    """The sum of the lanes 0 and 1 of each four, in the low half; of the lanes 2 and 3 in the high half."""
    half = b.add(*halves(b, x))
    quarter = b.add(*halves(b, half))
    pairs = b.add(quarter, b.shuffle_vector(quarter, quarter, ir.Constant(ir.VectorType(I32, 4), [1, 0, 3, 2])))
    low, high = (b.extract_element(pairs, ir.Constant(I32, lane)) for lane in (0, 2))
    return b.or_(b.zext(low, I64), b.shl(b.zext(high, I64), ir.Constant(I64, 32)))


@operation(types.int64, types.int64)
def hidden(b, x):
    """x, of which LLVM knows nothing: a loop over it is not unrolled, and an address is not made of others."""
    return b.call(ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0"), [x])


@operation(types.int64, types.int64)
def count_trailing_zeros(b, x):
    return b.cttz(x, ir.Constant(ir.IntType(1), 0))


@operation(types.int64, types.int64)
def count_ones(b, x):
    return b.ctpop(x)


@operation(types.void, types.intp, b1x16, f32x16)
def store_selected(b, address, mask, value):
    """The lanes that the mask names, one after another. All 16 floats at ``address`` may be written."""
    if current_isa().has_avx512:
        store(b, address, call(b, "llvm.x86.avx512.mask.compress.v16f32", f32x16.llvm, value, value, mask))
        return
    for lane in range(LANES):
        index = ir.Constant(I32, lane)
        store(b, address, b.extract_element(value, index))
        address = b.add(address, b.shl(b.zext(b.extract_element(mask, index), I64), ir.Constant(I64, 2)))


@operation(f32x16, f32x16)
def exp(b, x):
    """e**x, relative error under 3e-7: 2**n times a polynomial on [-ln2/2, ln2/2] (Cephes expf). Below -87 it is 1e-38, not 0."""
    floats, integers = f32x16.llvm, i32x16.llvm

    def const(number):
        return constant(floats, number)

    def mul_add(p, q, r):
        return call(b, "llvm.fmuladd.v16f32", floats, p, q, r)

    x = b.select(b.fcmp_ordered("<", x, const(-87.0)), const(-87.0), x)
    x = b.select(b.fcmp_ordered(">", x, const(88.0)), const(88.0), x)
    n = call(b, "llvm.rint.v16f32", floats, b.fmul(x, const(1.44269504088896341)))
    r = mul_add(n, const(-0.693359375), x)
    r = mul_add(n, const(2.12194440e-4), r)
    p = const(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = mul_add(p, r, const(coefficient))
    p = mul_add(p, b.fmul(r, r), b.fadd(r, const(1.0)))
    exponent = b.shl(b.add(b.fptosi(n, integers), constant(integers, 127)), constant(integers, 23))
    return b.fmul(p, b.bitcast(exponent, floats))


@operation(f32x16, f32x16)
def exp2(b, x):
    """2**x, relative error under 8e-5; below -126 it is 1e-38, not 0; x must be below 128.

    Adding 1.5 * 2**23 rounds x to an integer and leaves that in the low bits, to be added to the exponent; on what is left, between -1/2
    and 1/2, a polynomial that was fitted for the least relative error.
    """
    floats, integers = f32x16.llvm, i32x16.llvm
    lowest, magic = constant(floats, -126.0), constant(floats, 1.5 * 2**23)
    x = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)  # in this order NaN stays NaN
    shifted = b.fadd(x, magic)
    r = b.fsub(x, b.fsub(shifted, magic))
    p = constant(floats, _EXP2[0])
    for coefficient in _EXP2[1:]:
        p = call(b, "llvm.fmuladd.v16f32", floats, p, r, constant(floats, coefficient))
    exponent = b.shl(b.bitcast(shifted, integers), constant(integers, 23))
    return b.bitcast(b.add(b.bitcast(p, integers), exponent), floats)
