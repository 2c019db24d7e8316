"""Whole models through the CUDA kernels, in a simulator or on a GPU: every architecture against transformers."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pymistral.kernels.cuda import linear
from pymistral.kernels.cuda.launch import Launch

from pymistral.engine.cuda_runner import CudaRunner, free_after_weights, step_bytes, weight_bytes
from pymistral.engine.types import Segment
from pymistral.loading.checkpoint import Checkpoint, load_gguf
from pymistral.loading.huggingface import load_folder
from pymistral.models.registry import build_model
from pymistral.nn import record
from pymistral.nn.cuda import Size

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from simulated_gpu import SimulatedGpu, make_gpu
from test_goldens import compare
from test_parity import GOLDENS, golden
from tiny import write_folder
from tiny_gguf import write_gguf

GPU = pytest.param("gpu", marks=pytest.mark.gpu)
TOLERANCE = 5e-5


def runner_of(checkpoint: Checkpoint, kind: str) -> CudaRunner:
    graph = record(build_model(checkpoint.config, checkpoint.weights))
    return CudaRunner(graph, make_gpu(kind), max_position_embeddings=128, max_num_seqs=4, cache_tokens=256, max_tokens=64)


def logits_in_steps(runner: CudaRunner, tokens: list[int], cuts: list[int], blocks: list[int]) -> NDArray[np.float32]:
    rows = []
    for start, end in itertools.pairwise(cuts):
        logits = runner.forward([Segment(tokens[start:end], start, blocks, end - start)])
        rows.append(runner.read_logits(logits).copy())
    return np.concatenate(rows)[:, ::4]


@pytest.mark.parametrize("kind", ["90", GPU])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_architectures(path: Path, kind: str, tmp_path: Path) -> None:
    """A prompt, a short chunk and single tokens: each is a program of its own, with other kernels."""
    config, values, tokens, expected = golden(path)
    runner = runner_of(load_folder(write_folder(tmp_path / "model", config, values)), kind)
    found = logits_in_steps(runner, tokens, [0, 50, len(tokens) - 6, len(tokens) - 1, len(tokens)], [7, 5])
    assert np.abs(found - expected).max() < TOLERANCE


@pytest.mark.parametrize("kind", ["90", "75", GPU])
@pytest.mark.parametrize(
    ("name", "matrices", "limit"),
    [("mixtral", "Q8_0", 0.1), ("phi3", "Q8_0", 0.1), ("qwen3_moe", "Q5_1", 0.6), ("mixtral", "F16", 0.05), ("phi3", "BF16", 0.1)],
)
def test_other_types(name: str, matrices: str, limit: float, kind: str, tmp_path: Path) -> None:
    """On tensor cores and without; prompts and single tokens take other paths, and all stay near the float model's logits."""
    config, values, tokens, expected = golden(GOLDENS[0].parent / f"{name}.npz")
    runner = runner_of(load_gguf(write_gguf(tmp_path / "tiny.gguf", config, values, matrices)), kind)
    found = logits_in_steps(runner, tokens, [0, 50, len(tokens) - 4, len(tokens)], [3, 0])
    error = np.median(np.abs(found - expected).max(axis=1)) / expected.std()  # of a token; near a tie, a router chooses otherwise
    assert error < limit


def test_prompts_on_unpacked_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What prompts of hundreds of tokens take: every matrix in bfloat16 before it is multiplied. The same numbers as without."""
    config, values, tokens, expected = golden(GOLDENS[0].parent / "phi3.npz")
    monkeypatch.setattr(linear, "FEW_ROWS", 32)
    for matrices in ("Q8_0", "BF16"):
        path = write_gguf(tmp_path / f"{matrices}.gguf", config, values, matrices)
        monkeypatch.setattr(linear, "UNPACKED_ROWS", 1 << 20)
        without = runner_of(load_gguf(path), "90")
        wanted = logits_in_steps(without, tokens, [0, 50], [3, 0])
        assert not any("hopper" in launch.kernel.name for launch in launches_of(without))
        monkeypatch.setattr(linear, "UNPACKED_ROWS", 64)
        runner = runner_of(load_gguf(path), "90")
        np.testing.assert_allclose(logits_in_steps(runner, tokens, [0, 50], [3, 0]), wanted, atol=1e-3 * expected.std())
        names = [launch.kernel.name for launch in launches_of(runner)]
        unpacked = names.count("matmul_hopper") + 2 * names.count("gated_matmul_hopper")
        assert names.count("dequantize") == (unpacked if matrices == "Q8_0" else 0)
        assert "matmul_hopper" in names
        assert "gated_matmul_hopper" in names


def launches_of(runner: CudaRunner) -> list[Launch]:
    return runner.programs.of(Size(64, 8, True)).launches


def test_queries_keys_and_values_are_one_launch(tmp_path: Path) -> None:
    config, values, _, _ = golden(GOLDENS[0].parent / "mistral.npz")
    runner = runner_of(load_gguf(write_gguf(tmp_path / "tiny.gguf", config, values, "Q8_0")), "90")
    launches = runner.programs.of(Size(1, 1, False)).launches
    layers = sum(launch.kernel.name.startswith("attention_decode") for launch in launches)
    assert sum(launch.kernel.name == "matvec" for launch in launches) == 3 * layers + 1  # and the output's, the way down, the logits


def test_programs_are_captured_once_for_each_size(tmp_path: Path) -> None:
    config, values, tokens, _ = golden(GOLDENS[0].parent / "llama.npz")
    runner = runner_of(load_folder(write_folder(tmp_path / "model", config, values)), "90")
    gpu = runner.gpu
    assert isinstance(gpu, SimulatedGpu)
    first = gpu.captured  # the largest, so that a lack of memory shows at once, and sampling
    for start in range(3):
        runner.forward([Segment(tokens[start : start + 1], start, [1], 1)])
    assert gpu.captured == first + 1
    free = gpu.free_memory()
    runner.forward([Segment(tokens[3:8], 3, [1], 1)])
    runner.forward([Segment(tokens[8:15], 8, [1], 0)])
    assert gpu.captured == first + 2
    assert gpu.free_memory() == free  # programs share the memory of what lives during one step


def test_how_much_memory_is_left(tmp_path: Path) -> None:
    config, values, _, _ = golden(GOLDENS[0].parent / "llama.npz")
    checkpoint = load_folder(write_folder(tmp_path / "model", config, values))
    graph = record(build_model(checkpoint.config, checkpoint.weights))
    gpu = SimulatedGpu(memory=3 << 30)
    assert free_after_weights(graph, gpu, 64) == (3 << 30) - (512 << 20) - weight_bytes(graph) - step_bytes(graph, 64)
    assert free_after_weights(graph, SimulatedGpu(memory=1 << 20)) == 0
    runner = CudaRunner(graph, gpu, max_position_embeddings=128, max_num_seqs=4, cache_tokens=256, max_tokens=64)
    assert runner.model.weights.nbytes == weight_bytes(graph)


def test_a_real_model(smollm2_path: Path) -> None:
    """A prompt on simulated tensor cores and two tokens after it: as close to float32 as llama.cpp is over the whole text."""
    checkpoint = load_gguf(smollm2_path)
    runner = runner_of(checkpoint, "90")
    with np.load(Path(__file__).parents[1] / "goldens" / "smollm2-135m-instruct-q4_1.npz") as golden:
        tokens, limit = [int(token) for token in golden["tokens"][:32]], float(golden["llama_cpp_mean_kl"])
        expected = {"top_ids": golden["top_ids"][:32], "top_logprobs": golden["top_logprobs"][:32]}
    rows = [
        runner.read_logits(runner.forward([Segment(tokens[start:end], start, [2], end - start)])).copy()
        for start, end in ((0, 30), (30, 31), (31, 32))
    ]
    divergence, agreement = compare(np.concatenate(rows), expected)
    assert divergence <= limit
    assert agreement > 0.9
