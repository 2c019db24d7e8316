"""Every instruction set that this machine can run or emulate, and AArch64's dot products as assembly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest
from llvmlite import ir
from pymistral.kernels.cpu import int8_dots, simd
from pymistral.kernels.cpu.isa import _NEEDS, Isa, current_isa

CHECKS = Path(__file__).with_name("isa_checks.py")


def check(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHECKS, *arguments], env={**os.environ, "PYMISTRAL_ISA": isa}, capture_output=True, text=True)


@pytest.mark.parametrize("isa", _NEEDS)
def test_kernels(isa: str) -> None:
    done = check(isa)
    if "this CPU offers" in done.stderr:
        if isa not in ("avx512vnni", "avxvnni") or "avx2" not in done.stderr:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        done = check("", isa)  # emulated
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


def test_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    current_isa.cache_clear()
    monkeypatch.setenv("PYMISTRAL_ISA", "altivec")
    try:
        with pytest.raises(ValueError, match=r"PYMISTRAL_ISA='altivec': this CPU offers .*generic"):
            current_isa()
    finally:
        monkeypatch.undo()
        current_isa.cache_clear()


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
    neon = Isa("neon", "generic", features, False, True, False, 4, has_sdot="dotprod" in features, has_usdot="i8mm" in features)
    monkeypatch.setattr(int8_dots, "current_isa", lambda: neon)
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    pointers = [vector.llvm.as_pointer() for vector in (simd.i32x16, simd.i8x64, simd.i8x64)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), "dot")
    b = ir.IRBuilder(function.append_basic_block())
    total, weights, activations = (b.load(argument) for argument in function.args)
    b.store(int8_dots.dot(b, total, weights, activations, signed=signed), function.args[0])
    b.ret_void()
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
