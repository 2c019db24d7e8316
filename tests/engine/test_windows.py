"""Layers with a window keep their window alone: on the runner that really computes, and in what a pool has room for."""

from __future__ import annotations

import gc
import os
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy_reference as ref
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymistral.engine.kv_cache import BlockPool, PagedCache, chain_key
from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.nn import Array, Batch, Rope, record
from pymistral.nn import functional as F
from pymistral.nn.cache_groups import cache_groups

from .fakes import VOCAB, FakeRunner, Params
from .test_core import check_invariants, drain, greedy_alone, make_core, submit

HIDDEN, CONTEXT = 64, 2048
WINDOWS = (40, 40, None, 100, 40)


@cache
def runner(windows: tuple[int | None, ...] = WINDOWS, cache_tokens: int = 1024) -> CpuRunner:
    """One layer of attention for each window."""
    rng = np.random.default_rng(0)
    embed = ref.matrix(rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32))
    mixes = [ref.matrix(0.3 * rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32)) for _ in windows]
    rope = Rope(10000.0 ** -(np.arange(16) / 16), CONTEXT)

    def model(batch: Batch) -> Array:
        x = F.embedding(batch.tokens, embed)
        for window, mix in zip(windows, mixes, strict=True):
            q = F.linear(x, mix)
            x = x + F.linear(F.attention(q, F.linear(x, mix), F.linear(x, mix), head_dim=32, scale=0.3, rope=rope, window=window), mix)
        return F.linear(x[batch.output_rows], embed)

    return CpuRunner(record(model), max_position_embeddings=CONTEXT, max_num_seqs=4, cache_tokens=cache_tokens, threads=2)


def alone(prompt: Sequence[int], count: int) -> list[int]:
    """Token by token, with a table that keeps all positions of all layers."""
    run, tokens = runner(), list(prompt)
    table = array("i", range(-(-(len(prompt) + count) // 32)))
    logits = run.forward([Segment(tokens, 0, table, 1)])
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits = run.forward([Segment(tokens[-1:], len(tokens) - 1, table, 1, 1)])
    return tokens[len(prompt) :]


def test_layers_are_grouped_by_window() -> None:
    embed = ref.matrix(np.zeros((4, 32), np.float32))

    def of(*windows: int | None) -> Any:
        def model(batch: Batch) -> Array:
            x = F.embedding(batch.tokens, embed)
            for window in windows:
                x = x + F.attention(x, x, x, head_dim=32, scale=1.0, rope=None, window=window)
            return F.linear(x[batch.output_rows], embed)

        return cache_groups(record(model))

    assert of(None, None).windows == (None,)
    assert of(40, 40).windows == (40,)
    gemma = of(*[*[512] * 5, None] * 3)
    assert gemma.windows == (None, *[512] * 5)
    assert len(set(gemma.places)) == 18
    assert {place for _, place in gemma.places} == {0, 1, 2}
    assert [gemma.places[layer][0] for layer in (5, 11, 17)] == [0, 0, 0]
    assert len(of(*[512] * 29, *[None] * 5).windows) == 7
    assert len(of(*[512] * 29, None).windows) <= 10


def test_texts_are_those_of_a_cache_that_keeps_everything() -> None:
    """Company, chunks, the prefix cache, preemption, forks and cancellation included."""
    rng = np.random.default_rng(1)
    run = runner(cache_tokens=288)
    assert run.windows == (None, 40, 40, 40, 100)
    core = make_core(run, max_num_seqs=4)
    shared = [int(token) for token in rng.integers(0, 250, 150)]
    work = [shared[: int(rng.choice([0, 70, 150]))] + rng.integers(0, 250, rng.integers(1, 60)).tolist() for _ in range(12)]
    sent = [submit(core, prompt, Params(max_len=60, n_choices=1 + number % 2)) for number, prompt in enumerate(work)]
    for step in range(10_000):
        if step == 40:
            core.cancel(sent[3][0])
        if not core.busy:
            break
        core.step()
        check_invariants(core)
    assert core.pool.num_free == core.pool.num_blocks
    stats = core.snapshot()
    assert stats.preemptions > 0
    assert stats.cached_prompt_tokens > 0
    for number, (prompt, (_, collector)) in enumerate(zip(work, sent, strict=True)):
        expected = alone(prompt, 60)
        for tokens in collector.tokens.values():
            assert tokens == (expected[: len(tokens)] if number == 3 else expected)


def test_logits_slide_too() -> None:
    core = make_core(runner(cache_tokens=1024))
    assert core.max_length == 2048  # twice what a cache without windows would hold
    tokens = np.random.default_rng(2).integers(0, 250, 2048).tolist()
    table, whole = array("i", range(64)), runner(cache_tokens=4096)
    rows = [whole.forward([Segment(tokens[at : at + 64], at, table, 64)]).copy() for at in range(0, 2048, 64)]
    assert core.logits(tokens).tobytes() == np.concatenate(rows).tobytes()
    assert core.pool.num_free == core.pool.num_blocks


def test_tables_for_other_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="2 block tables for 5 groups"):
        runner().forward([Segment([1], 0, [0], 1, further_tables=[[1]])])
    with pytest.raises(ValueError, match="does not exist"):
        runner().forward([Segment([1], 0, [0], 1, further_tables=[[1], [2], [3], [10**6]])])


def test_a_long_run_leaves_nothing_behind() -> None:
    """Blocks, objects, memory: after as many tokens again there is no more of them."""
    core, rng = make_core(runner(cache_tokens=288), max_num_seqs=4), np.random.default_rng(3)

    def serve(requests: int) -> None:
        for number in range(requests):
            prompt = rng.integers(0, 250, rng.integers(1, 120)).tolist()
            job, _ = submit(core, prompt, Params(max_len=50, temperature=0.8, n_choices=1 + number % 2))
            for _ in range(25):
                core.step()
            if number % 5 == 0:
                core.cancel(job)
        drain(core)

    def used() -> tuple[int, int]:
        gc.collect()
        return len(gc.get_objects()), int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    serve(60)
    objects, resident = used()
    serve(60)
    assert core.snapshot().completion_tokens > 6000
    assert used()[0] - objects < 500
    assert used()[1] - resident < 4 << 20


def test_a_long_text_holds_its_windows_alone() -> None:
    fake = FakeRunner(num_blocks=60, block_size=4, max_batch_tokens=8, max_sequence_length=1000, windows=(None, 10, 10, 10))
    core = make_core(fake)
    assert core.max_length == 4 * (60 - 3 * (3 + 2 + 1))
    job, _ = submit(core, [65] * 100, Params(max_len=60))
    most = 0
    while core.busy:
        core.step()
        check_invariants(core)
        if job.sequences:
            most = max(most, len(job.sequences[0].blocks.held()))
    assert most <= 40 + 3 * 6


def test_a_shared_prefix_counts_as_far_as_its_windows_are_known() -> None:
    fake = FakeRunner(num_blocks=200, block_size=4, max_batch_tokens=8, max_sequence_length=200, windows=(None, 10))
    core = make_core(fake)
    submit(core, list(range(100, 180)), Params(max_len=4))
    drain(core)
    for length, cached in ((80, 76), (42, 40)):  # the end, and a place that the window has left behind
        _, collector = submit(core, [*range(100, 100 + length), 65], Params(max_len=4))
        drain(core)
        assert collector.end.usage.cached_prompt_tokens in (cached, cached + 4)
        assert collector.tokens[0] == greedy_alone([*range(100, 100 + length), 65], 4, 200, 0.0)[0]
    # Once the window's blocks there are gone, the prefix is computed again, as far as it must be.
    keys = core.pool.by_key
    for key in [key for key in keys if key[0] == 1][2:]:  # type: ignore[index]
        block = keys[key]
        core.pool._forget(block)
        del core.pool.idle[block]
        core.pool.blank.append(block)
    _, collector = submit(core, [*range(100, 180), 65], Params(max_len=4))
    drain(core)
    assert collector.end.usage.cached_prompt_tokens == 8
    assert collector.tokens[0] == greedy_alone([*range(100, 180), 65], 4, 200, 0.0)[0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sets(st.integers(0, 11)), min_size=3, max_size=3), st.integers(0, 12), st.integers(1, 4))
def test_the_longest_prefix_is_found(known: list[set[int]], length: int, block_size: int) -> None:
    """Against trying all lengths."""
    windows = (None, 3, 9)
    cache = PagedCache(BlockPool(36), block_size, windows, 8)
    keys: list[bytes] = []
    for number in range(length):
        keys.append(chain_key(keys[-1] if keys else b"", [number]))
    for group, blocks in enumerate(known):
        for block in blocks & set(range(length)):
            cache.pool.register(cache.pool.allocate(), (group, keys[block]))

    def usable(count: int) -> bool:
        needed = [0 if window is None else max(0, count * block_size - window + 1) // block_size for window in windows]
        return all(set(range(first, count)) <= blocks for first, blocks in zip(needed, known, strict=True))

    found = cache.find(keys)
    assert len(found) == max(count for count in range(length + 1) if usable(count))
    places = [(group, at) for at in range(len(found)) for group in range(3) if at >= found.firsts[group]]
    assert found.held() == [cache.pool.by_key[group, keys[at]] for group, at in places]
