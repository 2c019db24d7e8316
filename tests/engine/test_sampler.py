from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymistral.engine.sampler import Dry as DryState
from pymistral.engine.sampler import SampledToken, Sampler, sample_rows
from pymistral.errors import InferenceError
from pymistral.nn.sampling import SamplingProgram

from . import reference_sampler as reference
from .fakes import Dry, Params

BREAKERS = frozenset({7})


@cache
def runner(vocab: int) -> Any:
    return SimpleNamespace(vocab_size=vocab, sample=SamplingProgram(vocab, threads=1).run)


def sample(sampler: Sampler, logits: np.ndarray) -> SampledToken:
    (sampled,) = sample_rows(runner(logits.size), logits[None], [sampler])
    if isinstance(sampled, Exception):
        raise sampled
    return sampled


def make(params: Params, context: list[int], prompt_length: int, vocab: int, **options: Any) -> Sampler:
    tokens = list(context[:prompt_length])
    sampler = Sampler(params, tokens, vocab, seed=options.pop("seed", 5), breakers=BREAKERS, **options)
    for token in context[prompt_length:]:
        sampler.accept(token)
        tokens.append(token)
    return sampler


penalties = st.none() | st.floats(-2, 2, width=32)
all_params = st.builds(
    Params,
    temperature=st.none() | st.sampled_from([0.0, 1e-9]) | st.floats(0.1, 3),
    top_k=st.none() | st.integers(-1, 90),
    top_p=st.none() | st.floats(0.0, 1.2),
    min_p=st.none() | st.floats(-0.1, 1.2),
    frequency_penalty=penalties,
    presence_penalty=penalties,
    repetition_penalty=st.none() | st.floats(0.5, 2, width=32),
    logits_bias=st.none() | st.dictionaries(st.integers(0, 79), st.floats(-5, 5, width=32), max_size=4),
    dry_params=st.none() | st.builds(Dry, st.floats(0, 2, width=32), st.floats(1, 2, width=32), st.integers(0, 4)),
)


@given(all_params, st.lists(st.integers(0, 8), min_size=1, max_size=60), st.data(), st.integers(0, 2**32), st.integers(-2, 2**64))
def test_matches_the_reference(params: Params, context: list[int], data: st.DataObject, number: int, seed: int) -> None:
    vocab = 80
    prompt_length = data.draw(st.integers(1, len(context)))
    logits = (np.random.default_rng(number).standard_normal(vocab) * 3).astype(np.float32)
    before = logits.copy()
    adjusted: list[np.ndarray] = []
    make_one = lambda **options: make(params, context, prompt_length, vocab, seed=seed, return_logprobs=True, **options)  # noqa: E731
    params.top_n_logprobs = 5
    result = sample(make_one(), logits)
    assert sample(make_one(processors=[lambda row, tokens: adjusted.append(row.copy())]), logits) == result
    np.testing.assert_array_equal(logits, before)
    expected = reference.adjusted_logits(logits, params, context, prompt_length, BREAKERS)
    np.testing.assert_allclose(adjusted[0], expected, rtol=1e-4, atol=1e-4)

    temperature = 1.0 if params.temperature is None else params.temperature
    probs = reference.probabilities(adjusted[0].astype(np.float64), temperature)
    assert reference.is_drawn(result.id, probs, params, reference.uniform(seed, 0, len(context)))
    assert result.logprob == pytest.approx(math.log(probs[result.id]), abs=1e-5)
    assert [token for token, _ in result.top] == np.argsort(-adjusted[0], kind="stable")[:5].tolist()
    np.testing.assert_allclose([p for _, p in result.top], np.log(np.sort(probs)[::-1][:5]), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
        {"top_p": 0.95, "min_p": 0.2},
    ],
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    vocab, draws = 300, 20_000
    logits = (np.random.default_rng(3).standard_normal(vocab) * 2).astype(np.float32)
    params = Params(**{"temperature": 1.0, **options})
    expected = reference.cut(reference.probabilities(logits.astype(np.float64), params.temperature or 1.0), params)
    tokens: list[int] = [0]
    sampler = Sampler(params, tokens, vocab, seed=11)
    counts = np.zeros(vocab)
    for _ in range(draws):
        counts[sample(sampler, logits).id] += 1
        tokens.append(0)
    assert not counts[expected == 0].any()
    likely = expected * draws >= 5
    rest = 1 - expected[likely].sum()
    chi2 = float(((counts[likely] - draws * expected[likely]) ** 2 / (draws * expected[likely])).sum())
    if rest * draws > 5:
        chi2 += float((counts[~likely].sum() - draws * rest) ** 2 / (draws * rest))
    degrees = int(likely.sum())
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 3))
def test_dry_step_by_step_equals_dry_of_the_whole_context(context: list[int], allowed: int) -> None:
    state = DryState(0.8, 1.25, allowed, frozenset({4}))
    for end, token in enumerate(context, start=1):
        state.add(token)
        ids, values = state.penalties()
        expected = reference.dry_penalties(context[:end], Dry(0.8, 1.25, allowed), frozenset({4}))
        assert dict(zip(ids.tolist(), values.tolist(), strict=True)) == pytest.approx(expected, rel=1e-4)


def test_dry_with_an_absurd_base_forbids_the_token() -> None:
    state = DryState(1.0, 1e30, 1, frozenset())
    for token in [1, 2, 3, 1, 2]:
        state.add(token)
    ids, values = state.penalties()
    assert ids.tolist() == [3]
    assert values[0] > 1e29
    for token in [3, 1, 2]:
        state.add(token)
    assert np.isinf(state.penalties()[1]).all()


def test_random_numbers_are_uniform_and_independent() -> None:
    u = np.array([reference.uniform(seed, choice, position) for seed in range(20) for choice in range(10) for position in range(100)])
    assert ((u >= 0) & (u < 1)).all()
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 49 + 5 * math.sqrt(98)
    for shift in (1, 100, 1000):
        assert abs(np.corrcoef(u[:-shift], u[shift:])[0, 1]) < 0.03
    assert reference.uniform(-1, 0, 0) == reference.uniform(2**64 - 1, 0, 0)


def test_a_draw_depends_on_seed_choice_and_position_only() -> None:
    logits = np.zeros(1000, np.float32)
    drawn = {
        (seed, choice, length): sample(Sampler(Params(temperature=1.0), [0] * length, 1000, seed=seed, choice=choice), logits).id
        for seed in range(3)
        for choice in range(3)
        for length in range(1, 4)
    }
    assert len(set(drawn.values())) > 20
    again = Sampler(Params(temperature=1.0), [5] * 2, 1000, seed=1, choice=2)
    rows = np.stack([logits, logits])
    other = Sampler(Params(temperature=0.3), [1], 1000, seed=9)
    assert sample_rows(runner(1000), rows, [other, again])[1] == SampledToken(drawn[1, 2, 2])


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.array([1, 3, 3, 0], np.float32)
    for params in (Params(temperature=0.0), Params(temperature=None, top_k=1), Params(temperature=0.0, logits_bias={0: 1.0})):
        assert sample(Sampler(params, [0], 4, seed=1), logits).id == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error_of_their_row(bad: float, temperature: float) -> None:
    row = np.full(4, -np.inf, np.float32)
    row[2] = bad
    rows = np.stack([row, np.arange(4, dtype=np.float32)])
    before = rows.tobytes()
    samplers = [Sampler(Params(temperature=temperature, top_k=1, logits_bias={1: 0.5}), [0], 4, seed=1) for _ in range(2)]
    first, second = sample_rows(runner(4), rows, samplers)
    assert rows.tobytes() == before
    assert isinstance(first, InferenceError)
    assert isinstance(second, SampledToken)
    assert second.id == 3


@pytest.mark.parametrize("vocab", [300, 1024])
def test_choices_of_one_row_do_not_see_each_others_bias(vocab: int) -> None:
    """The kernel changes a row for as long as it samples from it."""
    logits = np.zeros((1, vocab), np.float32)
    both = SimpleNamespace(vocab_size=vocab, sample=SamplingProgram(vocab, threads=2).run)
    tokens = [vocab - 1 - i for i in range(32)]
    samplers = [Sampler(Params(temperature=0.0, logits_bias={token: 1.0}), [0], vocab, seed=1) for token in tokens]
    assert sample_rows(both, logits, samplers, [0] * 32) == [SampledToken(token) for token in tokens]
    assert not logits.any()


def test_processors_see_a_copy_and_the_context() -> None:
    logits = np.zeros(4, np.float32)
    seen: list[list[int]] = []

    def in_place(row: np.ndarray, context: Any) -> None:
        seen.append(list(context))
        row[2] = 5.0

    def returns(row: np.ndarray, context: Any) -> np.ndarray:
        return -row.astype(np.float64)

    sampler = Sampler(Params(temperature=0.0), [1, 3], 4, seed=1, processors=[in_place])
    assert sample(sampler, logits).id == 2
    assert seen == [[1, 3]]
    assert not logits.any()
    assert sample(Sampler(Params(temperature=0.0), [1], 4, seed=1, processors=[in_place, returns]), logits).id == 0
    with pytest.raises(InferenceError, match=r"shape \(2,\)"):
        sample(Sampler(Params(temperature=0.0), [1], 4, seed=1, processors=[lambda row, context: row[:2]]), logits)

    def text(row: np.ndarray, context: Any) -> str:
        return "warmer"

    with pytest.raises(InferenceError, match=r"processor text returned a str that is no array of numbers; return one of shape \(4,\)"):
        sample(Sampler(Params(temperature=0.0), [1], 4, seed=1, processors=[text]), logits)  # type: ignore[list-item]
