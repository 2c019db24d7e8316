"""Prompts on the tile registers of AMX, against float64; skipped where the CPU has none."""

from __future__ import annotations

import numpy as np
import numpy_reference as ref
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pymistral.kernels.cpu.isa import current_isa

from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.nn import Batch, Rope, record
from pymistral.nn import functional as F
from pymistral.nn.eager import evaluate
from pymistral.nn.graph import Array, OutputRows
from pymistral.quantization.types import BLOCK_SIZES, GgmlType, Tensor

pytestmark = pytest.mark.skipif(not current_isa().has_amx, reason="this CPU has no AMX")

KINDS = (*ref.QUANTIZED, "BF16")
ROUNDINGS = 2.0**-8 * 1.01  # of an activation and a weight, each to 8 bits


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """All at once, so that they are compiled side by side."""
    rng = np.random.default_rng(0)
    tensors = {kind: ref.random_tensor(kind, 256, 256, rng)[0] for kind in KINDS}

    def everything(x: Array) -> Array:
        for tensor in tensors.values():
            x = F.linear(x, tensor)
        return F.linear(F.gated_linear(F.rms_norm(x, ref.vector(np.ones(256)), 1e-5), tensors["Q4_K"], tensors["Q4_K"], "silu"), tensor)

    evaluate(everything, np.zeros((1, 256), np.float32), as_prompt=True)


def product(x: NDArray[np.float32], tensor: Tensor) -> NDArray[np.float32]:
    return evaluate(lambda x: F.linear(x, tensor), x, as_prompt=True)


def bound(x: NDArray[np.float32], weights: ref.Floats) -> ref.Floats:
    sizes = np.abs(x).astype(np.float64) @ np.abs(weights).T
    return ROUNDINGS * sizes + 1e-5 * np.abs(weights).max() * np.abs(x).sum(axis=1, keepdims=True) + 1e-30


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 150), blocks=st.integers(1, 45), tokens=st.integers(1, 70))
def test_products(kind: str, seed: int, rows: int, blocks: int, tokens: int) -> None:
    """All numbers of rows, also an odd last tile; one segment of columns and several; whole panels and parts."""
    rng = np.random.default_rng(seed)
    block = max(32, BLOCK_SIZES[GgmlType[kind]][0])
    columns = -(-blocks * 32 // block) * block
    tensor, weights = ref.random_tensor(kind, rows, columns, rng)
    x = (rng.standard_normal((tokens, columns)) * 10.0 ** rng.uniform(-3, 3, (tokens, 1))).astype(np.float32)
    together = product(x, tensor)
    assert np.all(np.abs(together - x @ weights.T) <= bound(x, weights))
    few = int(rng.integers(1, tokens + 1))
    assert product(x[:few], tensor).tobytes() == together[:few].tobytes()
    assert product(x[-1:], tensor).tobytes() == together[-1:].tobytes()


@pytest.mark.parametrize("columns", [256, 2560])
def test_sum_with_a_residual(columns: int) -> None:
    rng = np.random.default_rng(1)
    tensor, weights = ref.random_tensor("Q4_K", 200, columns, rng)
    x = rng.standard_normal((40, columns)).astype(np.float32)
    residual = rng.standard_normal((40, 200)).astype(np.float32)
    found = evaluate(lambda r, x: r + F.linear(x, tensor), residual, x, as_prompt=True)
    assert np.all(np.abs(found - (residual + x @ weights.T)) <= bound(x, weights) + 1e-6 * np.abs(found))


@pytest.mark.parametrize("columns", [256, 1024])
def test_gated(columns: int) -> None:
    rng = np.random.default_rng(2)
    gate, gate_weights = ref.random_tensor("Q4_K", 96, columns, rng)
    up, up_weights = ref.random_tensor("Q4_K", 96, columns, rng)
    x = rng.standard_normal((70, columns)).astype(np.float32) / columns**0.5
    identity = ref.identity(96)
    found = evaluate(lambda x: F.linear(F.gated_linear(x, gate, up, "silu"), identity), x, as_prompt=True)
    wanted = ref.silu(x @ gate_weights.T) * (x @ up_weights.T)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < 0.02, error


def small_model() -> CpuRunner:
    rng = np.random.default_rng(3)
    tensors = [ref.random_tensor("Q8_0", rows, 128, rng)[0] for rows in (128, 64, 64, 128)]
    embedding = ref.random_tensor("F16", 64, 128, rng)[0]
    head = ref.random_tensor("Q8_0", 64, 128, rng)[0]
    inverse = 10000.0 ** -(np.arange(16) / 16)

    def model(batch: Batch) -> Array:
        x = F.embedding(batch.tokens, embedding)
        y = F.rms_norm(x, ref.vector(np.ones(128)), 1e-5)
        q, k, v = (F.linear(y, tensor) for tensor in tensors[:3])
        x = x + F.linear(F.attention(q, k, v, head_dim=32, scale=0.2, rope=Rope(inverse, 256)), tensors[3])
        return F.linear(F.rms_norm(x[OutputRows()], ref.vector(np.ones(128)), 1e-5), head)

    return CpuRunner(record(model), max_position_embeddings=256, threads=2, max_num_seqs=4, cache_tokens=512)


def test_what_is_generated_is_computed_as_such_in_any_company() -> None:
    """Prompt and generated tokens of one sequence in one segment, as after a preemption, or each in its own step, beside others."""
    runner = small_model()
    assert runner.prompts_apart
    tokens = [int(token) for token in np.random.default_rng(4).integers(0, 64, 60)]
    table, other = list(range(4)), list(range(4, 8))

    runner.forward([Segment(tokens[:50], 0, table, 1)])
    alone = [runner.forward([Segment([token], 50 + i, table, 1, 1)]).copy() for i, token in enumerate(tokens[50:])]
    assert runner.forward([Segment(tokens, 0, other, 10, 10)]).tobytes() == np.concatenate(alone).tobytes()

    company = runner.forward([Segment(tokens[:20], 0, other, 1), Segment(tokens[:53], 0, table, 4, 3), Segment([5], 20, other, 1, 1)])
    assert company[2:5].tobytes() == np.concatenate(alone[:3]).tobytes()


def test_prompts_part_by_part_beside_what_is_generated() -> None:
    runner = small_model()
    tokens = [int(token) for token in np.random.default_rng(6).integers(0, 64, 60)]
    table, other = list(range(4)), list(range(4, 8))
    prompt = runner.forward([Segment(tokens[:50], 0, table, 1)]).copy()
    alone = [runner.forward([Segment([token], 50 + i, table, 1, 1)]).copy() for i, token in enumerate(tokens[50:])]

    assert runner.prompt_pass is not None
    runner.prompt_pass.begin([Segment(tokens[:50], 0, other, 1)])
    for i, token in enumerate(tokens[50:54]):
        assert runner.forward([Segment([token], 50 + i, table, 1, 1)]).tobytes() == alone[i].tobytes()
        assert runner.prompt_pass.proceed(0.0) is None
    found = runner.prompt_pass.proceed(float("inf"))
    assert found is not None
    assert found.tobytes() == prompt.tobytes()
    assert runner.forward([Segment(tokens[50:51], 50, other, 1, 1)]).tobytes() == alone[0].tobytes()


def test_chunks_of_a_prompt_do_not_matter() -> None:
    runner = small_model()
    tokens = [int(token) for token in np.random.default_rng(5).integers(0, 64, 100)]
    whole = runner.forward([Segment(tokens, 0, list(range(4)), 1)]).copy()
    for cuts in ([1, 2, 3], [31, 32, 99], [64]):
        for start, end in zip([0, *cuts], [*cuts, 100], strict=True):
            found = runner.forward([Segment(tokens[start:end], start, list(range(4, 8)), int(end == 100))])
        assert found.tobytes() == whole.tobytes(), cuts
