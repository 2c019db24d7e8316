"""Fusions and reused buffers: whatever is recorded computes what its operations compute one by one, bit for bit."""

from __future__ import annotations

import numpy as np
import numpy_reference as ref
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymistral.nn import Array, Batch, record
from pymistral.nn import functional as F
from pymistral.nn.cpu import compile_graph
from pymistral.nn.eager import evaluate
from pymistral.nn.graph import A, Tokens
from pymistral.nn.state import Limits

COLUMNS = 64
_rng = np.random.default_rng(0)
FLOAT = [ref.random_tensor("F16", COLUMNS, COLUMNS, _rng)[0] for _ in range(2)]  # with float32 alone, attention is another one
QUANTIZED = [ref.random_tensor("Q4_1", COLUMNS, COLUMNS, _rng)[0] for _ in range(2)]
NORMS = [ref.vector(_rng.uniform(0.5, 1.5, COLUMNS)) for _ in range(2)]
TABLE = ref.matrix(_rng.standard_normal((30, COLUMNS)).astype(np.float32))

steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "add",
                "add",
                "multiply",
                "scale",
                "cap",
                "norm",
                "norm",
                "float",
                "quantized",
                "quantized",
                "gated",
                "float_gated",
                "attention",
            ]
        ),
        st.integers(0, 4),
        st.integers(0, 4),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=14,
)


def apply(op: str, x: A, y: A, which: int) -> A:
    if op == "add":
        return x + y if isinstance(x, Array) else evaluate(lambda x, y: x + y, x, y)  # type: ignore[operator, return-value]
    if op == "multiply":
        return x * y if isinstance(x, Array) else evaluate(lambda x, y: x * y, x, y)  # type: ignore[operator, return-value]
    if op == "scale":
        return x * 0.7 if isinstance(x, Array) else evaluate(lambda x: x * 0.7, x)  # type: ignore[return-value]
    if op == "cap":
        return F.soft_cap(x, 2.0)
    if op == "norm":
        return F.rms_norm(x, NORMS[which], (1e-5, 1e-3)[which])
    if op == "float":
        return F.linear(x, FLOAT[which])
    if op == "quantized":
        return F.linear(x, QUANTIZED[which])
    if op == "gated":
        return F.gated_linear(x, QUANTIZED[which], QUANTIZED[1 - which], "silu")
    if op == "float_gated":
        return F.gated_linear(x, FLOAT[which], FLOAT[1 - which], "relu")
    return F.attention(x, y, x, head_dim=16, scale=0.25, rope=None)


Plan = list[tuple[str, int, int, int]]


def follow(plan: Plan, x: A, y: A) -> A:
    """Each step takes its operands from the last five results, the newest as often as any."""
    results = [x, y]
    for op, first, second, which in plan:
        results.append(apply(op, results[-1 - first % len(results)], results[-1 - second % len(results)], which))
    return results[-1]


@settings(max_examples=60, deadline=None)
@given(plan=steps, tokens=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_any_graph(plan: Plan, tokens: int, seed: int) -> None:
    inputs = np.random.default_rng(seed).standard_normal((2, tokens, COLUMNS)).astype(np.float32)

    def compute(x: A, y: A) -> A:
        return follow(plan, x, y)

    one_by_one = compute(*inputs)
    with np.errstate(all="ignore"):
        assert evaluate(compute, *inputs).tobytes() == one_by_one.tobytes()


@pytest.mark.parametrize("tokens", [1, 13])
def test_blocks_of_both_kinds(tokens: int) -> None:
    """What Llama and Gemma are made of, with every fusion in them."""
    x = np.random.default_rng(1).standard_normal((tokens, COLUMNS)).astype(np.float32)

    def llama(x: A) -> A:
        for which in (0, 1, 0):
            h = F.rms_norm(x, NORMS[which], 1e-5)
            q, k, v = (F.linear(h, QUANTIZED[i]) for i in (0, 1, 0))
            x = apply("add", x, F.linear(F.attention(q, k, v, head_dim=16, scale=0.25, rope=None), QUANTIZED[which]), 0)
            h = F.rms_norm(x, NORMS[1 - which], 1e-5)
            x = apply("add", x, F.linear(F.gated_linear(h, QUANTIZED[0], QUANTIZED[1], "silu"), QUANTIZED[which]), 0)
        return F.rms_norm(x, NORMS[0], 1e-5)

    def gemma(x: A) -> A:
        for which in (0, 1, 0):
            h = F.rms_norm(x, NORMS[which], 1e-5)
            q, k, v = (F.linear(h, QUANTIZED[i]) for i in (0, 1, 0))
            h = F.linear(F.attention(q, k, v, head_dim=16, scale=0.25, rope=None), QUANTIZED[which])
            x = apply("add", x, F.rms_norm(h, NORMS[which], 1e-5), 0)
            h = F.rms_norm(x, NORMS[1 - which], 1e-5)
            h = F.linear(F.gated_linear(h, QUANTIZED[0], QUANTIZED[1], "gelu"), QUANTIZED[which])
            x = apply("add", x, F.rms_norm(h, NORMS[which], 1e-5), 0)
        return F.rms_norm(x, NORMS[0], 1e-5)

    for block in (llama, gemma):
        assert evaluate(block, x).tobytes() == block(x).tobytes()


def small_model(batch: Batch) -> Array:
    x = F.embedding(batch.tokens, TABLE)
    x = x + F.linear(F.gated_linear(F.rms_norm(x, NORMS[0], 1e-5), QUANTIZED[0], QUANTIZED[1], "silu"), FLOAT[0])
    return F.linear(F.rms_norm(x[batch.output_rows], NORMS[1], 1e-5), QUANTIZED[0])


@settings(max_examples=40, deadline=None)
@given(plan=steps)
def test_rows_for_logits_are_those_of_all_tokens(plan: Plan) -> None:
    """However early they are picked: each is what it is among all."""

    def compute(tokens: Tokens) -> Array:
        x = F.embedding(tokens, TABLE)
        return F.linear(follow(plan, x, F.embedding(tokens, TABLE, scale=0.5)), FLOAT[0])

    def model(batch: Batch) -> Array:
        x = F.embedding(batch.tokens, TABLE)
        return F.linear(follow(plan, x, F.embedding(batch.tokens, TABLE, scale=0.5))[batch.output_rows], FLOAT[0])

    with np.errstate(all="ignore"):
        everything = evaluate(lambda: compute(Tokens()), tokens=np.arange(5))
        assert run(model).tobytes() == everything[[4, 1]].tobytes()


def run(model: object = small_model) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    limits = Limits(max_tokens=5, max_outputs=2, max_sequences=1, block_size=32, num_blocks=1, max_blocks=1)
    program = compile_graph(record(model), limits, threads=2)  # type: ignore[arg-type]
    state = program.state
    state.output_rows[:] = (4, 1)
    for array in (state.tokens, state.positions, state.cache_slots[0]):
        array[:] = range(5)
    state.block_tables[0, 0] = 0
    tiles = range(0, 5, state.query_tile)
    for item, first in enumerate(tiles):
        state.items[item] = (first, min(state.query_tile, 5 - first), 0, -1, 0)
    state.counts[:5] = (5, 2, len(tiles), 0, len(tiles))
    program.run()
    return program.logits[:2].copy()


def test_eager_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    together = run()
    for off in ("", "0"):
        monkeypatch.setenv("PYMISTRAL_EAGER", off)
        assert run().tobytes() == together.tobytes()
    monkeypatch.setenv("PYMISTRAL_EAGER", "1")
    assert run().tobytes() == together.tobytes()


@pytest.mark.parametrize("mode", ["0", "1"])
def test_attention_leaves_its_operands_to_others(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Kernels narrow keys and values where they lie; what is there then are no floats, and not for an eager program to judge."""
    monkeypatch.setenv("PYMISTRAL_EAGER", mode)
    x = np.arange(1, COLUMNS + 1, dtype=np.float32)[None] / COLUMNS
    options = {"head_dim": 16, "scale": 0.25, "rope": None}
    attended = F.attention(x, x, x, **options)
    np.testing.assert_allclose(attended, x, rtol=2e-2)  # of one token
    for operand in range(3):

        def compute(*qkv: A, operand: int = operand) -> A:
            return apply("add", F.attention(*qkv, **options), qkv[operand], 0)

        assert evaluate(compute, x, x, x).tobytes() == (attended + x).tobytes()


def test_eager_programs_name_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = np.ones((COLUMNS, COLUMNS), np.float32)
    broken[3, 5] = np.nan
    weight = ref.matrix(broken, "layers.7.mlp.down_proj.weight")

    def model(batch: Batch) -> Array:
        x = F.linear(F.embedding(batch.tokens, TABLE), weight)
        return F.linear(x[batch.output_rows], FLOAT[0])

    assert np.isnan(run(model)).all()
    monkeypatch.setenv("PYMISTRAL_EAGER", "1")
    with pytest.raises(
        FloatingPointError, match=r"launch 2 of \d, matmul.float_matmul layers.7.mlp.down_proj.weight: nan in row 0, column 3"
    ):
        run(model)


def test_symbols_and_arrays_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="outside a recording"):
        F.linear(Array("tokens", COLUMNS), FLOAT[0])
    with pytest.raises(RuntimeError, match="outside a recording"):
        F.embedding(Tokens(), TABLE)
