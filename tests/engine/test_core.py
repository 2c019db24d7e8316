"""The engine without threads: answers do not depend on company, chunks, caches or preemptions, and no block is ever misused."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymistral.engine import Delta, EngineRequest, RequestFailed, RequestFinished
from pymistral.engine.constraint import bitmask
from pymistral.engine.core import EngineCore
from pymistral.engine.sequence import Job
from pymistral.errors import InferenceError, RequestValidationError

from .fakes import EOS, STOP_TOKEN, VOCAB, ByteStream, ByteTokenizer, Collector, Dry, FakeRunner, Params, logits_of
from .test_kv_cache import check_pool


def make_core(runner: FakeRunner, **options: Any) -> EngineCore:
    return EngineCore(runner, ByteTokenizer(), **{"eos_token_ids": [EOS], "max_num_seqs": 8, **options})


def submit(core: EngineCore, prompt: Sequence[int], params: Params | None = None, **options: Any) -> tuple[Job, Collector]:
    collector = Collector()
    job = core.prepare(EngineRequest(list(prompt), params or Params(max_len=8), **options), collector)
    core.add(job)
    return job, collector


def drain(core: EngineCore, limit: int = 10_000) -> None:
    for _ in range(limit):
        if not core.busy:
            break
        core.step()
        check_invariants(core)
    assert not core.busy
    assert core.pool.num_free == core.pool.num_blocks


def check_invariants(core: EngineCore) -> None:
    scheduler, size = core.scheduler, core.runner.block_size
    check_pool(core.pool, [sequence.blocks.held() for sequence in scheduler.running])
    for sequence in scheduler.running:
        assert not sequence.finished
        assert not sequence.job.done
        assert sequence.computed < len(sequence.tokens)
        assert sequence.computed <= len(sequence.blocks) * size
        assert len(sequence.blocks.held()) <= core.cache.most_blocks(len(sequence.tokens))
        for block in sequence.blocks.held(sequence.computed // size):
            assert core.pool.references[block] == 1, "a shared block would be written"
            assert core.pool.keys[block] is None, "a cached block would be written"
    assert all(not sequence.blocks and not sequence.finished for sequence in scheduler.waiting)
    for queue in (scheduler.running, list(scheduler.waiting)):
        assert [sequence.order for sequence in queue] == sorted(sequence.order for sequence in queue)
    assert len(scheduler.running) <= scheduler.max_num_seqs


def greedy_alone(prompt: Sequence[int], max_len: int, context: int, eos_bonus: float) -> tuple[list[int], str]:
    """What a model without cache, batch or engine would say."""
    tokens = list(prompt)
    while len(tokens) < min(context + 1, len(prompt) + max_len):
        token = int(logits_of(tokens, eos_bonus).argmax())
        if token == EOS:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


prompts = st.builds(
    lambda prefix, tail: prefix + tail,
    st.sampled_from([[], [65] * 7, [65] * 4 + [66] * 6, list(b"system prompt")]),
    st.lists(st.sampled_from([65, 66]), min_size=1, max_size=8),
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), prompts, st.integers(1, 12), st.integers(1, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.sampled_from(["clear", "logits"])),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=400, deadline=None)
@given(
    actions,
    st.integers(1, 5),
    st.integers(24, 60),
    st.integers(1, 4),
    st.integers(1, 16),
    st.booleans(),
    st.none() | st.integers(1, 8),
    st.sampled_from([0.0, 3.0]),
    st.sampled_from([(None,), (7,), (None, 5), (None, None, 3, 9)]),
    st.none() | st.integers(1, 4),
)
def test_greedy_is_the_same_in_any_company(
    script: list[Any],
    block_size: int,
    positions: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    prefix_cache: bool,
    prefill_chunk: int | None,
    eos_bonus: float,
    windows: tuple[int | None, ...],
    parts: int | None,
) -> None:
    blocks = -(-positions // block_size) * len(windows)
    runner = FakeRunner(blocks, block_size, max_num_seqs, max_batch_tokens, 40, eos_bonus, windows=windows)
    if parts is not None:
        runner.prompts_apart, runner.parts = True, parts
    core = make_core(runner, prefix_cache_n=int(prefix_cache), prefill_chunk=prefill_chunk)
    sent: list[tuple[Job, Collector, list[int], int, int]] = []
    canceled: set[int] = set()
    for action in script:
        if action[0] == "submit":
            _, prompt, max_len, n_choices = action
            job, collector = submit(core, prompt, Params(max_len=max_len, n_choices=n_choices))
            sent.append((job, collector, prompt, max_len, n_choices))
        elif action[0] == "cancel" and action[1] < len(sent):
            core.cancel(sent[action[1]][0])
            canceled.add(action[1])
        elif action[0] == "step":
            for _ in range(action[1]):
                core.step()
                check_invariants(core)
        elif action[0] == "clear":
            core.clear_cache()
        elif action[0] == "logits":
            rows = core.logits([65, 66, 67, 68, 69])
            np.testing.assert_array_equal(rows[3], logits_of([65, 66, 67, 68], eos_bonus))
        check_invariants(core)
    drain(core)
    for index, (_, collector, prompt, max_len, n_choices) in enumerate(sent):
        tokens, reason = greedy_alone(prompt, max_len, core.max_length, eos_bonus)
        assert isinstance(collector.end, RequestFinished)
        assert sorted(collector.finished) == list(range(n_choices))
        for choice, finished in collector.finished.items():
            made = collector.tokens.get(choice, [])
            if index in canceled and finished.reason == "canceled":
                assert made == tokens[: len(made)]
            else:
                assert (made, finished.reason) == (tokens, reason)
                assert finished.text == ByteTokenizer().decode(tokens)
    stats = core.snapshot()
    assert (stats.waiting, stats.running, stats.free_blocks) == (0, 0, runner.num_blocks)
    assert stats.finished + stats.canceled == len(sent)


sampled_params = st.builds(
    Params,
    temperature=st.sampled_from([None, 0.7, 1.5]),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.none() | st.floats(0.2, 0.99),
    min_p=st.none() | st.floats(0.01, 0.3),
    frequency_penalty=st.none() | st.just(0.5),
    repetition_penalty=st.none() | st.just(1.3),
    dry_params=st.none() | st.just(Dry()),
    max_len=st.integers(1, 10),
    n_choices=st.integers(1, 3),
    seed=st.integers(0, 5),
    stop_toks=st.none() | st.just(["A", "bc", STOP_TOKEN]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(prompts, sampled_params), min_size=1, max_size=6), st.integers(1, 4), st.integers(24, 60), st.integers(2, 16))
def test_seeds_give_the_same_text_in_any_company(
    requests: list[tuple[list[int], Params]], max_num_seqs: int, positions: int, max_batch_tokens: int
) -> None:
    def run(some: list[tuple[list[int], Params]], **options: Any) -> list[Any]:
        core = make_core(FakeRunner(**options))
        collectors = [submit(core, prompt, params)[1] for prompt, params in some]
        drain(core)
        return [(c.texts, c.tokens, {k: (f.reason, f.stop) for k, f in c.finished.items()}) for c in collectors]

    crowd = run(
        requests,
        num_blocks=-(-positions // 3),
        block_size=3,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
    )
    alone = [run([request], max_sequence_length=-(-positions // 3) * 3)[0] for request in requests]
    assert crowd == alone


def test_choices_differ_and_share_one_prefill() -> None:
    runner = FakeRunner()
    core = make_core(runner, prefix_cache_n=0)
    _, collector = submit(core, list(range(65, 65 + 26)), Params(temperature=1.0, n_choices=4, max_len=6, seed=3))
    drain(core)
    assert len({tuple(tokens) for tokens in collector.tokens.values()}) == 4
    # 26 tokens of prompt; then each of the other three repeats the 2 in the unfinished block; then 5 tokens each.
    assert runner.computed == 26 + 3 * 2 + 4 * 5
    assert collector.end.usage.completion_tokens == 24


def test_choices_beyond_the_slots_wait_and_find_the_prefix() -> None:
    runner = FakeRunner(max_num_seqs=2)
    core = make_core(runner)
    _, collector = submit(core, list(range(65, 65 + 24)), Params(temperature=1.0, n_choices=5, max_len=6, seed=3))
    drain(core)
    assert sorted(collector.finished) == [0, 1, 2, 3, 4]
    assert runner.computed < 24 + 5 * 10


def test_a_cached_prompt_costs_little_and_is_counted() -> None:
    runner = FakeRunner()
    core = make_core(runner)
    prompt = list(b"a long shared system prompt.")
    submit(core, prompt, Params(max_len=4))
    drain(core)
    before = runner.computed
    _, collector = submit(core, prompt, Params(max_len=1))
    drain(core)
    assert collector.end.usage.cached_prompt_tokens == 24
    assert collector.end.usage.prompt_tokens == 28
    assert runner.computed - before == 4
    # Another turn of the chat also finds what was generated.
    answer = greedy_alone(prompt, 4, 128, 0.0)[0]
    _, collector = submit(core, prompt + answer + [65], Params(max_len=1))
    drain(core)
    assert collector.end.usage.cached_prompt_tokens == 28
    core.clear_cache()
    _, collector = submit(core, prompt, Params(max_len=1))
    drain(core)
    assert collector.end.usage.cached_prompt_tokens == 0


@pytest.mark.parametrize("from_the_start", [True, False], ids=["always", "since the weights were quantised anew"])
def test_what_was_generated_is_no_prompt_where_prompts_are_computed_apart(from_the_start: bool) -> None:
    runner = FakeRunner()
    runner.prompts_apart = from_the_start
    core = make_core(runner)
    runner.prompts_apart = True
    core.clear_cache()
    prompt = list(b"a long shared system prompt.")
    submit(core, prompt, Params(max_len=12))
    drain(core)
    answer = greedy_alone(prompt, 12, 128, 0.0)[0]
    _, collector = submit(core, prompt + answer + [65], Params(max_len=1))
    drain(core)
    assert collector.end.usage.cached_prompt_tokens == 28  # the prompt, and nothing of the answer
    # A sequence that is preempted computes its own tokens again, though a prompt that held them is in the cache by now.
    job, _ = submit(core, prompt, Params(max_len=12))
    while len(job.sequences[0].tokens) < len(prompt) + 10:
        core.step()
    core.scheduler.preempt(job.sequences[0])
    core.step()
    assert runner.steps[-1] == [(28, 10)]
    drain(core)


def test_streams_go_on_while_a_long_prompt_is_worked_through() -> None:
    runner = FakeRunner(num_blocks=200, max_sequence_length=600, max_batch_tokens=64)
    core = make_core(runner, prefill_chunk=10)
    _, stream = submit(core, [65, 66], Params(max_len=80))
    core.step()
    core.deliver()
    _, late = submit(core, [66] * 300, Params(max_len=2))
    steps = 0
    while late.end is None:
        before = len(stream.tokens[0])
        core.step()
        core.deliver()
        steps += 1
        assert len(stream.tokens[0]) == before + 1
        assert sum(count for _, count in runner.steps[-1]) <= 11
    assert steps == 30 + 1


def prompts_apart(parts: int) -> FakeRunner:
    runner = FakeRunner(num_blocks=400, max_sequence_length=400, max_batch_tokens=64)
    runner.prompts_apart, runner.parts = True, parts
    return runner


def test_streams_go_on_while_a_prompt_is_computed_part_by_part() -> None:
    """They have a token in each step. A prompt that leaves on the way takes nothing with it but its own part."""
    runner = prompts_apart(5)
    core = make_core(runner)
    _, stream = submit(core, [65, 66], Params(max_len=80))
    core.step()
    first, second = (submit(core, [letter] * 20, Params(max_len=2)) for letter in (66, 67))
    begun = len(core.scheduler.running[0].tokens)
    for steps in range(1, 5):
        core.step()
        check_invariants(core)
        assert len(core.scheduler.running[0].tokens) == begun + steps
        assert [sequence.computed for sequence in core.scheduler.under_way] == [0, 0]
    core.cancel(first[0])  # the other one is begun anew
    assert runner.steps[-4:] == [[(2 + i, 1)] for i in range(begun - 3, begun + 1)]
    for _ in range(4):
        core.step()
        assert len(core.scheduler.under_way) == 1
    core.step()
    assert runner.steps[-1] == [(0, 20)]
    assert not core.scheduler.under_way
    drain(core)
    assert second[1].tokens[0] == greedy_alone([67] * 20, 2, 400, 0.0)[0]
    assert stream.tokens[0] == greedy_alone([65, 66], 80, 400, 0.0)[0]


def test_a_prompt_gets_ahead_though_its_step_is_given_up_again_and_again() -> None:
    """Logits of a text that are asked for take its place in each step."""
    core = make_core(prompts_apart(10))
    submit(core, [65, 66], Params(max_len=300))
    core.step()
    _, late = submit(core, [66] * 20, Params(max_len=1))
    for _ in range(4):
        core.step()
        core.logits([65, 66, 67])
    assert isinstance(late.end, RequestFinished)
    assert core.scheduler.forgotten == 0


def test_what_a_preempted_stream_had_generated_is_computed_a_bit_at_a_time() -> None:
    """Its prompt beside the streams, part by part; the rest with them."""
    runner = prompts_apart(3)
    core = make_core(runner, prefix_cache_n=0)
    submit(core, [65, 66], Params(max_len=390))
    job, collector = submit(core, [67] * 8, Params(max_len=200))
    while len(job.sequences[0].tokens) < 100:
        core.step()
    core.scheduler.preempt(job.sequences[0])
    begun = len(runner.steps)
    while job.sequences[0].computed < 99:
        core.step()
        check_invariants(core)
    steps = runner.steps[begun:]
    assert [step for step in steps if (0, 8) in step] == [[(0, 8)]]
    assert [step[1] for step in steps if len(step) > 1][:3] == [(8, 32), (40, 32), (72, 28)]
    drain(core)
    assert collector.tokens[0] == greedy_alone([67] * 8, 200, 400, 0.0)[0]


def test_prompts_have_room_where_what_streams_take_alone_is_known_of_few() -> None:
    core = make_core(prompts_apart(3))
    pacer = core.scheduler.pacer
    assert pacer.room(4, 0.02) == pytest.approx(0.03)  # nothing is known
    for _ in range(9):
        pacer.observe(1, 0, 0.02)
    assert pacer.room(1, 0.025) == pytest.approx(0.025)  # 2.5 times 0.02 in all
    assert pacer.room(32, 0.06) == pytest.approx(0.03)


def test_prompts_under_way_end_at_once_where_nobody_waits() -> None:
    core = make_core(prompts_apart(50))
    stream, _ = submit(core, [65, 66], Params(max_len=80))
    core.step()
    _, late = submit(core, [66] * 20, Params(max_len=1))
    core.step()
    core.cancel(stream)
    core.step()
    assert isinstance(late.end, RequestFinished)


class TimedRunner(FakeRunner):
    """Its steps take the time that a function of streams and prompt tokens says, on a clock of its own."""

    now = 0.0

    def __init__(self, seconds: Callable[[int, int], float], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(num_blocks=3000, max_num_seqs=32, max_batch_tokens=512, max_sequence_length=4000)
        self.seconds = seconds
        self.prompt_tokens: list[int] = []
        monkeypatch.setattr("pymistral.engine.core.perf_counter", lambda: self.now)

    def forward(self, segments: Sequence[Any], meanwhile: Callable[[], object] | None = None) -> np.ndarray:
        prompt = sum(len(s.tokens) for s in segments if len(s.tokens) > 1)
        self.now += self.seconds(sum(len(s.tokens) == 1 for s in segments), prompt)
        self.prompt_tokens.append(prompt)
        if meanwhile is not None:
            meanwhile()
        return np.tile(np.arange(VOCAB, dtype=np.float32) == 65, (sum(s.outputs for s in segments), 1)).astype(np.float32)


def gaps_before_and_during(runner: TimedRunner, streams: int) -> tuple[np.ndarray, np.ndarray]:
    """The time between steps while streams run alone, and while a prompt of 2,000 tokens is worked through beside them."""
    core = make_core(runner, max_num_seqs=32, prefix_cache_n=0)
    for _ in range(streams):
        submit(core, [65, 66], Params(max_len=3000))

    def steps(enough: Callable[[int], bool]) -> np.ndarray:
        times = [runner.now]
        while not enough(len(times)):
            core.step()
            times.append(runner.now)
        return np.diff(times)

    steps(lambda count: count > 20)
    before = steps(lambda count: count > 60)
    _, late = submit(core, [66] * 2000, Params(max_len=1))
    return before, steps(lambda count: late.end is not None)


def linear(streams: int, prompt: int) -> float:
    return 0.002 + 0.0002 * streams + 0.0003 * prompt


def hidden(streams: int, prompt: int) -> float:
    """The first tokens hide behind the weights that a step reads."""
    return max(0.003, 0.0004 * (streams + prompt))


def test_a_prompt_whose_tokens_are_dear_still_leaves_short_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = gaps_before_and_during(TimedRunner(lambda streams, prompt: 0.005 + 0.0025 * prompt, monkeypatch), 1)
    assert np.median(during) <= 3.01 * np.median(before)


@pytest.mark.parametrize("streams", [1, 4, 16])
@pytest.mark.parametrize("cost", [linear, hidden])
def test_a_prompt_stretches_the_gaps_of_streams_as_far_as_wanted(
    streams: int, cost: Callable[[int, int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = TimedRunner(cost, monkeypatch)
    before, during = gaps_before_and_during(runner, streams)
    assert 1.8 < np.median(during) / np.median(before) < 2.6
    assert np.percentile(during[4:], 99) < 3 * np.median(before)


@pytest.mark.parametrize("streams", range(1, 18))
def test_a_panel_that_is_begun_is_filled(streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that compute eight tokens, four or one: a step of five takes as long as one of eight."""

    def of_panels(streams: int, prompt: int) -> float:
        whole, rest = divmod(streams + prompt, 8)
        return 0.0022 + 0.0005 * (8 * whole + next(part for part in (0, 1, 4, 8) if rest <= part))

    runner = TimedRunner(of_panels, monkeypatch)
    runner.panel_tokens = 8
    before, during = gaps_before_and_during(runner, streams)
    assert np.median(during) <= 2.6 * np.median(before)
    usual = int(np.median([tokens for tokens in runner.prompt_tokens[-200:] if tokens]))
    assert of_panels(streams, usual + 1) > of_panels(streams, usual)  # no token more would be free
    assert of_panels(streams, usual) > 1.4 * of_panels(streams, 0)  # and the prompt gets ahead


@pytest.mark.parametrize("seed", range(10))
def test_gaps_stay_short_on_a_machine_that_others_use(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)

    def noisy(streams: int, prompt: int) -> float:
        held_up = 0.02 if rng.random() < 0.05 else 0.0
        return linear(streams, prompt) * rng.lognormal(0.0, 0.3) + held_up

    runner = TimedRunner(noisy, monkeypatch)
    before, during = gaps_before_and_during(runner, 4)
    assert 1.3 < np.median(during) / np.median(before) < 2.75
    assert np.mean([tokens for tokens in runner.prompt_tokens if tokens]) > 5  # and the prompt gets ahead


def steps_until_begun(core: EngineCore, collectors: Sequence[Any]) -> int:
    """Steps until each of them has a token."""
    steps = 0
    while not all(collector.tokens for collector in collectors):
        core.step()
        steps += 1
    return steps


def test_a_prompt_gets_ahead_while_streams_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TimedRunner(linear, monkeypatch)
    core = make_core(runner, max_num_seqs=32, prefix_cache_n=0)
    submit(core, [65, 66], Params(max_len=3000))
    for _ in range(20):
        core.step()
    steps = steps_until_begun(core, [submit(core, [66] * 300, Params(max_len=500))[1] for _ in range(8)])
    assert steps < 2400 / 7  # the floor of four tokens in a step alone would take 600


def test_streams_that_never_ran_alone_are_not_put_down_to_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one stream takes alone is known; the steps of fifteen that follow each other closely take longer for the streams in them."""
    runner = TimedRunner(linear, monkeypatch)
    core = make_core(runner, max_num_seqs=32, prefix_cache_n=0)
    submit(core, [65, 66], Params(max_len=3000))
    for _ in range(20):
        core.step()
    late = [submit(core, [66] * 40, Params(max_len=500))[1] for _ in range(15)]
    began, steps = runner.now, steps_until_begun(core, late)
    assert (runner.now - began) / steps < 2.6 * linear(15, 0)
    assert steps < 600 / 10  # the floor of four tokens in a step, which a step of many streams had, took 111


@pytest.mark.parametrize(("longer", "fastest"), [(6.0, 2.6), (1 / 6, 3.0)])
def test_what_streams_take_alone_is_judged_by_the_texts_of_today(longer: float, fastest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of streams ran alone once, when texts were others; only one more runs alone now, until it ends and a prompt comes."""
    lengths = [1.0]
    runner = TimedRunner(lambda streams, prompt: 0.002 + 0.0003 * lengths[0] * streams + 0.0003 * prompt, monkeypatch)
    core = make_core(runner, max_num_seqs=32, prefix_cache_n=0)
    for _ in range(13):
        last, _ = submit(core, [65, 66], Params(max_len=3000))
        for _ in range(12):
            core.step()
    lengths[0] = longer
    for _ in range(80):
        core.step()
    core.cancel(last)
    usual = 0.002 + 0.0003 * longer * 12
    _, late = submit(core, [66] * 2000, Params(max_len=1))
    times = [runner.now]
    while late.end is None:
        core.step()
        times.append(runner.now)
    gaps = np.diff(times)
    assert np.median(gaps) <= fastest * usual
    assert len(gaps) < 2000 / (4 if longer < 1 else 30)


def test_prompts_that_never_end_do_not_hide_what_streams_take_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt after the other, while the texts of the streams grow until they take ten times as long."""
    monkeypatch.setattr("pymistral.engine.scheduler._WITH_PROMPTS", 16)
    lengths = [1.0]
    runner = TimedRunner(lambda streams, prompt: 0.002 + 0.0003 * lengths[0] * streams + 0.0003 * prompt, monkeypatch)
    core = make_core(runner, max_num_seqs=32, prefix_cache_n=0)
    for _ in range(12):
        submit(core, [65, 66], Params(max_len=4000))
    for _ in range(20):
        core.step()
    late: list[Any] = []
    stretches = []
    for _ in range(1000):
        if all(collector.end is not None for collector in late):
            late.append(submit(core, [66] * 1000, Params(max_len=1))[1])
        lengths[0] = min(10.0, lengths[0] + 0.02)
        before = runner.now
        core.step()
        stretches.append((runner.now - before) / (0.002 + 0.0036 * lengths[0]))
    assert 2.0 < np.median(stretches[500:]) < 2.6
    assert np.percentile(stretches, 99) < 3.0
    assert runner.prompt_tokens[-500:].count(0) > 20


def test_the_oldest_request_is_never_preempted() -> None:
    runner = FakeRunner(num_blocks=8, block_size=2, max_num_seqs=4)
    core = make_core(runner, prefix_cache_n=0)
    collectors = [submit(core, [65 + i] * 3, Params(max_len=12))[1] for i in range(6)]
    ended: list[int] = []
    while core.busy:
        core.step()
        check_invariants(core)
        ended += [i for i, c in enumerate(collectors) if c.end is not None and i not in ended]
    assert ended[0] == 0
    assert core.snapshot().preemptions > 0


def test_a_prompt_that_is_half_done_makes_room_for_an_older_stream() -> None:
    runner = FakeRunner(num_blocks=24, block_size=1, max_num_seqs=2)
    core = make_core(runner, prefill_chunk=1)
    _, older = submit(core, [65] * 5, Params(max_len=12))
    core.step()
    _, younger = submit(core, [66] * 17, Params(max_len=4))
    for _ in range(2):
        core.step()
    assert core.scheduler.running[-1].computed == 2
    drain(core)
    assert core.snapshot().preemptions > 0
    assert older.tokens[0] == greedy_alone([65] * 5, 12, 24, 0.0)[0]
    assert younger.tokens[0] == greedy_alone([66] * 17, 4, 24, 0.0)[0]


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    core = make_core(FakeRunner(num_blocks=5, block_size=4))
    with pytest.raises(RequestValidationError, match=r"21 tokens.*holds 20 \(5 blocks of 4\)"):
        submit(core, [65] * 21)
    core = make_core(FakeRunner(max_sequence_length=30))
    with pytest.raises(RequestValidationError, match=r"31 tokens.*context holds 30"):
        submit(core, [65] * 31)
    with pytest.raises(RequestValidationError, match="empty"):
        submit(core, [])
    for token in (-1, VOCAB, 2**40):
        with pytest.raises(RequestValidationError, match=f"{token}.*0 to {VOCAB - 1}"):
            submit(core, [65, token])
        with pytest.raises(RequestValidationError, match="logits_bias"):
            submit(core, [65], Params(logits_bias={token: 1.0}))
    for bad in (Params(n_choices=0), Params(max_len=0)):
        with pytest.raises(RequestValidationError):
            submit(core, [65], bad)
    assert not core.busy
    with pytest.raises(RequestValidationError, match="between 1 and 30"):
        core.logits([65] * 31)


def test_a_full_context_ends_with_length() -> None:
    core = make_core(FakeRunner(max_sequence_length=30))
    for prompt_length, made in ((30, 1), (29, 2), (10, 21)):
        _, collector = submit(core, [65] * prompt_length, Params())
        drain(core)
        assert collector.finished[0].reason == "length"
        assert collector.end.usage.completion_tokens == made


def test_truncation_keeps_the_end_and_leaves_room() -> None:
    core = make_core(FakeRunner(max_sequence_length=30))
    prompt = [65 + i % 50 for i in range(100)]
    for max_len, kept in ((None, 29), (10, 20), (100, 1)):
        _, collector = submit(core, prompt, Params(max_len=max_len), truncate=True)
        drain(core)
        assert collector.end.usage.prompt_tokens == kept
        assert collector.tokens[0] == greedy_alone(prompt[-kept:], max_len or 99, 30, 0.0)[0]


def test_stop_strings_and_tokens() -> None:
    core = make_core(FakeRunner())
    text = ByteTokenizer().decode(greedy_alone([65], 20, 128, 0.0)[0])
    assert len(text) == 20
    for stop in (text[5:8], text[19], text):
        _, collector = submit(core, [65], Params(max_len=20, stop_toks=["never", stop]))
        drain(core)
        finished = collector.finished[0]
        assert (finished.text, finished.reason, finished.stop) == (text[: text.index(stop)], "stop", stop)
    _, collector = submit(core, [65], Params(max_len=20, stop_toks=[ord(text[6])]))
    drain(core)
    first = text.index(text[6])
    assert collector.finished[0].text == text[:first]
    assert collector.finished[0].stop == ord(text[6])
    assert collector.end.usage.completion_tokens == first + 1
    # A special token given as text ends the answer though it never shows up in the text.
    _, collector = submit(core, [65], Params(max_len=20, stop_toks=["<stop>"], logits_bias={STOP_TOKEN: 99.0}))
    drain(core)
    assert (collector.finished[0].text, collector.finished[0].stop) == ("", "<stop>")
    # Held back, and released at the end since nothing came of it.
    _, collector = submit(core, [65], Params(max_len=3, stop_toks=[text[2] + "no"]))
    drain(core)
    assert collector.finished[0].text == text[:3]
    assert [e.text for e in collector.events if isinstance(e, Delta)] == list(text[:3])


def test_logprobs_come_with_their_tokens() -> None:
    core = make_core(FakeRunner())
    prompt = list(b"logprobs")
    _, collector = submit(core, prompt, Params(max_len=5, top_n_logprobs=3), return_logprobs=True)
    drain(core)
    for i, entry in enumerate(collector.logprobs[0]):
        row = logits_of(prompt + collector.tokens[0][:i]).astype(np.float64)
        row -= np.log(np.exp(row).sum())
        assert entry.token == collector.tokens[0][i]
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-4)
        assert [token for token, _ in entry.top] == np.argsort(-row)[:3].tolist()
        assert [p for _, p in entry.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)
    assert len(collector.logprobs[0]) == 5


def test_an_error_in_one_request_ends_that_one_alone() -> None:
    core = make_core(FakeRunner())

    def fails_later(row: np.ndarray, context: Sequence[int]) -> None:
        if len(context) == 6:
            raise KeyError("oops")

    _, good = submit(core, [65, 66], Params(max_len=6))
    _, bad = submit(core, [65, 66], Params(max_len=6, n_choices=2), logits_processors=[fails_later])
    drain(core)
    assert isinstance(bad.end, RequestFailed)
    assert isinstance(bad.end.error, InferenceError)
    assert "fails_later raised KeyError" in str(bad.end.error)
    assert isinstance(bad.end.error.__cause__, KeyError)
    assert bad.end.texts[0] == good.texts[0][:4]
    assert bad.end.usage.completion_tokens >= 8
    assert good.finished[0].reason == "length"
    assert core.snapshot().failed == 1


@pytest.mark.parametrize("max_len", [1, 6])
def test_nothing_follows_the_error_of_a_choice_that_begins(max_len: int) -> None:
    core = make_core(FakeRunner())
    calls = []

    def fails_second(row: np.ndarray, context: Sequence[int]) -> None:
        calls.append(len(context))
        if len(calls) == 2:
            raise KeyError("oops")

    _, collector = submit(core, [65, 66], Params(max_len=max_len, n_choices=3), logits_processors=[fails_second])
    drain(core)
    core.deliver()
    assert isinstance(collector.end, RequestFailed)
    assert calls == [2, 2, 2]
    assert core.snapshot().completion_tokens == 0


def test_a_failed_step_ends_its_requests_and_leaves_nothing_in_the_cache() -> None:
    runner = FakeRunner()
    core = make_core(runner)
    runner.fail_on = 90
    _, collector = submit(core, [65] * 8 + [90])
    drain(core)
    assert isinstance(collector.end, RequestFailed)
    assert "cannot bear" in str(collector.end.error)
    assert not core.pool.by_key
    _, collector = submit(core, [65] * 9)
    drain(core)
    assert isinstance(collector.end, RequestFinished)


def test_a_receiver_that_raises_is_canceled() -> None:
    core = make_core(FakeRunner())
    calls = []

    def receiver(event: Any) -> None:
        calls.append(event)
        raise RuntimeError("the consumer is gone")

    core.add(core.prepare(EngineRequest([65], Params(max_len=50, n_choices=2)), receiver))
    _, other = submit(core, [65], Params(max_len=5))
    drain(core)
    assert len(calls) == 1
    assert other.finished[0].reason == "length"


def test_text_is_passed_on_while_the_next_step_is_computed() -> None:
    core = make_core(FakeRunner(), max_num_seqs=2)
    woken: list[int] = []
    collector = Collector()
    core.add(core.prepare(EngineRequest([65], Params(max_len=3)), collector, lambda: woken.append(len(collector.events))))
    seen = []
    for _ in range(3):
        core.step()
        seen.append(collector.texts.get(0, ""))
    core.deliver()
    text = ByteTokenizer().decode(greedy_alone([65], 3, 128, 0.0)[0])
    assert seen == ["", text[:1], text]  # the last step ends the request, which waits for nothing
    assert woken == [1, 2, len(collector.events)]


def test_text_that_cannot_be_decoded_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is under way goes on, for the others."""
    core = make_core(FakeRunner())
    job, broken = submit(core, [65, 66], Params(max_len=20))
    _, other = submit(core, [65], Params(max_len=6))
    core.step()

    def fail(token: int) -> str:
        raise ValueError("not a text")

    monkeypatch.setattr(job.sequences[0].text, "_decoder", type("Broken", (), {"step": staticmethod(fail), "flush": staticmethod(str)}))
    drain(core)
    assert isinstance(broken.end, RequestFailed)
    assert "not a text" in str(broken.end.error)
    assert other.tokens[0] == greedy_alone([65], 6, 128, 0.0)[0]


def test_deadlines() -> None:
    core = make_core(FakeRunner())
    now = time.monotonic()
    _, missed = submit(core, [65], deadline=now - 1)
    _, later = submit(core, [65], Params(max_len=100), deadline=now + 0.05)
    _, never = submit(core, [65], Params(max_len=3), deadline=now + 1000)
    core.step()
    assert isinstance(missed.end, RequestFailed)
    assert "was over after" in str(missed.end.error)
    assert later.end is None
    time.sleep(0.06)
    core.step()
    assert isinstance(later.end, RequestFailed)
    assert later.end.texts == [later.texts[0]]
    assert later.texts[0]
    drain(core)
    assert isinstance(never.end, RequestFinished)


class Only:
    """A constraint that allows one text, and hands out its capital letters without being asked."""

    accepting = False

    def __init__(self, text: bytes) -> None:
        self.text = text

    @property
    def complete(self) -> bool:
        return not self.text

    def start(self) -> Only:
        return Only(self.text)

    def allowed(self) -> np.ndarray:
        return bitmask(self.text[:1], VOCAB)

    def accept(self, token: int) -> bytes:
        assert token == self.text[0]
        rest = self.text[1:].lstrip(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        forced, self.text = self.text[1 : len(self.text) - len(rest)], rest
        return forced


def test_constraints_mask_and_end_the_text() -> None:
    core = make_core(FakeRunner())
    _, collector = submit(core, [65], Params(n_choices=2, temperature=1.0), constraint=Only(b"yes"))
    drain(core)
    assert collector.texts == {0: "yes", 1: "yes"}
    assert collector.finished[0].reason == "stop"


def test_forced_tokens_are_taken_in_one_step() -> None:
    core = make_core(FakeRunner())
    _, collector = submit(core, [65], Params(temperature=1.0), constraint=Only(b"aBCDEFGe"), return_logprobs=True)
    drain(core)
    assert collector.texts == {0: "aBCDEFGe"}
    assert core.stats.steps == 2
    assert collector.end.usage.completion_tokens == 8
    assert [entry.token for entry in collector.logprobs[0]] == list(b"aBCDEFGe")
    assert all(entry.logprob == 0.0 for entry in collector.logprobs[0])


def test_forced_tokens_stop_at_a_stop_string() -> None:
    core = make_core(FakeRunner())
    _, collector = submit(core, [65], Params(stop_toks=("CD",)), constraint=Only(b"aBCDEFGe"))
    drain(core)
    assert collector.texts == {0: "aB"}
    assert collector.finished[0].stop == "CD"


@pytest.mark.parametrize("max_len", [1, 4, 6, 7])
def test_a_constrained_text_that_is_cut_fails(max_len: int) -> None:
    core = make_core(FakeRunner())
    _, collector = submit(core, [65], Params(max_len=max_len), constraint=Only(b"aBCDEFGe"))
    drain(core)
    assert isinstance(collector.end, RequestFailed)
    assert f"cut after {max_len} token{'' if max_len == 1 else 's'}, before" in str(collector.end.error)
    assert collector.end.texts == ["aBCDEFGe"[:max_len]]


def test_nothing_follows_the_error_of_a_text_that_cannot_be_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what another choice had to say behind such a token of its own."""

    def decode(stream: ByteStream, token: int) -> str:
        if token == ord("a"):
            raise ValueError("not a text")
        return chr(token)

    monkeypatch.setattr(ByteStream, "step", decode)
    core = make_core(FakeRunner())
    _, collector = submit(core, [65], Params(n_choices=3), constraint=Only(b"aBCDe"))
    drain(core)
    assert isinstance(collector.end, RequestFailed)


def test_a_constraint_may_end_exactly_at_max_len() -> None:
    core = make_core(FakeRunner())
    _, collector = submit(core, [65], Params(max_len=8), constraint=Only(b"aBCDEFGe"))
    drain(core)
    assert collector.finished[0].reason == "stop"


def test_usage_adds_up() -> None:
    core = make_core(FakeRunner(delay=0.002))
    _, collector = submit(core, [65] * 40, Params(max_len=10))
    drain(core)
    usage = collector.end.usage
    assert usage.completion_tokens == 10
    assert usage.prompt_seconds >= 0.004
    assert usage.completion_seconds >= 0.018
    assert usage.queue_seconds + usage.prompt_seconds + usage.completion_seconds == pytest.approx(usage.total_seconds, abs=1e-6)


def test_50000_tokens_leave_nothing_behind() -> None:
    class Instant(FakeRunner):
        row = np.tile(np.arange(VOCAB, dtype=np.float32) == 65, (32, 1)).astype(np.float32)

        def forward(self, segments: Sequence[Any], meanwhile: Callable[[], object] | None = None) -> np.ndarray:
            if meanwhile is not None:
                meanwhile()
            return self.row[: sum(segment.outputs for segment in segments)]

    core = make_core(Instant(num_blocks=64, block_size=16, max_num_seqs=32))

    def serve(requests: int) -> None:
        for number in range(requests):
            job = core.prepare(EngineRequest([66 + number % 100, 67] * 20, Params(max_len=60)), lambda event: None)
            core.add(job)
        while core.busy:
            core.step()

    gc.disable()
    tracemalloc.start()
    try:
        serve(470)
        before = tracemalloc.get_traced_memory()[0]
        serve(470)
        growth = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert core.snapshot().completion_tokens == 940 * 60
    assert growth < 50_000


def test_200_requests_through_a_pool_that_holds_few() -> None:
    rng = np.random.default_rng(0)
    runner = FakeRunner(num_blocks=16, block_size=4, max_num_seqs=4, max_batch_tokens=24, max_sequence_length=60)
    core = make_core(runner)
    work = [([65 + int(i) for i in rng.integers(0, 3, rng.integers(1, 20))], int(rng.integers(1, 15))) for _ in range(200)]
    collectors = [submit(core, prompt, Params(max_len=max_len))[1] for prompt, max_len in work]
    drain(core)
    for (prompt, max_len), collector in zip(work, collectors, strict=True):
        assert collector.tokens.get(0, []) == greedy_alone(prompt, max_len, 60, 0.0)[0]
