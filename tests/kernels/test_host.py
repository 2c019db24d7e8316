"""What LLVM says of the CPU is asked once for each kind of machine; whatever is in the cache, the answer is LLVM's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding as llvm
import pytest
from pymistral.kernels.cpu import host
from pymistral.kernels.cpu.host import Host

CORE = """processor\t: {core}
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: {model}
model name\t: AMD EPYC
stepping\t: 1
microcode\t: 0x1000065
cpu MHz\t\t: {mhz}
flags\t\t: fpu avx2 fma f16c{more}

"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Host]:
    """What a new process finds out on a machine with this ``/proc/cpuinfo``."""
    monkeypatch.setenv("PYMISTRAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")

    def ask(cpuinfo: str) -> Host:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        return host.current_host.__wrapped__()

    return ask


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Host]:
    """LLVM's answers, each time another."""
    answers: list[Host] = []

    def answer() -> Host:
        answers.append(Host(f"cpu-{len(answers)}", "+avx2,-avx512f", "x86_64-unknown-linux-gnu"))
        return answers[-1]

    monkeypatch.setattr(host, "_ask_llvm", answer)
    return answers


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.json"))


def test_llvm_is_asked_once(ask: Callable[[str], Host], asked: list[Host], tmp_path: Path) -> None:
    """Whatever the clock's rate is, and however many cores there are."""
    first = ask(CORE.format(core=0, model=1, mhz=2445.4, more=""))
    assert ask(CORE.format(core=0, model=1, mhz=3000, more="") + CORE.format(core=1, model=9, mhz=3, more="")) == first
    assert asked == [first]
    assert len(files(tmp_path)) == 1


def test_machines_that_differ_share_a_cache(ask: Callable[[str], Host], asked: list[Host]) -> None:
    machines = [CORE.format(core=0, model=1, mhz=1, more=""), CORE.format(core=0, model=17, mhz=1, more="")]
    machines += [CORE.format(core=0, model=1, mhz=1, more=" avx512f"), ARM, ARM.replace("0xd0c", "0xd40")]
    found = [ask(machine) for machine in machines]
    assert len(set(found)) == len(machines)
    assert [ask(machine) for machine in machines] == found
    assert len(asked) == len(machines)


@pytest.mark.parametrize("release", ["0.44.0", None])
def test_another_llvm_is_asked_again(
    release: str | None, ask: Callable[[str], Host], asked: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(ARM)
    if release:
        monkeypatch.setattr(host, "llvmlite_version", lambda: release)
    else:
        monkeypatch.setattr(host.importlib.machinery, "EXTENSION_SUFFIXES", [".cpython-311-aarch64-linux-musl.so"])
    ask(ARM)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-10],
        lambda data: data.replace(b"-avx512f", b"+avx512f"),
        lambda data: b"[1]",
        lambda data: b"{}",
        lambda data: b"\xff",
        lambda data: b"[" * 60_000,
        lambda data: json.dumps({**json.loads(data), "sha256": None}).encode(),
    ],
)
def test_a_damaged_file(damage: Callable[[bytes], bytes], ask: Callable[[str], Host], asked: list[Host], tmp_path: Path) -> None:
    ask(ARM)
    (path,) = files(tmp_path)
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    assert ask(ARM) == asked[1]
    assert ask(ARM) == asked[1], "the new file is whole"


def test_another_machines_file(ask: Callable[[str], Host], asked: list[Host], tmp_path: Path) -> None:
    """Whole, but under the wrong name."""
    ask(ARM)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    path.unlink()
    ask(CORE.format(core=0, model=1, mhz=1, more=""))
    (path,) = files(tmp_path)
    path.write_bytes(content)
    ask(CORE.format(core=0, model=1, mhz=1, more=""))
    assert len(asked) == 3


@pytest.mark.parametrize("cpuinfo", ["", "\n", "processor\t: 0\n", "flags: avx2\n", ARM.replace("CPU part", "CPU"), "no colon\n"])
def test_a_machine_that_says_little_is_not_remembered(cpuinfo: str, ask: Callable[[str], Host], asked: list[Host], tmp_path: Path) -> None:
    ask(cpuinfo)
    ask(cpuinfo)
    assert len(asked) == 2
    assert files(tmp_path) == []


def test_no_cpuinfo(ask: Callable[[str], Host], asked: list[Host], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "missing")
    assert ask(ARM) == asked[0]


def test_nowhere_to_keep_it(ask: Callable[[str], Host], asked: list[Host], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    assert [ask(ARM), ask(ARM)] == asked


def test_this_machine(ask: Callable[[str], Host]) -> None:
    own = Path("/proc/cpuinfo")
    cpuinfo = own.read_text() if own.exists() else ""
    features = {name for name, present in llvm.get_host_cpu_features().items() if present}
    for _ in range(2):  # from LLVM, and from the cache
        found = ask(cpuinfo)
        assert (found.cpu, found.triple, found.present) == (llvm.get_host_cpu_name(), llvm.get_process_triple(), features)
        assert found.features == llvm.get_host_cpu_features().flatten()
