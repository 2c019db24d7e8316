"""pymistral beside other engines: the same file, the same threads, taking turns, so that a noisy machine is noisy for all of them.

    python -m benchmarks.engines -m MODEL.gguf --python llama_cpp=/path/to/venv/bin/python --output results

Each engine runs in a process of its own, with its own interpreter: ``--python ENGINE=PATH`` names one that has it, else
this interpreter is tried. Engines that are not installed are left out. The tests are those of llama-bench: ppN
processes a prompt of N tokens; tgN generates N tokens one by one, always the likeliest; "tgN @ C" does so after C
tokens.

Figures are medians, in tokens per second; a ratio is pymistral's median over the other's. An engine that needs longer
than --patience for a test is measured once, without warm-up. "% of bound" is of the rate at which the memory, as it is just before and
after each run, gives the bytes that the tokens need: the weights, and the KV cache as far as they look at it.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pymistral.loading.hub import DEFAULT_MODEL, resolve
from pymistral.nn.pool import available_threads

from .report import Report, arguments, median

ENGINES = ("pymistral", "llama_cpp", "mistralrs", "transformers")
WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Test:
    """One of llama-bench's tests."""

    kind: str
    tokens: int
    context: int = 0

    @property
    def name(self) -> str:
        name = f"{'pp' if self.kind == 'prefill' else 'tg'}{self.tokens}"
        return f"{name} @ {self.context}" if self.context else name

    @classmethod
    def parse(cls, name: str) -> Test:
        """From its name: pp512, tg128, tg128@2000."""
        match = re.fullmatch(r"(pp|tg)([1-9]\d*)(?: ?@ ?(\d+))?", name)
        if match is None or (match[1] == "pp" and match[3]):
            raise SystemExit(f"--tests: {name!r} is none; tests are written pp512, tg128 or tg128@2000")
        return cls("prefill" if match[1] == "pp" else "decode", int(match[2]), int(match[3] or 0))


TESTS = "pp512,tg128,tg128@2000,pp4096"
QUICK_TESTS = "pp32,tg8,tg8@64"


class EngineError(Exception):
    """The engine's process ended; the message is the last line that it wrote."""


@dataclass
class Worker:
    """An engine's process, loaded and waiting."""

    engine: str
    process: subprocess.Popen[str]
    errors: IO[bytes]
    version: str = ""
    note: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)
    of_bound: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    patient: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def start(cls, engine: str, python: str, model: Path, threads: int, context: int) -> Worker:
        """Start the process and wait until the model is loaded. Raises EngineError."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = [python, str(WORKERS / f"{engine}.py"), str(model), str(threads), str(context)]
        worker = cls(engine, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True), errors)
        hello = worker._read()
        worker.version, worker.note = hello["version"], hello["note"]
        return worker

    def run(self, test: Test, patience: float) -> None:
        """Measure a test once more. The first time is a warm-up, unless it lasts too long."""
        if self.patient.get(test.name) is False or test.name in self.failures:
            return
        try:
            result = self._measure(test)
            if test.name not in self.patient:
                self.patient[test.name] = result["seconds"] <= patience
                if result["seconds"] <= patience:
                    result = self._measure(test)
        except EngineError as error:
            self.failures[test.name] = str(error)
            return
        self.samples.setdefault(test.name, []).append(result["tokens"] / result["seconds"])
        if "least_seconds" in result:
            self.of_bound.setdefault(test.name, []).append(100 * result["least_seconds"] / result["seconds"])

    def _measure(self, test: Test) -> dict[str, float]:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; reading says why
            self.process.stdin.write(json.dumps({"test": test.kind, "tokens": test.tokens, "context": test.context}) + "\n")
            self.process.stdin.flush()
        result: dict[str, float] = self._read()
        return result

    def _read(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or [f"exit code {self.process.returncode}"]
        raise EngineError(lines[-1])

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def interpreters(options: list[str]) -> dict[str, str]:
    """Which interpreter has which engine."""
    chosen = dict.fromkeys(ENGINES, sys.executable)
    for option in options:
        engine, _, python = option.partition("=")
        if engine not in ENGINES or not python:
            raise SystemExit(f"--python {option}: expected ENGINE=PATH with one of the engines {', '.join(ENGINES)}")
        chosen[engine] = python
    return chosen


def start_all(engines: list[str], pythons: dict[str, str], model: Path, threads: int, context: int, notes: list[str]) -> list[Worker]:
    """The engines that can be started, pymistral first."""
    workers = []
    for engine in engines:
        try:
            workers.append(Worker.start(engine, pythons[engine], model, threads, context))
        except (EngineError, OSError) as error:  # noqa: PERF203
            message = f"{engine} is not measured: {error}"
            print(message, file=sys.stderr)
            notes.append(message)
    return workers


def collect(report: Report, workers: list[Worker], tests: tuple[Test, ...], model: str) -> None:
    """A row for each test and engine."""
    for test in tests:
        own = next((median(w.samples[test.name]) for w in workers if w.engine == "pymistral" and test.name in w.samples), None)
        for worker in workers:
            samples = worker.samples.get(test.name)
            if not samples:
                report.notes.append(f"{worker.engine}, {model}, {test.name}: {worker.failures.get(test.name, 'not measured')}")
                continue
            rate = median(samples)
            report.add(
                model=model,
                test=test.name,
                engine=worker.engine,
                tokens_per_sec=rate,
                low=min(samples),
                high=max(samples),
                runs=len(samples),
                ratio=own / rate if own and worker.engine != "pymistral" else None,
                percent=median(worker.of_bound[test.name]) if test.name in worker.of_bound else None,
            )


def plot_bars(report: Report, path: Path) -> None:
    """Bars of each test, one panel for each model and test, because their scales differ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((str(row["model"]), str(row["test"])) for row in report.rows))
    models = list(dict.fromkeys(model for model, _ in panels))
    across = max(sum(model == other for other, _ in panels) for model in models)
    figure, grid = plt.subplots(len(models), across, figsize=(3 * across, 3 * len(models)), squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set_visible(False)
    for line, model in zip(grid, models, strict=True):
        for axes, test in zip(line, [test for other, test in panels if other == model], strict=False):
            rows: list[Any] = [row for row in report.rows if (row["model"], row["test"]) == (model, test)]
            axes.set_visible(True)
            rates = [row["tokens_per_sec"] for row in rows]
            spread = [[row["tokens_per_sec"] - row["low"] for row in rows], [row["high"] - row["tokens_per_sec"] for row in rows]]
            bars = axes.bar(
                [row["engine"] for row in rows], rates, yerr=spread, capsize=3, color=[f"C{ENGINES.index(row['engine'])}" for row in rows]
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
            axes.set_title(f"{test}, {model}"[:44], fontsize=8)
            axes.tick_params(axis="x", labelsize=7)
    grid[0][0].set_ylabel("tokens per second")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "-m", "--model", action="append", metavar="MODEL", help=f"a GGUF file or model id; may be repeated (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("-t", "--threads", type=int, default=available_threads(), metavar="N", help="threads (default: one per core)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="turns (default: 5)")
    parser.add_argument("--tests", default=TESTS, metavar="NAMES", help=f"which tests (default: {TESTS})")
    parser.add_argument(
        "--python", action="append", default=[], metavar="ENGINE=PATH", help="the interpreter that has the engine; may be repeated"
    )
    parser.add_argument("--engines", default=",".join(ENGINES), metavar="NAMES", help=f"which to measure (default: {','.join(ENGINES)})")
    parser.add_argument(
        "--patience", type=float, default=20.0, metavar="S", help="seconds that a test may take to be repeated (default: 20)"
    )
    args = parser.parse_args()
    pythons, engines = interpreters(args.python), args.engines.split(",")
    if unknown := [engine for engine in engines if engine not in ENGINES]:
        raise SystemExit(f"--engines: {unknown[0]} is unknown; these are known: {', '.join(ENGINES)}")
    tests = tuple(Test.parse(name) for name in (QUICK_TESTS if args.quick else args.tests).split(","))
    repetitions = 2 if args.quick else args.repetitions
    context = max(test.tokens + test.context for test in tests) + 64

    columns = {
        "model": "model",
        "test": "test",
        "engine": "engine",
        "tokens_per_sec": "tok/s",
        "low": "lowest",
        "high": "highest",
        "runs": "runs",
    }
    columns |= {"ratio": "pymistral is x times as fast", "percent": "% of bound"}
    report = Report("engines", columns, plot=plot_bars)
    report.machine["threads"] = args.threads
    for model in args.model or [DEFAULT_MODEL]:
        path = resolve(model)
        workers = start_all(engines, pythons, path, args.threads, context, report.notes)
        try:
            for _ in range(repetitions):
                for test in tests:
                    for worker in workers:
                        worker.run(test, args.patience)
            collect(report, workers, tests, path.name)
            report.machine["engines"] = ", ".join(f"{w.engine} {w.version}{f' ({w.note})' if w.note else ''}" for w in workers)
        finally:
            for worker in workers:
                worker.close()
    report.finish(args)


if __name__ == "__main__":
    main()
