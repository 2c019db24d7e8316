"""Rotation, the KV cache and both attention kernels against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy_reference as ref
import pytest
from conftest import Array, Gpu
from numpy.typing import NDArray
from pymistral.kernels.cuda import attention
from pymistral.kernels.cuda.attention import Heads, Places
from pymistral.kernels.cuda.operands import Rows
from test_products import check_forms

BLOCK = 32


class Batch:
    """Sequences in a paged cache, as a runner lays them out: some of their positions are new in this step."""

    def __init__(
        self, gpu: Gpu, rng: np.random.Generator, lengths: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, floats: bool
    ) -> None:
        """``lengths``: (positions before this step, tokens of this step) of each sequence."""
        blocks = sum(-(-(old + new) // BLOCK) for old, new in lengths) + 2
        free = list(rng.permutation(blocks))
        width = max(-(-(old + new) // BLOCK) for old, new in lengths)
        self.tables = np.full((len(lengths), width), 2**30, np.int32)  # what is beyond a sequence must not be read
        self.lengths, self.floats = lengths, floats
        positions, slots, rows = [], [], []
        for row, (old, new) in enumerate(lengths):
            used = -(-(old + new) // BLOCK)
            self.tables[row, :used] = [free.pop() for _ in range(used)]
            for position in range(old, old + new):
                positions.append(position)
                slots.append(self.tables[row, position // BLOCK] * BLOCK + position % BLOCK)
                rows.append(row)
        self.positions = np.array(positions, np.int32)
        self.rows = np.array(rows, np.int32)
        self.tokens = len(positions)
        shape = (blocks, kv_heads, BLOCK, head_dim)
        dtype: Any = np.float32 if floats else np.uint16
        nan: Any = np.nan if floats else 0x7FC0
        self.keys, self.values = (gpu.put(np.full(shape, nan, dtype)) for _ in range(2))
        self.state = [gpu.put(x) for x in (positions, slots, rows) for x in [np.array(x, np.int32)]]
        self.table_array = gpu.put(self.tables)
        self.count = gpu.count(self.tokens)
        self.heads = Heads(heads, kv_heads, head_dim, self.keys.address, self.values.address, BLOCK, floats)
        self.items_array: Array | None = None

    def places(self) -> Places:
        items = self.items_array.address if self.items_array else 0
        return Places(*(array.address for array in self.state), items, self.table_array.address, self.tables.shape[1])

    def cached(self, array: Array, row: int, length: int) -> NDArray[np.float64]:
        """``[length, kv_heads, head_dim]``."""
        values = array.get()
        if not self.floats:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        own = values[self.tables[row, : -(-length // BLOCK)]]
        return own.transpose(0, 2, 1, 3).reshape(-1, *own.shape[1:2], own.shape[3])[:length].astype(np.float64)

    def fill(self, gpu: Gpu, rng: np.random.Generator) -> None:
        """Random keys and values for all positions, new ones too. What no sequence owns stays NaN."""
        for array in (self.keys, self.values):
            values = array.get()
            for row, (old, new) in enumerate(self.lengths):
                for position in range(old + new):
                    random = rng.standard_normal((values.shape[1], values.shape[3])).astype(np.float32)
                    if not self.floats:
                        random = (random.view(np.uint32) >> 16).astype(np.uint16)  # type: ignore[assignment]
                    values[self.tables[row, position // BLOCK], :, position % BLOCK] = random
            fresh = gpu.put(values)
            array.address, array._owner, array._get = fresh.address, fresh._owner, fresh._get
        heads = self.heads
        self.heads = Heads(heads.heads, heads.kv_heads, heads.head_dim, self.keys.address, self.values.address, BLOCK, self.floats)

    def expected(self, q: NDArray[np.float32], window: int, cap: float, u: float) -> tuple[ref.Floats, ref.Floats]:
        shape = (self.tokens, self.heads.heads, self.heads.head_dim)
        out, bound = np.empty(shape), np.empty(shape)
        for row, (old, new) in enumerate(self.lengths):
            own = self.rows == row
            if new:
                k, v = (self.cached(array, row, old + new) for array in (self.keys, self.values))
                queries = q[: self.tokens].reshape(shape)[own].astype(np.float64)
                positions = self.positions[own].astype(np.int64)
                out[own], bound[own] = ref.attention(queries, k, v, positions, scale=1.0, window=window or None, soft_cap=cap or None, u=u)
        return out.reshape(self.tokens, -1), bound.reshape(self.tokens, -1)


LENGTHS = [(0, 1), (5, 3), (31, 1), (32, 2), (200, 1), (64, 40)]


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "pairs", "normed"),
    [(64, 9, 3, 32, False), (256, 4, 1, 128, True), (80, 2, 2, 20, True), (16, 4, 2, 0, False)],
)
def test_rope_and_cache(gpu: Gpu, floats: bool, head_dim: int, heads: int, kv_heads: int, pairs: int, normed: bool) -> None:
    rng = np.random.default_rng(0)
    batch = Batch(gpu, rng, LENGTHS, heads, kv_heads, head_dim, floats)
    tokens = batch.tokens
    fused = rng.standard_normal((tokens + 1, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    array = gpu.put(fused)
    at = [array.address + 4 * head_dim * first for first in (0, heads, heads + kv_heads)]
    q, k, v = (Rows(fused.shape[1], address) for address in at)
    weights = [rng.standard_normal(head_dim).astype(np.float32) for _ in range(2)]
    norms = [gpu.put(weight) for weight in weights]
    frequencies = 10000.0 ** -(np.arange(pairs) / max(pairs, 1))
    angles = np.arange(300)[:, None] * frequencies
    table = gpu.put(np.stack([np.cos(angles), np.sin(angles)], axis=1), np.float32)
    gpu.run(
        attention.rope_and_cache(
            q,
            k,
            v,
            batch.heads,
            batch.places(),
            q_norm=norms[0].address if normed else 0,
            k_norm=norms[1].address if normed else 0,
            epsilon=1e-5,
            rotations=table.address if pairs else 0,
            pairs=pairs,
            scale=0.25,
            count=batch.count.address,
            max_rows=tokens + 1,
        )
    )
    split = fused[:tokens].reshape(tokens, -1, head_dim).astype(np.float64)
    queries, keys, values = split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]
    if normed:
        queries, keys = (ref.rms_norm(x, weight.astype(np.float64), 1e-5) for x, weight in zip((queries, keys), weights, strict=True))
    if pairs:
        queries, keys = (ref.rotated(x, batch.positions.astype(np.int64), frequencies) for x in (queries, keys))
    found = array.get()
    assert np.allclose(found[:tokens, : heads * head_dim].reshape(queries.shape), queries * 0.25, rtol=1e-5, atol=3e-6)
    assert np.array_equal(found[:, heads * head_dim :], fused[:, heads * head_dim :])
    assert np.array_equal(found[tokens], fused[tokens])
    tolerance = 3e-6 if floats else 2.0**-8
    for row, (old, new) in enumerate(batch.lengths):
        own = batch.rows == row
        for cache, wanted in ((batch.keys, keys), (batch.values, values)):
            stored = batch.cached(cache, row, old + new)
            assert np.allclose(stored[old:], wanted[own], rtol=tolerance, atol=3e-6)
            assert np.all(np.isnan(stored[:old]))  # nothing else was written


def test_what_is_cached_is_finite(gpu: Gpu) -> None:
    batch = Batch(gpu, np.random.default_rng(0), [(0, 1)], 1, 1, 32, False)
    x = gpu.put(np.array([[np.inf, -np.inf, np.nan, 1.0] * 8], np.float32))
    rows = Rows(32, x.address)
    gpu.run(
        attention.rope_and_cache(
            rows, rows, rows, batch.heads, batch.places(),
            q_norm=0, k_norm=0, epsilon=0.0, rotations=0, pairs=0, scale=1.0, count=batch.count.address, max_rows=1,
        )
    )  # fmt: skip
    assert np.all(np.isfinite(batch.cached(batch.values, 0, 1)))


SHAPES = [(64, 9, 3), (128, 4, 1), (256, 4, 1), (80, 2, 2), (16, 2, 1), (32, 20, 1), (64, 20, 1)]


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (17, 0.0), (0, 3.0)])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_decode(gpu: Gpu, head_dim: int, heads: int, kv_heads: int, splits: int, window: int, cap: float) -> None:
    rng = np.random.default_rng(1)
    batch = Batch(gpu, rng, [(0, 1), (5, 2), (31, 1), (260, 1), (0, 0)], heads, kv_heads, head_dim, floats=head_dim == 16)
    batch.fill(gpu, rng)
    for tensor_cores in sorted({False, attention.decode_tensor_cores(batch.heads, gpu.arch)}):
        check_decode(gpu, rng, batch, splits, window, cap, tensor_cores)


def check_decode(
    gpu: Gpu, rng: np.random.Generator, batch: Batch, splits: int, window: int, cap: float, tensor_cores: bool, sharpness: float = 1.0
) -> None:
    heads, tokens = batch.heads, batch.tokens
    columns = heads.heads * heads.head_dim
    q = rng.standard_normal((tokens + 1, columns)).astype(np.float32) * np.float32(sharpness / heads.head_dim**0.5)
    queries = gpu.put(q)
    partials = gpu.put(np.full(attention.partial_floats(heads, tokens + 1, splits), np.nan, np.float32))
    out, made = gpu.rows(tokens + 1, columns, "f32 q8 bf16")
    arrived = gpu.put(np.zeros((tokens + 1, heads.heads), np.int32))
    launches = attention.attention_decode(
        Rows(columns, queries.address), heads, batch.places(), out,
        window=window, soft_cap=cap, partials=partials.address, arrived=arrived.address, splits=splits, tensor_cores=tensor_cores,
        count=batch.count.address, max_rows=tokens + 1,
    )  # fmt: skip
    gpu.run(*launches)
    assert not arrived.get().any()
    wanted, bound = batch.expected(q, window, cap, 2.0**-16 if tensor_cores else 2.0**-20)
    found = made["f32"].get()
    assert np.all(np.abs(found[:tokens, :columns] - wanted) <= bound)
    assert np.all(found[tokens] == 777)
    check_forms(found[:tokens], made, tokens)


@pytest.mark.parametrize("window", [0, 70])
def test_decode_of_long_sequences(gpu: Gpu, window: int) -> None:
    """Several products of a warp, with maxima that grow from one to the next, and scores far below them."""
    rng = np.random.default_rng(4)
    batch = Batch(gpu, rng, [(700, 1), (0, 1), (511, 1)], 4, 1, 128, floats=False)
    batch.fill(gpu, rng)
    for tensor_cores in sorted({False, attention.decode_tensor_cores(batch.heads, gpu.arch)}):
        check_decode(gpu, rng, batch, 2, window, 0.0, tensor_cores, sharpness=12.0)


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (50, 0.0), (0, 3.0)])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 9, 3), (128, 4, 1), (256, 4, 1), (80, 2, 2), (16, 8, 1)])
def test_attention_prefill(gpu: Gpu, head_dim: int, heads: int, kv_heads: int, window: int, cap: float) -> None:
    if gpu.arch < 80:
        pytest.skip("this GPU has no bfloat16 tensor cores")
    rng = np.random.default_rng(2)
    batch = Batch(gpu, rng, [(0, 70), (40, 20), (3, 1), (100, 33)], heads, kv_heads, head_dim, floats=False)
    batch.fill(gpu, rng)
    check_prefill(gpu, rng, batch, window, cap)


@pytest.mark.parametrize("window", [0, 1, 33, 100])
def test_prefill_of_long_sequences(gpu: Gpu, window: int) -> None:
    """Tiles of which a warp sees all positions, some, or none; maxima that grow from tile to tile, and scores far below them."""
    if gpu.arch < 80:
        pytest.skip("this GPU has no bfloat16 tensor cores")
    rng = np.random.default_rng(3)
    batch = Batch(gpu, rng, [(300, 45), (0, 130), (64, 1)], 4, 1, 64, floats=False)
    batch.fill(gpu, rng)
    check_prefill(gpu, rng, batch, window, 0.0, sharpness=12.0)
    if not window:
        check_prefill(gpu, rng, batch, window, 40.0, sharpness=12.0)


def check_prefill(gpu: Gpu, rng: np.random.Generator, batch: Batch, window: int, cap: float, sharpness: float = 1.0) -> None:
    heads = batch.heads
    tile = attention.query_tile_tokens(heads)
    items, at = [], 0
    for row, (_, new) in enumerate(batch.lengths):
        items += [(at + first, min(tile, new - first), row) for first in range(0, new, tile)]
        at += new
    batch.items_array = gpu.put(np.array([*items, (2**30, 2**30, 2**30)], np.int32))
    columns = heads.heads * heads.head_dim
    q = rng.standard_normal((batch.tokens, columns)).astype(np.float32) * np.float32(sharpness / heads.head_dim**0.5)
    queries = gpu.put(q)
    out, made = gpu.rows(batch.tokens + 1, columns, "f32 bf16")
    count = gpu.count(len(items))
    gpu.run(
        attention.attention_prefill(
            Rows(columns, queries.address),
            heads,
            batch.places(),
            out,
            window=window,
            soft_cap=cap,
            count=count.address,
            max_items=len(items) + 1,
        )
    )
    wanted, bound = batch.expected(q, window, cap, 2.0**-9)
    found = made["f32"].get()
    assert np.all(np.abs(found[: batch.tokens, :columns] - wanted) <= bound)
    tolerance = 0.02 * max(1.0, sharpness / 2)
    assert np.abs(found[: batch.tokens, :columns] - wanted).max() < tolerance
    halves = (made["bf16"].get().astype(np.uint32) << 16).view(np.float32)
    assert np.allclose(halves[: batch.tokens, :columns], wanted, atol=1.5 * tolerance)
    assert np.all(found[batch.tokens] == 777)
