"""Vectors in Numba: sixteen lanes wide in the source, whatever the machine has; and what operations on them are made with.

``f32x16`` and friends are Numba types whose LLVM value is a vector. On AVX-512 an ``f32x16`` is one register; on AVX2 LLVM splits it in
two, on NEON and SSE in four, so that a kernel is written once. Only what LLVM cannot express in general terms (dot products of integers,
look-ups in bytes), or expresses badly (half floats, selected stores), asks which instruction set it compiles for.

`operation` makes a function for kernels of one that emits LLVM instructions. What follows it emits what many of these have in common.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

LANES = 16

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

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_Emit = Callable[..., Any]


def operation(result: types.Type, *parameters: types.Type) -> Callable[[_Emit], Any]:
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


def call(b: Any, name: str, result: Any, *values: Any) -> Any:
    function_type = ir.FunctionType(result, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), values)


def pointer(b: Any, address: Any, llvm_type: Any) -> Any:
    return b.inttoptr(address, llvm_type.as_pointer())


def load(b: Any, address: Any, llvm_type: Any) -> Any:
    value = b.load(pointer(b, address, llvm_type))
    value.align = 1
    return value


def store(b: Any, address: Any, value: Any) -> None:
    b.store(value, pointer(b, address, value.type)).align = 1


def splat(b: Any, scalar: Any, lanes: int = LANES) -> Any:
    vector = ir.VectorType(scalar.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


class _BFloatType(ir.Type):  # type: ignore[misc]
    """LLVM's ``bfloat``, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


BFLOAT = _BFloatType()


def row_address(b, base, stride, t):
    return b.add(base, ir.Constant(I64, stride * t)) if t else base


def constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def halves(b, value):
    half = value.type.count // 2
    return [b.shuffle_vector(value, value, _consecutive(start, half)) for start in (0, half)]


def join(b, parts):
    low, high = parts
    return b.shuffle_vector(low, high, _consecutive(0, 2 * low.type.count))


@functools.cache
def _consecutive(start: int, count: int) -> Any:
    return ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
