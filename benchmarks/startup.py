"""How long a person waits: imports, loading, the first token with and without compiled kernels; and how much memory it takes.

Each figure is of fresh processes, one after the other. "First token" runs from the start of `pymistral run` to the
first byte of the answer; "cold" gives it an empty kernel cache, as on the day of the installation. Files are in the
page cache, as the second time that anyone uses them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pymistral.loading.hub import DEFAULT_MODEL, resolve

from .report import Report, arguments, median

# Loads a model, generates, and tells seconds and peak memory (VmHWM, KiB) on the way.
_MEMORY = """
import re, sys, time
from pathlib import Path
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
from pymistral import ModelBuilder, RequestBuilder
from pymistral.blocking import BlockingModel
imported = peak()
start = time.perf_counter()
model = BlockingModel.from_builder(ModelBuilder(sys.argv[1], threads=int(sys.argv[2]) or None))
loaded, seconds = peak(), time.perf_counter() - start
model.send_chat_request(RequestBuilder().add_message("user", "Count. " * 100).set_sampler_max_len(int(sys.argv[3])))
print(seconds, imported, loaded, peak())
"""


def wall(command: Sequence[str], **environment: str) -> float:
    """Seconds of a whole process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    return time.perf_counter() - start


def first_byte(command: Sequence[str], **environment: str) -> float:
    """Seconds from the start of a process to its first output."""
    start = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env={**os.environ, **environment}) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
    if not first.strip() or process.returncode:
        raise SystemExit(f"{' '.join(command)} gave no answer:\n{errors.decode(errors='replace')}")
    return seconds


def load_and_generate(model: Path, threads: int, tokens: int) -> list[float]:
    """Seconds to load; peak MiB after the imports, after loading, after an answer."""
    command = [sys.executable, "-c", _MEMORY, str(model), str(threads), str(tokens)]
    output = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    return [float(word) for word in output.split()]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "-m", "--model", action="append", metavar="MODEL", help=f"a GGUF file or model id; may be repeated (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="threads (default: one per core)")
    parser.add_argument("-r", "--repetitions", type=int, default=9, metavar="N", help="processes for each figure (default: 9)")
    args = parser.parse_args()
    repetitions = 2 if args.quick else args.repetitions
    report = Report(
        "startup",
        {"model": "model", "what": "what", "median": "median", "low": "lowest", "high": "highest", "unit": "unit", "runs": "runs"},
    )

    def add(model: str | None, what: str, unit: str, samples: Sequence[float]) -> None:
        report.add(model=model, what=what, median=median(samples), low=min(samples), high=max(samples), unit=unit, runs=len(samples))

    def repeat(work: Callable[[], float], times: int = repetitions) -> list[float]:
        work()
        return [work() for _ in range(times)]

    python = sys.executable
    for what, code in {
        "python alone": "pass",
        "import numpy": "import numpy",
        "import numba": "import numba",
        "import pymistral": "import pymistral",
        "import pymistral and a builder": "from pymistral import ModelBuilder",
    }.items():
        add(None, what, "s", repeat(lambda code=code: wall([python, "-c", code])))  # type: ignore[misc]
    add(None, "pymistral --help", "s", repeat(lambda: wall([python, "-m", "pymistral", "--help"])))

    threads = ["-t", str(args.threads)] if args.threads else []
    for name in args.model or [DEFAULT_MODEL]:
        path = resolve(name)
        run = [python, "-m", "pymistral", "run", "-m", str(path), *threads, "--max-len", "1", "-s", "You are a helpful assistant.", "Hello"]
        add(path.name, "first token, warm", "s", repeat(lambda run=run: first_byte(run)))  # type: ignore[misc]
        cold = []
        for _ in range(1 if args.quick else 3):
            with tempfile.TemporaryDirectory() as empty:
                cold.append(first_byte(run, PYMISTRAL_CACHE=empty))
        add(path.name, "first token, cold", "s", cold)
        runs = [load_and_generate(path, args.threads, 16 if args.quick else 128) for _ in range(2 if args.quick else 3)]
        size = path.stat().st_size / 2**20
        add(path.name, "load", "s", [run[0] for run in runs])
        for index, moment in enumerate(("after the imports", "after loading", "after an answer"), 1):
            add(path.name, f"peak memory {moment}", "MiB", [run[index] for run in runs])
        add(path.name, "peak memory after an answer, over the file's size", "x", [run[3] / size for run in runs])
    report.finish(args)


if __name__ == "__main__":
    main()
