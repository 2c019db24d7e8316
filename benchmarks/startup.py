"""How long a person waits: imports, loading, the first token with and without compiled kernels; and how much memory it takes.

Each figure is of fresh processes, one after the other. "First token" runs from the start of `pymistral run` to the
first byte of the answer; "cold" gives it an empty kernel cache, as on the day of the installation. Files are in the
page cache, as the second time that anyone uses them; Python's bytecode is cached, as by an installation. The floors are what is
wanted at least: 1.4 x the file and the part of the KV cache that the answer fills in memory, 0.15 s to load a file of up to 0.1 GB and
0.5 s for one of up to 0.5 GB, 1 s to the first token with compiled kernels, 8 s without, 0.3 s to import. "Private" leaves out what
processes share and the system may drop: the pages of libraries and of the mapped file.
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

from .report import PLAIN, Report, arguments, has_chat_template, median

# Loads a model, generates, and tells seconds and peak memory (VmHWM, KiB) on the way.
_MEMORY = """
import re, sys, time
from pathlib import Path
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def peak():
    return status("VmHWM")
from pymistral import ModelBuilder, RequestBuilder
from pymistral.blocking import BlockingModel
imported = peak()
start = time.perf_counter()
model = BlockingModel.from_builder(ModelBuilder(sys.argv[1], threads=int(sys.argv[2]) or None, chat_template=sys.argv[4]))
loaded, seconds = peak(), time.perf_counter() - start
request = RequestBuilder().add_message("user", "Count. " * 100).set_sampler_max_len(int(sys.argv[3]))
tokens = model.send_chat_request(request).usage.total_tokens
config = model.config()
head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
cache = tokens * config["num_hidden_layers"] * config["num_key_value_heads"] * head * 2 * 2 / 2**20
print(seconds, imported, loaded, peak(), status("RssAnon"), cache)
"""


LOADING = ((0.1, 0.15), (0.5, 0.5))
"""Files of up to so many GB are loaded in so many seconds."""


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
    """Seconds to load; peak MiB after the imports, after loading, after an answer; private MiB at the end, and those of the KV cache."""
    command = [sys.executable, "-c", _MEMORY, str(model), str(threads), str(tokens), PLAIN]
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
        {
            "model": "model",
            "what": "what",
            "median": "median",
            "low": "lowest",
            "high": "highest",
            "floor": "floor",
            "unit": "unit",
            "runs": "runs",
        },
    )
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process would compile all modules again

    def add(model: str | None, what: str, unit: str, samples: Sequence[float], floor: float | None = None) -> None:
        middle = median(samples)
        report.add(model=model, what=what, median=middle, low=min(samples), high=max(samples), floor=floor, unit=unit, runs=len(samples))
        if floor is not None and middle > floor:
            report.notes.append(f"{model or 'all models'}: {what}: {middle:.3g} {unit}, more than the {floor:.3g} {unit} wanted")

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
        floor = 0.3 if what == "import pymistral" else None
        add(None, what, "s", repeat(lambda code=code: wall([python, "-c", code])), floor)  # type: ignore[misc]
    add(None, "pymistral --help", "s", repeat(lambda: wall([python, "-m", "pymistral", "--help"])))

    threads = ["-t", str(args.threads)] if args.threads else []
    for name in args.model or [DEFAULT_MODEL]:
        path = resolve(name)
        run = [python, "-m", "pymistral", "run", "-m", str(path), *threads, "--max-len", "1", "-s", "You are a helpful assistant.", "Hello"]
        if has_chat_template(path):
            add(path.name, "first token, warm", "s", repeat(lambda run=run: first_byte(run)), 1.0)  # type: ignore[misc]
            cold = []
            for _ in range(1 if args.quick else 3):
                with tempfile.TemporaryDirectory() as empty:
                    cold.append(first_byte(run, PYMISTRAL_CACHE=empty))
            add(path.name, "first token, cold", "s", cold, 8.0)
        else:
            report.notes.append(f"{path.name}: no first token, since `pymistral run` needs a chat template and the file has none")
        runs = [load_and_generate(path, args.threads, 16 if args.quick else 128) for _ in range(2 if args.quick else 3)]
        size = path.stat().st_size / 2**20
        add(path.name, "load", "s", [run[0] for run in runs], next((s for gb, s in LOADING if path.stat().st_size <= gb * 1e9), None))
        for index, moment in enumerate(("after the imports", "after loading", "after an answer"), 1):
            add(path.name, f"peak memory {moment}", "MiB", [run[index] for run in runs])
        add(path.name, "private memory after an answer", "MiB", [run[4] for run in runs])
        add(path.name, "KV cache of the answer", "MiB", [run[5] for run in runs])
        over = "over the file's size, without the KV cache"
        add(path.name, f"peak memory after an answer, {over}", "x", [(run[3] - run[5]) / size for run in runs], 1.4)
        add(path.name, f"private memory after an answer, {over}", "x", [(run[4] - run[5]) / size for run in runs])
    report.finish(args)


if __name__ == "__main__":
    main()
