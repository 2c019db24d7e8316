"""Machine code that is compiled and kept here, for which CuPy has no target: with a compiler that only counts."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pymistral.kernels.cuda.device import Device, _machine_code
from pymistral.kernels.cuda.launch import Kernel


class Nvrtc:
    """What of `cupy.cuda.nvrtc` is used."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self, fails: bool = False) -> None:
        self.compiled: list[tuple[str, ...]] = []
        self.alive = 0
        self.fails = fails

    def createProgram(self, source: str, name: str, headers: Any, includes: Any) -> str:
        self.alive += 1
        return source

    def destroyProgram(self, program: str) -> None:
        self.alive -= 1

    def compileProgram(self, program: str, options: tuple[str, ...]) -> None:
        self.compiled.append(options)
        if self.fails:
            raise self.NVRTCError

    def getCUBIN(self, program: str) -> bytes:
        return f"machine code of {program}".encode()

    def getProgramLog(self, program: str) -> str:
        return "line 3: it is wrong"


OPTIONS = ("-arch=sm_90a",)


def test_machine_code_is_kept(tmp_path: Path) -> None:
    nvrtc, path = Nvrtc(), tmp_path / "kernels" / "one.cubin"
    assert _machine_code(nvrtc, "a", OPTIONS, path) == b"machine code of a"
    assert _machine_code(nvrtc, "a", OPTIONS, path) == b"machine code of a"
    assert nvrtc.compiled == [OPTIONS]
    assert nvrtc.alive == 0


@pytest.mark.parametrize("damage", [lambda kept: kept[:-1], lambda kept: kept[:20], lambda kept: b"", lambda kept: kept[:-1] + b"!"])
def test_a_damaged_file_is_compiled_again(damage: Any, tmp_path: Path) -> None:
    nvrtc, path = Nvrtc(), tmp_path / "one.cubin"
    _machine_code(nvrtc, "a", OPTIONS, path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert _machine_code(nvrtc, "a", OPTIONS, path) == b"machine code of a"
    assert len(nvrtc.compiled) == 2
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kernels").write_text("a file where the folder would be")
    with caplog.at_level(logging.INFO, "pymistral.kernels"):
        assert _machine_code(Nvrtc(), "a", OPTIONS, tmp_path / "kernels" / "one.cubin") == b"machine code of a"
    assert "cannot be kept" in caplog.text


def test_a_source_that_does_not_compile(tmp_path: Path) -> None:
    nvrtc = Nvrtc(fails=True)
    with pytest.raises(RuntimeError, match=r"does not compile one.cubin(.|\n)*it is wrong"):
        _machine_code(nvrtc, "a", OPTIONS, tmp_path / "one.cubin")
    assert nvrtc.alive == 0
    assert not (tmp_path / "one.cubin").exists()


@pytest.mark.parametrize(("arch", "message"), [(80, "is for compute capability 9.0 alone; this GPU has 8.0"), (100, "this GPU has 10.0")])
def test_a_kernel_that_another_gpu_needs(arch: int, message: str) -> None:
    device = object.__new__(Device)
    device.arch, device._functions = arch, {}
    with pytest.raises(ValueError, match=message):
        device.load(Kernel("matmul_hopper", "matmul_hopper.cu", "", (), 90, only_there=True))


def test_hoppers_own_kernels_are_loaded_from_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMISTRAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "loaded").mkdir()
    nvrtc, modules = Nvrtc(), []
    nvrtc.getVersion = lambda: (12, 8)  # type: ignore[attr-defined]

    def module(**options: str) -> Any:
        modules.append(options)
        return SimpleNamespace(get_function=lambda name: f"function {name}")

    device = object.__new__(Device)
    device.arch, device._functions = 90, {}
    device._folder = SimpleNamespace(name=str(tmp_path / "loaded"))  # type: ignore[assignment]
    device._cupy = SimpleNamespace(cuda=SimpleNamespace(nvrtc=nvrtc), RawModule=module)
    kernels = [Kernel("matmul_hopper", "matmul_hopper.cu", "", (("BN", str(width)),), 90, only_there=True) for width in (128, 256)]
    assert [device.load(kernel) for kernel in kernels] == 2 * ["function matmul_hopper"]
    assert all(device.has(kernel) for kernel in kernels)
    paths = [Path(each["path"]) for each in modules]
    assert len(set(paths)) == 2
    assert all(path.read_bytes().startswith(b"machine code of #line 1") for path in paths)
    assert [options[-1] for options in nvrtc.compiled] == 2 * ["-arch=sm_90a"]
    assert len(list((tmp_path / "cache" / "kernels").glob("matmul_hopper-*.cubin"))) == 2
    device.load(Kernel("norm_rows", "norm.cu", "", ()))
    assert "code" in modules[-1]  # CuPy compiles and keeps it
