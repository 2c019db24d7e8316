"""Real models against transformers in float32: at least as close as llama.cpp, on every instruction set.

The goldens hold 512 tokens of an English text, the 128 most likely ids at each position with their log-probabilities, and llama.cpp's
figures.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymistral.kernels.cpu.isa import _NEEDS, current_isa

import pymistral
from pymistral.builders.load import load_runner
from pymistral.engine.types import Segment

sys.path.insert(0, str(Path(__file__).parent))
from simulated_gpu import make_gpu

GOLDENS = Path(__file__).parent / "goldens"
MODELS = {"smollm2": "smollm2-135m-instruct-q4_1", "gemma3": "gemma3-270m-q4_k_m"}


def logits(path: Path, tokens: list[int], device: str) -> NDArray[np.float32]:
    async def run() -> NDArray[np.float32]:
        async with await pymistral.GgufModelBuilder(str(path.parent), [path.name], device=device).build() as model:
            return await model.logits(tokens)

    return asyncio.run(run())


def compare(logits: NDArray[np.float32], golden: Any) -> tuple[float, float]:
    """Mean KL divergence over the golden's ids and one bucket for all others, and how often the most likely id agrees."""
    ids = golden["top_ids"]
    expected = golden["top_logprobs"].astype(np.float64)
    found = np.empty_like(expected)
    for row, (values, top) in enumerate(zip(logits, ids, strict=True)):
        peak = values.max()
        found[row] = values[top].astype(np.float64) - peak - np.log(np.exp(values - peak).sum(dtype=np.float64))
    p = np.exp(expected)
    rest_p, rest_q = (np.maximum(1 - np.exp(values).sum(axis=1), 1e-9) for values in (expected, found))
    divergence = (p * (expected - found)).sum(axis=1) + rest_p * np.log(rest_p / rest_q)
    return float(divergence.mean()), float((logits.argmax(axis=1) == ids[:, 0]).mean())


def check(name: str, path: Path, device: str = "cpu") -> str:
    with np.load(GOLDENS / f"{MODELS[name]}.npz") as golden:
        divergence, agreement = compare(logits(path, [int(token) for token in golden["tokens"]], device), golden)
        limit, expected = float(golden["llama_cpp_mean_kl"]), float(golden["llama_cpp_top1_agreement"])
    where = current_isa().name if device == "cpu" else device
    found = f"{name} on {where}: mean KL {divergence:.3e} (llama.cpp {limit:.3e}), top-1 {agreement:.4f} ({expected:.4f})"
    assert divergence <= limit, found
    assert agreement >= expected - 0.01, found
    return found


@pytest.mark.parametrize("name", MODELS)
def test_as_close_as_llama_cpp(name: str, request: pytest.FixtureRequest) -> None:
    print(check(name, request.getfixturevalue(f"{name}_path")))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name: str, request: pytest.FixtureRequest) -> None:
    make_gpu("gpu")  # or skip
    print(check(name, request.getfixturevalue(f"{name}_path"), "cuda:0"))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_generated_is_as_close(name: str, request: pytest.FixtureRequest) -> None:
    """Where prompts have kernels of their own, the others are held to the same."""
    runner = load_runner(pymistral.ModelBuilder(request.getfixturevalue(f"{name}_path"))).runner
    if not runner.prompts_apart:
        pytest.skip("prompts and what is generated go through the same kernels")
    with np.load(GOLDENS / f"{MODELS[name]}.npz") as golden:
        tokens = [int(token) for token in golden["tokens"]]
        table = list(range(-(-len(tokens) // runner.block_size)))
        parts = [range(start, min(start + 64, len(tokens))) for start in range(0, len(tokens), 64)]
        segments = (Segment([tokens[i] for i in part], part.start, table, len(part), len(part)) for part in parts)
        divergence, _ = compare(np.concatenate([runner.forward([segment]).copy() for segment in segments]), golden)
        assert divergence <= float(golden["llama_cpp_mean_kl"]), divergence


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("isa", [isa for isa in _NEEDS if isa != current_isa().name])
def test_on_other_instruction_sets(isa: str, name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(f"{name}_path")
    done = subprocess.run(
        [sys.executable, __file__, name, path],
        env={**os.environ, "PYMISTRAL_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    if "this CPU offers" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    print(done.stdout)


if __name__ == "__main__":
    print(check(sys.argv[1], Path(sys.argv[2])))
