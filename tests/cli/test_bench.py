"""``pymistral bench`` and ``pymistral doctor``."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from fake_model import AlphabetRunner

from pymistral.cli import doctor
from pymistral.cli.bench import decode, prefill

Cli = Callable[..., Any]


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(3 << 20))
    return str(path)


def test_table(cli: Cli, gguf: str, builders: list[Any]) -> None:
    outcome = cli("bench", "-m", gguf, "-p", "8,600", "-n", "4", "-t", "1,2", "-r", "2")
    assert outcome.code == 0, outcome.err
    header, rule, *rows = outcome.out.splitlines()
    assert "mean ± sd" in header
    assert len(header) == len(rule)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[1], row[2], row[3]) for row in cells] == [("3 MiB", t, test) for t in "12" for test in ("pp8", "pp600", "tg4")]
    assert [builder.threads for builder in builders] == [1, 2]


def test_the_type_of_the_cache(cli: Cli, gguf: str, builders: list[Any]) -> None:
    assert cli("bench", "-m", gguf, "-p", "0", "-n", "4", "-r", "1", "--pa-cache-type", "int8").code == 0
    assert cli("run", "Hi", "--pa-cache-type", "f32").code == 0
    assert cli("run", "Hi").code == 0
    assert [builder.paged_attn.cache_type for builder in builders] == ["int8", "f32", "auto"]
    for command in (["run", "Hi"], ["bench", "-m", gguf]):
        outcome = cli(*command, "--pa-cache-type", "q4")
        assert (outcome.code, outcome.out) == (2, "")
        kinds = "'auto', 'f32', 'f16', 'bf16', 'int16', 'f8e4m3', 'int8'"
        assert outcome.err.startswith(f"error: argument --pa-cache-type: must be one of {kinds}, got 'q4' (see ")


def test_json(cli: Cli, gguf: str) -> None:
    (result,) = json.loads(cli("bench", "-m", gguf, "-p", "0", "-n", "5", "-r", "3", "--json").out)
    assert (result["model"], result["test"], result["size"]) == ("model.gguf", "tg5", 3 << 20)
    assert len(result["samples"]) == 3
    assert min(result["samples"]) <= result["median"] <= max(result["samples"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-p", "9999"], "this model's context of 1024 has no room for 9999 tokens"),
        (["-p", "-1"], "-1 is less than 0"),
        (["-p", "many"], "'many' is no list of whole numbers"),
        (["-r", "0"], "argument -r/--repetitions: 0 is less than 1"),
        (["-t", "1,2000"], "argument -t/--threads: must be a whole number from 1 to 1024, got 2000"),
    ],
)
def test_usage_errors(cli: Cli, gguf: str, arguments: list[str], message: str) -> None:
    outcome = cli("bench", "-m", gguf, *arguments)
    assert outcome.code == 2
    assert message in outcome.err


class Recorder(AlphabetRunner):
    """Keeps the segments of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[tuple[int, int, int]] = []

    def forward(self, segments: Any) -> Any:
        (segment,) = segments
        assert len(segment.block_table) * self.block_size >= segment.start + len(segment.tokens)
        assert all(0 <= token < self.vocab_size for token in segment.tokens)
        self.segments.append((segment.start, len(segment.tokens), segment.outputs))
        return super().forward(segments)


def test_what_is_measured() -> None:
    runner = Recorder()
    prefill(runner, 600)
    assert runner.segments == [(0, 256, 0), (256, 256, 0), (512, 88, 1)]
    runner = Recorder()
    decode(runner, 3)
    assert runner.segments == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]


# ---- doctor ---------------------------------------------------------------------------------------


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYMISTRAL_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "read_bandwidth", lambda threads, size: 42.0)
    outcome = cli("doctor")
    assert outcome.code == 0, outcome.out
    assert outcome.out.startswith("verdict       ready: ")
    report = json.loads(cli("doctor", "--json").out)
    assert report["ok"]
    assert report["cpu"]["isa"]
    assert report["memory"]["read_gb_per_sec"] == 42.0
    assert report["caches"]["models"]["path"] == str(tmp_path / "models")
    assert report["packages"]["numba"]


def test_doctor_knows_the_extras() -> None:
    assert {*doctor.EXTRAS, "bench", "test"} == set(metadata("pymistral").get_all("Provides-Extra", []))


def test_doctor_shows_what_is_broken(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("pymistral", "no-such-package"))
    monkeypatch.setattr(doctor, "read_bandwidth", lambda threads, size: 42.0)
    outcome = cli("doctor")
    assert outcome.code == 1
    assert outcome.out.startswith("verdict       pymistral cannot work here: missing packages: no-such-package")


def test_bandwidth_is_measured() -> None:
    assert 0.1 < doctor.read_bandwidth(2, 16 << 20) < 5000


@pytest.mark.parametrize(
    ("files", "cpus", "memory"),
    [
        ({"cpu.max": "max 100000", "a/b/cpu.max": "150000 100000", "a/cpu.max": "400000 100000", "a/memory.max": "1073741824"}, 1.5, 2**30),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        (
            {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": str(2**63 - 4096)},
            0.5,
            None,
        ),
        ({"a/b/cpu.max": "garbage"}, None, None),
        ({}, None, None),
    ],
)
def test_cgroups(tmp_path: Path, files: dict[str, str], cpus: float | None, memory: int | None) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/a/b\n")
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    assert doctor.cgroup_cpus(tmp_path / "fs", membership) == cpus
    assert doctor.cgroup_memory(tmp_path / "fs", membership) == memory
