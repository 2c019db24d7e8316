"""Speculative decoding: whatever is guessed, the text is the model's own, and no block remembers a guess."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pymistral.engine import EngineRequest, RequestFailed, RequestFinished
from pymistral.engine.core import EngineCore
from pymistral.engine.speculative import DraftModel, NgramIndex, PromptLookup, Speculation, StepCost
from pymistral.nn.sampling import SamplingProgram

from . import fakes
from .fakes import EOS, STOP_TOKEN, VOCAB, ByteTokenizer, Collector, Dry, FakeRunner, Params, logits_of
from .test_core import Only, check_invariants, drain, greedy_alone, make_core, submit


class Foresight:
    """Guesses what greedy decoding will say, except for some of the tokens."""

    computes, seconds = False, 0.0

    def __init__(self, wrong: Sequence[bool], eos_bonus: float = 0.0) -> None:
        self.wrong, self.eos_bonus = wrong, eos_bonus
        self.made = 0
        self.known: set[Any] = set()

    def draft(self, wanted: list[tuple[Any, int]]) -> list[list[int]]:
        drafts = []
        for sequence, count in wanted:
            self.known.add(sequence)
            tokens = list(sequence.tokens)
            for _ in range(count):
                self.made += 1
                right = int(logits_of(tokens, self.eos_bonus).argmax())
                tokens.append(66 if self.wrong and self.wrong[self.made % len(self.wrong)] else right)
            drafts.append(tokens[len(sequence.tokens) :])
        return drafts

    def release(self, sequence: Any) -> None:
        self.known.discard(sequence)


class Always(Speculation):
    """Guesses as much as it may, whether it pays or not."""

    def lengths(self, likelihoods: list[float], most: list[int], tokens: int, room: int) -> list[int]:
        lengths = []
        for count in most:
            lengths.append(max(0, min(count, room)))
            room -= lengths[-1]
        return lengths


class Lookalike(FakeRunner):
    """A draft model: the other one, with noise, and with a few logits more."""

    vocab_size = VOCAB + 3

    def __init__(self, noise: float, **options: Any) -> None:
        super().__init__(**options)
        self.noise = noise
        self.sample = SamplingProgram(self.vocab_size, threads=1).run

    def forward(self, segments: Sequence[Any], meanwhile: Callable[[], object] | None = None) -> np.ndarray:
        rows = super().forward(segments, meanwhile)
        rows = rows + self.noise * np.random.default_rng(len(self.steps)).standard_normal(rows.shape).astype(np.float32)
        return np.concatenate([rows, np.full((len(rows), 3), -50.0, np.float32)], axis=1)


def drafter(kind: str, wrong: Sequence[bool], eos_bonus: float) -> Any:
    if kind == "foresight":
        return Foresight(wrong, eos_bonus)
    if kind == "lookup":
        return PromptLookup(1)
    small = Lookalike(2.0 * any(wrong), num_blocks=12, block_size=3, max_num_seqs=4, max_batch_tokens=7, eos_bonus=eos_bonus)
    return DraftModel(small, VOCAB)


class Doubles:
    """A constraint that allows any text, and has an X follow each token with an odd number."""

    accepting, complete = True, False

    def start(self) -> Doubles:
        return Doubles()

    def allowed(self) -> None:
        return None

    def accept(self, token: int) -> bytes:
        return b"X" if token % 2 else b""


prompts = st.builds(
    lambda prefix, tail: prefix + tail,
    st.sampled_from([[], [65] * 7, [65, 66, 67] * 4, list(b"system prompt")]),
    st.lists(st.sampled_from([65, 66]), min_size=1, max_size=8),
)
params = st.builds(
    Params,
    temperature=st.sampled_from([0.0, 0.0, 0.7, None]),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.none() | st.floats(0.2, 0.99),
    frequency_penalty=st.none() | st.just(0.5),
    repetition_penalty=st.none() | st.just(1.3),
    dry_params=st.none() | st.just(Dry()),
    logits_bias=st.none() | st.just({65: 3.0}),
    max_len=st.integers(1, 20),
    n_choices=st.integers(1, 3),
    seed=st.integers(0, 5),
    top_n_logprobs=st.integers(0, 2),
    stop_toks=st.none() | st.just(["A", "bc", STOP_TOKEN]),
)
extras = st.sampled_from(
    [
        {},
        {},
        {"return_logprobs": True},
        {"constraint": Only(b"aBCDEFGeFghi")},
        {"constraint": Doubles()},
        {"logits_processors": [lambda row, tokens: -row]},
    ]
)


@settings(max_examples=200, deadline=None)
@example(  # canceled after one choice failed where there are no guesses, and before where there are
    [
        ([65, 66, 67] * 4 + [65, 65], Params(temperature=0.0, max_len=15, n_choices=3), {}),
        ([65, 66] + [65] * 5, Params(temperature=0.0, max_len=12, n_choices=2), {"constraint": Doubles()}),
    ],
    "lookup",
    [],
    1,
    (1, 40, 4, 10, False),
    0.0,
    [(30, 1)],
    Speculation,
    (None,),
)
@given(
    st.lists(st.tuples(prompts, params, extras), min_size=1, max_size=5),
    st.sampled_from(["foresight", "lookup", "model"]),
    st.lists(st.booleans(), max_size=5),
    st.integers(1, 6),
    st.tuples(st.integers(1, 5), st.integers(40, 70), st.integers(2, 4), st.integers(4, 20), st.booleans()),
    st.sampled_from([0.0, 3.0]),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=2),
    st.sampled_from([Speculation, Always, Always]),
    st.sampled_from([(None,), (7,), (None, 5)]),
)
def test_the_text_is_the_same_with_and_without_guesses(
    requests: list[Any],
    kind: str,
    wrong: list[bool],
    gamma: int,
    shape: tuple[int, int, int, int, bool],
    eos_bonus: float,
    cancels: list[tuple[int, int]],
    policy: type[Speculation],
    windows: tuple[int | None, ...],
) -> None:
    def answers(core: EngineCore, cancels: Sequence[tuple[int, int]]) -> list[Any]:
        sent = [submit(core, prompt, params, **extra) for prompt, params, extra in requests]
        for step in range(10_000):
            for when, which in cancels:
                if when == step and which < len(sent):
                    core.cancel(sent[which][0])
            if not core.busy:
                break
            core.step()
            check_invariants(core)
            for sequence in core.scheduler.running:
                assert len(sequence.blocks) <= -(-len(sequence.tokens) // core.runner.block_size)
        assert core.pool.num_free == core.pool.num_blocks
        return [collector for _, collector in sent]

    def summary(collector: Collector) -> Any:
        reasons = {choice: (finished.reason, finished.stop) for choice, finished in collector.finished.items()}
        return type(collector.end), collector.texts, collector.tokens, collector.logprobs, reasons

    block_size, positions, seqs, batch, prefix_cache = shape
    size = {"block_size": block_size, "max_num_seqs": seqs, "max_batch_tokens": batch, "max_sequence_length": 40, "eos_bonus": eos_bonus}
    plain = answers(make_core(FakeRunner(num_blocks=400 // block_size, **size)), ())
    guesses = drafter(kind, wrong, eos_bonus)
    tight = FakeRunner(num_blocks=-(-positions // block_size) * len(windows), windows=windows, **size)
    core = make_core(tight, speculation=policy(guesses, gamma), prefix_cache_n=int(prefix_cache))
    speculative = answers(core, cancels)
    assert core.speculation is not None, "the drafter failed"
    assert not core.speculation._likelihoods
    if kind == "model":
        assert not guesses._caches
        assert guesses.pool.num_free == guesses.pool.num_blocks
    canceled = {which for _, which in cancels}
    for index, (one, other) in enumerate(zip(plain, speculative, strict=True)):
        failed = isinstance(one.end, RequestFailed) and len(one.tokens) > 1
        stopped = index in canceled and any(finished.reason == "canceled" for finished in other.finished.values())
        if failed:  # The choice that fails ends the others, which guesses may have brought less or more far.
            assert stopped or isinstance(other.end, RequestFailed)
            for choice in one.tokens.keys() & other.tokens.keys():
                both = min(len(one.tokens[choice]), len(other.tokens[choice]))
                assert one.tokens[choice][:both] == other.tokens[choice][:both]
        elif stopped:
            assert all(one.tokens[choice][: len(tokens)] == tokens for choice, tokens in other.tokens.items())
        else:
            assert summary(one) == summary(other)
    stats = core.snapshot()
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
    assert stats.accepted_tokens <= stats.completion_tokens


def test_right_guesses_save_steps_and_are_counted() -> None:
    core = make_core(FakeRunner(), speculation=Always(Foresight([]), 4))
    _, collector = submit(core, [65, 66], Params(max_len=21))
    drain(core)
    assert collector.tokens[0] == greedy_alone([65, 66], 21, 128, 0.0)[0]
    assert core.stats.steps == 1 + 4  # the first token, then five at a time
    assert collector.end.usage.drafted_tokens == collector.end.usage.accepted_tokens == 16
    assert (core.stats.drafted_tokens, core.stats.accepted_tokens) == (16, 16)


def test_wrong_guesses_cost_steps_nothing_and_leave_no_block() -> None:
    runner = FakeRunner(block_size=2)
    core = make_core(runner, speculation=Always(Foresight([True]), 6))
    _, collector = submit(core, [65, 66, 67], Params(max_len=10))
    while core.busy:
        core.step()
        check_invariants(core)
        assert sum(len(s.blocks) for s in core.scheduler.running) <= -(-13 // 2)
    assert collector.tokens[0] == greedy_alone([65, 66, 67], 10, 128, 0.0)[0]
    assert core.stats.steps == 10
    assert collector.end.usage.accepted_tokens == 0
    assert collector.end.usage.drafted_tokens > 20


def test_the_prefix_cache_knows_accepted_tokens_and_no_wrong_guess() -> None:
    runner = FakeRunner(block_size=2)
    core = make_core(runner, speculation=Always(Foresight([False, False, True]), 5))
    prompt = [65, 66, 67]
    submit(core, prompt, Params(max_len=13))
    drain(core)
    text = prompt + greedy_alone(prompt, 13, 128, 0.0)[0]
    _, collector = submit(core, [*text, 65], Params(max_len=8))
    drain(core)
    assert collector.end.usage.cached_prompt_tokens >= len(text) - 2
    assert collector.tokens[0] == greedy_alone([*text, 65], 8, 128, 0.0)[0]


def test_guesses_never_cost_another_sequence_its_blocks() -> None:
    runner = FakeRunner(num_blocks=10, block_size=2, max_num_seqs=2)
    core = make_core(runner, speculation=Always(Foresight([True]), 16))
    for start in (65, 70):
        submit(core, [start, start], Params(max_len=7))
    drain(core)
    assert core.snapshot().preemptions == 0


def test_a_failing_drafter_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Foresight):
        def draft(self, wanted: list[tuple[Any, int]]) -> list[list[int]]:
            raise RuntimeError("no idea")

    core = make_core(FakeRunner(), speculation=Always(Broken([]), 4))
    _, collector = submit(core, [65], Params(max_len=6))
    drain(core)
    assert isinstance(collector.end, RequestFinished)
    assert collector.tokens[0] == greedy_alone([65], 6, 128, 0.0)[0]
    assert caplog.text.count("is given up") == 1


def test_a_processor_that_raises_ends_its_request_alone() -> None:
    def grumpy(row: np.ndarray, tokens: Sequence[int]) -> None:
        if len(tokens) == 7:
            raise ValueError("seven")

    core = make_core(FakeRunner(), speculation=Always(Foresight([]), 4))
    _, bad = submit(core, [65], Params(max_len=20), logits_processors=[grumpy])
    _, good = submit(core, [66], Params(max_len=20))
    drain(core)
    assert isinstance(bad.end, RequestFailed)
    assert len(bad.end.texts[0]) == 6
    assert good.tokens[0] == greedy_alone([66], 20, 128, 0.0)[0]


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_guesses_keep_the_distribution(kind: str) -> None:
    """The second to fourth token of 6,000 samples against the probabilities themselves: chi-square over the values of two positions."""

    class Small(FakeRunner):
        """Four letters, whose probabilities depend on the last two."""

        table = np.random.default_rng(1).standard_normal((4, 4, 4)) * 1.2

        def forward(self, segments: Sequence[Any], meanwhile: Callable[[], object] | None = None) -> np.ndarray:
            if meanwhile is not None:
                meanwhile()
            rows = []
            for s in segments:
                self.write(s)
                text = self.read(s)
                rows += [self.row(text[: len(text) - s.outputs + 1 + i]) for i in range(s.outputs)]
            return np.array(rows, np.float32).reshape(-1, VOCAB)

        def row(self, text: Sequence[int]) -> np.ndarray:
            row = np.full(VOCAB, -np.inf, np.float32)
            row[65:69] = self.table[text[-2] - 65, text[-1] - 65]
            return row

    class Other(Small):
        table = Small.table + np.random.default_rng(2).standard_normal((4, 4, 4)) * 0.7

    def probabilities(a: int, b: int) -> np.ndarray:
        weights = np.exp(Small.table[a, b])
        return weights / weights.sum()

    options = {"num_blocks": 400, "block_size": 4}
    guesses = PromptLookup(1) if kind == "lookup" else DraftModel(Other(**options), VOCAB)
    core = make_core(Small(**options), speculation=Always(guesses, 3))
    samples, counts = 6000, np.zeros((4, 4, 4))
    for first in range(0, samples, 8):
        collectors = [submit(core, [65, 66, 67, 68, 65, 66], Params(temperature=1.0, max_len=4, seed=first + i))[1] for i in range(8)]
        while core.busy:
            core.step()
        for collector in collectors:
            _, *rest = (token - 65 for token in collector.tokens[0])
            counts[tuple(rest)] += 1
    expected = np.zeros((4, 4, 4))
    for a in range(4):
        for b, c, d in np.ndindex(4, 4, 4):
            chance = probabilities(0, 1)[a] * probabilities(1, a)[b] * probabilities(a, b)[c] * probabilities(b, c)[d]
            expected[b, c, d] += samples * chance
    common = expected > 5
    chi = float((((counts - expected) ** 2) / expected)[common].sum())
    freedom = int(common.sum())
    assert chi < freedom + 4 * sqrt(2 * freedom), f"chi-square {chi:.0f} with {freedom} degrees of freedom"
    accepted = core.stats.accepted_tokens / core.stats.drafted_tokens
    assert 0.15 < accepted < 0.95


def test_two_models_that_agree_draw_the_same_tokens() -> None:
    small = Lookalike(0.0, num_blocks=64, block_size=4)
    core = make_core(FakeRunner(), speculation=Always(DraftModel(small, VOCAB), 5))
    for seed in range(5):
        _, collector = submit(core, [65, 66], Params(temperature=1.0, max_len=30, seed=seed))
        drain(core)
        usage = collector.end.usage
        assert usage.accepted_tokens == usage.drafted_tokens > 10
    # It reads what was accepted once, and guesses the rest: nothing twice.
    assert small.computed <= 5 * 33


def test_ngrams_are_found_where_they_were_last() -> None:
    index = NgramIndex(2)
    tokens = [1, 2, 3, 1, 2, 4, 5, 1, 2]
    assert index.continuation(tokens, 3) == [4, 5, 1]
    tokens += [4]
    assert index.continuation(tokens, 2) == [5, 1]
    tokens += [9]
    assert index.continuation(tokens, 2) == []
    assert NgramIndex(2).continuation([7, 8, 7, 8, 7], 5) == [8, 7, 8, 7, 8]
    assert NgramIndex(3).continuation([7, 8], 5) == []


def steps(cost: StepCost, fixed: float, each: float) -> None:
    for tokens in (1, 1, 2, 5, 1, 9, 1, 3, 1, 17) * 5:
        cost.observe(tokens, fixed + each * tokens)


def test_the_cost_of_a_step_is_learnt() -> None:
    cost = StepCost()
    steps(cost, 0.004, 0.0002)
    assert cost.each == pytest.approx(0.0002, rel=0.1)
    assert cost.fixed == pytest.approx(0.004, rel=0.1)
    cost.observe(1, 10.0)  # the machine slept
    steps(cost, 0.004, 0.0002)
    assert cost.fixed == pytest.approx(0.004, rel=0.2)


def test_guesses_are_made_where_they_pay() -> None:
    speculation = Speculation(PromptLookup(3), 16)
    steps(speculation.cost, 0.003, 0.0002)
    assert speculation.lengths([0.98], [16], 1, 60) == [16]
    assert speculation.lengths([0.98], [5], 1, 60) == [5]
    assert speculation.lengths([0.98], [16], 1, 3) == [3]
    assert 1 <= speculation.lengths([0.4], [16], 1, 60)[0] <= 4
    assert speculation.lengths([0.03], [16], 1, 60) == [0]
    first, second = speculation.lengths([0.95, 0.3], [16, 16], 2, 60)
    assert first > second
    # Where the time of a step is its tokens', a guess is worth less than another stream's token.
    steps(speculation.cost, 0.0001, 0.003)
    assert speculation.lengths([0.9] * 4, [16] * 4, 4, 60) == [0] * 4


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes on when a model computes, and at no other time."""
    now = [0.0]

    def compute(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(fakes, "time", SimpleNamespace(sleep=compute))
    for module in ("core", "speculative"):
        monkeypatch.setattr(f"pymistral.engine.{module}.perf_counter", lambda: now[0])


@pytest.mark.usefixtures("clock")
def test_what_a_draft_model_takes_counts_once() -> None:
    small = Lookalike(0.0, num_blocks=64, block_size=4, delay=0.002)
    core = make_core(FakeRunner(delay=0.01), speculation=Speculation(DraftModel(small, VOCAB), 8))
    submit(core, [65, 66], Params(max_len=100))
    drain(core)
    assert core.snapshot().drafted_tokens > 40
    assert core.speculation is not None
    assert core.speculation.drafter.seconds == pytest.approx(0.002)
    assert core.speculation.cost.each < 0.0005  # whatever the step has to check, it takes 10 ms


@pytest.mark.usefixtures("clock")
def test_a_draft_model_that_takes_too_long_is_not_asked() -> None:
    small = Lookalike(0.0, num_blocks=64, block_size=4, delay=0.002)
    core = make_core(FakeRunner(delay=0.001), speculation=Speculation(DraftModel(small, VOCAB), 4))
    _, collector = submit(core, [65, 66], Params(max_len=100))
    drain(core)
    assert collector.tokens[0] == greedy_alone([65, 66], 100, 128, 0.0)[0]
    assert 5 <= collector.end.usage.drafted_tokens < 40


def test_text_does_not_wait_for_a_draft_model() -> None:
    """Which has to read the whole prompt before its first guess."""
    collector = Collector()
    known: list[tuple[int, int]] = []

    class Observed(Lookalike):
        def forward(self, segments: Sequence[Any], meanwhile: Callable[[], object] | None = None) -> np.ndarray:
            known.append((len(job.sequences[0].tokens) - 3, len(collector.tokens.get(0, ()))))
            return super().forward(segments, meanwhile)

    core = make_core(FakeRunner(), speculation=Always(DraftModel(Observed(1.0), VOCAB), 3))
    core.add(job := core.prepare(EngineRequest([65, 66, 67], Params(max_len=20)), collector))
    drain(core)
    assert known
    assert all(made == received for made, received in known)


def test_many_streams_are_not_guessed_for() -> None:
    core = make_core(FakeRunner(max_num_seqs=16), max_num_seqs=16, speculation=Always(Foresight([]), 2))
    for i in range(9):
        submit(core, [65, 66 + i], Params(max_len=3))
    core.step()
    core.step()
    assert core.stats.drafted_tokens == 0


def test_a_request_that_ends_early_returns_exactly_its_text() -> None:
    core = make_core(FakeRunner(eos_bonus=3.0), speculation=Always(Foresight([], 3.0), 8))
    for start in range(65, 90):
        _, collector = submit(core, [start, 66], Params(max_len=40))
        drain(core)
        tokens, reason = greedy_alone([start, 66], 40, 128, 3.0)
        assert (collector.tokens.get(0, []), collector.finished[0].reason) == (tokens, reason)
        assert EOS not in collector.tokens.get(0, [])


def test_a_forced_token_behind_one_that_was_not_guessed_is_no_guess_come_true() -> None:
    """The guess stands at the position of the token before it."""

    class Stubborn(Foresight):
        def draft(self, wanted: list[tuple[Any, int]]) -> list[list[int]]:
            return [[ord("X")] * count for _, count in wanted]

    def answer(speculation: Speculation | None) -> list[int]:
        core = make_core(FakeRunner(), speculation=speculation)
        _, collector = submit(core, [65, 66], Params(max_len=60), constraint=Doubles())
        drain(core)
        return collector.tokens[0]

    assert answer(Always(Stubborn([]), 4)) == answer(None)


def test_engine_requests_need_nothing_new() -> None:
    core = EngineCore(FakeRunner(), ByteTokenizer(), eos_token_ids=[EOS], speculation=Speculation(PromptLookup(2), 8))
    collector = Collector()
    core.add(core.prepare(EngineRequest([65, 66, 65, 66], Params(max_len=12)), collector))
    drain(core)
    assert collector.tokens[0] == greedy_alone([65, 66, 65, 66], 12, 128, 0.0)[0]
