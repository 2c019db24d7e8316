"""Kernels on an NVIDIA GPU: compiled by NVRTC through CuPy (which keeps them on disk), launched on the current stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from .launch import Kernel, Launch, source_text

_CONVERT: dict[str, Any] = {"p": np.uint64, "i": np.int32, "l": np.int64, "f": np.float32}
_STATIC_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel has without asking


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

    def load(self, kernel: Kernel) -> Any:
        """The kernel, compiled. Raises ValueError if this GPU is too old for it."""
        known = self._functions.get(kernel)
        if known is None:
            if self.arch < kernel.min_arch:
                raise ValueError(f"kernel {kernel.name} needs compute capability {kernel.min_arch / 10}; this GPU has {self.arch / 10}")
            module = self._cupy.RawModule(code=source_text(kernel.source), options=("-std=c++17", *kernel.options))
            known = self._functions[kernel] = module.get_function(kernel.name)
        return known

    def prepare(self, launch: Launch) -> Any:
        """The kernel, loaded and allowed its shared memory."""
        function = self.load(launch.kernel)
        if launch.shared > _STATIC_SHARED and function.max_dynamic_shared_size_bytes < launch.shared:
            function.max_dynamic_shared_size_bytes = launch.shared
        return function

    def launch(self, launch: Launch) -> None:
        """Launch on the current stream. `prepare` first if that stream is being captured."""
        function = self.prepare(launch)
        arguments = tuple(_CONVERT[kind](value) for kind, value in zip(launch.kernel.arguments, launch.arguments, strict=True))
        function(launch.grid, (launch.block, 1, 1), arguments, shared_mem=launch.shared)
