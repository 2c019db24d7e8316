"""The compiler's cache: whatever is in its folder, kernels are right or compiled again, and never an error."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pymistral.kernels.cpu import compiler
from pymistral.kernels.cpu.compiler import Spec, entry_point, load_kernels, spec

ADD, MULTIPLY, SCALE = (spec(f"elementwise.{name}") for name in ("add", "multiply", "scale"))


@pytest.fixture(scope="module")
def machine_code() -> dict[Spec, compiler.CompiledKernel]:
    """Compiled once, by children: where Numba is loaded, the kernels of all later tests would be compiled one after the other."""
    children = compiler._Children()
    children.add([ADD, MULTIPLY])
    return children.wait([ADD, MULTIPLY], lambda count: None)


@pytest.fixture
def compiled(machine_code: dict[Spec, compiler.CompiledKernel], monkeypatch: pytest.MonkeyPatch) -> list[Spec]:
    """The kernels that were compiled."""
    kernels: list[Spec] = []

    def compile_spec(kernel: Spec) -> compiler.CompiledKernel:
        kernels.append(kernel)
        return machine_code[kernel]

    monkeypatch.setattr(compiler, "compile_spec", compile_spec)
    return kernels


@pytest.fixture
def cache(compiled: list[Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a linker that has loaded nothing."""
    monkeypatch.setenv("PYMISTRAL_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "_linker", compiler._Linker())
    return tmp_path / "kernels"


def works(kernel: Spec) -> bool:
    """The kernel computes what it says, on one row of 16."""
    x, y, out = np.arange(16, dtype=np.float32), np.full(16, 3, np.float32), np.zeros(16, np.float32)
    slots = np.array([x.ctypes.data, y.ctypes.data, out.ctypes.data, 16, 64, 0x40400000], np.int64)
    entry_point(load_kernels([kernel])[kernel], 4)(slots.ctypes.data, 0, 1, 0)
    return bool(np.array_equal(out, x + y if kernel == ADD else x * y))


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_linker", compiler._Linker())


def test_compiled_once_and_kept(cache: Path, compiled: list[Spec], monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(ADD)
    assert works(ADD)
    restart(monkeypatch)
    assert works(ADD)
    assert compiled == [ADD]
    assert [path.name for path in cache.iterdir()] == [f"{ADD.key}.o"]


DAMAGES = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:20],
    "cut in the code": lambda data: data[:-1],
    "a byte changed": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "another symbol": lambda data: data.replace(b'"symbol": "_ZN', b'"symbol": "_XN', 1),
    "no header": lambda data: data[data.index(b"\n") + 1 :],
    "text": lambda data: b"hello\n",
    "a list": lambda data: b"[1, 2]\n" + data,
    "a number": lambda data: b"17\n" + data,
    "no size": lambda data: b'{"symbol": "x", "sha256": ""}\n',
    "a huge size": lambda data: re.sub(rb'"size": \d+', b'"size": 9223372036854775807', data, count=1),
    "a larger size": lambda data: re.sub(rb'"size": \d+', b'"size": ' + b"9" * 400, data, count=1),
    "a negative size": lambda data: re.sub(rb'"size": \d+', b'"size": -1', data, count=1),
    "a size of null": lambda data: re.sub(rb'"size": \d+', b'"size": null', data, count=1),
    "infinity": lambda data: re.sub(rb'"size": \d+', b'"size": Infinity', data, count=1),
    "deep": lambda data: b"[" * 60_000,
    "not UTF-8": lambda data: b"\xff\xfe\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again(damage: str, cache: Path, compiled: list[Spec], monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(ADD)
    path = cache / f"{ADD.key}.o"
    whole = path.read_bytes()
    damaged = DAMAGES[damage](whole)
    assert damaged != whole
    path.write_bytes(damaged)
    restart(monkeypatch)
    assert works(ADD)
    assert compiled == [ADD, ADD]
    restart(monkeypatch)
    assert works(ADD)
    assert compiled == [ADD, ADD], "the new file is whole"


def test_another_kernels_file(cache: Path, compiled: list[Spec], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, but under the wrong name."""
    assert works(ADD)
    assert works(MULTIPLY)
    (cache / f"{MULTIPLY.key}.o").write_bytes((cache / f"{ADD.key}.o").read_bytes())
    restart(monkeypatch)
    assert works(MULTIPLY)
    assert compiled == [ADD, MULTIPLY, MULTIPLY]


def test_a_folder_in_the_files_place(cache: Path, compiled: list[Spec]) -> None:
    (cache / f"{ADD.key}.o").mkdir(parents=True)
    assert works(ADD)
    assert [path.name for path in cache.iterdir()] == [f"{ADD.key}.o"], "nothing half-written is left"


@pytest.mark.parametrize("obstacle", ["file", "read-only"])
def test_nowhere_to_keep_them(obstacle: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiler, "_told", False)
    if obstacle == "file":
        cache.write_text("not a folder")
    else:
        cache.mkdir()
        cache.chmod(0o500)
        if os.access(cache, os.W_OK):  # root writes anywhere
            monkeypatch.setattr(compiler.tempfile, "NamedTemporaryFile", _refuse)
    assert works(ADD)
    assert works(MULTIPLY)
    (told,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert f"cannot be kept in {cache}" in told.getMessage()


def _refuse(**options: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.os, "replace", replace)
    assert works(ADD)
    assert list(cache.iterdir()) == []


def test_keys_tell_everything_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {ADD.key, MULTIPLY.key, spec("matmul.matmul", layout="q4_0").key, spec("matmul.matmul", layout="q4_1").key}
    assert len(keys) == 4
    sources = Path(compiler.__file__).parent
    for name in ("compiler.py", "tiles.py", "simd.py", "matmul.py"):
        folder = tmp_path / name
        folder.mkdir()
        for source in sources.glob("*.py"):
            text = source.read_bytes()
            (folder / source.name).write_bytes(text + b"# changed\n" if source.name == name else text)
        monkeypatch.setattr(compiler, "__file__", str(folder / "compiler.py"))
        compiler.fingerprint.cache_clear()
        keys.add(ADD.key)
    monkeypatch.undo()
    compiler.fingerprint.cache_clear()
    assert len(keys) == 8
    assert ADD.key in keys


def test_progress(cache: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_kernels([ADD, MULTIPLY, ADD], lambda done, of: calls.append((done, of)))
    assert calls == [(0, 2), (1, 2), (2, 2)]
    load_kernels([ADD, MULTIPLY], lambda done, of: calls.append((done, of)))
    assert len(calls) == 3


# ---- in processes of their own, where Numba is not loaded and child processes compile -------------------------------

PRELUDE = """
import sys
sys.path[:0] = {path!r}
from test_compiler import *
from pymistral.kernels.cpu import compiler
KERNELS = [ADD, MULTIPLY, SCALE, spec("repack.repack", layout="q4_0", block_bytes=18), spec("repack.repack", layout="q4_1", block_bytes=20),
           spec("repack.repack", layout="q8_0", block_bytes=34)]
"""


def python(source: str, cache: Path, **options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYMISTRAL_CACHE": str(cache), **options}
    command = [sys.executable, "-c", PRELUDE.format(path=[*sys.path, str(Path(__file__).parent)]) + source]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


DISTINCT = """
addresses = load_kernels(KERNELS)
assert len(set(addresses.values())) == len(KERNELS), addresses
assert works(ADD) and works(MULTIPLY)
print("numba" in sys.modules)
"""
SIMPLE = sys.platform == "linux" and platform.machine() == "x86_64"  # where object files need no LLVM


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both compile in children; kernels of one factory stay apart; a third finds all in the cache and loads no Numba, nor LLVM."""
    both = [python(DISTINCT, tmp_path) for _ in range(2)]
    assert [finish(process).split() for process in both] == [["False"], ["False"]]
    assert len(list((tmp_path / "kernels").iterdir())) == 6
    source = "import unittest.mock\nwith unittest.mock.patch.object(compiler, '_compile', None):\n    load_kernels(KERNELS)\n"
    assert finish(python(source + DISTINCT + 'print("llvmlite" in sys.modules)', tmp_path)).split() == ["False", str(not SIMPLE)]


@pytest.mark.parametrize("executable", ["''", "None", "'/no/such/python'", "'/bin/true'", "'/bin/false'"])
def test_without_a_python_to_start(executable: str, tmp_path: Path) -> None:
    source = f"sys.executable = {executable}\n"
    assert finish(python(source + DISTINCT, tmp_path)).split() == ["True"]


def test_a_frozen_application_never_starts_itself(tmp_path: Path) -> None:
    source = "sys.frozen = True\nsys.executable = '/no/such/application'\ncompiler._children.add = None\n"
    assert finish(python(source + DISTINCT, tmp_path)).split() == ["True"]


def test_a_numba_that_is_not_known_compiles_with_its_own_pipeline(tmp_path: Path) -> None:
    source = "import numba\ncompiler._children.add = None\nsys.frozen = True\n"
    source += "numba.version_info = numba.version_info._replace(short=(9, 9))\n"
    source += DISTINCT + "from pymistral.kernels.cpu import pipeline\nprint('pipeline_class' in pipeline.OPTIONS)\n"
    assert finish(python(source, tmp_path)).split() == ["True", "False"]


def test_the_error_of_a_child_is_the_error(tmp_path: Path) -> None:
    process = python("load_kernels([*KERNELS, spec('matmul.matmul', layout='q9_9')])", tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1] == "KeyError: 'q9_9'"


def test_a_child_that_dies(tmp_path: Path) -> None:
    """Killed, as by a lack of memory: its share is compiled here."""
    source = "original = compiler.subprocess.Popen\n"
    source += "def start(command, **options):\n    return original(['/bin/sh', '-c', 'kill -9 $$'], **options)\n"
    source += "compiler.subprocess.Popen = start\n"
    assert finish(python(source + DISTINCT, tmp_path)).split() == ["True"]


def test_long_kernels_come_first_and_those_of_a_module_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_cores", lambda: 0)
    sample, product, gated = spec("sampling.sample"), spec("matmul.matmul", layout="q4_0"), spec("matmul.gated_matmul", layout="q4_0")
    children = compiler._Children()
    children.add([ADD, product, MULTIPLY, sample, gated])
    assert [children._next(None), children._next(None)] == [sample, gated]
    children.add([SCALE, ADD, sample])
    assert [children._next(gated), children._next(product)] == [product, ADD]
    assert [children._next(ADD), children._next(MULTIPLY), children._next(SCALE)] == [MULTIPLY, SCALE, None]


PREPARED = """
import threading, time
compiler.prepare_kernels(KERNELS[:4])
assert compiler._children.threads
{then}
"""


def test_what_is_prepared_is_compiled_once(tmp_path: Path) -> None:
    """Kernels that are asked for while others are being compiled join these, and no process stays behind."""
    asked = "original = compiler._ask\nasked = []\n"
    asked += "def ask(child, kernel):\n    asked.append(kernel)\n    return original(child, kernel)\ncompiler._ask = ask\n"
    after = "assert sorted(map(str, asked)) == sorted(map(str, KERNELS)), asked\n"
    after += "for thread in threading.enumerate():\n    'compiler' in thread.name and thread.join(10)\n"
    after += "try:\n    os.waitpid(-1, os.WNOHANG)\nexcept ChildProcessError:\n    print('no child')\n"
    assert finish(python(asked + PREPARED.format(then="") + DISTINCT + after, tmp_path)).split() == ["False", "no", "child"]


def test_what_is_prepared_is_kept_though_nobody_waits(tmp_path: Path) -> None:
    then = "while compiler._children.threads:\n    time.sleep(0.01)\nassert not compiler._children.queue"
    finish(python(PREPARED.format(then=then), tmp_path))
    assert len(list((tmp_path / "kernels").iterdir())) == 4
    source = "compiler._children.add = None\ncompiler.prepare_kernels(KERNELS[:4])\nprint('numba' in sys.modules)"
    assert finish(python(source, tmp_path)).split() == ["False"], "what is in the cache is not compiled"


def test_errors_of_what_is_prepared_come_with_the_kernel(tmp_path: Path) -> None:
    source = "wrong = spec('matmul.matmul', layout='q9_9')\ncompiler.prepare_kernels([wrong, *KERNELS])\n" + DISTINCT
    source += "try:\n    load_kernels([wrong])\nexcept KeyError as error:\n    print(error)\n"
    assert finish(python(source, tmp_path)).split() == ["False", "'q9_9'"]


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 2)", "1 / 0"])
def test_children_end_with_their_parent(end: str, tmp_path: Path) -> None:
    """However it ends, while they compile."""
    then = "while not compiler._children.processes:\n    time.sleep(0.01)\n"
    then += "print(*[process.pid for process in compiler._children.processes], flush=True)\n" + end
    process = python(PREPARED.format(then=then), tmp_path)
    output, _ = process.communicate(timeout=120)
    children = [int(word) for word in output.split()]
    assert children
    for _ in range(300):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            return
        time.sleep(0.1)
    raise AssertionError("a child is left")


def test_a_fork_has_no_children(tmp_path: Path) -> None:
    """It neither waits for its parent's, nor ends them."""
    then = "if os.fork() == 0:\n    assert not compiler._children.threads\n    sys.exit()\n"
    then += "assert os.waitpid(-1, 0)[1] == 0\n"
    assert finish(python(PREPARED.format(then=then) + DISTINCT, tmp_path)).split() == ["False"]


def test_noise_of_a_child(tmp_path: Path) -> None:
    """What prints at start-up, a sitecustomize say, does not reach the frames."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(2, b'noise on stderr\\n')\n")
    assert finish(python(DISTINCT, tmp_path / "cache", PYTHONPATH=str(tmp_path))).split() == ["False"]
