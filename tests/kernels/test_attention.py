"""Attention with its rotations, head norms and paged cache, against float64.

Keys and values are as exact as the cache's type. Where the CPU multiplies bfloat16, and the cache is of it, queries and probabilities are
rounded as well. `numpy_reference.attention` says how far that may move a result.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import numpy_reference as ref
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pymistral.kernels.cpu.geometry import cache_layout, usual_cache_type

from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.nn import Rope
from pymistral.nn import functional as F
from pymistral.nn.eager import evaluate
from pymistral.nn.graph import Array, Batch, record

# group x head_dim: every way that rows and vectors fill the registers
SHAPES = [(1, 16), (3, 64), (4, 32), (8, 48), (4, 256), (1, 128), (12, 64), (13, 64), (16, 64)]

# Cache type -> relative errors beside those of `numpy_reference.cached`. In float32: the sums of up to 256 products and 1500 positions.
# In the others, what is next to the middle of two steps may become either of them after a rotation in float32; and where the CPU
# multiplies bfloat16, queries and probabilities become that.
# In int16 a step of queries, or of probabilities, is what 64 of them, or 256, together are over 65,000: half of that for each of them is
# the floor.
FLOOR = {"int16": 2.0**-9}
U = {"f32": 2.0**-17, "f16": 2.0**-9, "bf16": 2.0**-9, "bf16 pairs": 2.0**-9, "int16": 2.0**-12, "f8e4m3": 2.0**-9, "int8": 2.0**-9}
# of the type that models have on this CPU
USUAL = {"int16": {"u": U["int16"], "floor": FLOOR["int16"], "rms": 1e-3}}.get(
    usual_cache_type(), {"u": U["bf16"], "floor": 0.0, "rms": 0.01}
)
# every type with one shape, and every way to fill the registers with two
CASES = [(3, 64, None, cache_type) for cache_type in U] + [
    (*shape, cache_type) for shape in ((8, 48, 100), (1, 16, 200), (4, 256, 40)) for cache_type in ("bf16", "int16", "int8")
]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """All at once, so that they are compiled side by side."""

    def everything(*x: Array) -> Array:
        total = None
        for q, k, (_, head_dim) in zip(x[::2], x[1::2], SHAPES, strict=True):
            out = F.attention(q, k, k, head_dim=head_dim, scale=1.0, rope=None)
            total = F.linear(out, ref.matrix(np.zeros((16, q.columns), np.float32)))
        assert total is not None
        return total

    arrays = [np.zeros((1, columns), np.float32) for group, head_dim in SHAPES for columns in (group * head_dim, head_dim)]
    evaluate(everything, *arrays)


def heads(x: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    return x.reshape(len(x), -1, head_dim)


def random_qkv(rng: np.random.Generator, tokens: int, kv_heads: int, group: int, head_dim: int) -> list[NDArray[np.float32]]:
    return [rng.standard_normal((tokens, n * head_dim)).astype(np.float32) for n in (kv_heads * group, kv_heads, kv_heads)]


def check(found: NDArray[np.float32], wanted: ref.Floats, bound: ref.Floats) -> None:
    """Each value within the worst case of 16 bits; all together much closer, as errors of random sign are."""
    error = np.abs(found.reshape(wanted.shape) - wanted)
    assert np.all(error <= bound)
    assert np.sqrt((error**2).mean()) <= USUAL["rms"] * np.sqrt((wanted**2).mean()) + 1e-6


@pytest.mark.parametrize(("group", "head_dim"), SHAPES)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.sampled_from([1, 2, 15, 33, 70, 256, 300]),
    kv_heads=st.integers(1, 2),
    window=st.sampled_from([None, 1, 7, 64, 300]),
    soft_cap=st.sampled_from([None, 2.0, 50.0]),
)
def test_one_sequence(group: int, head_dim: int, seed: int, tokens: int, kv_heads: int, window: int | None, soft_cap: float | None) -> None:
    q, k, v = random_qkv(np.random.default_rng(seed), tokens, kv_heads, group, head_dim)
    scale = head_dim**-0.5
    found = F.attention(q, k, v, head_dim=head_dim, scale=scale, rope=None, window=window, soft_cap=soft_cap)
    inputs = (heads(x, head_dim).astype(np.float64) for x in (q, k, v))
    check(
        found, *ref.attention(*inputs, np.arange(tokens), scale=scale, window=window, soft_cap=soft_cap, u=USUAL["u"], floor=USUAL["floor"])
    )


@pytest.mark.parametrize("which", ["query", "key"])
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_is_no_number_is_no_number_afterwards(tokens: int, head_dim: int, which: str) -> None:
    """Or a model whose weights are broken would say something."""
    if which == "key" and cache_layout(usual_cache_type()) != "bf16 pairs":
        pytest.skip("keys of other caches are bounded, as values are")
    q, k, v = random_qkv(np.random.default_rng(0), tokens, 1, 3, head_dim)
    (q if which == "query" else k)[-1, 5] = np.nan
    found = F.attention(q, k, v, head_dim=head_dim, scale=0.1, rope=None)
    assert np.isnan(found[-1, :head_dim]).any()
    assert np.isfinite(found[:-1]).all()


@pytest.mark.parametrize("pairs", [32, 24, 20, 8, 1])
def test_rotations(pairs: int) -> None:
    """Whole, partial, and in numbers that fill no vector."""
    rng = np.random.default_rng(1)
    q, k, v = random_qkv(rng, 40, 2, 3, 64)
    inverse = 10000.0 ** -(np.arange(pairs) / pairs)
    found = F.attention(q, k, v, head_dim=64, scale=0.125, rope=Rope(inverse, 64, 1.2))
    positions = np.arange(40)
    turned = [ref.rotated(heads(x, 64), positions, inverse, 1.2) for x in (q, k)]
    check(found, *ref.attention(*turned, heads(v, 64).astype(np.float64), positions, scale=0.125, u=USUAL["u"], floor=USUAL["floor"]))


@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_head_norms(which: str) -> None:
    rng = np.random.default_rng(2)
    q, k, v = random_qkv(rng, 20, 2, 4, 32)
    q *= 30
    q_weight, k_weight = rng.uniform(0.5, 1.5, (2, 32)).astype(np.float32)
    norms: dict[str, Any] = {}
    normed_q, normed_k = heads(q, 32).astype(np.float64), heads(k, 32).astype(np.float64)
    if which != "k":
        norms["q_norm"] = F.HeadNorm(ref.vector(q_weight), 1e-6, 1.0)
        normed_q = ref.rms_norm(normed_q, q_weight.astype(np.float64) + 1, 1e-6)
    if which != "q":
        norms["k_norm"] = F.HeadNorm(ref.vector(k_weight), 1e-6)
        normed_k = ref.rms_norm(normed_k, k_weight.astype(np.float64), 1e-6)
    inverse = 10000.0 ** -(np.arange(16) / 16)
    found = F.attention(q, k, v, head_dim=32, scale=0.1, rope=Rope(inverse, 64), **norms)
    positions = np.arange(20)
    turned = [ref.rotated(x, positions, inverse) for x in (normed_q, normed_k)]
    check(found, *ref.attention(*turned, heads(v, 32).astype(np.float64), positions, scale=0.1, u=USUAL["u"], floor=USUAL["floor"]))


class Echo:
    """A model whose logits are its attention: one row of q, k and v for each of 50 token ids."""

    def __init__(self, kv_heads: int, group: int, head_dim: int, window: int | None, rng: np.random.Generator, cache_type: str) -> None:
        self.values = random_qkv(rng, 50, kv_heads, group, head_dim)
        self.tables = [ref.matrix(values) for values in self.values]
        self.inverse = 10000.0 ** -(np.arange(head_dim // 2) / (head_dim // 2))
        self.rope = Rope(self.inverse, 2048)
        self.head_dim, self.window, self.scale = head_dim, window, head_dim**-0.5
        self.out = ref.identity(self.values[0].shape[1], "F16")
        self.cache_type = cache_type
        self.u = U[cache_type]

    def __call__(self, batch: Batch) -> Array:
        q, k, v = (F.embedding(batch.tokens, table) for table in self.tables)
        x = F.attention(q, k, v, head_dim=self.head_dim, scale=self.scale, rope=self.rope, window=self.window)
        return F.linear(x[batch.output_rows], self.out)

    def expected(self, tokens: NDArray[np.int64]) -> tuple[ref.Floats, ref.Floats]:
        q, k, v = (heads(values[tokens], self.head_dim).astype(np.float64) for values in self.values)
        positions = np.arange(len(tokens))
        q, k = (ref.rotated(x, positions, self.inverse) for x in (q, k))
        k, v = (ref.cached(x, self.cache_type) for x in (k, v))
        return ref.attention(q, k, v, positions, scale=self.scale, window=self.window, u=self.u, floor=FLOOR.get(self.cache_type, 0.0))


def runner(model: Echo, **options: Any) -> CpuRunner:
    settings = {"cache_tokens": 4096, "cache_type": model.cache_type, "threads": 2, **options}
    return CpuRunner(record(model), max_position_embeddings=1500, max_num_seqs=12, **settings)


@pytest.mark.parametrize(("group", "head_dim", "window", "cache_type"), CASES)
def test_sequences_side_by_side(group: int, head_dim: int, window: int | None, cache_type: str) -> None:
    """Prompts in chunks beside decoding, blocks in any order, contexts over several chunks: a token depends on its own sequence."""
    rng = np.random.default_rng(3)
    model = Echo(2, group, head_dim, window, rng, cache_type)
    run = runner(model)
    lengths = [700, 1, 300, 33, 260]
    sequences = [rng.integers(0, 50, length) for length in lengths]
    free = list(rng.permutation(run.num_blocks))
    tables = [[int(free.pop()) for _ in range(-(-length // run.block_size))] for length in lengths]
    wanted = [model.expected(tokens) for tokens in sequences]
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        segments, rows = [], []
        room = 200
        for s in rng.permutation(len(lengths)):
            left = lengths[s] - done[s]
            if left == 0 or room == 0:
                continue
            count = int(min(left, room, rng.choice([1, 1, 5, 64, 150])))
            outputs = min(count, int(rng.integers(0, 13)))
            segments.append(Segment([int(t) for t in sequences[s][done[s] : done[s] + count]], done[s], tables[s], outputs))
            done[s] += count
            room -= count
            rows += [(s, position) for position in range(done[s] - outputs, done[s])]
        logits = run.forward(segments)
        assert len(logits) == len(rows)
        for row, (s, position) in zip(logits, rows, strict=True):
            values, bound = wanted[s]
            assert np.all(np.abs(row.reshape(values[position].shape) - values[position]) <= bound[position]), (s, position)


@pytest.mark.parametrize(("group", "head_dim", "window", "cache_type"), CASES)
def test_bits_do_not_depend_on_the_batch(group: int, head_dim: int, window: int | None, cache_type: str) -> None:
    """One token at a time, in chunks of any size, alone or beside many others, on one thread or three: the same bits."""
    rng = np.random.default_rng(4)
    length = 560
    model = Echo(2, group, head_dim, window, rng, cache_type)
    tokens = [int(t) for t in rng.integers(0, 50, length)]

    def run(cuts: list[int], others: int, **options: Any) -> NDArray[np.float32]:
        run = runner(model, **options)
        size = run.block_size
        blocks = -(-length // size)
        table = [int(b) for b in rng.permutation(run.num_blocks)[: blocks + others]]
        rows = np.zeros((length, run.vocab_size), np.float32)
        for start, end in zip([0, *cuts], [*cuts, length], strict=True):
            outputs = min(end - start, 50)
            segments = [Segment(tokens[start:end], start, table[:blocks], outputs)]
            segments += [Segment([int(rng.integers(50))], 0, [table[blocks + other]], 0) for other in range(others)]
            rng.shuffle(segments)  # type: ignore[arg-type]
            rows[end - outputs : end] = run.forward(segments)
        return rows[-20:]

    last = list(range(length - 20, length))
    one_by_one = run([256, 500, *last], others=0)
    assert one_by_one.tobytes() == run([500], others=0, threads=1).tobytes()
    assert one_by_one.tobytes() == run([256, 512, *last], others=10).tobytes()
    assert one_by_one.tobytes() == run([3, 300, *accumulate([541, 2, 7])], others=3, threads=3, block_size=64).tobytes()
    assert one_by_one.tobytes() == run([3, 300, *last], others=1, block_size=96).tobytes()
    assert one_by_one.tobytes() == run([300, *accumulate([541, 3, 8])], others=0).tobytes()  # few tokens, each over all threads


@pytest.mark.parametrize(("group", "head_dim"), [(3, 64), (4, 256)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_integers(group: int, head_dim: int, sign: int) -> None:
    """All products of a score, and of an output, at their largest, and of one sign: a sum that left 32 bits would have the other one."""
    model = Echo(1, group, head_dim, None, np.random.default_rng(6), "int16")
    model.inverse = np.zeros(head_dim // 2)  # nothing is rotated
    model.rope = Rope(model.inverse, 2048)
    model.values = [np.full_like(x, size) for x, size in zip(model.values, (1.0, sign, sign * 7.0), strict=True)]
    model.tables = [ref.matrix(values) for values in model.values]
    run = runner(model)
    for cuts in ([300], [299, 1]):
        start = 0
        for count in cuts:
            row = run.forward([Segment([1] * count, start, list(range(10)), 1)])[0]
            start += count
        assert np.allclose(row, sign * 7.0, rtol=1e-3)


def test_the_longest_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding at the last position that the model was made for."""
    rng = np.random.default_rng(5)
    model = Echo(1, 3, 64, None, rng, "bf16")
    run = runner(model)
    tokens = rng.integers(0, 50, run.max_sequence_length)
    table = list(range(-(-len(tokens) // run.block_size)))
    for start in range(0, len(tokens) - 1, 500):
        end = min(start + 500, len(tokens) - 1)
        run.forward([Segment([int(t) for t in tokens[start:end]], start, table, 0)])
    row = run.forward([Segment([int(tokens[-1])], len(tokens) - 1, table, 1)])[0]
    values, bound = model.expected(tokens)
    assert np.all(np.abs(row.reshape(values[-1].shape) - values[-1]) <= bound[-1])
