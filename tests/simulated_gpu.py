"""A GPU for tests: the simulator's launches behind the interface that programs use, so that whole models run without one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymistral.kernels.cuda.launch import Launch

from pymistral.nn.cuda_gpu import Gpu, GpuLike

sys.path.append(str(Path(__file__).parent / "kernels" / "cuda"))
from simulator import Simulator


class SimulatedGpu:
    """NumPy's memory and the simulator's launches. Memory is counted, and copies are checked against it."""

    def __init__(self, arch: int = 90, memory: int = 4 << 30) -> None:
        self._simulator = Simulator(arch)
        self.arch, self.multiprocessors = self._simulator.arch, self._simulator.multiprocessors
        self._left = memory
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self.captured = 0

    def allocate(self, nbytes: int) -> int:
        memory = np.zeros(nbytes + 256, np.uint8)
        start = -memory.ctypes.data % 256
        block = memory[start : start + nbytes]
        self._left -= nbytes
        self._blocks[block.ctypes.data] = block
        return block.ctypes.data

    def _part(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        for first, block in self._blocks.items():
            if first <= start and start + nbytes <= first + block.nbytes:
                return block[start - first : start - first + nbytes]
        raise AssertionError(f"{nbytes} bytes at {start:#x} are not the GPU's")

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        memory = np.zeros(nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 64
        return memory[start : start + nbytes]

    def copy_in(self, target: int, source: NDArray[Any]) -> None:
        assert source.flags.c_contiguous
        self._part(target, source.nbytes)[:] = source.reshape(-1).view(np.uint8)

    def copy_out(self, target: NDArray[Any], source: int) -> None:
        assert target.flags.c_contiguous
        target.reshape(-1).view(np.uint8)[:] = self._part(source, target.nbytes)

    def synchronize(self) -> None:
        pass

    def run(self, launch: Launch) -> None:
        self._simulator.launch(launch)

    def capture(self, launches: Sequence[Launch]) -> Callable[[], None]:
        self.captured += 1
        kept = list(launches)

        def run() -> None:
            for launch in kept:
                self._simulator.launch(launch)

        return run

    def free_memory(self) -> int:
        return self._left


def make_gpu(kind: str) -> GpuLike:
    """``gpu``: the real one; else a simulator of that architecture. Skips the test if there is none."""
    if kind == "gpu":
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        try:
            cupy.cuda.Device(0).use()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            pytest.skip(f"no GPU: {error}")
        return Gpu(0)
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: it compiles the kernels for the simulator")
    return SimulatedGpu(int(kind))
