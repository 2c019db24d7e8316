"""The loader of object files: what LLVM makes of each kind of section, symbol and address, and what is left to LLVM."""

from __future__ import annotations

import ctypes
import logging
import platform
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding as llvm
import pytest
from pymistral.kernels.cpu import elf
from pymistral.kernels.cpu.compiler import CompiledKernel, _Linker, spec

pytestmark = pytest.mark.skipif(not (sys.platform == "linux" and platform.machine() == "x86_64"), reason="for x86-64 Linux")

PROGRAM = """
@constant = internal constant [3 x i64] [i64 100, i64 200, i64 300]
@names = internal constant [6 x i8] c"seven\\00"
@variable = global i64 7
@zeros = global [5000 x i64] zeroinitializer, align 64
@shared = common global i64 0
@pointers = global [2 x i64*] [i64* @variable, i64* getelementptr ([3 x i64], [3 x i64]* @constant, i64 0, i64 2)]

declare double @floor(double)
declare i32 @sched_yield()

define weak i64 @next() noinline {
  %old = load i64, i64* @variable
  %new = add i64 %old, 1
  store i64 %new, i64* @variable
  ret i64 %new
}

define i64 @main(i64 %what, i64 %argument) {
  %table = alloca i64, align 8
  switch i64 %what, label %none [i64 0, label %constants  i64 1, label %count  i64 2, label %through
                                 i64 3, label %external  i64 4, label %writable  i64 5, label %text]
constants:
  %place = getelementptr [3 x i64], [3 x i64]* @constant, i64 0, i64 %argument
  %a = load i64, i64* %place
  ret i64 %a
count:
  %b = call i64 @next()
  ret i64 %b
through:
  %slot = getelementptr [2 x i64*], [2 x i64*]* @pointers, i64 0, i64 %argument
  %pointer = load i64*, i64** %slot
  %c = load i64, i64* %pointer
  ret i64 %c
external:
  %yielded = call i32 @sched_yield()
  %wide = sitofp i64 %argument to double
  %half = fmul double %wide, 0.5
  %low = call double @floor(double %half)
  %d = fptosi double %low to i64
  %e = sext i32 %yielded to i64
  %f = add i64 %d, %e
  ret i64 %f
writable:
  %zero = getelementptr [5000 x i64], [5000 x i64]* @zeros, i64 0, i64 %argument
  %g = load i64, i64* %zero
  store i64 %what, i64* %zero
  %h = load i64, i64* @shared
  store i64 %what, i64* @shared
  %i = add i64 %g, %h
  ret i64 %i
text:
  %letter = getelementptr [6 x i8], [6 x i8]* @names, i64 0, i64 %argument
  %j = load i8, i8* %letter
  %k = zext i8 %j to i64
  ret i64 %k
none:
  ret i64 -1
}
"""


def compiled(source: str, model: str = "large", reloc: str = "static") -> bytes:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel=model, reloc=reloc, opt=2)
    return bytes(machine.emit_object(llvm.parse_assembly(source)))


@pytest.fixture(scope="module")
def program() -> bytes:
    return compiled(PROGRAM)


def function(address: int) -> Callable[[int, int], int]:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)


def check(main: Callable[[int, int], int]) -> None:
    assert [main(0, index) for index in range(3)] == [100, 200, 300]
    assert [main(1, 0), main(1, 0)] == [8, 9]
    assert [main(2, 0), main(2, 1)] == [9, 300]
    assert [main(3, 7), main(3, -7)] == [3, -4]
    assert [main(4, 4999), main(4, 4999), main(4, 0)] == [0, 8, 4]
    assert bytes(main(5, index) for index in range(6)) == b"seven\0"
    assert main(9, 9) == -1


def test_sections_symbols_and_addresses(program: bytes) -> None:
    """Constants, variables, zeros, common symbols, addresses in data, functions of this file and of two libraries."""
    files = [elf.read(program, "main") for _ in range(2)]
    assert {section.access for section in files[0].sections} == set(elf.Access)
    for address in elf.load(files):  # each has its own variables
        check(function(address))


def access_to(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        if begin <= address < end:
            return line.split()[1]
    raise AssertionError(f"{address:#x} is not mapped")


def test_no_page_is_both_written_and_executed(program: bytes) -> None:
    source = "@variable = global i64 7\n@constant = internal constant [2 x i64] [i64 3, i64 4]\n"
    source += "define i64 @main(i64 %what, i64 %index) {\n"
    source += "  %a = ptrtoint i64* @variable to i64\n"
    source += "  %b = ptrtoint [2 x i64]* @constant to i64\n"
    source += "  %which = icmp eq i64 %what, 0\n  %c = select i1 %which, i64 %a, i64 %b\n  ret i64 %c\n}\n"
    (address,) = elf.load([elf.read(compiled(source), "main")])
    assert [access_to(where) for where in (address, function(address)(0, 0), function(address)(1, 0))] == ["r-xp", "rw-p", "r--p"]


REFUSED = {
    "another code model": (PROGRAM, {"model": "small"}, "a relocation of type"),
    "code that may lie anywhere": (PROGRAM, {"reloc": "pic"}, "a relocation of type"),
    "an unknown function": (PROGRAM.replace("@floor", "@no_such_function"), {}, "no library has no_such_function"),
    "variables of threads": (PROGRAM.replace("@variable = global", "@variable = thread_local global"), {}, "with the flags 0x403"),
    "no such function": (PROGRAM.replace("@main", "@other"), {}, "it lacks main"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_left_to_llvm(what: str) -> None:
    source, options, message = REFUSED[what]
    with pytest.raises(elf.Unsupported, match=message):
        elf.read(compiled(source, **options), "main")


@pytest.mark.parametrize(("at", "value"), [(0, 0x7E), (4, 1), (5, 2), (6, 2), (16, 2), (18, 183), (58, 63)])
def test_another_kind_of_file(at: int, value: int, program: bytes) -> None:
    """Magic, 32 bits, big-endian, version, an executable, AArch64, sections of another size."""
    with pytest.raises(elf.Unsupported, match="no relocatable file for x86-64"):
        elf.read(program[:at] + bytes([value]) + program[at + 1 :], "main")


def headers(code: bytes) -> int:
    return int(struct.unpack_from("<Q", code, 40)[0])


def test_a_file_that_ends_early(program: bytes) -> None:
    for size in range(headers(program) + 64):  # the table of sections stands at the end
        with pytest.raises(elf.Unsupported):
            elf.read(program[:size], "main")


def test_a_file_that_contradicts_itself(program: bytes) -> None:
    """Any number in the header and in the tables of sections, symbols and addresses: refused, or loaded within its own memory."""
    table = headers(program)
    sections = [struct.unpack_from("<2I4Q2I2Q", program, at) for at in range(table, len(program), 64)]
    tables = [(table, len(program) - table)] + [(section[4], section[5]) for section in sections if section[1] in (2, 4)]
    places = [*range(64), *(place for start, size in tables for place in range(start, start + size))]
    rng = random.Random(0)
    refused = 0
    for _ in range(4000):
        damaged = bytearray(program)
        at = rng.choice(places)
        number = rng.choice([0, 1, 0xFF, 0xFFFF, 0xFFF2, 0x7FFFFFFF, 1 << 63, (1 << 64) - 1, rng.getrandbits(16)])
        damaged[at : at + 8] = number.to_bytes(8, "little")
        try:
            file = elf.read(bytes(damaged[: len(program)]), "main")
        except elf.Unsupported:
            refused += 1
            continue
        for where, _ in file.relocations:
            assert where.section in file.sections
            assert 0 <= where.offset <= where.section.size - 8
        assert file.entry.section in file.sections
        assert sum(section.size for section in file.sections) < 1 << 26
    assert 1000 < refused < 4000


def test_the_linker_falls_back_to_llvm(caplog: pytest.LogCaptureFixture) -> None:
    """One object file is not simple: LLVM loads them all."""
    caplog.set_level(logging.INFO, "pymistral.kernels")
    source = "@constant = global i64 5\ndefine i64 @main(i64 %a, i64 %b) {\n"
    source += "  %c = load i64, i64* @constant\n  %d = sub i64 %a, %b\n  %e = add i64 %c, %d\n  ret i64 %e\n}\n"
    kernels = []
    for name, reloc in (("simple", "static"), ("other", "pic")):
        own = source.replace("@main", f"@{name}").replace("@constant", f"@constant_of_{name}")
        kernels.append((spec(name), CompiledKernel(name, compiled(own, reloc=reloc))))
    linker = _Linker()
    linker.load(kernels)
    assert "LLVM loads the kernels: a relocation of type" in caplog.text
    assert [function(linker.addresses[kernel])(7, 4) for kernel, _ in kernels] == [8, 8]


@pytest.mark.parametrize("call", ["mmap", "mprotect"])
def test_no_executable_memory(call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, program: bytes) -> None:
    """LLVM may have other means, or says itself what is wrong."""
    caplog.set_level(logging.INFO, "pymistral.kernels")
    original = elf._libc
    refusal = ctypes.c_void_p(-1).value if call == "mmap" else -1
    monkeypatch.setattr(elf, "_libc", lambda name, *types: (lambda *_: refusal) if name == call else original(name, *types))
    linker = _Linker()
    linker.load([(spec("main"), CompiledKernel("main", program))])
    assert "LLVM loads the kernels" in caplog.text
    check(function(linker.addresses[spec("main")]))
