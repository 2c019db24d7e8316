"""The kernels that work row by row: norms, embeddings and what is element-wise."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import numpy_reference as ref
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymistral.kernels.cpu.compiler import load_kernels, spec

from pymistral.nn import functional as F
from pymistral.nn.eager import evaluate
from pymistral.nn.graph import Array, OutputRows
from pymistral.nn.memory import address, zeros
from pymistral.nn.pool import Launches, thread_pool
from pymistral.quantization.types import BLOCK_SIZES, GgmlType

KINDS = (*ref.QUANTIZED, *ref.FLOATS)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=8, deadline=None)

# A sum of n squares is off by at most n roundings, its root by half of that; then a division, two products and epsilon's sum.
NORM_ERROR = 60 * ref.EPSILON


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """All at once, so that they are compiled side by side."""
    rng = np.random.default_rng(0)

    def everything(x: Array) -> Array:
        y = F.soft_cap(F.rms_norm((x + x) * x * 2.0, ref.vector(np.ones(256)), 1e-6), 3.0)
        for kind in KINDS:
            y = F.linear(y, ref.random_tensor(kind, 256, 256, rng)[0])
        return F.soft_cap(y[OutputRows()], 1.0)

    evaluate(everything, np.zeros((1, 256), np.float32))
    load_kernels([spec("embedding.embedding", layout=kind.lower()) for kind in KINDS])


def close(found: ref.Floats, wanted: ref.Floats, relative: float) -> None:
    assert np.all(np.abs(found - wanted) <= relative * np.abs(wanted) + 1e-37), np.abs(found / wanted - 1).max()


# ---- RMSNorm --------------------------------------------------------------------------------------------------------


@few
@given(
    seed=seeds,
    tokens=st.integers(1, 9),
    columns=st.sampled_from([1, 7, 16, 20, 33, 64, 576]),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e6, 1e15]),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_rms_norm(seed: int, tokens: int, columns: int, size: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, columns)) * size).astype(np.float32)
    weight = rng.uniform(-1, 1, columns).astype(np.float32)
    found = F.rms_norm(x, ref.vector(weight), 1e-5, offset=offset)
    wanted = ref.rms_norm(x, (weight + np.float32(offset)).astype(np.float64), np.float64(np.float32(1e-5)))
    close(found, wanted, NORM_ERROR)


def test_rms_norm_of_zeros() -> None:
    assert not F.rms_norm(np.zeros((2, 32), np.float32), ref.vector(np.ones(32)), 1e-6).any()


@pytest.mark.parametrize("tokens", [1, 5, 13, 30])
def test_norm_to_panels(tokens: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, 96)).astype(np.float32)
    weight = rng.uniform(0.1, 2, 96).astype(np.float32)
    back = ref.identity(96)
    wanted = ref.rms_norm(x, weight.astype(np.float64), 1e-6)
    steps = np.repeat(np.abs(wanted).reshape(tokens, 3, 32).max(axis=2), 32, axis=1) / 127
    found = evaluate(lambda x: F.linear(F.rms_norm(x, ref.vector(weight), 1e-6), back), x)
    assert np.all(np.abs(found - wanted) <= 0.501 * steps)  # half a step of the quantisation
    # rows of outputs as near to each other as likely logits keep what that lost, in as many steps again
    found = evaluate(lambda x: F.linear(F.rms_norm(x[OutputRows()], ref.vector(weight / 8), 1e-6), back), x)
    assert np.all(np.abs(found - wanted / 8) <= 0.501 * steps / 8 / 254 + NORM_ERROR * np.abs(wanted / 8))


def test_residual_with_a_norm_before_the_sum() -> None:
    """``x += norm(branch)`` and the norm of the next block are one kernel, as floats or panels; the sum goes on."""
    rng = np.random.default_rng(2)
    x, branch = rng.standard_normal((2, 7, 64)).astype(np.float32)
    first, second = rng.uniform(0.1, 2, (2, 64)).astype(np.float32)
    back = ref.identity(64)
    total = x.astype(np.float64) + ref.rms_norm(branch, first.astype(np.float64), 1e-6)
    normed = ref.rms_norm(total, second.astype(np.float64), 1e-6)

    def block(x: Array, branch: Array) -> Array:
        return x + F.rms_norm(branch, ref.vector(first), 1e-6)

    assert np.allclose(evaluate(block, x, branch), total, rtol=1e-5, atol=1e-6)
    found = evaluate(lambda x, b: F.rms_norm(block(x, b), ref.vector(second), 1e-6), x, branch)
    assert np.allclose(found, normed, rtol=1e-5, atol=1e-6)
    found = evaluate(lambda x, b: F.linear(F.rms_norm(block(x, b), ref.vector(second), 1e-6), back), x, branch)
    steps = np.repeat(np.abs(normed).reshape(7, 2, 32).max(axis=2), 32, axis=1) / 127
    assert np.all(np.abs(found - normed) <= 0.501 * steps)

    def goes_on(x: Array, branch: Array) -> Array:
        y = block(x, branch)
        return y + F.linear(F.rms_norm(y, ref.vector(second), 1e-6), back)

    assert np.all(np.abs(evaluate(goes_on, x, branch) - (total + normed)) <= 0.501 * steps + 1e-5)


@pytest.mark.parametrize("with_branch", [False, True])
@pytest.mark.parametrize("with_branch_weight", [False, True])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("with_out", [False, True])
def test_norm_by_its_slots(with_branch: bool, with_branch_weight: bool, with_rows: bool, with_out: bool) -> None:
    """Every combination of the kernel's own, also those that no recorded model makes yet."""
    rng = np.random.default_rng(3)
    shape = (6, 48)
    x, branch, out = zeros(shape), zeros(shape), zeros(shape)
    x[:], branch[:] = rng.standard_normal((2, *shape))
    weight, branch_weight = zeros(48), zeros(48)
    weight[:], branch_weight[:] = rng.uniform(0.1, 2, (2, 48))
    rows = np.array([4, 1, 5], np.int32)
    used = rows if with_rows else np.arange(6)
    before, added = x.astype(np.float64), branch.astype(np.float64)
    epsilon = struct.unpack("<I", struct.pack("<f", 1e-6))[0]
    slots = np.array(
        [
            address(x),
            48 * 4,
            address(branch) if with_branch else 0,
            address(branch_weight) if with_branch_weight else 0,
            address(weight) if with_out else 0,
            address(out) if with_out else 0,
            0,
            48,
            epsilon,
            address(rows) if with_rows else 0,
            0,
            0,
            0,
        ],
        np.int64,
    )
    count = np.array([len(used)], np.int64)
    kernel = spec("norm.norm")
    thread_pool(2).run(Launches([(load_kernels([kernel])[kernel], address(slots), address(count), 1, 1, 0, 0, 0)], 2))
    wanted = before.copy()
    if with_branch:
        wanted[used] += (ref.rms_norm(added, branch_weight.astype(np.float64), 1e-6) if with_branch_weight else added)[used]
    assert np.allclose(x, wanted, rtol=1e-5, atol=1e-6)
    if with_out:
        assert np.allclose(out[: len(used)], ref.rms_norm(wanted, weight.astype(np.float64), 1e-6)[used], rtol=1e-5, atol=1e-6)
    assert not out[len(used) if with_out else 0 :].any()


# ---- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@few
@given(seed=seeds, rows=st.integers(1, 50), blocks=st.integers(1, 3), edges=st.booleans(), scale=st.sampled_from([1.0, 25.3]))
def test_embedding(kind: str, seed: int, rows: int, blocks: int, edges: bool, scale: float) -> None:
    rng = np.random.default_rng(seed)
    size = BLOCK_SIZES[GgmlType[kind]][0]
    columns = blocks * max(32, size)
    tensor, weights = ref.random_tensor(kind, rows, columns, rng, edges=edges)
    tokens = rng.integers(0, rows, 11)
    found = F.embedding(tokens, tensor, scale=scale)
    wanted = weights[tokens] * np.float64(np.float32(scale))
    # scale * quant, its sum with the minimum and the last product round once each, and so did the oracle; a minimum may cancel
    peaks = np.repeat(np.abs(wanted).reshape(11, -1, size).max(axis=2), size, axis=1)
    assert np.all(np.abs(found - wanted) <= 3 * 6 * ref.EPSILON * peaks + 1e-37)


def test_embedding_of_what_does_not_exist() -> None:
    tensor, _ = ref.random_tensor("F32", 5, 32, np.random.default_rng(0))
    for wrong in ([5], [-1], [0, 2**31]):
        with pytest.raises(ValueError, match="token ids must be 0 to 4"):
            F.embedding(np.array(wrong), tensor)


# ---- element-wise ---------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, tuple[Callable[..., Array], Callable[..., ref.Floats], float]] = {
    # exact float32 operations round once; tanh's exp is good to 3e-7, and 1 - 2 / (e + 1) loses what cancels for small x
    "add": (lambda x, y: x + y, lambda x, y: x + y, ref.EPSILON),
    "multiply": (lambda x, y: x * y, lambda x, y: x * y, ref.EPSILON),
    "scale": (lambda x, y: x * 1.7 + y * 0.0, lambda x, y: x * np.float64(np.float32(1.7)), 2 * ref.EPSILON),
}


@pytest.mark.parametrize("name", OPERATIONS)
@few
@given(seed=seeds, tokens=st.integers(1, 9), columns=st.sampled_from([1, 15, 16, 40, 256]))
def test_elementwise(name: str, seed: int, tokens: int, columns: int) -> None:
    function, oracle, error = OPERATIONS[name]
    x, y = np.random.default_rng(seed).standard_normal((2, tokens, columns)).astype(np.float32)
    close(evaluate(function, x, y), oracle(x.astype(np.float64), y.astype(np.float64)), error)


@pytest.mark.parametrize("cap", [0.5, 30.0, 1000.0])
def test_soft_cap(cap: float) -> None:
    x = np.concatenate([np.linspace(-300, 300, 501), [0, 1e-3, -1e-3, 1e4, -1e4, 3e38, -3e38]]).astype(np.float32)[None]
    found = F.soft_cap(x, cap)
    wanted = cap * np.tanh(x.astype(np.float64) / cap)
    assert np.all(np.abs(found - wanted) <= 5e-7 * cap)  # 1 - 2 / (e + 1) is as precise as its largest part
    assert np.all(np.abs(found) <= cap)


def test_rows_are_taken_in_order() -> None:
    x = np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32)
    assert np.array_equal(evaluate(lambda x: x[OutputRows()] * 2.0, x), x * 2)
