"""NVRTC by itself, or nvcc: compiles CUDA C for GPUs that are not here."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class Report(NamedTuple):
    """What ptxas says of a kernel."""

    registers: int
    spilled: int  # bytes
    shared: int  # bytes of static shared memory


@cache
def library() -> Any:
    """NVRTC from its wheel or the system, or None."""
    wheels = [path for root in sys.path for path in Path(root).glob("nvidia/**/lib/libnvrtc.so.*")]
    for name in [*map(str, wheels), "libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"]:
        with suppress(OSError):
            return ctypes.CDLL(name)
    return None


NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@cache
def architectures() -> list[int]:
    """What can be compiled for: times ten; nothing without a compiler."""
    if library() is None:
        if NVCC is None:
            return []
        listed = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        return [int(arch) for arch in re.findall(r"sm_(\d+)$", listed, re.MULTILINE)]
    count = ctypes.c_int()
    library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    values = (ctypes.c_int * count.value)()
    library().nvrtcGetSupportedArchs(values)
    return list(values)


def compile_kernel(source: str, name: str, arch: str, options: tuple[str, ...]) -> Report:
    """Compile to machine code. Raises RuntimeError with the compiler's log."""
    log = _nvrtc_log(source, arch, options) if library() is not None else _nvcc_log(source, arch, options)
    after = log.partition(f"entry function '{name}'")[2]
    if not after:
        raise RuntimeError(f"{name} does not compile for sm_{arch} {options}:\n{log[:4000]}")

    def number(pattern: str) -> int:
        found = re.search(pattern, after)
        return int(found[1]) if found else 0

    return Report(number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes smem"))


def _nvcc_log(source: str, arch: str, options: tuple[str, ...]) -> str:
    assert NVCC is not None
    # nvcc, unlike NVRTC, takes a comma in an option for the start of another option.
    macros = [option[2:].replace("=", " ", 1) for option in options if option.startswith("-D")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text("".join(f"#define {macro}\n" for macro in macros) + source)
        command = [
            NVCC,
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-std=c++17",
            "-Xptxas",
            "-v",
            *(option for option in options if not option.startswith("-D")),
            "-cubin",
            "-o",
            str(path.with_suffix(".cubin")),
            str(path),
        ]
        return subprocess.run(command, capture_output=True, text=True).stderr


def _nvrtc_log(source: str, arch: str, options: tuple[str, ...]) -> str:
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    as_cupy = ("-std=c++17", *options, "-ftz=true", "--device-as-default-execution-space")
    flags = [f"-arch=sm_{arch}", "--ptxas-options=-v", *as_cupy]
    values = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    nvrtc.nvrtcCompileProgram(program, len(flags), values)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode()
