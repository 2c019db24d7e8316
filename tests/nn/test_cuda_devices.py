"""What is missing to use a GPU, said by a driver that answers as it is told."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pymistral import Device, ModelBuilder, ModelDType
from pymistral.builders import load
from pymistral.errors import ModelLoadError
from pymistral.nn import cuda_devices
from pymistral.nn.cuda_devices import cuda_device, cuda_driver, default_cuda_device
from pymistral.nn.cuda_gpu import Gpu


class Driver:
    """libcuda, as far as it is asked."""

    def __init__(self, version: int = 12040, capabilities: tuple[tuple[int, int], ...] = ((9, 0),), error: int = 0) -> None:
        self.version, self.capabilities, self.error = version, capabilities, error

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0

    def cuDriverGetVersion(self, value: Any) -> int:
        value._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, value: Any) -> int:
        value._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        handle._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: Any) -> int:
        name.value = b"Test GPU"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, handle: Any) -> int:
        memory._obj.value = 80 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:
        major, minor = self.capabilities[handle.value]
        value._obj.value = {75: major, 76: minor, 16: 132}[attribute]
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets up a machine with this driver (None: no driver) and these packages of CuPy."""

    def set_up(driver: Driver | None, *packages: str) -> None:
        def library() -> Driver:
            if driver is None:
                raise OSError("libcuda.so.1: cannot open shared object file")
            return driver

        monkeypatch.setattr(cuda_devices, "_library", library)
        monkeypatch.setattr(cuda_devices, "_is_installed", packages.__contains__)
        found = importlib.util.find_spec("json") if packages else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)

    return set_up


def test_a_device_that_can_be_used(machine: Any) -> None:
    machine(Driver(capabilities=((8, 6), (9, 0))), "cupy-cuda12x")
    assert cuda_driver().version == (12, 4)
    device = cuda_device(1)
    assert (device.name, device.capability, device.memory, device.multiprocessors) == ("Test GPU", (9, 0), 80 << 30, 132)
    assert default_cuda_device() == cuda_device(0)


@pytest.mark.parametrize(
    ("driver", "packages", "message"),
    [
        (None, (), r"NVIDIA's driver, and libcuda.so.1 is not installed"),
        (Driver(error=100), (), r"CUDA_ERROR_NO_DEVICE \(100\) to cuInit"),
        (Driver(capabilities=()), (), "shows no device"),
        (Driver(11080), (), "runs CUDA 11.8 at most.*update the driver"),
        (Driver(), (), r"pip install 'pymistral\[cuda12\]'"),
        (Driver(13000), (), r"pip install 'pymistral\[cuda13\]'"),
        (Driver(14000), (), r"pip install 'pymistral\[cuda13\]'"),
        (Driver(13000, ((7, 0),)), (), r"pip install 'pymistral\[cuda12\]'"),
        (Driver(13000, ((7, 0),)), ("cupy-cuda13x",), r"CUDA 13 no longer serves.*cuda12"),
        (Driver(), ("cupy-cuda13x",), r"cupy-cuda13x needs a driver for CUDA 13.*cuda12"),
        (Driver(capabilities=((6, 1),)), ("cupy-cuda12x",), "compute capability 6.1; pymistral needs 7.0"),
    ],
)
def test_what_is_missing(driver: Driver | None, packages: tuple[str, ...], message: str, machine: Any) -> None:
    machine(driver, *packages)
    with pytest.raises(ModelLoadError, match=message):
        cuda_device(0)
    assert default_cuda_device() is None
    with pytest.raises(ModelLoadError, match=message):
        load.choose_device(ModelBuilder("m", device="cuda"))


def test_the_extra_is_there_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy is installed without the wheels of the toolkit."""

    def missing() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so"')

    runtime = SimpleNamespace(runtimeGetVersion=lambda: 12090)
    cuda = SimpleNamespace(nvrtc=SimpleNamespace(getVersion=missing), runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    with pytest.raises(ModelLoadError, match=r"finds no NVRTC.*pip install 'pymistral\[cuda12\]'"):
        Gpu(0)


def test_a_device_that_is_not_there(machine: Any) -> None:
    machine(Driver(), "cupy-cuda12x")
    with pytest.raises(ModelLoadError, match="there is no CUDA device 3; this machine has 0: Test GPU"):
        cuda_device(3)


def test_which_device_a_builder_takes(machine: Any) -> None:
    machine(Driver(), "cupy-cuda12x")
    chosen = load.choose_device(ModelBuilder("m"))
    assert chosen is not None
    assert chosen.index == 0
    assert load.choose_device(ModelBuilder("m").with_device(Device.cuda(0))) == chosen
    for cpu in (ModelBuilder("m").with_force_cpu(), ModelBuilder("m").with_device(Device.cpu()), ModelBuilder("m", device="cpu")):
        assert load.choose_device(cpu) is None
    with pytest.raises(ModelLoadError, match="contradict each other"):
        load.choose_device(ModelBuilder("m", device="cuda:0", force_cpu=True))
    machine(Driver())
    assert load.choose_device(ModelBuilder("m")) is None  # without the extra: the CPU


def test_names_of_devices_and_types() -> None:
    assert ModelBuilder("m", device="cuda:2").device == Device.cuda(2)
    assert str(Device.cuda(2)) == "cuda:2"
    assert str(Device.cpu()) == "cpu"
    assert ModelBuilder("m", dtype="BF16").dtype is ModelDType.BF16
    for wrong in ("gpu", "cpu:1", "cuda:", "cuda:-1", 3):
        with pytest.raises(ModelLoadError, match="device must be"):
            ModelBuilder("m", device=wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="a device is"):
        Device.cuda(-1)
    with pytest.raises(ModelLoadError, match="dtype must be one of 'auto', 'bf16'"):
        ModelBuilder("m", dtype="int8")
