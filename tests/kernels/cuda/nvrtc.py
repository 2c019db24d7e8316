"""NVRTC by itself: compiles CUDA C for GPUs that are not here."""

from __future__ import annotations

import ctypes
import re
import sys
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
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def architectures() -> list[int]:
    count = ctypes.c_int()
    library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    values = (ctypes.c_int * count.value)()
    library().nvrtcGetSupportedArchs(values)
    return list(values)


def compile_kernel(source: str, name: str, arch: int, options: tuple[str, ...]) -> Report:
    """Compile to machine code. Raises RuntimeError with the compiler's log."""
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    flags = [f"-arch=sm_{arch}", "-std=c++17", "--ptxas-options=-v", *options]
    values = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    code = nvrtc.nvrtcCompileProgram(program, len(flags), values)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    if code:
        raise RuntimeError(f"NVRTC does not compile {name} for sm_{arch} {options}:\n{text[:4000]}")
    after = text.split(f"entry function '{name}'", 1)[1]

    def number(pattern: str) -> int:
        found = re.search(pattern, after)
        return int(found[1]) if found else 0

    return Report(number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes smem"))
