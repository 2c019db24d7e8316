"""Norms, elementwise operations, and mixtures of experts around their products, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy_reference as ref
import pytest
from conftest import Gpu, tensor_core_gpu
from numpy.typing import NDArray
from pymistral.kernels.cuda import linear, moe, rowwise
from pymistral.kernels.cuda.operands import Rows, Weights
from test_products import ACTIVATIONS, check_forms, put


@pytest.mark.parametrize("columns", [32, 576, 1102, 4200])
@pytest.mark.parametrize("branch", ["none", "plain", "normed"])
@pytest.mark.parametrize("picked", [False, True])
def test_norm(gpu: Gpu, columns: int, branch: str, picked: bool) -> None:
    rng = np.random.default_rng(columns)
    stride = -(-columns // 32) * 32
    x, y = (rng.standard_normal((5, stride)).astype(np.float32) for _ in range(2))
    weight, branch_weight = (rng.standard_normal(columns).astype(np.float32) for _ in range(2))
    wanted_x = x.astype(np.float64)
    indices = np.array([3, 0], np.int32) if picked else np.arange(4, dtype=np.int32)
    added = y.astype(np.float64)
    if branch == "normed":
        added[:, :columns] = ref.rms_norm(y[:, :columns], branch_weight.astype(np.float64), 1e-5)
    if branch != "none":
        wanted_x[indices, :columns] += added[indices, :columns]
    wanted = ref.rms_norm(wanted_x[indices, :columns], weight.astype(np.float64), 1e-5)
    arrays = {name: gpu.put(values) for name, values in (("x", x), ("y", y), ("w", weight), ("b", branch_weight), ("i", indices))}
    out, made = gpu.rows(5, columns, "f32 q8 bf16")
    gpu.run(
        rowwise.norm(
            Rows(stride, arrays["x"].address),
            columns,
            1e-5,
            weight=arrays["w"].address,
            out=out,
            branch=Rows(stride, arrays["y"].address) if branch != "none" else None,
            branch_weight=arrays["b"].address if branch == "normed" else 0,
            indices=arrays["i"].address if picked else 0,
            count=gpu.count(len(indices)).address,
            max_rows=5,
        )
    )
    found = made["f32"].get()
    assert np.allclose(found[: len(indices), :columns], wanted, rtol=1e-5, atol=3e-6)
    assert np.all(found[: len(indices), columns:] == 0)
    assert np.all(found[len(indices) :] == 777)
    assert np.allclose(arrays["x"].get()[:, :columns], wanted_x[:, :columns], rtol=1e-5, atol=3e-6)
    check_forms(found[: len(indices)], made, len(indices))


def sigmoid(x: ref.Floats) -> ref.Floats:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("rows", [0, 3])
def test_elementwise(gpu: Gpu, rows: int) -> None:
    rng = np.random.default_rng(3)
    columns, stride = 130, 160
    x, y = (rng.standard_normal((4, stride)).astype(np.float32) for _ in range(2))
    vector = rng.standard_normal(columns).astype(np.float32)
    indices = np.array([2, 2, 0, 1], np.int32)
    ax, ay, av, ai = gpu.put(x), gpu.put(y), gpu.put(vector), gpu.put(indices)
    rx, ry = Rows(stride, ax.address), Rows(stride, ay.address)
    a, b = x[:, :columns].astype(np.float64), y[:, :columns].astype(np.float64)
    common: dict[str, Any] = {"count": gpu.count(rows).address, "max_rows": 4}
    cases: list[tuple[Any, ref.Floats]] = [
        (lambda out: rowwise.add(rx, ry, columns, out, **common), a + b),
        (lambda out: rowwise.multiply(rx, ry, columns, out, **common), a * b),
        (lambda out: rowwise.add_vector(rx, av.address, columns, out, **common), a + vector),
        (lambda out: rowwise.sigmoid_gate(rx, ry, columns, out, **common), a * sigmoid(b[:, :1])),
        (lambda out: rowwise.soft_cap(rx, 1.5, columns, out, **common), 1.5 * np.tanh(a / 1.5)),
        (lambda out: rowwise.scale(rx, -2.0, columns, out, **common), -2 * a),
        (lambda out: rowwise.take_rows(rx, ai.address, columns, out, **common), a[indices]),
    ]
    for name, function in ACTIVATIONS.items():
        cases.append((lambda out, name=name: rowwise.activate(rx, name, columns, out, **common), function(a)))
        cases.append((lambda out, name=name: rowwise.gate(rx, ry, name, columns, out, **common), function(a) * b))
    for launch, wanted in cases:
        out, made = gpu.rows(4, columns, "f32 q8 bf16")
        gpu.run(launch(out))
        found = made["f32"].get()
        assert np.allclose(found[:rows, :columns], wanted[:rows], rtol=2e-6, atol=1e-6)
        assert np.all(found[:rows, columns:] == 0)
        assert np.all(found[rows:] == 777)
        check_forms(found[:rows], made, rows)


def test_elementwise_in_a_wider_row_leaves_its_neighbours(gpu: Gpu) -> None:
    x = np.arange(192, dtype=np.float32).reshape(1, 192)
    array = gpu.put(x)
    middle = Rows(192, array.address + 4 * 64)
    gpu.run(rowwise.scale(middle, 2.0, 64, middle, count=gpu.count(1).address, max_rows=1))
    x[:, 64:128] *= 2
    assert np.array_equal(array.get(), x)


def mixture(
    x: ref.Floats, logits: ref.Floats, gate: list[ref.Floats], up: list[ref.Floats], down: list[ref.Floats], top_k: int, normalize: bool
) -> ref.Floats:
    out = np.zeros_like(x)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    for token in range(len(x)):
        chosen = np.argsort(-logits[token], kind="stable")[:top_k]
        weights = p[token, chosen] / (p[token, chosen].sum() if normalize else 1.0)
        for expert, weight in zip(chosen, weights, strict=True):
            out[token] += weight * (ref.silu(x[token] @ gate[expert].T) * (x[token] @ up[expert].T)) @ down[expert].T
    return out


def test_route(gpu: Gpu) -> None:
    rng = np.random.default_rng(5)
    for experts, top_k, normalize in ((8, 2, True), (60, 4, False), (128, 8, True), (3, 3, False)):
        logits = rng.integers(-3, 4, (6, experts)).astype(np.float32)  # ties
        array = gpu.put(logits)
        chosen, weights = gpu.put(np.full((7, top_k), 99, np.int32)), gpu.put(np.full((7, top_k), 99, np.float32))
        gpu.run(
            moe.route(
                Rows(experts, array.address),
                experts,
                top_k,
                normalize=normalize,
                chosen=chosen.address,
                weights=weights.address,
                count=gpu.count(6).address,
                max_rows=7,
            )
        )
        wanted = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
        assert np.array_equal(chosen.get()[:6], wanted)
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(axis=1, keepdims=True)
        p = np.take_along_axis(p, wanted, axis=1)
        assert np.allclose(weights.get()[:6], p / p.sum(axis=1, keepdims=True) if normalize else p, rtol=1e-6)
        assert np.all(chosen.get()[6] == 99)


@pytest.mark.parametrize("tokens", [0, 1, 90])
@pytest.mark.parametrize("experts", [4, 300])
def test_group(gpu: Gpu, tokens: int, experts: int) -> None:
    rng = np.random.default_rng(6)
    top_k, tile = 2, 32
    chosen = np.array([rng.choice(experts, top_k, replace=False) for _ in range(90)], np.int32)
    most = moe.max_expert_tiles(90, top_k, experts, tile)
    array = gpu.put(chosen)
    places, owners, tiles = gpu.put(np.full((most, tile), -7, np.int32)), gpu.put(np.full(most, -7, np.int32)), gpu.count(-7)
    gpu.run(
        moe.group(
            array.address, top_k, experts, tile,
            places=places.address, tile_experts=owners.address, tiles=tiles.address, count=gpu.count(tokens).address,
        )
    )  # fmt: skip
    used = int(tiles.get()[0])
    assert used == sum(-(-int(count) // tile) for count in np.bincount(chosen[:tokens].reshape(-1), minlength=experts))
    found = places.get()[:used]
    live = found[found >= 0]
    assert sorted(live.tolist()) == list(range(tokens * top_k))
    for own, expert in zip(found, owners.get(), strict=False):
        assert np.all(chosen.reshape(-1)[own[own >= 0]] == expert)
    assert np.all(places.get()[used:] == -7)


@pytest.mark.parametrize("path", ["matvec", "tensor cores", "float32"])
@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_mixture_of_experts(gpu: Gpu, kind: str, path: str) -> None:
    if path == "tensor cores":
        tensor_core_gpu(gpu)
    rng = np.random.default_rng(7)
    experts, top_k, hidden, ffn, tokens = 5, 2, 64, 96, 3 if path == "matvec" else 40
    made = {}
    for name, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
        values = put(gpu, kind, experts * rows, columns, rng)[1]
        parts = [values[rows * e : rows * (e + 1)] / 4 for e in range(experts)]
        made[name] = (pack_experts(gpu, kind, parts), parts)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    logits = rng.standard_normal((tokens, experts)).astype(np.float32)
    source, alive = gpu.activations(x)
    router = gpu.put(logits)
    most, count = tokens + 1, gpu.count(tokens)
    chosen, weights = gpu.put(np.zeros((most, top_k), np.int32)), gpu.put(np.zeros((most, top_k), np.float32))
    common: dict[str, Any] = {"count": count.address, "max_rows": most}
    gpu.run(
        moe.route(Rows(experts, router.address), experts, top_k, normalize=True, chosen=chosen.address, weights=weights.address, **common)
    )
    products = {}
    tile = linear.matmul_tile(most * top_k) if path == "tensor cores" else linear.MATMUL_FLOAT_TILE
    tiles = moe.max_expert_tiles(most, top_k, experts, tile)
    places, owners, used = gpu.put(np.zeros((tiles, tile), np.int32)), gpu.put(np.zeros(tiles, np.int32)), gpu.count(0)
    group = {"places": places.address, "tile_experts": owners.address, "tiles": used.address}
    if path != "matvec":
        gpu.run(moe.group(chosen.address, top_k, experts, tile, count=count.address, **group))

    def product(name: str, rows: Rows, shared: bool) -> Rows:
        (matrix, _keep), _ = made[name]
        out = gpu.put(np.zeros((most * top_k, matrix.rows), np.float32))
        products[name] = out
        if path == "matvec":
            launch = moe.expert_matvec(
                matrix, rows, out.address, matrix.rows, chosen=chosen.address, top_k=top_k, shared_x=shared, **common
            )
        else:
            launch = moe.expert_matmul(
                matrix, rows, out.address, matrix.rows,
                tile=tile, max_tiles=tiles, choices_per_row=top_k if shared else 1, tensor_cores=path == "tensor cores", **group,
            )  # fmt: skip
        gpu.run(launch)
        return Rows(matrix.rows, out.address)

    gated, forms = gpu.rows(most * top_k, ffn, "f32 q8 bf16")
    gpu.run(moe.gate_choices(product("gate", source, True), product("up", source, True), ffn, "silu", top_k, gated, **common))
    out, result = gpu.rows(most, hidden)
    gpu.run(moe.combine(product("down", gated, False), weights.address, top_k, hidden, out, **common))
    inputs = ref.quantized(x) if kind == "Q8_0" and path == "matvec" else x
    wanted = mixture(inputs.astype(np.float64), logits.astype(np.float64), *(made[name][1] for name in ("gate", "up", "down")), top_k, True)
    found = result["f32"].get()
    tolerance = 1e-5 if kind == "F32" and path != "tensor cores" else 0.03
    assert np.abs(found[:tokens] - wanted).max() <= tolerance * np.abs(wanted).max()
    assert np.all(found[tokens] == 777)
    del alive, forms


def pack_experts(gpu: Gpu, kind: str, parts: list[NDArray[np.float64]]) -> tuple[Weights, Any]:
    """Experts one after the other, as `planes.Layout.nbytes` says. `parts` become what is stored of them."""
    import gguf
    from pymistral.kernels.cuda.planes import LAYOUTS
    from weights import tiles_of

    from pymistral.quantization.types import GgmlType, Tensor

    layout = LAYOUTS[kind.lower()]
    planes = []
    for index, part in enumerate(parts):
        stored = gguf.quants.quantize(part.astype(np.float32), gguf.GGMLQuantizationType[kind])
        data = np.ascontiguousarray(stored).view(np.uint8).reshape(-1)
        parts[index] = ref.values_of(kind, data, *part.shape)
        planes.append(layout.pack(tiles_of(Tensor("expert", GgmlType[kind], part.shape, data)), *part.shape))
    array = gpu.put(np.concatenate(planes))
    return Weights(layout, array.address, *parts[0].shape), array
