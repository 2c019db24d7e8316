"""Products and embeddings of every storage type against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy_reference as ref
import pytest
from conftest import Gpu, tensor_core_gpu
from numpy.typing import NDArray
from pymistral.kernels.cuda import linear
from pymistral.kernels.cuda.launch import Launch
from pymistral.kernels.cuda.operands import Weights
from weights import random_weights

from pymistral.quantization.types import BLOCK_SIZES, GgmlType

KINDS = (*ref.QUANTIZED, *ref.FLOATS)
COMMON = ("Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ2_XS", "MXFP4", "F16", "BF16", "F32")
BF16 = 2.0**-8
ACTIVATIONS = {"silu": ref.silu, "gelu": ref.gelu, "relu": ref.relu}


def columns_for(kind: str, blocks: int) -> int:
    return blocks * max(32, BLOCK_SIZES[GgmlType[kind]][0])


def put(
    gpu: Gpu, kind: str, rows: int, columns: int, rng: np.random.Generator, *, edges: bool = False
) -> tuple[Weights, ref.Floats, object]:
    layout, planes, values = random_weights(kind, rows, columns, rng, edges=edges)
    array = gpu.put(planes)
    return Weights(layout, array.address, rows, columns), values, array


def inputs(rng: np.random.Generator, tokens: int, columns: int) -> NDArray[np.float32]:
    """Every token of a size of its own, with blocks of zeros here and there."""
    x = rng.standard_normal((tokens, columns)) * 10.0 ** rng.uniform(-3, 3, (tokens, 1))
    x.reshape(tokens, columns // 32, 32)[rng.random((tokens, columns // 32)) < 0.1] = 0
    return x.astype(np.float32)


def expected(kind: str, weights: ref.Floats, x: NDArray[np.float32]) -> tuple[ref.Floats, ref.Floats]:
    """The product of what a kernel is given, and how far float32 may be from it."""
    if not len(x):
        return np.zeros((0, len(weights))), np.zeros((0, len(weights)))
    if kind in ref.FLOATS:
        bound = (weights.shape[1] + 1) * ref.EPSILON * (np.abs(x).astype(np.float64) @ np.abs(weights).T)
        return x.astype(np.float64) @ weights.T, bound + 1e-30
    used = ref.quantized(x).astype(np.float64)
    return used @ weights.T, 3 * ref.product_bound(weights, used, "")


@pytest.mark.parametrize("kind", KINDS)
def test_embedding(gpu: Gpu, kind: str) -> None:
    rng = np.random.default_rng(0)
    columns = columns_for(kind, 3)
    weights, values, _ = put(gpu, kind, 21, columns, rng, edges=True)
    ids = np.array([3, 20, 0, 3, 9], np.int32)
    out, arrays = gpu.rows(5, columns)
    tokens = gpu.put(ids)
    gpu.run(linear.embedding(weights, tokens.address, out, 1.5, count=gpu.count(4).address, max_rows=5))
    found = arrays["f32"].get()
    wanted = values[ids[:4]] * 1.5
    scale = np.abs(values).reshape(21, -1, 32).max(axis=2)[ids[:4]].repeat(32, axis=1)
    assert np.all(np.abs(found[:4] - wanted) <= 16 * ref.EPSILON * scale)
    assert np.all(found[4] == 777)


def test_a_token_that_does_not_exist_has_no_embedding(gpu: Gpu) -> None:
    weights, _, _ = put(gpu, "Q8_0", 4, 64, np.random.default_rng(0))
    out, arrays = gpu.rows(2, 64)
    tokens = gpu.put(np.array([-1, 4], np.int32))
    gpu.run(linear.embedding(weights, tokens.address, out, 1.0, count=gpu.count(2).address, max_rows=2))
    assert np.all(arrays["f32"].get() == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_matvec(gpu: Gpu, kind: str) -> None:
    rng = np.random.default_rng(1)
    columns = columns_for(kind, 5)
    weights, values, _ = put(gpu, kind, 19, columns, rng, edges=True)
    x = inputs(rng, 3, columns)
    wanted, bound = expected(kind, values, x)
    rows, arrays = gpu.activations(x)
    out = gpu.put(np.full((4, 24), 777, np.float32))
    gpu.run(linear.matvec([linear.Product(weights, out.address, 24)], rows, accumulate=False, count=gpu.count(3).address, max_rows=4))
    found = out.get()
    assert np.all(np.abs(found[:3, :19] - wanted) <= bound)
    assert np.all(found[3] == 777)
    assert np.all(found[:, 19:] == 777)
    del arrays


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 11])
@pytest.mark.parametrize("kind", ["Q4_K", "F16"])
def test_matvec_for_any_number_of_tokens(gpu: Gpu, kind: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    columns = columns_for(kind, 3) if kind != "F16" else 1088
    weights, values, _ = put(gpu, kind, 33, columns, rng)
    x = inputs(rng, tokens, columns)
    wanted, bound = expected(kind, values, x)
    rows, arrays = gpu.activations(x)
    before = rng.standard_normal((12, 40)).astype(np.float32)
    out = gpu.put(before)
    most = max(tokens, 1)
    gpu.run(
        linear.matvec([linear.Product(weights, out.address, 40)], rows, accumulate=True, count=gpu.count(tokens).address, max_rows=most)
    )
    found = out.get()
    allowed = bound + 2 * ref.EPSILON * (np.abs(before[:tokens, :33]) + np.abs(wanted))
    assert np.all(np.abs(found[:tokens, :33] - before[:tokens, :33] - wanted) <= allowed)
    assert np.array_equal(found[tokens:], before[tokens:])
    del arrays


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "BF16"])
def test_gated_matvec(gpu: Gpu, kind: str, activation: str) -> None:
    rng = np.random.default_rng(2)
    columns, ffn = columns_for(kind, 2), 70
    gate, gate_values, _a = put(gpu, kind, ffn, columns, rng)
    up, up_values, _b = put(gpu, kind, ffn, columns, rng)
    x = (rng.standard_normal((3, columns)) / 4).astype(np.float32)
    rows, arrays = gpu.activations(x)
    out, made = gpu.rows(4, ffn, "f32 q8 bf16")
    gpu.run(linear.gated_matvec(gate, up, rows, activation, out, count=gpu.count(3).address, max_rows=4))
    wanted = ACTIVATIONS[activation](expected(kind, gate_values, x)[0]) * expected(kind, up_values, x)[0]
    found = made["f32"].get()
    assert np.allclose(found[:3, :ffn], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert np.all(found[:3, ffn:] == 0)
    assert np.all(found[3] == 777)
    check_forms(found[:3], made, 3)
    del arrays


def check_forms(floats: NDArray[np.float32], made: dict[str, object], rows: int) -> None:
    """int8 and bfloat16 say what the floats say."""
    if not rows:
        return
    scales = made["scales"].get()[:rows]  # type: ignore[attr-defined]
    quants = made["q8"].get()[:rows].astype(np.float64).reshape(rows, -1, 32)  # type: ignore[attr-defined]
    wanted = floats.reshape(rows, -1, 32)
    assert np.all(np.abs(quants * scales[..., :1] - wanted) <= 0.501 * scales[..., :1])
    assert np.allclose(scales[..., 1], (quants * scales[..., :1]).sum(axis=2), rtol=1e-5, atol=1e-6)
    assert np.all(np.abs(quants).max(axis=2)[np.abs(wanted).max(axis=2) > 0] == 127)
    halves = (made["bf16"].get()[:rows].astype(np.uint32) << 16).view(np.float32)  # type: ignore[attr-defined]
    assert np.all(np.abs(halves - floats) <= BF16 * np.abs(floats))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize(gpu: Gpu, kind: str) -> None:
    rng = np.random.default_rng(3)
    columns = columns_for(kind, 2)
    weights, values, _ = put(gpu, kind, 7, columns, rng, edges=True)
    out = gpu.put(np.zeros((7, columns), np.uint16))
    gpu.run(linear.dequantize(weights, out.address))
    found = (out.get().astype(np.uint32) << 16).view(np.float32)
    peak = np.abs(values).reshape(7, -1, 32).max(axis=2).repeat(32, axis=1)
    assert np.all(np.abs(found - values) <= 1.001 * BF16 * np.abs(values) + 16 * ref.EPSILON * peak + 1e-37)


def rounded(values: ref.Floats) -> ref.Floats:
    """To bfloat16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("kind", COMMON)
@pytest.mark.parametrize(("rows", "tokens", "most"), [(70, 37, 64), (130, 33, 32)])
def test_matmul_on_tensor_cores(gpu: Gpu, kind: str, rows: int, tokens: int, most: int) -> None:
    tensor_core_gpu(gpu)
    rng = np.random.default_rng(4)
    columns = 256 if kind in ("Q4_K", "Q6_K", "IQ2_XS") else 224
    weights, values, _ = put(gpu, kind, rows, columns, rng)
    x = inputs(rng, tokens, columns)
    acts, arrays = gpu.activations(x)
    out = gpu.put(np.full((70, rows + 3), 777, np.float32))
    live = min(tokens, most)
    gpu.run(
        linear.matmul(
            weights, acts, out.address, rows + 3, accumulate=False, count=gpu.count(live).address, max_rows=most, tensor_cores=True
        )
    )
    found = out.get()
    left, right = rounded(x[:live].astype(np.float64)), rounded(values)
    bound = (columns + 4) * ref.EPSILON * 4 * (np.abs(left) @ np.abs(right).T) + 2.0**-8 * 0.02 * (np.abs(left) @ np.abs(right).T)
    assert np.all(np.abs(found[:live, :rows] - left @ right.T) <= bound)
    assert np.all(found[live:] == 777)
    assert np.all(found[:, rows:] == 777)
    del arrays


def check_few(found: NDArray[np.float32], x: NDArray[np.float32], values: ref.Floats, before: NDArray[np.float32]) -> None:
    """Weights are rounded as scale, as minimum and as themselves; all are of the size of their block at most."""
    left = rounded(x.astype(np.float64))
    peak = np.abs(values).reshape(len(values), -1, 32).max(axis=2).repeat(32, axis=1)
    error = np.sqrt(np.square(left) @ np.square(BF16 * peak).T)  # errors of many blocks are independent
    bound = 3 * error + (x.shape[1] + 4) * 4 * ref.EPSILON * (np.abs(left) @ np.abs(values).T + np.abs(before)) + 1e-30
    assert np.all(np.abs(found - before - left @ values.T) <= bound)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "F32"])
def test_matmul_few(gpu: Gpu, kind: str) -> None:
    tensor_core_gpu(gpu)
    rng = np.random.default_rng(10)
    columns = columns_for(kind, 5) if kind not in ref.FLOATS else 416
    weights, values, _ = put(gpu, kind, 19, columns, rng, edges=True)
    x = inputs(rng, 3, columns)
    rows, arrays = gpu.activations(x)
    out = gpu.put(np.full((4, 24), 777, np.float32))
    gpu.run(linear.matmul_few([linear.Product(weights, out.address, 24)], rows, accumulate=False, count=gpu.count(3).address, max_rows=4))
    found = out.get()
    check_few(found[:3, :19], x, values, np.zeros((3, 19), np.float32))
    assert np.all(found[3] == 777)
    assert np.all(found[:, 19:] == 777)
    del arrays


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 16, 31, 33, 64])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_matmul_few_for_any_number_of_tokens(gpu: Gpu, kind: str, tokens: int) -> None:
    tensor_core_gpu(gpu)
    rng = np.random.default_rng(tokens)
    columns = 1312 if kind != "Q4_K" else 1280  # more chunks than warps, the last not whole
    weights, values, _ = put(gpu, kind, 37, columns, rng)
    x = inputs(rng, tokens, columns)
    rows, arrays = gpu.activations(x)
    before = rng.standard_normal((tokens + 2, 40)).astype(np.float32)
    out = gpu.put(before)
    product = linear.Product(weights, out.address, 40)
    gpu.run(linear.matmul_few([product], rows, accumulate=True, count=gpu.count(tokens).address, max_rows=max(tokens, 1)))
    found = out.get()
    check_few(found[:tokens, :37], x, values, before[:tokens, :37])
    assert np.array_equal(found[tokens:], before[tokens:])
    assert np.array_equal(found[:, 37:], before[:, 37:])
    del arrays


def three_products(
    gpu: Gpu, rng: np.random.Generator, kind: str, sizes: tuple[int, ...], make: Callable[..., Launch]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], ref.Floats]]:
    """Three rows times matrices of so many rows, three in a launch and then two: each product, x, and the matrix. What belongs to one is
    never written into another's result.
    """
    made = [put(gpu, kind, rows, 512, rng) for rows in sizes]
    x = inputs(rng, 3, 512)
    rows, arrays = gpu.activations(x)
    outs = [gpu.put(np.full((4, 40), 777, np.float32)) for _ in made]
    products = [linear.Product(weights, out.address, 40) for (weights, _, _), out in zip(made, outs, strict=True)]
    for used in (3, 2):
        gpu.run(make(products[:used], rows, accumulate=False, count=gpu.count(3).address, max_rows=4))
        for (weights, values, _), out in list(zip(made, outs, strict=True))[:used]:
            found = out.get()
            assert np.all(found[3] == 777)
            assert np.all(found[:, weights.rows :] == 777)
            yield found[:3, : weights.rows], x, values
    del arrays


@pytest.mark.parametrize("blocks", [128, 1])
@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K", "BF16"])
def test_few_rows_do_not_depend_on_each_other(gpu: Gpu, kind: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, for any number of others, in the smallest blocks and in the largest."""
    tensor_core_gpu(gpu)
    monkeypatch.setattr(linear, "_FEW_BLOCKS", blocks)
    rng = np.random.default_rng(11)
    weights, _, _ = put(gpu, kind, 130, 1536, rng)
    up, _, _ = put(gpu, kind, 130, 1536, rng)
    x = inputs(rng, 64, 1536)
    found, gated = [], []
    for tokens in (1, 5, 8, 13, 31, 64):
        rows, arrays = gpu.activations(x[:tokens])
        out = gpu.put(np.zeros((tokens, 130), np.float32))
        counted = {"count": gpu.count(tokens).address, "max_rows": tokens}
        gpu.run(linear.matmul_few([linear.Product(weights, out.address, 130)], rows, accumulate=False, **counted))
        other, made = gpu.rows(tokens, 130)
        gpu.run(linear.gated_matmul_few(weights, up, rows, "relu", other, **counted))
        found.append(out.get())
        gated.append(made["f32"].get())
        del arrays
    for some in (found, gated):
        assert np.any(some[-1])
        for each in some:
            assert np.array_equal(each, some[-1][: len(each)])


@pytest.mark.parametrize("tokens", [3, 9, 33])
@pytest.mark.parametrize(("kind", "rows"), [("Q4_0", 37), ("Q4_K", 75), ("F16", 75), ("Q6_K", 139), ("BF16", 139)])
def test_matmul_few_of_many_rows(gpu: Gpu, kind: str, rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32, 64 and 128 rows, the last of which is not whole; several chunks for each warp."""
    tensor_core_gpu(gpu)
    monkeypatch.setattr(linear, "_FEW_BLOCKS", 1)
    rng = np.random.default_rng(12)
    columns = 1312 if kind[-1] != "K" else 1280
    weights, values, _ = put(gpu, kind, rows, columns, rng)
    x = inputs(rng, tokens, columns)
    acts, arrays = gpu.activations(x)
    out = gpu.put(np.full((tokens + 1, rows + 3), 777, np.float32))
    product = linear.Product(weights, out.address, rows + 3)
    gpu.run(linear.matmul_few([product], acts, accumulate=False, count=gpu.count(tokens).address, max_rows=tokens + 1))
    found = out.get()
    check_few(found[:tokens, :rows], x, values, np.zeros((tokens, rows), np.float32))
    assert np.all(found[tokens] == 777)
    assert np.all(found[:, rows:] == 777)
    del arrays


@pytest.mark.parametrize("blocks", [128, 1])
def test_three_products_of_few_rows(gpu: Gpu, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_core_gpu(gpu)
    monkeypatch.setattr(linear, "_FEW_BLOCKS", blocks)
    for found, x, values in three_products(gpu, np.random.default_rng(13), "Q6_K", (33, 7, 17), linear.matmul_few):
        check_few(found, x, values, np.zeros(found.shape, np.float32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "tokens", "blocks"), [("Q4_1", 3, 128), ("Q6_K", 19, 1), ("BF16", 33, 128), ("F16", 9, 1)])
def test_gated_matmul_few(gpu: Gpu, kind: str, tokens: int, blocks: int, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_core_gpu(gpu)
    monkeypatch.setattr(linear, "_FEW_BLOCKS", blocks)
    rng = np.random.default_rng(14)
    columns, ffn = columns_for(kind, 2) if kind not in ref.FLOATS else 160, 75
    gate, gate_values, _a = put(gpu, kind, ffn, columns, rng)
    up, up_values, _b = put(gpu, kind, ffn, columns, rng)
    x = (rng.standard_normal((tokens, columns)) / 4).astype(np.float32)
    rows, arrays = gpu.activations(x)
    out, made = gpu.rows(tokens + 1, ffn, "f32 q8 bf16")
    gpu.run(linear.gated_matmul_few(gate, up, rows, activation, out, count=gpu.count(tokens).address, max_rows=tokens + 1))
    left = rounded(x.astype(np.float64))
    wanted = ACTIVATIONS[activation](left @ gate_values.T) * (left @ up_values.T)
    found = made["f32"].get()
    assert np.allclose(found[:tokens, :ffn], wanted, rtol=0.02, atol=0.01 * np.abs(wanted).max())
    assert np.all(found[:tokens, ffn:] == 0)
    assert np.all(found[tokens] == 777)
    check_forms(found[:tokens], made, tokens)
    del arrays


def test_matmul_of_large_tiles(gpu: Gpu) -> None:
    tensor_core_gpu(gpu)
    rng = np.random.default_rng(5)
    weights, values, _ = put(gpu, "Q4_0", 2050, 64, rng)
    x = inputs(rng, 140, 64)
    acts, arrays = gpu.activations(x)
    before = rng.standard_normal((140, 2050)).astype(np.float32)
    out = gpu.put(before)
    launch = linear.matmul(weights, acts, out.address, 2050, accumulate=True, count=gpu.count(140).address, max_rows=140, tensor_cores=True)
    gpu.run(launch)
    left, right = rounded(x.astype(np.float64)), rounded(values)
    size = np.abs(left) @ np.abs(right).T + np.abs(before)
    assert np.all(np.abs(out.get() - before - left @ right.T) <= 1e-4 * size)
    del arrays


@pytest.mark.parametrize("matmul", [linear.matmul_bf16, linear.matmul_hopper])
@pytest.mark.parametrize(("kind", "rows", "columns", "tokens"), [("BF16", 130, 96, 131), ("Q4_K", 255, 512, 40), ("Q8_0", 8, 32, 300)])
def test_matmul_on_unpacked_weights(gpu: Gpu, matmul: Callable[..., Launch], kind: str, rows: int, columns: int, tokens: int) -> None:
    """More stages than pieces of columns, tiles that are partly empty, and blocks beyond the count."""
    tensor_core_gpu(gpu)
    if matmul is linear.matmul_hopper and gpu.arch != 90:
        pytest.skip("this GPU has no products of warpgroups")
    rng = np.random.default_rng(8)
    weights, values, _ = put(gpu, kind, rows, columns, rng)
    x = inputs(rng, tokens, columns)
    acts, arrays = gpu.activations(x)
    unpacked = gpu.put(np.zeros((rows, columns), np.uint16))
    gpu.run(linear.dequantize(weights, unpacked.address))
    left, right = rounded(x.astype(np.float64)), rounded(values)
    for accumulate in (False, True):
        before = rng.standard_normal((tokens + 1, rows + 3)).astype(np.float32)
        out = gpu.put(before)
        options = {"accumulate": accumulate, "count": gpu.count(tokens).address, "max_rows": 512}
        gpu.run(matmul(unpacked.address, weights, acts, out.address, rows + 3, **options))
        found, old = out.get(), before[:tokens, :rows] * accumulate
        size = np.abs(left) @ np.abs(right).T
        assert np.all(np.abs(found[:tokens, :rows] - old - left @ right.T) <= 1e-4 * size + 1e-5 * np.abs(old) + 1e-30)
        assert np.array_equal(found[tokens:], before[tokens:])
        assert np.array_equal(found[:, rows:], before[:, rows:])
    del arrays


def test_wide_tiles_of_a_warpgroup(gpu: Gpu) -> None:
    """Tiles of 256 rows of weights, more pieces of columns than stages, and pairs of floats written together."""
    if gpu.arch != 90:
        pytest.skip("this GPU has no products of warpgroups")
    rng = np.random.default_rng(10)
    rows, columns, tokens = 512, 480, 70
    weights, values, _ = put(gpu, "BF16", rows, columns, rng)
    x = inputs(rng, tokens, columns)
    acts, arrays = gpu.activations(x)
    before = rng.standard_normal((tokens + 1, rows)).astype(np.float32)
    for accumulate in (False, True):
        out = gpu.put(before)
        options = {"accumulate": accumulate, "count": gpu.count(tokens).address}
        launch = linear.matmul_hopper(weights.address, weights, acts, out.address, rows, max_rows=64 * 256, **options)
        assert ("BN", "256") in launch.kernel.macros
        gpu.run(launch._replace(grid=(1, *launch.grid[1:])))
        wanted = rounded(x.astype(np.float64)) @ values.T
        found = out.get() - before * accumulate
        assert np.all(np.abs(found[:tokens] - wanted) <= 1e-4 * (np.abs(rounded(x.astype(np.float64))) @ np.abs(values).T) + 1e-5)
        assert np.array_equal(out.get()[tokens], before[tokens])
    del arrays


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(150, 96, 131), (40, 320, 20)])
def test_gated_products_of_a_warpgroup(gpu: Gpu, rows: int, columns: int, tokens: int) -> None:
    if gpu.arch != 90:
        pytest.skip("this GPU has no products of warpgroups")
    rng = np.random.default_rng(11)
    (gate, gates, _), (up, ups, _) = (put(gpu, "BF16", rows, columns, rng) for _ in range(2))
    x = inputs(rng, tokens, columns)
    acts, arrays = gpu.activations(x)
    out, made = gpu.rows(tokens + 1, rows, "bf16")
    count = gpu.count(tokens).address
    gpu.run(linear.gated_matmul_hopper((gate.address, up.address), gate, acts, "gelu", out, count=count, max_rows=256))
    left = rounded(x.astype(np.float64))
    first, second = left @ gates.T, left @ ups.T
    wanted = ref.gelu(first) * second
    size = np.abs(left) @ np.abs(gates).T * np.abs(second) + np.abs(first) * (np.abs(left) @ np.abs(ups).T)
    found = (made["bf16"].get().astype(np.uint32) << 16).view(np.float32)
    assert np.all(np.abs(found[:tokens, :rows] - wanted) <= 1.1 * BF16 * np.abs(wanted) + 1e-4 * size + 1e-30)
    assert np.all(found[:tokens, rows:] == 0)
    assert np.all(made["bf16"].get()[tokens] == 0x4442)
    del arrays


def test_three_products_at_once(gpu: Gpu) -> None:
    for found, x, values in three_products(gpu, np.random.default_rng(9), "Q4_K", (33, 7, 2), linear.matvec):
        wanted, bound = expected("Q4_K", values, x)
        assert np.all(np.abs(found - wanted) <= bound)


@pytest.mark.parametrize("kind", COMMON)
def test_matmul_in_float32(gpu: Gpu, kind: str) -> None:
    rng = np.random.default_rng(6)
    columns = columns_for(kind, 2) if kind not in ref.FLOATS else 96
    weights, values, _ = put(gpu, kind, 70, columns, rng)
    x = inputs(rng, 67, columns)
    acts, arrays = gpu.activations(x)
    out = gpu.put(np.full((70, 72), 777, np.float32))
    gpu.run(linear.matmul(weights, acts, out.address, 72, accumulate=False, count=gpu.count(67).address, max_rows=70, tensor_cores=False))
    found = out.get()
    size = np.abs(x).astype(np.float64) @ np.abs(values).T
    assert np.all(np.abs(found[:67, :70] - x.astype(np.float64) @ values.T) <= 4 * (columns + 4) * ref.EPSILON * size + 1e-30)
    assert np.all(found[67:] == 777)
    assert np.all(found[:, 70:] == 777)
    del arrays
