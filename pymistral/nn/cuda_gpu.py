"""A GPU as programs see it: memory by address, copies, launches, and launches captured as a graph. `Gpu` is one through CuPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..kernels.cuda.device import Device
from ..kernels.cuda.launch import Launch
from .pool import available_threads


class GpuLike(Protocol):
    """`Gpu`, or a simulator of one."""

    arch: int
    multiprocessors: int

    def allocate(self, nbytes: int) -> int:
        """The address of zeroed memory that lives as long as this object."""
        ...

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that copies may read and write while Python goes on."""
        ...

    def copy_in(self, target: int, source: NDArray[Any]) -> None:
        """Bring contiguous host memory to an address, in the order of the stream."""
        ...

    def copy_out(self, target: NDArray[Any], source: int) -> None:
        """Bring memory at an address into contiguous host memory, in the order of the stream."""
        ...

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""
        ...

    def capture(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """What runs all of them, in order, when called."""
        ...

    def run(self, launch: Launch) -> None:
        """Run one launch, in the order of the stream."""
        ...

    def free_memory(self) -> int:
        """Bytes that nobody uses."""
        ...


class Gpu:
    """One CUDA device, with a stream of its own. Whatever thread calls it may be another each time, but one at a time."""

    def __init__(self, index: int) -> None:
        import cupy

        try:
            cupy.cuda.nvrtc.getVersion()  # a wheel of its own, which CuPy looks for when it compiles
        except RuntimeError as error:
            major = cupy.cuda.runtime.runtimeGetVersion() // 1000
            message = f"CuPy finds no NVRTC, which compiles the kernels: pip install 'pymistral[cuda{major}]'"
            raise ModelLoadError(message) from error
        self._cupy = cupy
        self._device = cupy.cuda.Device(index)
        try:
            with self._device:
                self._launcher = Device()
                self._stream = cupy.cuda.Stream(non_blocking=True)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise ModelLoadError(f"CUDA device {index} cannot be used: {error}; does nvidia-smi show another program on it?") from error
        self.arch, self.multiprocessors = self._launcher.arch, self._launcher.multiprocessors
        self._alive: list[Any] = []

    def allocate(self, nbytes: int) -> int:
        try:
            with self._device:
                # Past CuPy's pool: what is asked for here is never given back piece by piece. Zeroed in the order of our stream,
                # which does not wait for the default one: zeros must not arrive after the first copy.
                memory = self._cupy.cuda.Memory(max(1, nbytes))
                self._cupy.cuda.runtime.memsetAsync(memory.ptr, 0, memory.size, self._stream.ptr)
        except (self._cupy.cuda.memory.OutOfMemoryError, self._cupy.cuda.runtime.CUDARuntimeError) as error:
            gib, free = nbytes / 2**30, self.free_memory() / 2**30
            raise ModelLoadError(
                f"the GPU has no room for {gib:.2f} GiB ({free:.2f} GiB are free): {error}; take a smaller model or cache"
            ) from error
        self._alive.append(memory)
        return int(memory.ptr)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        with self._device:
            memory = self._cupy.cuda.alloc_pinned_memory(nbytes)
        array: NDArray[np.uint8] = np.frombuffer(memory, np.uint8, nbytes)
        array[:] = 0
        return array

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        with self._device:
            self._cupy.cuda.runtime.memcpyAsync(target, source, nbytes, kind, self._stream.ptr)

    def copy_in(self, target: int, source: NDArray[Any]) -> None:
        self._copy(target, source.ctypes.data, source.nbytes, self._cupy.cuda.runtime.memcpyHostToDevice)

    def copy_out(self, target: NDArray[Any], source: int) -> None:
        self._copy(source=source, target=target.ctypes.data, nbytes=target.nbytes, kind=self._cupy.cuda.runtime.memcpyDeviceToHost)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def run(self, launch: Launch) -> None:
        with self._device, self._stream:
            self._launcher.launch(launch)

    def capture(self, launches: Sequence[Launch]) -> Callable[[], None]:
        self._load(launches)  # nothing may be loaded while a stream is captured
        with self._device, self._stream:
            self._stream.begin_capture()
            try:
                for launch in launches:
                    self._launcher.launch(launch)
            finally:
                graph = self._stream.end_capture()

        def run() -> None:
            with self._device:
                graph.launch(self._stream)

        return run

    def _load(self, launches: Sequence[Launch]) -> None:
        """Compile what must be, a kernel to a thread: it takes a second or two each, and NVRTC leaves Python to others."""

        def load(launch: Launch) -> None:
            with self._device:
                self._launcher.prepare(launch)

        new = {launch.kernel: launch for launch in launches if not self._launcher.has(launch.kernel)}
        with ThreadPoolExecutor(available_threads()) as threads:
            for _ in threads.map(load, new.values()):
                pass
        with self._device:
            for launch in launches:
                self._launcher.prepare(launch)

    def free_memory(self) -> int:
        with self._device:
            return int(self._cupy.cuda.runtime.memGetInfo()[0])
