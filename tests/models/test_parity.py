"""Every architecture against transformers: a tiny checkpoint's logits, from safetensors and from GGUF, at once, in chunks, by the token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymistral.kernels.cpu.geometry import panel_tokens, panels_at_once
from tiny import tiny_values, write_folder
from tiny_gguf import write_gguf

from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.loading.checkpoint import Checkpoint, load_gguf
from pymistral.loading.huggingface import load_folder
from pymistral.models.registry import build_model, supported_model_types
from pymistral.nn import record

GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*.npz"))
TOLERANCE = 5e-5


def golden(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]], list[int], NDArray[np.float32]]:
    with np.load(path) as file:
        config, shapes = json.loads(str(file["config"])), json.loads(str(file["shapes"]))
        values = tiny_values(shapes, config["model_type"].startswith("gemma"))
        return config, values, file["tokens"].tolist(), file["logits"]


def runner_of(checkpoint: Checkpoint) -> CpuRunner:
    graph = record(build_model(checkpoint.config, checkpoint.weights))
    return CpuRunner(graph, max_position_embeddings=128, threads=2, block_size=32, cache_tokens=256)


def logits_in_steps(runner: CpuRunner, tokens: list[int], step: int, blocks: list[int]) -> NDArray[np.float32]:
    rows = []
    for start in range(0, len(tokens), step):
        chunk = tokens[start : start + step]
        rows.append(runner.forward([Segment(chunk, start, blocks, outputs=len(chunk))]).copy())
    return np.concatenate(rows)[:, ::4]


def check(checkpoint: Checkpoint, tokens: list[int], expected: NDArray[np.float32]) -> None:
    runner = runner_of(checkpoint)
    for step, blocks in ((64, [0, 1]), (1, [7, 5]), (23, [3, 0])):
        found = logits_in_steps(runner, tokens, step, blocks)
        error = np.abs(found - expected).max()
        print(f"steps of {step}: {error:.2e}")
        assert error < TOLERANCE, f"steps of {step}"


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_safetensors(path: Path, tmp_path: Path) -> None:
    config, values, tokens, expected = golden(path)
    checkpoint = load_folder(write_folder(tmp_path / "model", config, values))
    check(checkpoint, tokens, expected)


def test_every_architecture_has_a_golden() -> None:
    assert {path.stem.partition("-")[0] for path in GOLDENS} == set(supported_model_types())


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_gguf(path: Path, tmp_path: Path) -> None:
    config, values, tokens, expected = golden(path)
    if config["rope_parameters"].get("rope_type") == "dynamic":
        pytest.skip("GGUF has no word for it")
    plain = {"use_sliding_window": False, "sliding_window": None, "layer_types": None, "mlp_only_layers": [], "query_pre_attn_scalar": 32}
    if config.get("use_sliding_window") or config.get("mlp_only_layers") or "query_pre_attn_scalar" in config:
        # GGUF has no words for these: compare with what safetensors give without them
        kept = ("sliding_window", "layer_types") if "query_pre_attn_scalar" in config else ()
        config = config | {key: value for key, value in plain.items() if key in config and key not in kept}
        values = without_dense_layers(values, golden(path)[0])
        checkpoint = load_folder(write_folder(tmp_path / "model", config, values))
        expected = logits_in_steps(runner_of(checkpoint), tokens, 64, [0, 1])
    check(load_gguf(write_gguf(tmp_path / "tiny.gguf", config, values)), tokens, expected)


def without_dense_layers(values: dict[str, NDArray[np.float32]], config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    if not config.get("mlp_only_layers"):
        return values
    shapes = {name: list(tensor.shape) for name, tensor in values.items()}
    for layer in config["mlp_only_layers"]:
        dense = f"model.layers.{layer}.mlp."
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(dense)}
        shapes |= {name.replace(".layers.0.", f".layers.{layer}."): shape for name, shape in shapes.items() if ".layers.0.mlp." in name}
    return tiny_values(shapes, gemma=False)


@pytest.mark.parametrize("name", ["mistral", "qwen3_moe"])
def test_long_texts_and_batches(name: str, tmp_path: Path) -> None:
    """Several chunks of positions, split over threads in decode; two sequences in one step; all the same to the last bits."""
    config, values, tokens, _ = golden(Path(__file__).parent / "goldens" / f"{name}.npz")
    checkpoint = load_folder(write_folder(tmp_path / "model", config | {"max_position_embeddings": 1024}, values))
    graph = record(build_model(checkpoint.config, checkpoint.weights))
    runner = CpuRunner(graph, max_position_embeddings=1024, threads=2, block_size=32, cache_tokens=2048)
    text = (tokens * 10)[:600]
    blocks, others = list(range(20)), list(range(40, 60))
    whole = [
        runner.forward([Segment(text[:400], 0, blocks, 0)]),
        runner.forward([Segment(text[400:598], 400, blocks, 1)]).copy(),
        runner.forward([Segment(text[598:599], 598, blocks, 1)]).copy(),
        runner.forward([Segment(text[599:], 599, blocks, 1)]).copy(),
    ]
    runner.forward([Segment(text[:300], 0, others, 0), Segment(tokens, 0, [30, 31], 0)])
    runner.forward([Segment(text[300:597], 300, others, 0), Segment(tokens[:1], 64, [30, 31, 32], 0)])
    both = runner.forward([Segment(text[597:], 597, others, 3), Segment(tokens[1:2], 65, [30, 31, 32], 1)])[:3]
    np.testing.assert_allclose(np.concatenate(whole[1:]), both, atol=2e-6)


@pytest.mark.parametrize(("matrices", "most"), [("F32", 0), ("Q4_1", 1 << 62), ("Q4_1", 0), ("Q4_1", 2000), ("Q5_0", 0)])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_lanes(path: Path, matrices: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread takes streams of its own through the model, but for products of more than ``most`` bytes of quants: to the last bit what
    each stream gets alone."""
    monkeypatch.setattr("pymistral.nn.cpu_lanes.most_read_twice", lambda: most)
    config, values, tokens, _ = golden(path)
    if matrices == "F32":
        checkpoint = load_folder(write_folder(tmp_path / "model", config, values))
    elif config["model_type"] in ("llama", "gemma2", "qwen3_moe"):
        checkpoint = load_gguf(write_gguf(tmp_path / "tiny.gguf", config, values, matrices))
    else:
        pytest.skip("three architectures have all kinds of launches")
    graph = record(build_model(checkpoint.config, checkpoint.weights))
    panel = panel_tokens()
    runner = CpuRunner(graph, max_position_embeddings=128, max_num_seqs=4 * panel, threads=2, cache_tokens=4 * panel * 64)
    lengths = [5 + 7 * i % 40 for i in range(4 * panel)]

    def step(sequence: int) -> Segment:
        return Segment([tokens[(3 * sequence + 1) % len(tokens)]], lengths[sequence], [2 * sequence, 2 * sequence + 1], 1, 1)

    for i, length in enumerate(lengths):
        runner.forward([Segment([tokens[(i + j) % len(tokens)] for j in range(length)], 0, [2 * i, 2 * i + 1], 0)])
    alone = np.concatenate([runner.forward([step(i)]).copy() for i in range(4 * panel)])
    assert runner.program.state.panels_in_lane == 0
    mixture = any(node.op == "mixture_of_experts" for node in graph.nodes)  # its launches are for all tokens
    for count, panels in ((2 * panel - 3, 1), (2 * panel, 1), (4 * panel - 1, 2), (4 * panel, 2), (3 * panel, 0), (panel + 1, 0)):
        found = runner.forward([step(i) for i in range(count)])
        np.testing.assert_array_equal(found, alone[:count], err_msg=f"{count} streams")
        assert runner.program.state.panels_in_lane == (0 if mixture or count <= 8 else panels)


def test_what_has_no_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices that each lane would read, unless two panels share what is unpacked of them; more threads than two; steps launch by
    launch."""
    config, values, tokens, _ = golden(Path(__file__).parent / "goldens" / "llama.npz")
    checkpoint = load_folder(write_folder(tmp_path / "model", config, values))
    streams = 4 * panel_tokens()

    def panels_in_lane(threads: int) -> list[int]:
        graph = record(build_model(checkpoint.config, checkpoint.weights))
        runner = CpuRunner(graph, max_position_embeddings=32, max_num_seqs=streams, threads=threads, cache_tokens=32 * streams)
        found = []
        for count in (streams // 2, streams):
            runner.forward([Segment([tokens[i]], 0, [i], 1, 1) for i in range(count)])
            found.append(runner.program.state.panels_in_lane)
        return found

    one = int(streams // 2 > 8)  # fewer tokens are divided by their positions
    assert panels_in_lane(2) == [one, 2]
    assert panels_in_lane(1) == panels_in_lane(3) == [0, 0]
    monkeypatch.setattr("pymistral.nn.cpu_lanes._SMALL", 0)
    monkeypatch.setattr("pymistral.nn.cpu_lanes.most_read_twice", lambda: 1 << 62)
    assert panels_in_lane(2) == [0 if panels_at_once() == 2 else one, 2]
    monkeypatch.setenv("PYMISTRAL_EAGER", "1")
    assert panels_in_lane(2) == [0, 0]


@pytest.mark.parametrize(
    ("name", "matrices", "limit"),
    [
        ("mixtral", "Q8_0", 0.1),
        ("qwen2", "Q8_0", 0.1),
        ("phi3", "Q8_0", 0.1),
        ("qwen3_moe", "Q5_1", 0.6),
        ("mixtral", "F16", 0.05),
        ("phi3", "BF16", 0.1),
    ],
)
def test_other_types(name: str, matrices: str, limit: float, tmp_path: Path) -> None:
    """Quantised experts, biases and slices of fused matrices; all steps agree, and the logits stay near the float model's."""
    config, values, tokens, expected = golden(Path(__file__).parent / "goldens" / f"{name}.npz")
    if name == "qwen2":
        config = config | {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
        expected = logits_in_steps(runner_of(load_folder(write_folder(tmp_path / "model", config, values))), tokens, 64, [0, 1])
    runner = runner_of(load_gguf(write_gguf(tmp_path / "tiny.gguf", config, values, matrices)))
    whole = logits_in_steps(runner, tokens, 64, [0, 1])
    np.testing.assert_allclose(logits_in_steps(runner, tokens, 1, [7, 5]), whole, atol=1e-5)
    error = np.median(np.abs(whole - expected).max(axis=1)) / expected.std()  # of a token; near a tie, a router chooses otherwise
    assert error < limit
