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

import contextlib
import ctypes
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
from collections.abc import Callable, Iterable, Sequence
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
    from numba import config

    # Numba reads these when it first makes code; a forced instruction set must not use what the host has beyond it.
    if isa.cpu != current_host().cpu:
        config.CPU_NAME, config.CPU_FEATURES = isa.cpu, isa.features
    from numba import types

    from .pipeline import compile_function

    module, _, name = kernel.factory.partition(".")
    function = getattr(importlib.import_module(f"{__package__}.{module}"), name)(**dict(kernel.constants))
    # Symbols carry the qualified name and a counter of this process only: kernels of one factory from two child processes would share
    # theirs.
    function.__qualname__ = f"{name}_{kernel.key[:16]}"
    signature = types.void(*[types.intp] * function.__code__.co_argcount)
    return CompiledKernel(*compile_function(function, signature))


def _compile_here(kernels: Iterable[Spec], done: Callable[[Spec, CompiledKernel], None]) -> None:
    for kernel in kernels:
        done(kernel, compile_spec(kernel))


def _compile_in_children(kernels: Sequence[Spec], done: Callable[[Spec, CompiledKernel], None]) -> None:
    """Deal the kernels out to child processes; each answers with one frame per kernel on its standard output."""
    count = min(len(kernels), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def serve(child: subprocess.Popen[bytes], share: Sequence[Spec]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps([[kernel.factory, kernel.constants] for kernel in share]).encode())
            child.stdin.close()
            for kernel in share:
                compiled = _read_frame(child.stdout, kernel)
                with lock:
                    done(kernel, compiled)
        except BaseException as error:  # handed to the caller's thread below
            failures.append(error)

    # Children find this package by the parent's path, whatever it was started with.
    start = f"import sys; sys.path[:] = {list(map(str, sys.path))!r}; from {__name__} import _child; _child()"
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (it outlives the children)
    children = []
    try:
        for index in range(count):
            command = [sys.executable, "-c", start]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            thread = threading.Thread(target=serve, args=(child, kernels[index::count]), daemon=True)
            thread.start()
            children.append((child, thread))
        for _, thread in children:
            thread.join()
    finally:
        for child, _ in children:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
    if failures:
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip()
        raise ChildProcessError(text.splitlines()[-1] if text else str(failures[0])) from failures[0]


def _child() -> None:
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write between the frames
    for factory, constants in json.loads(sys.stdin.buffer.read()):
        kernel = spec(factory, **dict(constants))
        output.write(_frame(kernel, compile_spec(kernel)))
        output.flush()


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


def _write_cached(kernel: Spec, compiled: CompiledKernel) -> None:
    """Keep it if we can: a read-only or full disk costs the next start some time, nothing else."""
    try:
        write(cache_folder() / f"{kernel.key}.o", _frame(kernel, compiled))
    except OSError as error:
        logger.info("compiled kernels cannot be kept in %s: %s", cache_folder(), error)


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
if hasattr(os, "register_at_fork"):  # the lock may be held by a thread that the child does not have
    os.register_at_fork(after_in_child=lambda: setattr(_linker, "lock", threading.RLock()))


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


def _compile(kernels: list[Spec], progress: Progress | None) -> list[tuple[Spec, CompiledKernel]]:
    logger.info("compiling %d kernels for %s", len(kernels), current_isa().name)
    finished: dict[Spec, CompiledKernel] = {}

    def done(kernel: Spec, compiled: CompiledKernel) -> None:
        finished[kernel] = compiled
        _write_cached(kernel, compiled)
        if progress is not None:
            progress(len(finished), len(kernels))

    if progress is not None:
        progress(0, len(kernels))
    # A child costs a third of a second before its first kernel; and where Numba is loaded already, it is no burden.
    # A frozen application's executable is not a Python that takes a command.
    if len(kernels) > 2 and sys.executable and not getattr(sys, "frozen", False) and "numba" not in sys.modules:
        try:
            _compile_in_children(kernels, done)
        except OSError as error:
            logger.info("compiling in this process: %s", error)
    _compile_here([kernel for kernel in kernels if kernel not in finished], done)
    return list(finished.items())


def entry_point(address: int, arguments: int) -> Callable[..., None]:
    """A Python callable for a kernel of ``arguments`` integers; calling it releases the interpreter lock."""
    native = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * arguments)(address)
    scratch = ctypes.create_string_buffer(64)
    pointer = ctypes.cast(scratch, ctypes.c_void_p)

    def call(*values: int, _scratch: Any = scratch) -> None:
        native(pointer, pointer, *values)

    return call
