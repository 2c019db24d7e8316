"""From a kernel's name and constants to the address of machine code.

A kernel is written as a factory: a Python function that takes compile-time constants and returns the function that Numba
compiles. A `Spec` names a factory and its constants. Compiled kernels are plain object files, kept in the user's cache folder under a
key of everything they depend on (all kernel sources, the CPU, the versions of Numba and llvmlite), and loaded by `elf`, or by LLVM where
they hold more than `elf` knows: a warm start imports no Numba, and on x86-64 Linux no llvmlite. What is missing is compiled in child
processes, one per core, so that Numba's memory and its global lock stay out of this process.

A cache file is checked by a SHA-256 over its key and its code, and written by rename: a truncated, foreign or half-written file is
compiled again, and processes that start at once at worst compile twice.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from . import elf
from .cache import cache_folder, write
from .host import current_host, llvmlite_version
from .isa import current_isa

logger = logging.getLogger("pymistral.kernels")

Constant = int | float | str
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Spec:
    """A kernel to compile: ``module.factory`` in this package, and the factory's keyword arguments."""

    factory: str
    constants: tuple[tuple[str, Constant], ...] = ()

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{fingerprint()}|{self.factory}|{self.constants!r}".encode()).hexdigest()


def spec(factory: str, **constants: Constant) -> Spec:
    """The kernel that ``factory(**constants)`` of this package makes; ``factory`` is ``"module.function"``."""
    return Spec(factory, tuple(sorted(constants.items())))


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code as an object file, and the symbol to call in it."""

    symbol: str
    code: bytes


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """A digest of all that compiled code depends on, apart from its own spec."""
    versions = f"{llvmlite_version()} {importlib.metadata.version('numba')}"
    digest = hashlib.sha256(f"{versions} {sys.byteorder} {current_isa()} {current_host().triple}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


# ---- compiling (needs Numba) ----------------------------------------------------------------------------------------


def compile_spec(kernel: Spec) -> CompiledKernel:
    """Compile one kernel in this process."""
    isa = current_isa()
    from llvmlite.binding import llvm_version_info
    from numba import config

    # Numba reads these when it first makes code; a forced instruction set must not use what the host has beyond it.
    config.CPU_NAME, config.CPU_FEATURES = isa.cpu, isa.features
    if isa.has_vnni and llvm_version_info >= (20,):
        # LLVM would else take a sum of products of int16 (`vpdpwssd`) apart into a product and an addition, as if a kernel had but one sum.
        config.CPU_FEATURES += ",+fast-dpwssd"
    from numba import types

    from .pipeline import compile_function

    module, _, name = kernel.factory.partition(".")
    function = getattr(importlib.import_module(f"{__package__}.{module}"), name)(**dict(kernel.constants))
    # Symbols carry the qualified name and a counter of this process only: kernels of one factory from two child processes would share
    # theirs.
    function.__qualname__ = f"{name}_{kernel.key[:16]}"
    signature = types.void(*[types.intp] * function.__code__.co_argcount)
    return CompiledKernel(*compile_function(function, signature))


_SECONDS = {
    "sampling.sample": 2.5,
    "attention.attention": 2.5,
    "float_attention.attention": 2.0,
    "int16_attention.attention": 2.0,
    "moe.experts": 2.0,
    "amx.gated_matmul": 1.5,
    "amx.matmul": 1.5,
    "matmul.gated_matmul": 1.5,
    "logits.product": 1.2,
    "matmul.matmul": 1.2,
    "rope.rope_and_cache": 0.9,
}
"""What kernels take to compile, roughly; the others take half a second."""


class _Children:
    """Processes that compile what is in a queue, one for each core. They end when they find it empty."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queue: list[Spec] = []
        self.begun: set[Spec] = set()
        self.results: dict[Spec, CompiledKernel | Exception] = {}  # until somebody has waited for them
        self.threads = 0
        self.processes: set[subprocess.Popen[bytes]] = set()

    def add(self, kernels: Iterable[Spec]) -> None:
        """Compile these as well. They go to the cache, whether or not anybody waits for them."""
        with self.changed:
            self.results = {kernel: result for kernel, result in self.results.items() if isinstance(result, CompiledKernel)}
            self.queue += [kernel for kernel in kernels if kernel not in {*self.queue, *self.begun, *self.results}]
            self.queue.sort(key=lambda kernel: -_SECONDS.get(kernel.factory, 0.5))  # long ones first, so that children end together
            for _ in range(min(len(self.queue), _cores() - self.threads)):
                threading.Thread(target=self._serve, name="pymistral-compiler", daemon=True).start()
                self.threads += 1  # it waits for the lock; if no thread can be started, none is waited for

    def wait(self, kernels: Sequence[Spec], done: Callable[[int], None]) -> dict[Spec, CompiledKernel]:
        """Those that a child could compile; ``done`` is told how many they are, as their number grows."""
        told = 0
        compiled: dict[Spec, CompiledKernel] = {}
        try:
            with self.changed:
                while True:
                    found = {kernel: self.results[kernel] for kernel in kernels if kernel in self.results}
                    compiled = {kernel: result for kernel, result in found.items() if isinstance(result, CompiledKernel)}
                    if len(compiled) > told:
                        told = len(compiled)
                        done(told)
                    if len(found) == len(kernels):
                        break
                    self.changed.wait()
                for kernel in kernels:
                    del self.results[kernel]
        except BaseException:  # Ctrl-C, say
            self.stop()
            raise
        return compiled

    def stop(self) -> None:
        """Begin no more kernels, and end what is being compiled."""
        with self.changed:
            self.queue.clear()
            for process in self.processes:
                process.kill()

    def _serve(self) -> None:
        """A thread's work: a child, and kernels for it while there are any."""
        kernel = None
        try:
            with _child_process() as child:
                with self.changed:
                    self.processes = {process for process in self.processes if process.returncode is None} | {child}
                while (kernel := self._next(kernel)) is not None:
                    compiled = _ask(child, kernel)
                    _write_cached(kernel, compiled)
                    self._finish(kernel, compiled)
        except Exception as error:  # of a child that cannot be started, was killed, or met an error in a kernel
            logger.info("a child that compiles kernels failed: %s", error)
            self._give_up(kernel, error)

    def _next(self, last: Spec | None) -> Spec | None:
        """A kernel of the module that the last one was of, as these share functions, which are then compiled already; else the first."""
        with self.changed:
            if not self.queue:
                self.threads -= 1
                return None
            module = last.factory.partition(".")[0] if last else ""
            kernel = next((kernel for kernel in self.queue if kernel.factory.partition(".")[0] == module), self.queue[0])
            self.queue.remove(kernel)
            self.begun.add(kernel)
            return kernel

    def _finish(self, kernel: Spec, result: CompiledKernel | Exception) -> None:
        with self.changed:
            self.begun.discard(kernel)
            self.results[kernel] = result
            self.changed.notify_all()

    def _give_up(self, kernel: Spec | None, error: Exception) -> None:
        """This child's kernel has failed, and if it was the last child, all the others have."""
        with self.changed:
            self.threads -= 1
            failed = [kernel] if kernel else []
            if not self.threads:
                failed += self.queue
                self.queue.clear()
            for each in failed:
                self._finish(each, error)


@contextlib.contextmanager
def _child_process() -> Iterator[subprocess.Popen[bytes]]:
    # Children find this package by the parent's path, whatever it was started with.
    start = f"import sys; sys.path[:] = {list(map(str, sys.path))!r}; from {__name__} import _child; _child()"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # NumPy's threads take longer to start than a short kernel to compile
    with tempfile.TemporaryFile() as errors:
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", start], stdin=pipe, stdout=pipe, stderr=errors, env=environment) as child:
            try:
                yield child
            except Exception as error:
                child.kill()
                child.wait()
                errors.seek(0)
                text = errors.read().decode(errors="replace").strip()
                raise ChildProcessError(text.splitlines()[-1] if text else str(error)) from error
            finally:
                child.kill()


def _ask(child: subprocess.Popen[bytes], kernel: Spec) -> CompiledKernel:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps([kernel.factory, kernel.constants]).encode() + b"\n")
    child.stdin.flush()
    return _read_frame(child.stdout, kernel)


def _child() -> None:
    """A child's life: a line for each kernel on its standard input, a frame for each on its output."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write between the frames
    gc.set_threshold(_RARELY)
    for line in sys.stdin.buffer:
        factory, constants = json.loads(line)
        kernel = spec(factory, **dict(constants))
        output.write(_frame(kernel, compile_spec(kernel)))
        output.flush()


_RARELY = 500_000
"""Objects between two searches for garbage, of which Numba makes little: at the usual thresholds they took a tenth of the time."""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _frame(kernel: Spec, compiled: CompiledKernel) -> bytes:
    header = {"symbol": compiled.symbol, "size": len(compiled.code), "sha256": _digest(kernel, compiled)}
    return json.dumps(header).encode() + b"\n" + compiled.code


def _read_frame(stream: IO[bytes], kernel: Spec) -> CompiledKernel:
    """Raises one of `_DAMAGED` if this is not the whole frame of this kernel."""
    header = json.loads(stream.readline(_MAX_HEADER))
    size = int(header["size"])
    if not 0 < size < _MAX_CODE:
        raise ValueError(f"a kernel of {size} bytes")
    compiled = CompiledKernel(str(header["symbol"]), stream.read(size))
    if _digest(kernel, compiled) != header["sha256"]:
        raise ValueError("the checksum differs")
    return compiled


def _digest(kernel: Spec, compiled: CompiledKernel) -> str:
    return hashlib.sha256(f"{kernel.key}|{compiled.symbol}|".encode() + compiled.code).hexdigest()


_MAX_HEADER, _MAX_CODE = 1 << 12, 1 << 26
_DAMAGED = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)


# ---- the cache on disk ----------------------------------------------------------------------------------------------


def _read_cached(kernel: Spec) -> CompiledKernel | None:
    path = cache_folder() / f"{kernel.key}.o"
    try:
        with path.open("rb") as file:
            return _read_frame(file, kernel)
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        logger.info("ignoring a damaged cached kernel, %s: %s", path, error)
        return None


_told = False


def _write_cached(kernel: Spec, compiled: CompiledKernel) -> None:
    """Keep it if we can: a read-only or full disk costs each start some seconds, and is told once, but costs nothing else."""
    global _told
    try:
        write(cache_folder() / f"{kernel.key}.o", _frame(kernel, compiled))
    except OSError as error:
        logger.log(logging.INFO if _told else logging.WARNING, "compiled kernels cannot be kept in %s: %s", cache_folder(), error)
        _told = True


# ---- loading (without Numba) ----------------------------------------------------------------------------------------


class _Linker:
    """The addresses of the kernels that this process has loaded, and LLVM's execution engine if it took one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.addresses: dict[Spec, int] = {}
        self._engine: Any = None

    def load(self, kernels: Sequence[tuple[Spec, CompiledKernel]]) -> None:
        try:
            addresses = elf.load([elf.read(compiled.code, compiled.symbol) for _, compiled in kernels])
        except (elf.Unsupported, OSError) as error:
            logger.info("LLVM loads the kernels: %s", error)
            addresses = self._load_with_llvm([compiled for _, compiled in kernels])
        self.addresses.update(zip((kernel for kernel, _ in kernels), addresses, strict=True))

    def _load_with_llvm(self, kernels: Sequence[CompiledKernel]) -> list[int]:
        import llvmlite.binding as llvm

        if self._engine is None:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
            self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for kernel in kernels:
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(kernel.code))
        self._engine.finalize_object()
        addresses = [int(self._engine.get_function_address(kernel.symbol)) for kernel in kernels]
        if not all(addresses):
            raise RuntimeError(f"a compiled kernel lacks its symbol {kernels[addresses.index(0)].symbol}")
        return addresses


_linker = _Linker()
_children = _Children()
atexit.register(lambda: _children.stop())


def _after_fork() -> None:
    """The new process has none of the threads: a lock may be held for ever, and nobody serves the children."""
    global _children
    _linker.lock = threading.RLock()
    _children = _Children()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load_kernels(kernels: Iterable[Spec], progress: Progress | None = None) -> dict[Spec, int]:
    """Addresses of all these kernels, compiled first where no cache has them.

    Parameters
    ----------
    kernels
        What is needed; duplicates are fine.
    progress
        Called as ``progress(compiled, to_compile)`` if anything has to be compiled.

    Returns
    -------
    dict
        The address of ``void kernel(...)`` in Numba's calling convention: two pointers (unused) before the arguments.
    """
    wanted = list(dict.fromkeys(kernels))
    with _linker.lock:
        missing = [kernel for kernel in wanted if kernel not in _linker.addresses]
        ready = []
        to_compile = []
        for kernel in missing:
            cached = _read_cached(kernel)
            if cached is None:
                to_compile.append(kernel)
            else:
                ready.append((kernel, cached))
        if to_compile:
            ready += _compile(to_compile, progress)
        if ready:
            _linker.load(ready)
        return {kernel: _linker.addresses[kernel] for kernel in wanted}


def kernels_to_compile(kernels: Iterable[Spec]) -> list[Spec]:
    """Those of these that are neither loaded nor in the cache."""
    folder = cache_folder()
    return [kernel for kernel in dict.fromkeys(kernels) if kernel not in _linker.addresses and not (folder / f"{kernel.key}.o").exists()]


def prepare_kernels(kernels: Iterable[Spec]) -> None:
    """Begin to compile what no cache has of these, and return at once. `load_kernels` waits for it, and meets its errors."""
    missing = kernels_to_compile(kernels)
    if len(missing) > _FEW and _may_start_children():
        _children.add(missing)


def _compile(kernels: list[Spec], progress: Progress | None) -> list[tuple[Spec, CompiledKernel]]:
    logger.info("compiling %d kernels for %s", len(kernels), current_isa().name)

    def done(count: int) -> None:
        if progress is not None:
            progress(count, len(kernels))

    done(0)
    finished: dict[Spec, CompiledKernel] = {}
    if _children.threads or (len(kernels) > _FEW and _may_start_children()):
        _children.add(kernels)
        finished = _children.wait(kernels, done)
    for kernel in kernels:
        if kernel not in finished:
            finished[kernel] = compile_spec(kernel)
            _write_cached(kernel, finished[kernel])
            done(len(finished))
    return list(finished.items())


_FEW = 2
"""So many kernels are compiled in this process: a child takes a third of a second before its first one."""


def _may_start_children() -> bool:
    """Where Numba is loaded already it is no burden; and a frozen application's executable is not a Python that takes a command."""
    return bool(sys.executable) and not getattr(sys, "frozen", False) and "numba" not in sys.modules


def entry_point(address: int, arguments: int) -> Callable[..., None]:
    """A Python callable for a kernel of ``arguments`` integers; calling it releases the interpreter lock."""
    native = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * arguments)(address)
    scratch = ctypes.create_string_buffer(64)
    pointer = ctypes.cast(scratch, ctypes.c_void_p)

    def call(*values: int, _scratch: Any = scratch) -> None:
        native(pointer, pointer, *values)

    return call
