"""Every architecture against transformers: logits of a tiny checkpoint, from safetensors and from GGUF, at once, in chunks and token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import tiny_values, write_folder

from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.loading.checkpoint import Checkpoint
from pymistral.loading.huggingface import load_folder
from pymistral.models.registry import build_model, supported_model_types
from pymistral.nn import record

GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*.npz"))
TOLERANCE = 2e-4


def golden(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]], list[int], NDArray[np.float32]]:
    with np.load(path) as file:
        config, shapes = json.loads(str(file["config"])), json.loads(str(file["shapes"]))
        values = tiny_values(shapes, config["model_type"].startswith("gemma"))
        return config, values, file["tokens"].tolist(), file["logits"]


def runner_of(checkpoint: Checkpoint) -> CpuRunner:
    graph = record(build_model(checkpoint.config, checkpoint.weights))
    return CpuRunner(graph, max_position_embeddings=128, threads=2, block_size=16, cache_tokens=256)


def logits_in_steps(runner: CpuRunner, tokens: list[int], step: int, blocks: list[int]) -> NDArray[np.float32]:
    rows = []
    for start in range(0, len(tokens), step):
        chunk = tokens[start : start + step]
        rows.append(runner.forward([Segment(chunk, start, blocks, outputs=len(chunk))]).copy())
    return np.concatenate(rows)[:, ::4]


def check(checkpoint: Checkpoint, tokens: list[int], expected: NDArray[np.float32]) -> None:
    runner = runner_of(checkpoint)
    for step, blocks in ((64, [0, 1, 2, 3]), (1, [7, 5, 9, 4]), (23, [3, 0, 2, 1])):
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
