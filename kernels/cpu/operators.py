"""Operators on vectors and numbers in kernels. Numba knows of them once this is imported, which `pipeline` does."""

from __future__ import annotations

import itertools
import operator
from typing import Any

from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin

from .vectors import Vector, f32x16, i8x64, i32x16


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
