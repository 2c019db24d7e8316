"""Matrix products of every storage type, with their quantisation of activations, in eager mode against float64."""

from __future__ import annotations

import numpy as np
import numpy_reference as ref
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pymistral.kernels.cpu.isa import current_isa

from pymistral.nn import functional as F
from pymistral.nn.eager import evaluate
from pymistral.nn.graph import Array, OutputRows
from pymistral.quantization.types import BLOCK_SIZES, GgmlType, Tensor

KINDS = (*ref.QUANTIZED, *ref.FLOATS)
ACTIVATIONS = {"silu": ref.silu, "gelu": ref.gelu, "relu": ref.relu}

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=6, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """All at once, so that they are compiled side by side."""
    rng = np.random.default_rng(0)
    tensors = {kind: ref.random_tensor(kind, 256, 256, rng)[0] for kind in KINDS}

    def everything(x: Array) -> Array:
        for tensor in tensors.values():
            x = F.linear(x, tensor)
        for activation in ACTIVATIONS:
            x = F.linear(F.gated_linear(x, tensors["Q4_1"], tensors["Q4_1"], activation), tensors["Q4_1"])
            x = F.linear(F.gated_linear(x, tensors["F32"], tensors["F32"], activation), tensors["F32"])
        for kind in ref.QUANTIZED:
            x = F.linear(F.gated_linear(x, tensors[kind], tensors[kind], "relu"), tensors[kind])
        return x

    evaluate(everything, np.zeros((1, 256), np.float32))


def columns_for(kind: str, blocks: int) -> int:
    return blocks * max(32, BLOCK_SIZES[GgmlType[kind]][0])


def activations(rng: np.random.Generator, tokens: int, columns: int) -> NDArray[np.float32]:
    """Every token of a size of its own, with a block of zeros and one of large values here and there."""
    x = rng.standard_normal((tokens, columns)) * 10.0 ** rng.uniform(-4, 4, (tokens, 1))
    blocks = x.reshape(tokens, -1, 32)
    blocks[rng.random(blocks.shape[:2]) < 0.1] = 0
    blocks[rng.random(blocks.shape[:2]) < 0.1] *= 100
    return x.astype(np.float32)


def expected(kind: str, weights: ref.Floats, x: NDArray[np.float32]) -> tuple[ref.Floats, ref.Floats]:
    if kind == "BF16" and current_isa().has_bf16:
        x = ref.cached(x, "bf16").astype(np.float32)
    if kind in ref.FLOATS:
        # columns + 1 roundings, each at most EPSILON of the sum of the terms' sizes
        bound = (weights.shape[1] + 1) * ref.EPSILON * (np.abs(x).astype(np.float64) @ np.abs(weights).T)
        return x.astype(np.float64) @ weights.T, bound + 1e-30
    used = ref.quantized(x, ref.largest_activation(kind)).astype(np.float64)
    return used @ weights.T, ref.product_bound(weights, used, kind)


@pytest.mark.parametrize("tokens", [1, 9, 16])
def test_scales_of_any_size(tokens: int) -> None:
    """MXFP4's are powers of two up to the largest that a float32 has."""
    rng = np.random.default_rng(3)
    tensor, _ = ref.random_tensor("MXFP4", 16, 64, rng)
    assert isinstance(tensor.data, np.ndarray)
    tensor.data.reshape(-1, BLOCK_SIZES[GgmlType.MXFP4][1])[:, 0] = 250
    weights = ref.multiplied_values("MXFP4", tensor.data, 16, 64)
    x = rng.standard_normal((tokens, 64)).astype(np.float32) * np.float32(1e-30)
    wanted, bound = expected("MXFP4", weights, x)
    assert np.all(np.abs(evaluate(lambda x: F.linear(x, tensor), x) - wanted) <= bound)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(seed=seeds, rows=st.integers(1, 70), blocks=st.integers(1, 5), tokens=st.integers(1, 30), edges=st.booleans())
def test_linear(kind: str, seed: int, rows: int, blocks: int, tokens: int, edges: bool) -> None:
    rng = np.random.default_rng(seed)
    columns = columns_for(kind, blocks)
    tensor, weights = ref.random_tensor(kind, rows, columns, rng, edges=edges)
    x = activations(rng, tokens, columns)
    wanted, bound = expected(kind, weights, x)
    assert np.all(np.abs(F.linear(x, tensor) - wanted) <= bound)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_never_depends_on_its_batch(kind: str) -> None:
    rng = np.random.default_rng(1)
    columns = columns_for(kind, 2)
    tensor, _ = ref.random_tensor(kind, 50, columns, rng)
    x = activations(rng, 30, columns)
    together = F.linear(x, tensor)
    for tokens in range(1, 30):
        assert F.linear(x[:tokens], tensor).tobytes() == together[:tokens].tobytes(), tokens
        assert F.linear(x[tokens : tokens + 1], tensor).tobytes() == together[tokens : tokens + 1].tobytes(), tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_sum_with_a_residual(kind: str, tokens: int) -> None:
    """``residual + linear(x)`` is one kernel."""
    rng = np.random.default_rng(2)
    columns = columns_for(kind, 1)
    tensor, weights = ref.random_tensor(kind, 40, columns, rng)
    x = activations(rng, tokens, columns)
    residual = rng.standard_normal((tokens, 40)).astype(np.float32)
    wanted, bound = expected(kind, weights, x)
    wanted = wanted + residual
    found = evaluate(lambda r, x: r + F.linear(x, tensor), residual, x)
    assert np.all(np.abs(found - wanted) <= bound + ref.EPSILON * np.abs(wanted))  # one more rounding


@pytest.mark.parametrize(
    ("kind", "quants"), [("Q5_0", slice(2, None)), ("Q5_1", slice(4, None)), ("Q5_K", slice(16, None)), ("Q6_K", slice(192))]
)
def test_the_largest_sums(kind: str, quants: slice) -> None:
    """All quants of a block at one end, all activations at the limit: sums of 16 bits hold just this."""
    rng = np.random.default_rng(4)
    tensor, _ = ref.random_tensor(kind, 40, 512, rng)
    blocks = tensor.data.reshape(-1, BLOCK_SIZES[tensor.type][1])
    blocks[:, quants] = rng.choice([0, 255], (len(blocks), 1))
    weights = ref.values_of(kind, tensor.data, 40, 512)
    x = np.ones((7, 512), np.float32) * np.array([1, -1, 1, 1, -1, -1, 1], np.float32)[:, None]
    assert np.all(np.abs(F.linear(x, tensor) - x @ weights.T) <= ref.product_bound(weights, x, kind))


@pytest.mark.parametrize(("kind", "quants"), [("Q4_0", slice(2, None)), ("Q4_1", slice(4, None)), ("Q4_K", slice(16, None))])
def test_the_largest_sums_of_quants_and_activations(kind: str, quants: slice) -> None:
    """Quants at either end, activations at either limit: where products are of their sums, a byte holds just these."""
    rng = np.random.default_rng(5)
    tensor, _ = ref.random_tensor(kind, 40, 512, rng)
    blocks = tensor.data.reshape(-1, BLOCK_SIZES[tensor.type][1])
    blocks[:, quants] = rng.choice([0, 15, 240, 255], blocks[:, quants].shape)
    weights = ref.multiplied_values(kind, tensor.data, 40, 512)
    x = rng.choice([-1, 1], (16, 512)).astype(np.float32)
    together = F.linear(x, tensor)
    assert np.all(np.abs(together - x @ weights.T) <= ref.product_bound(weights, x, kind))
    alone = np.concatenate([F.linear(x[token : token + 1], tensor) for token in range(16)])
    assert alone.tobytes() == together.tobytes()


def test_activations_that_go_to_several_types() -> None:
    """They are quantised once, as the type wants it that wants it smallest."""
    rng = np.random.default_rng(6)
    tensors = [ref.random_tensor(kind, 48, 256, rng) for kind in ("Q8_0", "Q4_0", "Q6_K")]
    x = rng.standard_normal((9, 256)).astype(np.float32)
    used = ref.quantized(x, ref.largest_activation("Q4_0")).astype(np.float64)
    found = evaluate(lambda x: sum((F.linear(x, tensor) for tensor, _ in tensors[1:]), F.linear(x, tensors[0][0])), x)
    wanted = sum(used @ weights.T for _, weights in tensors)
    bound = sum(ref.product_bound(weights, used, tensor.type.name) for tensor, weights in tensors)
    assert np.all(np.abs(found - wanted) <= bound + 4 * ref.EPSILON * sum(np.abs(used @ weights.T) for _, weights in tensors))


def logits_of(
    kind: str, rows: int, tokens: int, deviation: float, factor: float = 1.0
) -> tuple[NDArray[np.float32], ref.Floats, ref.Floats]:
    """Logits with such a standard deviation, before the model scales them by a power of two; and how far they are from products of coarse
    and of fine activations (int8 and int16; bfloat16 and float32), times what roundings may cost.
    """
    rng = np.random.default_rng(3)
    columns = columns_for(kind, 1)
    tensor, weights = ref.random_tensor(kind, rows, columns, rng)
    x = rng.standard_normal((tokens, columns))
    x = (x * deviation / (x @ weights.T).std()).astype(np.float32)
    found = evaluate(lambda x: F.linear(x[OutputRows()], tensor) * factor, x) / np.float32(factor)
    if kind == "BF16":
        of_floats = [(used, (columns + 1) * ref.EPSILON * (np.abs(used) @ np.abs(weights).T)) for used in (ref.cached(x, "bf16"), x)]
        return found, *(np.abs(found - used.astype(np.float64) @ weights.T) / bound for used, bound in of_floats)
    distances = []
    # integer sums of 16 bits are beyond 2**24: they are rounded once more
    for largest, roundings in ((ref.largest_activation(kind), 1), (32767, 2)):
        used = ref.quantized(x, largest).astype(np.float64)
        distances.append(np.abs(found - used @ weights.T) / (roundings * ref.product_bound(weights, used, kind)))
    return found, distances[0], distances[1]


@pytest.mark.parametrize("kind", [*ref.QUANTIZED, "BF16"])
@pytest.mark.parametrize("tokens", [1, 4, 14])
def test_the_likeliest_logits_come_from_finer_activations(kind: str, tokens: int) -> None:
    """Tiles of 16 with a logit not further than 4 from the largest one; all others come from 8 bits, or from pairs of bfloat16."""
    if kind == "BF16" and not current_isa().has_bf16:
        pytest.skip("this CPU has no products of bfloat16: all logits come from float32")
    rows = 1003
    found, from_8, from_16 = logits_of(kind, rows, tokens, 4.0)
    largest = found.max(axis=1, keepdims=True)
    for first in range(0, rows, 16):
        tile = slice(first, first + 16)
        distance = largest[:, 0] - found[:, tile].max(axis=1)
        assert np.all(from_16[distance < 3.8, tile] <= 1)  # a margin of 8 bits may decide otherwise near 4
        assert np.all(from_8[distance > 4.2, tile] <= 1)
    assert np.any(from_8 > 1)
    assert np.any(from_16 > 1)


def test_the_margin_is_of_logits_as_they_are_sampled_from() -> None:
    found, _, from_16 = logits_of("Q4_1", 1003, 3, 2.0, factor=0.125)
    assert np.all(found > found.max(axis=1, keepdims=True) - 8 * 4)
    assert np.all(from_16 <= 1)
    found, from_8, _ = logits_of("Q4_1", 1003, 3, 4.0, factor=8.0)
    for first in range(0, 1003, 16):
        far = found[:, first : first + 16].max(axis=1) < found.max(axis=1) - 1
        assert np.all(from_8[far, first : first + 16] <= 1)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_logits_that_are_all_alike_are_not_all_computed_twice(kind: str) -> None:
    rows, groups = 16 * 16 * 100, 32
    found, from_8, from_16 = logits_of(kind, rows, 3, 0.3)
    for token in range(3):
        assert from_16[token, found[token].argmax()] <= 1
        twice = np.any(from_8[token].reshape(-1, 256) > 1, axis=1)
        assert 0 < twice.sum() <= groups
    assert np.all(np.minimum(from_8, from_16) <= 1)


@pytest.mark.parametrize("tokens", [1, 9])
def test_logits_that_are_no_numbers_stay_so(tokens: int) -> None:
    tensor, _ = ref.random_tensor("Q8_0", 300, 64, np.random.default_rng(7))
    x = np.ones((tokens, 64), np.float32)
    x[-1, 40] = np.nan
    found = evaluate(lambda x: F.linear(x[OutputRows()], tensor), x)
    assert np.isnan(found[-1]).all()
    assert np.isfinite(found[:-1]).all()


@pytest.mark.parametrize("kind", ref.FLOATS)
def test_logits_of_floats_take_activations_as_they_are(kind: str) -> None:
    if kind == "BF16" and current_isa().has_bf16:
        pytest.skip("only the likeliest do")
    rng = np.random.default_rng(5)
    tensor, weights = ref.random_tensor(kind, 33, 64, rng)
    x = activations(rng, 5, 64)
    bound = 65 * ref.EPSILON * (np.abs(x).astype(np.float64) @ np.abs(weights).T)
    assert np.all(np.abs(evaluate(lambda x: F.linear(x[OutputRows()], tensor), x) - x @ weights.T) <= bound + 1e-30)


@pytest.mark.parametrize("tokens", [1, 19])
def test_an_array_goes_to_matrices_of_every_kind(tokens: int) -> None:
    """To bfloat16 and quantised ones, each in a form of its own, with a norm before it and without."""
    rng = np.random.default_rng(6)
    kinds = ("BF16", "Q8_0", "F32")
    matrices = {kind: ref.random_tensor(kind, 64, 64, rng) for kind in kinds}
    x = activations(rng, tokens, 64)
    ones = Tensor("norm", GgmlType.F32, (64,), np.ones(64, np.float32).view(np.uint8))
    normed = evaluate(lambda x: F.rms_norm(x, ones, 1e-6), x)
    for some in (kinds, kinds[:1]):
        for source, norm in ((x, False), (normed, True)):
            found = evaluate(lambda x: sum_of(F.rms_norm(x, ones, 1e-6) if norm else x, [matrices[kind][0] for kind in some]), x)  # noqa: B023
            parts = [expected(kind, matrices[kind][1], source) for kind in some]
            size = sum(np.abs(wanted) for wanted, _ in parts)
            # as many roundings as additions; a norm's last digits may be others where its result goes elsewhere
            slack = sum(bound for _, bound in parts) + 4 * ref.EPSILON * size
            assert np.all(np.abs(found - sum(wanted for wanted, _ in parts)) <= slack)


def sum_of(x: Array, tensors: list[Tensor]) -> Array:
    total = F.linear(x, tensors[0])
    for tensor in tensors[1:]:
        total = total + F.linear(x, tensor)
    return total


@pytest.mark.parametrize("tokens", [1, 7])
def test_gated_outputs(tokens: int) -> None:
    """Output rows are quantised as all others are, and once more, to 16 bits, where logits come of them."""
    rng = np.random.default_rng(5)
    (gate, gate_weights), (up, up_weights) = (ref.random_tensor("Q4_1", 64, 64, rng) for _ in range(2))
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    found = evaluate(lambda x: F.linear(F.gated_linear(x[OutputRows()], gate, up, "silu"), ref.identity(64)), x)
    wanted = ref.silu(x @ gate_weights.T) * (x @ up_weights.T)
    assert np.abs(found - wanted).max() <= 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["Q4_1", "F32"])
def test_gated_linear(kind: str, activation: str) -> None:
    rng = np.random.default_rng(4)
    gate, gate_weights = ref.random_tensor(kind, 48, 64, rng)
    up, up_weights = ref.random_tensor(kind, 48, 64, rng)
    x = rng.standard_normal((9, 64)).astype(np.float32) * np.float32(3)
    (a, a_bound), (b, b_bound) = expected(kind, gate_weights, x), expected(kind, up_weights, x)
    wanted = ACTIVATIONS[activation](a) * b
    # none of the activations is steeper than 1.13; exp is good to 3e-7, and to 6 roundings of its argument (|u| of gelu's is below 90)
    bound = (
        1.13 * a_bound * np.abs(b) + (np.abs(ACTIVATIONS[activation](a)) + a_bound) * b_bound + np.abs(wanted) * (3e-7 + 100 * ref.EPSILON)
    )
    assert np.all(np.abs(F.gated_linear(x, gate, up, activation) - wanted) <= bound + 1e-30)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 3, 13, 30])
def test_gated_linear_quantised_at_once(activation: str, tokens: int) -> None:
    """Before another product it writes int8 panels; an identity matrix reads them back."""
    rng = np.random.default_rng(5)
    gate, gate_weights = ref.random_tensor("Q4_1", 96, 64, rng)
    up, up_weights = ref.random_tensor("Q4_1", 96, 64, rng)
    back = ref.identity(96)
    x = rng.standard_normal((tokens, 64)).astype(np.float32) * np.float32(3)
    (a, a_bound), (b, b_bound) = expected("Q4_1", gate_weights, x), expected("Q4_1", up_weights, x)
    activated = ACTIVATIONS[activation](a)
    found = evaluate(lambda x: F.linear(F.gated_linear(x, gate, up, activation), back), x)
    # half a step of the quantisation, and what was wrong before it: none of the activations is steeper than 1.13
    before = 1.13 * a_bound * np.abs(b) + (np.abs(activated) + a_bound) * b_bound
    peaks = (np.abs(activated * b) + before).reshape(tokens, -1, 32).max(axis=2, keepdims=True)
    error = np.abs(found - activated * b) - before
    assert np.all(error.reshape(tokens, -1, 32) <= peaks / 254 * 1.0001)
    alone = evaluate(lambda x: F.linear(F.gated_linear(x, gate, up, activation), back), x[-1:])
    assert alone.tobytes() == found[-1:].tobytes()


@pytest.mark.parametrize("kind", ref.QUANTIZED)
@pytest.mark.parametrize("tokens", [1, 4, 17])
def test_gated_linear_of_every_format(kind: str, tokens: int) -> None:
    rng = np.random.default_rng(9)
    columns = columns_for(kind, 2)
    gate, gate_weights = ref.random_tensor(kind, 64, columns, rng)
    up, up_weights = ref.random_tensor(kind, 64, columns, rng)
    back = ref.identity(64)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    (a, a_bound), (b, b_bound) = expected(kind, gate_weights, x), expected(kind, up_weights, x)
    wanted = ref.relu(a) * b
    found = evaluate(lambda x: F.linear(F.gated_linear(x, gate, up, "relu"), back), x)
    peaks = np.abs(wanted).reshape(tokens, -1, 32).max(axis=2, keepdims=True)
    product_error = (a_bound * np.abs(b) + (np.abs(a) + a_bound) * b_bound).reshape(tokens, -1, 32).max(axis=2, keepdims=True)
    assert np.all(np.abs(found - wanted).reshape(tokens, -1, 32) <= peaks / 254 * 1.001 + 2 * product_error)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(seed=seeds, rows=st.integers(1, 70), blocks=st.integers(1, 3), edges=st.booleans())
def test_embedding(kind: str, seed: int, rows: int, blocks: int, edges: bool) -> None:
    rng = np.random.default_rng(seed)
    tensor, weights = ref.random_tensor(kind, rows, columns_for(kind, blocks), rng, edges=edges)
    tokens = rng.integers(0, rows, 9)
    # at most the scale, its product and the sum with a minimum are rounded, here and in the reference
    bound = 8 * ref.EPSILON * np.abs(weights[tokens]).reshape(9, -1, 32).max(axis=2, keepdims=True)
    error = np.abs(F.embedding(tokens, tensor) - weights[tokens]).reshape(9, -1, 32)
    assert np.all(error <= bound + 1e-44)


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_pairs_are_nearly_what_the_file_has(kind: str, edges: bool) -> None:
    """Weights are counted in 32,767ths of a row's largest scale, or in 16,128ths of the largest that 256 columns may have."""
    rng = np.random.default_rng(8)
    tensor, _ = ref.random_tensor(kind, 50, 512, rng, edges=edges)
    stored = ref.values_of(kind, tensor.data, 50, 512)
    blocks = tensor.data.reshape(50, -1, BLOCK_SIZES[tensor.type][1])
    scales = np.abs(np.ascontiguousarray(blocks[:, :, :4]).view(np.float16).astype(np.float64))
    if kind == "Q4_1":
        size = (scales[:, :, 0] + scales[:, :, 1] / 8).max(axis=1, keepdims=True)
        unit, most = np.repeat(size / 32767, 512, axis=1), 8  # half a unit for each of 8 quants, and for 8 units of the middle
    else:
        unit, most = np.repeat(scales.max(axis=2) / 256, 256, axis=1), 16  # as much, of which both may be rounded
    found = F.embedding(np.arange(50), tensor)
    assert np.all(np.abs(found - stored) <= most * unit + 8 * ref.EPSILON * np.abs(stored) + 1e-30)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 2])
@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_a_scale_that_is_no_number_spoils_its_row_alone(kind: str, part: int, value: float) -> None:
    rng = np.random.default_rng(10)
    tensor, _ = ref.random_tensor(kind, 50, 512, rng)
    x = rng.standard_normal((11, 512)).astype(np.float32)
    before = F.linear(x, tensor)
    blocks = tensor.data.reshape(50, -1, BLOCK_SIZES[tensor.type][1])
    blocks[37, 1, part : part + 2] = np.array([value], np.float16).view(np.uint8)
    after = F.linear(x, tensor)
    assert not np.isfinite(after[:, 37]).any()
    others = np.arange(50) != 37
    assert after[:, others].tobytes() == before[:, others].tobytes()


@pytest.mark.parametrize("columns", [16, 33, 100])
def test_float_weights_take_any_columns(columns: int) -> None:
    rng = np.random.default_rng(6)
    weights = rng.standard_normal((10, columns)).astype(np.float32)
    x = rng.standard_normal((5, columns)).astype(np.float32)
    wanted, bound = expected("F32", weights.astype(np.float64), x)
    assert np.all(np.abs(F.linear(x, ref.matrix(weights)) - wanted) <= bound)


@pytest.mark.parametrize("peak", [1e-44, 1e-38, 1e-30, 1e30])
def test_activations_of_any_size(peak: float) -> None:
    tensor = ref.identity(32)
    x = np.linspace(-peak, peak, 32, dtype=np.float32).reshape(1, 32)
    found = F.linear(x, tensor)
    # half a step of the quantisation; below 1e-36 values may be taken as zeros
    assert np.all(np.abs(found.astype(np.float64) - x) <= max(peak / 254 * 1.001, 1e-36))


def test_what_is_not_finite_stays_in_its_token() -> None:
    rng = np.random.default_rng(7)
    tensor, _ = ref.random_tensor("Q4_1", 32, 64, rng)
    x = rng.standard_normal((6, 64)).astype(np.float32)
    clean = F.linear(x, tensor)
    x[2, 5], x[4, 40] = np.nan, np.inf
    found = F.linear(x, tensor)
    others = [0, 1, 3, 5]
    assert found[others].tobytes() == clean[others].tobytes()
    assert not np.isfinite(found[[2, 4]]).any()


def same_bits(x: NDArray[np.float32], y: NDArray[np.float32]) -> bool:
    return x.tobytes() == y.tobytes()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    rng = np.random.default_rng(8)
    tensor: Tensor = ref.random_tensor("Q4_K", 500, 256, rng)[0]
    x = activations(rng, 20, 256)
    assert same_bits(evaluate(lambda x: F.linear(x, tensor), x, threads=threads), F.linear(x, tensor))
