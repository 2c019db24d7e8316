"""The CUDA devices of this machine, and what is missing to use them. The driver alone is asked; nothing here needs the extras."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

from ..errors import ModelLoadError

OLDEST_CAPABILITY = (7, 0)  # Volta: the first with tensor cores, and with threads of a warp that may diverge
_OLDEST_OF_13 = (7, 5)  # that CUDA 13 serves
_CUPY = {"cupy-cuda12x": 12, "cupy-cuda13x": 13}  # what the extras install -> CUDA's major version
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16  # CUdevice_attribute


@dataclass(frozen=True)
class CudaDevice:
    """A GPU as the driver describes it; ``memory`` in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int


@dataclass(frozen=True)
class CudaDriver:
    """The driver: the newest CUDA that it runs, as (major, minor), and its devices."""

    version: tuple[int, int]
    devices: tuple[CudaDevice, ...]


def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def cuda_driver() -> CudaDriver:
    """Ask the driver. Raises ModelLoadError if there is none, or it shows no device."""
    try:
        library = _library()
    except OSError:
        problem = "CUDA needs NVIDIA's driver, and libcuda.so.1 is not installed"
        raise ModelLoadError(problem, "; without a GPU, use Device.cpu()") from None

    def ask(function: str, *arguments: Any) -> None:
        code = getattr(library, function)(*arguments)
        if code:
            name = ctypes.c_char_p()
            library.cuGetErrorName(code, ctypes.byref(name))
            raise ModelLoadError(
                f"NVIDIA's driver answers {(name.value or b'?').decode()} ({code}) to {function}: does nvidia-smi show a GPU?"
            )

    ask("cuInit", 0)
    value = ctypes.c_int()
    ask("cuDriverGetVersion", ctypes.byref(value))
    version = value.value // 1000, value.value % 1000 // 10
    ask("cuDeviceGetCount", ctypes.byref(value))
    devices = []
    for index in range(value.value):
        handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        ask("cuDeviceGet", ctypes.byref(handle), index)
        ask("cuDeviceGetName", name, 256, handle)
        ask("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
        attributes = []
        for attribute in (_MAJOR, _MINOR, _MULTIPROCESSORS):
            ask("cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
            attributes.append(value.value)
        major, minor, multiprocessors = attributes
        devices.append(CudaDevice(index, name.value.decode(errors="replace"), (major, minor), memory.value, multiprocessors))
    return CudaDriver(version, tuple(devices))


def cuda_device(index: int) -> CudaDevice:
    """The device of this number, if all that it takes to use it is there.

    Raises
    ------
    ModelLoadError
        The driver, the extra or the device is missing, or one of them is too old for another.
    """
    driver = cuda_driver()
    major, minor = driver.version
    if major < 12:
        raise ModelLoadError(f"NVIDIA's driver runs CUDA {major}.{minor} at most; pymistral needs 12.0: update the driver to 525 or later")
    if not driver.devices:
        raise ModelLoadError("NVIDIA's driver shows no device: is CUDA_VISIBLE_DEVICES empty?")
    if index >= len(driver.devices):
        known = ", ".join(f"{device.index}: {device.name}" for device in driver.devices)
        raise ModelLoadError(f"there is no CUDA device {index}; this machine has {known}")
    device = driver.devices[index]
    if device.capability < OLDEST_CAPABILITY:
        found, needed = (".".join(map(str, capability)) for capability in (device.capability, OLDEST_CAPABILITY))
        raise ModelLoadError(f"CUDA device {index}, {device.name}, has the compute capability {found}; pymistral needs {needed} or later")
    if problem := missing_extra(major, device.capability):
        raise ModelLoadError(f"{device.name} can be used once the extra is installed: {problem}")
    return device


def missing_extra(driver_major: int, capability: tuple[int, int]) -> str | None:
    """What to install before such a device can be used with a driver of this CUDA version; None: all is there."""
    newest = 13 if capability >= _OLDEST_OF_13 else 12
    wanted = f"pip install 'pymistral[cuda{min(driver_major, newest)}]'"
    majors = [major for name, major in _CUPY.items() if _is_installed(name)]
    if importlib.util.find_spec("cupy") is None:
        return wanted
    if majors and min(majors) > newest:
        return f"CUDA 13 no longer serves it, and cupy-cuda13x is installed; uninstall that, then {wanted}"
    if majors and min(majors) > driver_major:
        return f"cupy-cuda13x needs a driver for CUDA 13, and this one is for {driver_major}; uninstall it, then {wanted}"
    return None


def default_cuda_device() -> CudaDevice | None:
    """The first device, if it can be used. Does not wake the driver where the extra is not installed."""
    if importlib.util.find_spec("cupy") is None:
        return None
    try:
        return cuda_device(0)
    except ModelLoadError:
        return None


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
