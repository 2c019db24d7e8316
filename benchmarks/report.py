"""What all benchmarks share: the machine they ran on, tables, and files of results."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "{{ messages[0].content }}"
"""A chat template for files that have none: the prompt as it is."""
PACKAGES = ("pymistral", "numba", "llvmlite", "numpy")

Cell = str | int | float | None
Row = dict[str, Cell]


@dataclass
class Report:
    """Rows to show and to keep.

    Parameters
    ----------
    name
        Of the benchmark, and of its files.
    columns
        Keys of the rows that the table shows, with their headings.
    machine, rows, notes
        What else is written down.
    """

    name: str
    columns: dict[str, str]
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plot: Callable[[Report, Path], None] | None = None

    def add(self, **row: Cell) -> None:
        """Keep a row, and say so: benchmarks take minutes."""
        self.rows.append(row)
        if sys.stderr.isatty():
            print("  " + "  ".join(text for key in self.columns if (text := shown(row.get(key)))), file=sys.stderr, flush=True)

    def finish(self, args: argparse.Namespace) -> None:
        """Print the table or the JSON, and write the files that were asked for."""
        print(self.as_json() if args.json else self.as_text())
        if args.output is not None:
            self.save(args.output)

    def save(self, folder: Path) -> None:
        """Write what there is so far."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(self.as_json() + "\n")
        (folder / f"{self.name}.md").write_text(self.as_markdown())
        if self.plot is not None:
            try:
                self.plot(self, folder / f"{self.name}.png")
            except ImportError:
                print("no plot: it needs matplotlib, pip install -e '.[bench]'", file=sys.stderr)

    def as_json(self) -> str:
        return json.dumps({"benchmark": self.name, "machine": self.machine, "notes": self.notes, "rows": self.rows}, indent=1)

    def as_text(self) -> str:
        lines = [list(self.columns.values()), *([shown(row.get(key)) for key in self.columns] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        numeric = [any(isinstance(row.get(key), int | float) for row in self.rows) for key in self.columns]
        table = [
            "  ".join(
                text.rjust(width) if right else text.ljust(width) for text, width, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in lines
        ]
        table.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([f"{key}: {value}" for key, value in self.machine.items()] + ["", *table, "", *self.notes]).rstrip()

    def as_markdown(self) -> str:
        lines = [f"# {self.name}", "", f"`{self.machine['command']}`", ""]
        lines += [f"- {key}: {value}" for key, value in self.machine.items() if key != "command"]
        lines += ["", "| " + " | ".join(self.columns.values()) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(shown(row.get(key)).replace("|", "\\|") for key in self.columns) + " |" for row in self.rows]
        return "\n".join([*lines, "", *self.notes]).rstrip() + "\n"


def shown(value: Cell) -> str:
    """A cell as text: three significant digits or more."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return str(value)


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: does it run at all")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write NAME.json, NAME.md and NAME.png there")
    return parser


def has_chat_template(model: Path) -> bool:
    """Whether a GGUF file or a folder says how to write a chat."""
    from pymistral.loading.checkpoint import GgufLoader
    from pymistral.loading.huggingface import chat_template

    return (chat_template(model) if model.is_dir() else GgufLoader(model).text("tokenizer.chat_template")) is not None


def machine() -> dict[str, Any]:
    """The machine, the versions and the command, for whoever wants to repeat it."""
    from pymistral.kernels.cpu.isa import current_isa

    from pymistral.cli.doctor import cpu_model
    from pymistral.nn.pool import available_threads

    return {
        "command": command(),
        "commit": commit(),
        "cpu": f"{cpu_model(Path('/proc/cpuinfo'))}, {available_threads()} cores, {last_level_cache() / 2**20:.0f} MiB last-level cache",
        "isa": current_isa().name,
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    }


def command() -> str:
    """The command line, without the folders of the machine that it ran on."""
    module = Path(sys.argv[0]).stem
    words = [re.sub(r"(^|[=,])[^=,]*/", r"\1", word) for word in sys.argv[1:]]
    return " ".join(["python -m", f"benchmarks.{module}", *words])


def commit() -> str:
    """The commit that was measured, marked if files had changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{name} and local changes" if changed else name


def last_level_cache() -> int:
    """Bytes of the largest cache that core 0 uses; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes)


def median(values: Sequence[float]) -> float:
    """Of at least one value."""
    import statistics

    return statistics.median(values)
