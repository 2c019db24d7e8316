"""The runner's checks: kernels trust what it writes, so it believes nothing."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

import numpy as np
import numpy_reference as ref
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pymistral.kernels.cpu.geometry import usual_cache_type
from pymistral.kernels.cpu.isa import current_isa

from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.errors import ModelLoadError
from pymistral.nn import Array, Batch, Rope, record
from pymistral.nn import functional as F

VOCABULARY, HIDDEN = 40, 64
CONTEXT = 300
CACHE_TYPES = ("f32", "f16", "bf16", "int16", "f8e4m3", "int8")


def runner(table: NDArray[np.float32] | None = None, **options: Any) -> CpuRunner:
    """One layer of attention over embeddings, which are given as they are or random."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32) if table is None else table
    embed, back = ref.matrix(table), ref.identity(HIDDEN, "F16")
    head = ref.matrix(rng.standard_normal((VOCABULARY + 7, HIDDEN)).astype(np.float32))
    rope = Rope(10000.0 ** -(np.arange(16) / 16), CONTEXT)

    def model(batch: Batch) -> Array:
        x = F.embedding(batch.tokens, embed)
        x = x + F.linear(F.attention(x, F.linear(x, back), F.linear(x, back), head_dim=32, scale=0.2, rope=rope), back)
        return F.linear(x[batch.output_rows], head)

    settings = {"max_position_embeddings": CONTEXT, "max_num_seqs": 4, "cache_tokens": 1024, "threads": 2, **options}
    return CpuRunner(record(model), **settings)


@pytest.fixture(scope="module")
def run() -> CpuRunner:
    return runner()


def test_sizes(run: CpuRunner) -> None:
    assert (run.vocab_size, run.max_num_seqs, run.num_blocks, run.block_size) == (VOCABULARY + 7, 4, 32, 32)
    assert run.max_sequence_length == CONTEXT
    assert run.forward([]).shape == (0, VOCABULARY + 7)
    assert run.forward([Segment([1, 2], 0, [0], 0)]).shape == (0, VOCABULARY + 7)
    assert runner(cache_tokens=100).max_sequence_length == 128


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment([], 0, [0], 0), "does not fit"),
        (Segment([1], -1, [0], 1), "does not fit"),
        (Segment([1], CONTEXT, list(range(10)), 1), "does not fit"),
        (Segment([1] * 400, 0, list(range(20)), 1), "does not fit"),
        (Segment([1] * 600, 0, list(range(20)), 1), "holds 512 tokens"),
        (Segment([1], 0, [0], 2), "does not fit"),
        (Segment([1], 0, [0], -1), "does not fit"),
        (Segment([1] * 100, 0, [0, 1, 2, 3], 100), "64 rows of logits"),
        (Segment([1], 0, [], 1), "does not cover 1 positions"),
        (Segment([1], 32, [0], 1), "does not cover 33 positions"),
        (Segment([1], 0, [32], 1), "does not exist"),
        (Segment([1], 0, [-1], 1), "does not exist"),
        (Segment([1], 64, [99, 1, 2], 1), "does not exist"),
        (Segment([1, 2], 64, [1, -7, 2], 1), "does not exist"),
        (Segment([VOCABULARY], 0, [0], 1), "does not exist"),  # although there are logits for it
        (Segment([-1], 0, [0], 1), "does not exist"),
        (Segment([1, VOCABULARY], 0, [0], 1), "does not exist"),
        (Segment([1, -2], 0, [0], 1), "does not exist"),
    ],
)
def test_segments_that_cannot_be(segment: Segment, message: str, run: CpuRunner) -> None:
    good = Segment([3, 4], 0, [5], 2)
    before = run.forward([good]).copy()
    with pytest.raises(ValueError, match=message):
        run.forward([segment])
    with pytest.raises(ValueError, match=message):
        run.forward([good, segment])
    assert run.forward([good]).tobytes() == before.tobytes()


@pytest.mark.parametrize("block", [-1, 10**6])
def test_a_block_that_is_refused_is_not_kept(block: int, run: CpuRunner) -> None:
    """Attention looks at 64 positions at once, and so at an entry behind those of a shorter table."""
    with pytest.raises(ValueError, match="a block does not exist"):
        run.forward([Segment([1], 40, [0, block], 1)])
    tables = run.program.state.block_tables
    assert 0 <= tables.min() <= tables.max() < run.num_blocks


def test_outputs_of_long_segments_are_those_of_short_ones(run: CpuRunner) -> None:
    """Attention is dealt out in tiles, and in the last layer none of them is computed but for outputs."""
    ids = np.random.default_rng(1).integers(0, VOCABULARY, 200).tolist()
    table = list(range(10, 17))
    alone = np.concatenate([run.forward([Segment([token], at, table, 1)]).copy() for at, token in enumerate(ids)])
    for outputs in (0, 1, 2, 17, 64):
        without = Segment(ids[:150], 0, list(range(5)), 0), Segment(ids[:130], 0, list(range(20, 25)), 0)
        segments = [without[0], Segment(ids, 0, table, outputs), without[1]]
        found = run.forward(segments)
        assert found[:outputs].tobytes() == alone[200 - outputs :].tobytes()
    prompt, token = run.forward([Segment(ids[:99], 0, list(range(4)), 1), Segment([ids[0]], 0, [30], 1)])
    assert (prompt.tobytes(), token.tobytes()) == (alone[98].tobytes(), alone[0].tobytes())


@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.integers(1, 12))
def test_tokens_that_follow_those_of_the_step_before(data: st.DataObject, count: int) -> None:
    """Little is written for them, and nothing read again of tables that are the same objects: as if all were new in each step."""
    run, fresh = (runner(max_num_seqs=12, cache_tokens=12 * 400) for _ in range(2))
    starts = data.draw(st.lists(st.integers(0, 70) | st.integers(230, 256), min_size=count, max_size=count))
    free = iter(np.random.default_rng(count).permutation(run.num_blocks).tolist())
    tables = [array("i", [next(free) for _ in range(start // 32 + 1)]) for start in starts]
    for start, table in zip(starts, tables, strict=True):
        for one in (run, fresh):
            one.forward([Segment(list(range(start % VOCABULARY)) + [3] * (start - start % VOCABULARY), 0, table, 0)] if start else [])
    for _ in range(data.draw(st.integers(2, 40))):
        change = data.draw(st.sampled_from(["none"] * 6 + ["refused", "two tokens", "one less", "again", "moved"]))
        segments = []
        for row, table in enumerate(tables[: max(1, count - (change == "one less"))]):
            length = 2 if change == "two tokens" and row == 0 else 1
            if change == "again" and row == 0 and starts[row]:
                starts[row] -= 1
            while len(table) * 32 < starts[row] + length:
                table.append(next(free))
            if change == "moved" and row == 0:  # to other blocks, where nothing was written: the same numbers for both
                table = tables[row] = array("i", [next(free, block) for block in table])
            segments.append(Segment([(row + starts[row] + i) % VOCABULARY for i in range(length)], starts[row], table, length, length))
            starts[row] += length
        if change == "refused":
            bad = [*segments[:-1], Segment([VOCABULARY], segments[-1].start, segments[-1].block_table, 1, 1)]
            with pytest.raises(ValueError, match="does not exist"):
                run.forward(bad)
        anew = [Segment(s.tokens, s.start, list(s.block_table), s.outputs, s.generated) for s in segments]
        assert run.forward(segments).tobytes() == fresh.forward(anew).tobytes()
        for name in ("tokens", "positions", "cache_slots", "items", "counts", "output_rows"):
            found, wanted = (getattr(one.program.state, name)[..., : 12 if name != "items" else None] for one in (run, fresh))
            assert np.array_equal(found, wanted), name


def test_what_follows_a_step_that_was_refused(run: CpuRunner) -> None:
    """It is written anew."""
    table = array("i", [4])
    for start in (30, 31):
        run.forward([Segment([1], start, table, 1, 1)])
    with pytest.raises(ValueError, match="does not cover 33 positions"):
        run.forward([Segment([1], 32, table, 1, 1)])
    table.append(9)
    run.forward([Segment([1], 33, table, 1, 1)])
    assert run.program.state.cache_slots[0, 0] == 9 * run.program.state.parts_of_block * 32 + 1


def test_a_step_in_parts(run: CpuRunner) -> None:
    """Gives what it gives at once, however much time there is for each, and can be given up on the way."""
    tokens, table, other = [7 * i % VOCABULARY for i in range(40)], [4, 9], [2, 3]
    whole = run.forward([Segment(tokens, 0, table, 2)]).tobytes()
    for seconds, most in ((0.0, 24), (1e-4, 24), (60.0, 1), (float("inf"), 1)):
        run.begin([Segment(tokens, 0, other, 2)])
        assert run.proceed(0.0) is None  # to be begun anew
        run.begin([Segment(tokens, 0, other, 2)])
        parts = 1
        while (found := run.proceed(seconds)) is None:
            parts += 1
        assert found.tobytes() == whole
        assert parts <= most
        assert seconds or parts > 4
    assert run.forward([Segment(tokens, 0, table, 2)]).tobytes() == whole
    with pytest.raises(ValueError, match="does not exist"):
        run.begin([Segment([VOCABULARY], 0, table, 0)])


def test_too_many_sequences(run: CpuRunner) -> None:
    with pytest.raises(ValueError, match="of 4 sequences at most"):
        run.forward([Segment([1], 0, [block], 1) for block in range(5)])


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    with pytest.raises(ModelLoadError, match="KV cache of"):
        runner(cache_tokens=None)


def decoded(cache: NDArray[np.uint8], cache_type: str, keys: bool) -> NDArray[np.float64]:
    """The first block of the first head, as `rope.rope_and_cache` states it: ``[32 positions][32 dimensions]``."""
    items_of = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "int16": np.int16, "f8e4m3": np.uint8, "int8": np.int8}
    item = items_of[cache_type]
    block = cache[0, 0]
    items = block[: 32 * 32 * np.dtype(item).itemsize].view(item)
    if cache_type == "int16":  # pairs of dimensions of 16 keys, of positions of 16 dimensions of values
        items = items.reshape(2, 16, 16, 2).transpose((0, 2, 1, 3) if keys else (1, 3, 0, 2)).reshape(32, 32)
    else:
        items = items.reshape(2, 32, 16).transpose(0, 2, 1).reshape(32, 32) if keys else items.reshape(32, 32)
    if cache_type == "bf16":
        return (items.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if cache_type == "f8e4m3":
        exponents, mantissas = items >> 3 & 15, items & 7
        sizes = np.where(exponents > 0, (8.0 + mantissas) * 2.0 ** (exponents.astype(int) - 10), mantissas * 2.0**-9)
        items = np.where(items > 127, -sizes, sizes)
    if cache_type not in ("int16", "f8e4m3", "int8"):
        return items.astype(np.float64)
    scales = (block[np.dtype(item).itemsize * 32 * 32 :].view(np.uint16).astype(np.uint32) << 16).view(np.float32)  # one for each position
    return items.astype(np.float64) * scales[:, None]


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), power=st.sampled_from([-45, -30, -6, 0, 4]), spread=st.integers(0, 8))
def test_what_the_cache_holds(cache_type: str, seed: int, power: int, spread: int) -> None:
    """Each key and value is the nearest one of its type, relative to its own row where the type has scales; also among very small ones."""
    rng = np.random.default_rng(seed)
    table = (rng.standard_normal((VOCABULARY, 32)) * 10.0 ** (power + rng.uniform(-spread, spread, (VOCABULARY, 32)))).astype(np.float32)
    table[3] = 0
    embed, back = ref.matrix(table), ref.identity(32, "F16")
    attend = lambda x: F.attention(x, x, x, head_dim=32, scale=1.0, rope=None)  # noqa: E731
    run = CpuRunner(
        record(lambda batch: F.linear(attend(F.embedding(batch.tokens, embed))[batch.output_rows], back)),
        max_position_embeddings=32,
        max_num_seqs=1,
        cache_tokens=32,
        cache_type=cache_type,
        threads=1,
    )
    run.forward([Segment(list(range(32)), 0, [0], 1)])
    keys, values = run.program.state.caches[0]
    if current_isa().has_bf16 and cache_type == "bf16":
        pytest.skip("this CPU keeps pairs")
    wanted = ref.cached(table[:32], cache_type)
    assert np.array_equal(decoded(keys, cache_type, True), wanted)
    assert np.array_equal(decoded(values, cache_type, False), wanted)


def test_many_streams_have_the_cache_fetched_ahead() -> None:
    """By the product between two layers of attention, which computes the same for it: the blocks that the second one reads."""
    rng = np.random.default_rng(4)
    embed, back = ref.matrix(rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)), ref.identity(HIDDEN, "F16")
    gate, up, down = (ref.random_tensor("Q4_1", HIDDEN, HIDDEN, rng)[0] for _ in range(3))

    def attend(x: Array, window: int | None) -> Array:
        return x + F.attention(x, F.linear(x, back), F.linear(x, back), head_dim=32, scale=0.2, rope=None, window=window)

    def model(batch: Batch) -> Array:
        x = attend(F.embedding(batch.tokens, embed), None)
        x = attend(x + F.linear(F.gated_linear(x, gate, up, "silu"), down), 40)
        return F.linear(x[batch.output_rows], embed)

    run = CpuRunner(record(model), max_position_embeddings=CONTEXT, max_num_seqs=16, cache_tokens=16 * CONTEXT, threads=2)
    assert set(run.windows) == {None, 40}
    starts = [20 + 19 * i for i in range(12)]
    streams = []
    for i, start in enumerate(starts):
        tables = [list(range(block, block + 10)) for block in (20 * i, 20 * i + 10)]
        run.forward([Segment([(7 * i + p) % VOCABULARY for p in range(start)], 0, tables[0], 0, further_tables=tables[1:])])
        streams.append(Segment([i], start, tables[0], 1, 1, tables[1:]))
    alone = [run.forward([stream]).copy() for stream in streams]
    read_blocks, parts = run.program.state.read_blocks[0], run.program.state.parts_of_block
    assert not read_blocks[:, 0].any()
    assert run.forward(streams).tobytes() == np.concatenate(alone).tobytes()
    for group, window in enumerate(run.windows):
        count, *blocks = read_blocks[group].tolist()
        oldest = [max(0, start - 39) if window else 0 for start in starts]
        assert blocks[:count] == [
            parts * (20 * i + 10 * group + block) for i, start in enumerate(starts) for block in range(oldest[i] // 32, start // 32 + 1)
        ]


@pytest.mark.parametrize("heads", [(32, 32), (32, 16)])
def test_layers_of_one_shape_share_blocks(heads: tuple[int, int]) -> None:
    """A block holds both layers if these are alike; a text is the same at once and by the token, wherever it lies."""
    rng = np.random.default_rng(2)
    embed, back = ref.matrix(rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)), ref.identity(HIDDEN, "F16")

    def model(batch: Batch) -> Array:
        x = F.embedding(batch.tokens, embed)
        for head_dim in heads:
            x = x + F.attention(F.linear(x, back), F.linear(x, back), F.linear(x, back), head_dim=head_dim, scale=0.2, rope=None)
        return F.linear(x[batch.output_rows], embed)

    run = CpuRunner(record(model), max_position_embeddings=CONTEXT, max_num_seqs=4, cache_tokens=1024, threads=2)
    assert run.program.state.parts_of_block == (4 if heads[0] == heads[1] else 1)
    tokens = [7 * i % VOCABULARY for i in range(40)]
    whole = run.forward([Segment(tokens, 0, [5, 2], 40)]).copy()
    run.forward([Segment(tokens[:20], 0, [1, 9], 0), Segment(tokens[::-1], 0, [31, 30], 0)])
    found = [run.forward([Segment([tokens[i]], i, [1, 9], 1)]).copy() for i in range(20, 40)]
    assert np.concatenate(found).tobytes() == whole[20:].tobytes()


def test_bytes_of_a_token() -> None:
    """Two heads of 32 dimensions, keys and values; int16 and those of 8 bits have a scale of 16 bits. The cache takes that and no more."""
    sizes = {"f32": 512, "f16": 256, "bf16": 256, "int16": 264, "int8": 136, "f8e4m3": 136}
    for cache_type, wanted in {**sizes, "auto": sizes[usual_cache_type()]}.items():
        run = runner(cache_type=cache_type)
        assert sum(array.nbytes for array in run.program.state.caches[0]) == wanted * run.num_blocks * run.block_size


@pytest.mark.parametrize("block_size", [16, 48, -32])
def test_block_sizes_that_cannot_be(block_size: int) -> None:
    with pytest.raises(ValueError, match=r"block_size|limits"):
        runner(block_size=block_size)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_is_not_finite_stays_in_its_sequence(poison: float, cache_type: str) -> None:
    """Beside it in a step, and in the blocks that it leaves behind."""
    table = np.random.default_rng(1).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    table[7] = poison
    run = runner(table, cache_type=cache_type)
    tokens = [1, 2, 3, 4, 5]
    clean = run.forward([Segment(tokens, 0, [3], 5)]).copy()
    bad = run.forward([Segment([7] * 90, 0, [0, 1, 2], 1)])
    assert not np.isfinite(bad).all()
    for cuts in ([0, 5], [0, 1, 2, 3, 4, 5], [0, 3, 5]):
        for start, end in itertools.pairwise(cuts):
            found = run.forward([Segment([7] * 20, 0, [9], 1), Segment(tokens[start:end], start, [1], end - start)])
            assert found[1:].tobytes() == clean[start:end].tobytes()
        run.forward([Segment([7] * 32, 0, [1], 1)])
