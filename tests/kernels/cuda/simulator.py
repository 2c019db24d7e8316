"""The CUDA kernels on the host: compiled by g++ against `cuda_on_host.h`, launched through ctypes on NumPy's memory.

`Simulator` runs launches as `pymistral.kernels.cuda.device.Device` does; an address is that of an array.
``PYMISTRAL_CUDA_SANITIZE=1`` compiles with ``-fsanitize=undefined`` and, where its library is loaded into the process, ``address``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pymistral.kernels.cuda.launch import Kernel, Launch, source_text

HEADER = Path(__file__).with_name("cuda_on_host.h")
COMPILER = shutil.which("g++")
_TYPES: dict[str, Any] = {"p": ctypes.c_uint64, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}


def _sanitizers() -> list[str]:
    if os.environ.get("PYMISTRAL_CUDA_SANITIZE", "0") in ("", "0"):
        return []
    address = ["-fsanitize=address"] if "libasan" in os.environ.get("LD_PRELOAD", "") else []
    return ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-g", *address]


class Simulator:
    """Runs launches, one after the other, on the host.

    Attributes
    ----------
    arch, multiprocessors
        Of the GPU that it stands for.
    """

    def __init__(self, arch: int = 90, multiprocessors: int = 4) -> None:
        self.arch = arch
        self.multiprocessors = multiprocessors
        self._functions: dict[Kernel, Any] = {}

    def load(self, kernel: Kernel) -> Any:
        known = self._functions.get(kernel)
        if known is None:
            library = ctypes.CDLL(str(compiled(kernel)))
            signature = getattr(library, f"signature_of_{kernel.name}")
            known = getattr(library, f"launch_{kernel.name}")
            known.restype = signature.restype = ctypes.c_char_p
            if signature() != kernel.arguments.encode():
                raise TypeError(f"{kernel.name} in {kernel.source} takes {signature().decode()}, and is declared as {kernel.arguments}")
            self._functions[kernel] = known
        return known

    def launch(self, launch: Launch) -> None:
        """Run to the end. Raises RuntimeError if its threads wait for what never comes."""
        kernel = launch.kernel
        function = self.load(kernel)
        values = [_TYPES[kind](value) for kind, value in zip(kernel.arguments, launch.arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        error = function(pointers, *launch.grid, launch.block, launch.shared)
        if error:
            raise RuntimeError(f"{kernel.name}: {error.decode()}")


def entry_points(source: str) -> list[str]:
    """The names of a source's kernels; ``ELEMENT`` is the macro that makes some in rows.cu."""
    return re.findall(r'^(?:extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?|ELEMENT\()(\w+)[(,]', source, re.MULTILINE)


def compiled(kernel: Kernel) -> Path:
    """The shared library of all kernels of a source with the same macros, from the cache folder if it is there."""
    assert COMPILER is not None
    text = source_text(kernel.source)
    source = "\n".join([text, *(f"GPU_ENTRY({name})" for name in entry_points(text)), ""])
    flags = ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-include", str(HEADER), *kernel.options, *_sanitizers()]
    key = hashlib.sha256("\0".join([source, HEADER.read_text(), *flags]).encode()).hexdigest()[:24]
    folder = Path(os.environ["PYMISTRAL_CACHE"]) / "cuda-simulator"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kernel.source}-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            file, library = Path(temporary) / "kernel.cpp", Path(temporary) / "kernel.so"
            file.write_text(source)
            done = subprocess.run([COMPILER, *flags, "-o", str(library), str(file)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{COMPILER} does not compile {kernel.source} {kernel.options}:\n{done.stderr[:4000]}")
            library.replace(path)
    return path
