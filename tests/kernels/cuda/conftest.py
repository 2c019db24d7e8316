"""A GPU for the kernels' tests: the simulator, and with ``-m gpu`` a real one, under the same tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymistral.kernels.cuda import rowwise
from pymistral.kernels.cuda.device import Device
from pymistral.kernels.cuda.launch import Launch
from pymistral.kernels.cuda.operands import Rows
from simulator import COMPILER, Simulator


class Array:
    """An array on the device, at a multiple of 16 bytes."""

    def __init__(self, address: int, owner: Any, get: Any) -> None:
        self.address = address
        self._owner = owner
        self._get = get

    def get(self) -> NDArray[Any]:
        return self._get()


class Gpu:
    """Memory and launches, on a device or in the simulator."""

    def __init__(self, launcher: Simulator | Device) -> None:
        self.launcher = launcher
        self.arch = launcher.arch
        self.alive: list[Any] = []  # what launches are given the address of, until a test ends

    def put(self, values: Any, dtype: Any = None) -> Array:
        source = np.ascontiguousarray(values, dtype)
        if isinstance(self.launcher, Simulator):
            own = source.copy()  # no byte more, so that a sanitizer sees what is read behind it
            assert own.ctypes.data % 16 == 0
            self.alive.append(own)
            return Array(own.ctypes.data, own, own.copy)
        import cupy

        own = cupy.asarray(source)
        self.alive.append(own)
        return Array(own.data.ptr, own, own.get)

    def count(self, value: int) -> Array:
        return self.put(np.array([value], np.int32))

    def rows(self, rows: int, columns: int, forms: str = "f32") -> tuple[Rows, dict[str, Array]]:
        """Room for rows in these forms, filled with what no kernel writes."""
        stride = -(-columns // 32) * 32
        arrays = {}
        if "f32" in forms:
            arrays["f32"] = self.put(np.full((rows, stride), 777.0, np.float32))
        if "q8" in forms:
            arrays["q8"] = self.put(np.full((rows, stride), 77, np.int8))
            arrays["scales"] = self.put(np.full((rows, stride // 32, 2), 777.0, np.float32))
        if "bf16" in forms:
            arrays["bf16"] = self.put(np.full((rows, stride), 0x4442, np.uint16))
        return Rows(stride, **{name: array.address for name, array in arrays.items()}), arrays

    def activations(self, x: NDArray[np.float32]) -> tuple[Rows, dict[str, Array]]:
        """x in every form, made by the device."""
        source = self.put(np.ascontiguousarray(x, np.float32))
        rows, arrays = self.rows(len(x), x.shape[1], "f32 q8 bf16")
        arrays["source"] = source
        if len(x):
            count = self.count(len(x))
            self.run(rowwise.scale(Rows(x.shape[1], source.address), 1.0, x.shape[1], rows, count=count.address, max_rows=len(x)))
        return rows, arrays

    def run(self, *launches: Launch) -> None:
        for launch in launches:
            self.launcher.launch(launch)


@pytest.fixture(scope="session", params=["simulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    if request.param == "simulator":
        if COMPILER is None:
            pytest.skip("g++ is not installed: it compiles the kernels for the simulator")
        yield Gpu(Simulator())
        return
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.cuda.Device().use()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    yield Gpu(Device())


@pytest.fixture(autouse=True)
def _free(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "gpu" in request.fixturenames:
        request.getfixturevalue("gpu").alive.clear()


def tensor_core_gpu(gpu: Gpu) -> None:
    if gpu.arch < 80:
        pytest.skip("this GPU has no bfloat16 tensor cores")
