"""What LLVM says of this CPU, remembered in the cache: to load LLVM takes longer than all else that a start needs of the kernels."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import itertools
import json
import logging
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from .cache import cache_folder, write

logger = logging.getLogger("pymistral.kernels")


@dataclass(frozen=True)
class Host:
    """The machine that kernels are compiled for.

    Attributes
    ----------
    cpu, features
        LLVM's name of it, and every feature that it has (``+avx2``) or lacks (``-amx-tile``).
    triple
        Architecture, system and C library of this process.
    """

    cpu: str
    features: str
    triple: str

    @property
    def present(self) -> frozenset[str]:
        """The features that it has."""
        return frozenset(feature[1:] for feature in self.features.split(",") if feature[:1] == "+")


@lru_cache(maxsize=1)
def current_host() -> Host:
    """This machine; LLVM is asked only where no earlier process has asked it."""
    processor = _processor()
    if processor is None:
        return _ask_llvm()
    known = hashlib.sha256("\n".join((llvmlite_version(), importlib.machinery.EXTENSION_SUFFIXES[0], processor)).encode()).hexdigest()
    path = cache_folder("cpus") / f"{known}.json"
    host = _read(path, known)
    if host is None:
        host = _ask_llvm()
        try:
            write(path, json.dumps({**asdict(host), "sha256": _digest(host, known)}).encode())
        except OSError as error:
            logger.info("what LLVM says of the CPU cannot be kept: %s", error)
    return host


def llvmlite_version() -> str:
    """Without importing it."""
    return importlib.metadata.version("llvmlite")


def _ask_llvm() -> Host:
    import llvmlite.binding as llvm

    return Host(llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), llvm.get_process_triple())


_CPUINFO = Path("/proc/cpuinfo")
_NAMES = ("vendor_id", "cpu family", "model", "model name", "stepping")
_ARM_NAMES = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision")


def _processor() -> str | None:
    """What Linux says of the first core's model and features, if it does: a cache may be shared by machines that differ."""
    try:
        with _CPUINFO.open(encoding="utf-8", errors="replace") as file:
            first = itertools.takewhile(str.strip, file)  # to the empty line behind the first core
            fields = dict(line.split(":", 1) for line in first if ":" in line)
    except OSError:
        return None
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    for features, names in (("flags", _NAMES), ("Features", _ARM_NAMES)):
        if fields.get(features) and all(name in fields for name in names):
            return "\n".join(fields[name] for name in (*names, features))
    return None


def _read(path: Path, known: str) -> Host | None:
    """None if there is no such file, or not a whole one."""
    try:
        fields = json.loads(path.read_bytes())
        host = Host(str(fields["cpu"]), str(fields["features"]), str(fields["triple"]))
        return host if fields["sha256"] == _digest(host, known) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(host: Host, known: str) -> str:
    return hashlib.sha256(f"{known}|{host}".encode()).hexdigest()
