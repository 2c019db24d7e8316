"""Kernels on an NVIDIA GPU: compiled by NVRTC through CuPy (which keeps them on disk), launched on the current stream."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..cpu import cache
from .launch import Kernel, Launch, source_text

logger = logging.getLogger("pymistral.kernels")

_CONVERT: dict[str, Any] = {"p": np.uint64, "i": np.int32, "l": np.int64, "f": np.float32}
_C_TYPES: dict[str, Any] = {"p": ctypes.c_uint64, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}
_OVERLAPS_IN_GRAPHS = 12030  # the driver's CUDA version that captures programmatic dependent launches
_STATIC_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel has without asking
_DIGEST = hashlib.sha256().digest_size


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, for values that are one int."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Configuration(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


_OVERLAP = _Attribute(id=6, value=1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Device:
    """The current CUDA device of this thread.

    Attributes
    ----------
    arch
        Its compute capability times ten: 90 for an H100.
    multiprocessors
        How many it has, which grids are made for.
    """

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        device = cupy.cuda.Device()
        self.arch = int(device.compute_capability)
        self.multiprocessors = int(device.attributes["MultiProcessorCount"])
        self._functions: dict[Kernel, Any] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="pymistral-cuda-")
        self._driver: Any = None  # by which launches may overlap, where the GPU and the driver can
        if self.arch >= 90 and cupy.cuda.runtime.driverGetVersion() >= _OVERLAPS_IN_GRAPHS:
            self._driver = ctypes.CDLL("libcuda.so.1")

    def has(self, kernel: Kernel) -> bool:
        """Whether it need not be compiled any more."""
        return kernel in self._functions

    def load(self, kernel: Kernel) -> Any:
        """The kernel, compiled. Raises ValueError if this GPU does not have its instructions."""
        known = self._functions.get(kernel)
        if known is None:
            if not kernel.runs_on(self.arch):
                needed = f"{kernel.min_arch / 10}" + (" alone" if kernel.only_there else "")
                raise ValueError(f"kernel {kernel.name} is for compute capability {needed}; this GPU has {self.arch / 10}")
            known = self._functions[kernel] = self._module(kernel).get_function(kernel.name)
        return known

    def _module(self, kernel: Kernel) -> Any:
        source, options = source_text(kernel.source), ("-std=c++17", *kernel.options)
        if not kernel.only_there:
            return self._cupy.RawModule(code=source, options=options)
        # CuPy compiles for sm_90, and for sm_90a takes machine code in a file only.
        options = (*options, "-ftz=true", f"-arch=sm_{self.arch}a")
        nvrtc = self._cupy.cuda.nvrtc
        key = hashlib.sha256("\0".join([source, *options, str(nvrtc.getVersion())]).encode()).hexdigest()
        path = Path(self._folder.name) / f"{key}.cubin"
        path.write_bytes(_machine_code(nvrtc, source, options, cache.cache_folder() / f"{kernel.name}-{key[:32]}.cubin"))
        return self._cupy.RawModule(path=str(path))

    def prepare(self, launch: Launch) -> Any:
        """The kernel, loaded and allowed its shared memory."""
        function = self.load(launch.kernel)
        if launch.shared > _STATIC_SHARED and function.max_dynamic_shared_size_bytes < launch.shared:
            function.max_dynamic_shared_size_bytes = launch.shared
        return function

    def launch(self, launch: Launch) -> None:
        """Launch on the current stream. `prepare` first if that stream is being captured.

        From Hopper on, the kernel may start before the one in front of it has ended (common.cuh says how it waits).
        """
        function = self.prepare(launch)
        kinds = zip(launch.kernel.arguments, launch.arguments, strict=True)
        if self._driver is None:
            arguments = tuple(_CONVERT[kind](value) for kind, value in kinds)
            function(launch.grid, (launch.block, 1, 1), arguments, shared_mem=launch.shared)
            return
        values = [_C_TYPES[kind](value) for kind, value in kinds]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = self._cupy.cuda.get_current_stream().ptr
        configuration = _Configuration(launch.grid, (launch.block, 1, 1), launch.shared, stream, ctypes.pointer(_OVERLAP), 1)
        code = self._driver.cuLaunchKernelEx(ctypes.byref(configuration), ctypes.c_void_p(function.kernel.ptr), pointers, None)
        if code:
            raise RuntimeError(f"NVIDIA's driver answers {code} to the launch of {launch.kernel.name} on {launch.grid} x {launch.block}")


def _machine_code(nvrtc: Any, source: str, options: tuple[str, ...], kept_at: Path) -> bytes:
    """From the cache on disk, where its digest comes first, or compiled."""
    try:
        kept = kept_at.read_bytes()
    except OSError:
        kept = b""
    if kept and hashlib.sha256(kept[_DIGEST:]).digest() == kept[:_DIGEST]:
        return kept[_DIGEST:]
    program = nvrtc.createProgram(source, kept_at.name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        code: bytes = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC does not compile {kept_at.name} {options}:\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    try:
        cache.write(kept_at, hashlib.sha256(code).digest() + code)
    except OSError as error:  # a read-only or full disk costs the next start some time, nothing else
        logger.info("compiled kernels cannot be kept in %s: %s", kept_at.parent, error)
    return code
