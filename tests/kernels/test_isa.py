"""Every instruction set that this machine can run or emulate, and AArch64's dot products as assembly."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from emulated import ZEN4
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numpy.typing import NDArray
from pymistral.kernels.cpu import geometry, int8_dots, int16_dots, operators, vectors
from pymistral.kernels.cpu.host import Host, current_host
from pymistral.kernels.cpu.isa import _NEEDS, Isa, current_isa

CHECKS = Path(__file__).with_name("isa_checks.py")


def check(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHECKS, *arguments], env={**os.environ, "PYMISTRAL_ISA": isa}, capture_output=True, text=True)


@pytest.mark.parametrize("isa", _NEEDS)
def test_kernels(isa: str) -> None:
    done = check(isa)
    if "this CPU offers" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


@pytest.mark.skipif("avx2" not in current_host().present, reason="this CPU lacks AVX2, of which the emulation is made")
@pytest.mark.parametrize("isa", ["avx512vnni", ZEN4, "avxvnni"])
def test_emulated_kernels(isa: str) -> None:
    """On every machine, so that what is changed on one is found to fail on another."""
    done = check("", isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == isa.split("+")[:1]


@pytest.mark.parametrize("function", operators._FIRST, ids=lambda function: function.__name__)
def test_operators_on_numbers_are_numbas(function: Callable[..., Any]) -> None:
    """Kernels answer first what Numba would answer."""
    context = cpu_target.typing_context
    context.refresh()
    templates = context.resolve_value_type(function).templates
    others = types.Function([template for template in templates if not issubclass(template, operators._FirstTemplate)])
    for arguments, signature in operators._FIRST[function].items():
        if not isinstance(arguments[0], vectors.Vector):
            assert (others.get_call_type(context, arguments, {}).return_type, arguments) == (signature.return_type, signature.args)


@pytest.mark.parametrize("number", [types.int64, types.float32, types.float64], ids=str)
def test_smaller_and_larger(number: Any) -> None:
    """As Python has them, also with NaN."""
    smaller, larger = njit(number(number, number))(lambda x, y: min(x, y)), njit(number(number, number))(lambda x, y: max(x, y))
    values = [-3, 0, 7, -(1 << 62), 1 << 62] if number is types.int64 else [-1.5, -0.0, 0.0, 2.5, np.inf, -np.inf, np.nan]
    for x, y in itertools.product(values, values):
        assert str(smaller(x, y)) == str(min(x, y)), (x, y)
        assert str(larger(x, y)) == str(max(x, y)), (x, y)


def test_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    current_isa.cache_clear()
    monkeypatch.setenv("PYMISTRAL_ISA", "altivec")
    try:
        with pytest.raises(ValueError, match=r"PYMISTRAL_ISA='altivec': this CPU offers .*generic"):
            current_isa()
    finally:
        monkeypatch.undo()
        current_isa.cache_clear()


@pytest.mark.parametrize(("isa", "cpu", "pairs"), [("avx512vnni", "znver4", True), ("avx512vnni", "emeraldrapids", False)])
def test_pairs_of_bfloat16_where_they_are_fast(isa: str, cpu: str, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel's CPUs without AMX multiply floats, and pairs of int16, faster."""
    features = ",".join(f"+{feature}" for feature in (*_NEEDS[isa], "avx512bf16"))
    monkeypatch.setattr("pymistral.kernels.cpu.isa.current_host", lambda: Host(cpu, features, "x86_64-unknown-linux-gnu"))
    monkeypatch.setenv("PYMISTRAL_ISA", isa)
    current_isa.cache_clear()
    try:
        assert current_isa().has_bf16 is pairs
        assert geometry.usual_cache_type() == ("bf16" if pairs else "int16")
    finally:
        current_isa.cache_clear()


NEON = Isa("neon", "generic", "+neon", False, True, False, 4)


def dot_function(emit: Callable[..., Any], triple: str) -> ir.Module:
    """A module with ``dot(total, weights, activations)``, which stores what ``emit(b, total, weights, activations)`` makes."""
    module = ir.Module()
    module.triple = triple
    pointers = [vector.llvm.as_pointer() for vector in (vectors.i32x16, vectors.i8x64, vectors.i8x64)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), "dot")
    b = ir.IRBuilder(function.append_basic_block())
    values = [b.load(argument) for argument in function.args]
    b.store(emit(b, *values), function.args[0])
    b.ret_void()
    return module


@pytest.mark.parametrize(
    ("features", "signed", "instruction"),
    [
        ("+neon,+dotprod,+i8mm", False, "usdot"),
        ("+neon,+dotprod", False, "sdot"),
        ("+neon,+dotprod", True, "sdot"),
        ("+neon", False, "mul"),
    ],
)
def test_dot_product_on_aarch64(features: str, signed: bool, instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows by 4 columns take four instructions of 16 products each."""
    neon = replace(NEON, features=features, has_sdot="dotprod" in features, has_usdot="i8mm" in features)
    monkeypatch.setattr(int8_dots, "current_isa", lambda: neon)
    module = dot_function(functools.partial(int8_dots.dot, signed=signed), "aarch64-unknown-linux-gnu")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(module.triple).create_target_machine(features=features, opt=3)
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    operations = [line.split()[0] for line in assembly.splitlines() if line.strip()]
    if instruction == "mul":
        assert not {"sdot", "usdot"} & set(operations)
        assert len(operations) < 200  # vectors, not one byte after the other
    else:
        assert operations.count(instruction) == 4
        assert len(operations) < 40


@pytest.mark.parametrize("words", [False, True])
def test_dot_product_on_any_cpu(words: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU gets that is neither x86-64 nor has dot products, run on this one."""
    for module in (int8_dots, int16_dots):
        monkeypatch.setattr(module, "current_isa", lambda: NEON)
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 256, 32 if words else 64).astype(np.int16 if words else np.uint8)
    weights[:8] = 255
    activations = rng.integers(*((-32767, 32768) if words else (-127, 128)), len(weights)).astype(np.int16 if words else np.int8)
    total = rng.integers(-(1 << 20), 1 << 20, 16).astype(np.int32)
    wanted = total + (weights.astype(np.int64) * activations).reshape(16, -1).sum(axis=1)

    def emit(b: Any, total: Any, *factors: Any) -> Any:
        if words:
            return int16_dots._dot(b, total, *(b.bitcast(factor, int16_dots.WORDS) for factor in factors))
        return int8_dots.dot(b, total, *factors)

    text = str(dot_function(emit, "aarch64-unknown-linux-gnu")).replace("aarch64-unknown-linux-gnu", llvm.get_process_triple())
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    with llvm.create_mcjit_compiler(llvm.parse_assembly(text), llvm.Target.from_default_triple().create_target_machine()) as engine:
        engine.finalize_object()
        arrays = [aligned(array) for array in (total, weights, activations)]
        ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(engine.get_function_address("dot"))(*(array.ctypes.data for array in arrays))
    assert np.array_equal(arrays[0], wanted)


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy at an address that whole vectors may be loaded from."""
    room = np.zeros(array.nbytes + 64, np.uint8)
    copy = room[-room.ctypes.data % 64 :][: array.nbytes].view(array.dtype)
    copy[:] = array
    return copy
