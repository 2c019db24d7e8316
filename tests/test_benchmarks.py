"""The benchmarks run, and count right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pymistral.kernels.cpu.isa import current_isa

from benchmarks.accuracy import score
from benchmarks.engines import Test as EngineTest
from benchmarks.report import has_chat_template, shown
from benchmarks.scaling import SHAPES, Machine, step
from pymistral.quantization.types import GgmlType

sys.path.insert(0, str(Path(__file__).parent))
from simulated_gpu import make_gpu

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels(tmp_path: Path) -> None:
    run("benchmarks.kernels", "--quick", "-t", "1", "--types", "Q4_1,F16", "--output", str(tmp_path))
    result = json.loads((tmp_path / "kernels.json").read_text())
    limits = result["machine"]["limits"]
    assert (limits.pop("tiles") > 0) == current_isa().has_amx
    assert (limits.pop("pairs") > 0) == current_isa().has_bf16
    assert min(limits.values()) > 0
    kernels = {row["kernel"] for row in result["rows"]}
    assert {
        "executor",
        "matmul.matmul",
        "matmul.gated_matmul",
        "matmul.float_matmul",
        "quantize.quantize",
    } <= kernels
    assert any(kernel.endswith("attention.attention") for kernel in kernels)
    assert all(row["microseconds"] > 0 for row in result["rows"])
    assert str(tmp_path.parent) not in result["machine"]["command"]
    assert (tmp_path / "kernels.md").read_text().startswith("# kernels\n")


def test_engines(smollm2_path: Path) -> None:
    result = json.loads(run("benchmarks.engines", "--quick", "--json", "-t", "1", "-m", str(smollm2_path), "--engines", "pymistral"))
    assert [row["test"] for row in result["rows"]] == ["pp32", "tg8", "tg8 @ 64"]
    assert all(row["low"] <= row["tokens_per_sec"] <= row["high"] for row in result["rows"])


def test_decode() -> None:
    (row,) = json.loads(run("benchmarks.decode", "--quick", "--json", "-t", "1"))["rows"]
    assert row["gb_per_token"] == pytest.approx(1.06e-3, rel=0.05)  # 1.8 million weights of half a byte each, and their scales
    assert row["tokens_per_sec"] * row["gb_per_token"] == pytest.approx(row["gb_per_sec"])


def test_serving(smollm2_path: Path) -> None:
    result = json.loads(
        run("benchmarks.serving", "--quick", "--json", "-t", "1", "-m", str(smollm2_path), "--python", "llama_cpp=/nowhere")
    )
    rows = {(row["test"], row["streams"]): row for row in result["rows"]}
    assert {("decode", 1), ("decode", 4), ("arrival: before", 2), ("arrival: 150 tokens", 2), ("first token, cached prefix", 1)} <= set(
        rows
    )
    assert all(row["gap"] <= row["gap_p99"] for row in rows.values() if "gap" in row)
    one = rows["decode", 1]
    assert 0.5 < one["tokens_per_sec"] * one["gap"] / 1e3 < 2  # two ways to measure the same
    assert len([note for note in result["notes"] if "wanted" in note]) == 3


def test_files_without_a_chat_template(smollm2_path: Path, gemma3_path: Path) -> None:
    """They are sent plain prompts; `pymistral run`, whose first token is timed, refuses them."""
    assert has_chat_template(smollm2_path)
    assert not has_chat_template(gemma3_path)
    serving = ("benchmarks.serving", "--quick", "--json", "-t", "1", "-m", str(gemma3_path), "--python", "llama_cpp=/nowhere")
    assert all(row["model"] == gemma3_path.name for row in json.loads(run(*serving))["rows"])
    startup = json.loads(run("benchmarks.startup", "--quick", "--json", "-t", "1", "-m", str(gemma3_path)))
    assert "load" in [row["what"] for row in startup["rows"]]
    assert any("needs a chat template" in note for note in startup["notes"])


@pytest.mark.parametrize("name", ["pp512", "tg128", "tg128 @ 2000"])
def test_names_of_tests(name: str) -> None:
    assert EngineTest.parse(name).name == name
    assert EngineTest.parse(name.replace(" ", "")).name == name


@pytest.mark.parametrize("name", ["pp0", "pp512@5", "tg", "xx5"])
def test_wrong_names_of_tests(name: str) -> None:
    with pytest.raises(SystemExit, match="tests are written"):
        EngineTest.parse(name)


def test_score() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logits)[:, :8]
    golden = {"top_ids": ids, "top_logprobs": np.take_along_axis(logprobs, ids, 1)}
    kl, _, top1 = score(logits, golden, 4)
    assert kl == pytest.approx(0, abs=1e-6)
    assert top1 == 1
    kl, _, top1 = score(-logits, golden, 4)
    assert kl > 0.5
    assert top1 == 0


def test_scaling_counts_the_bytes() -> None:
    machine = Machine(64, 40, 400, 0, 0)
    for shape in SHAPES:
        streaming, sync = step(shape, 1, machine)
        assert sync == 0
        assert streaming == pytest.approx(sum(launch.units * launch.unit_bytes for launch in shape.launches()) / 40e9)


@pytest.mark.parametrize(("value", "text"), [(None, ""), (3, "3"), (1234.5, "1234"), (12.34, "12.3"), (0.01234, "0.0123"), ("x", "x")])
def test_shown(value: str | float | None, text: str) -> None:
    assert shown(value) == text


def test_speculative(smollm2_path: Path) -> None:
    result = json.loads(run("benchmarks.speculative", "--quick", "--json", "-m", str(smollm2_path), "-d", str(smollm2_path)))
    assert {row["kind"] for row in result["rows"]} == {"plain", "prompt lookup", "draft model"}
    assert all(row["answer"] == "the same" for row in result["rows"])
    assert all(row["accepted"] <= row["drafted"] for row in result["rows"])
    # The target as its own draft is soon left alone, since its guesses cost what they save.
    assert sum(row["accepted"] for row in result["rows"] if row["kind"] == "prompt lookup" and row["temperature"] == 0) > 0


def test_soak(smollm2_path: Path) -> None:
    crowd, *fifths = json.loads(run("benchmarks.soak", "--quick", "--json", "-m", str(smollm2_path)))["rows"]
    assert (crowd["requests"], crowd["different"]) == (12, 0)
    assert [row["used_blocks"] for row in fifths] == [0] * 5
    assert fifths[-1]["tokens"] >= 300


def test_gpu() -> None:
    """Its parts, on a GPU that is simulated; times mean nothing there."""
    from benchmarks import gpu as bench
    from benchmarks.report import Report

    device = make_gpu("90")
    report, limits = Report("gpu", bench.COLUMNS), bench.Limits()
    limits.copy, limits.bf16 = 1000.0, 100.0
    bench.products(device, limits, report, ["q4_k", "bf16"], [(64, 256)], 1, (1, 40, 130))
    small = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"head_dim": 64, "vocab_size": 256}
    for type in (GgmlType.Q4_K, GgmlType.BF16):
        graph = bench.random_llama(bench.LLAMA_8B | small, type)
        bench.model_rows(device, limits, report, "small", type.name, graph, 70, (1,), 40, passes=1)
    models = {"small, prefill", "small, decode of 1 at 64", "small, decode of 1 at 69"}
    assert {row["name"] for row in report.rows} == models | {"matvec 64x256", "matmul_few 64x256", "matmul 64x256"}
    assert all(row["percent"] > 0 for row in report.rows)  # type: ignore[operator]
    assert len(report.rows) == 6 + 6
