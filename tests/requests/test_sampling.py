from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymistral import DrySamplingParams, SamplingParams
from pymistral.errors import PymistralError, RequestValidationError


def test_everything_is_open_by_default() -> None:
    params = SamplingParams()
    assert params.n_choices == 1
    assert params.top_n_logprobs == 0
    assert all(getattr(params, name) is None for name in ("temperature", "top_k", "top_p", "min_p", "max_len", "stop_toks", "seed"))


def test_deterministic_is_greedy() -> None:
    assert SamplingParams.deterministic() == SamplingParams(temperature=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (math.nan, math.inf, -0.1, "1", True, [1], 10**400)),
        *(("top_k", value) for value in (0, -1, 1.5, "40", True)),
        *(("top_p", value) for value in (0, 1.1, -0.5, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
        *(("top_n_logprobs", value) for value in (-1, None, 1.0)),
        *(("frequency_penalty", value) for value in (math.nan, -math.inf, "1", 1e39, -(10**400))),
        *(("presence_penalty", value) for value in (math.nan, math.inf, -1e39)),
        *(("repetition_penalty", value) for value in (0, -1, math.nan, 1e-40, 1e39)),
        *(("max_len", value) for value in (0, -5, 2.5)),
        *(("n_choices", value) for value in (0, None, 1.0, 1 << 17)),
        *(("seed", value) for value in (-1, 2**64, 0.5)),
        *(("stop_toks", value) for value in ("", [""], [1.5], [-1], 7, [None], b"stop")),
        *(("logits_bias", value) for value in ([1], {"1": 2}, {-1: 0}, {1: math.nan}, {1: math.inf}, {1: None}, {1: 1e39})),
        ("dry_params", {"multiplier": 1}),
    ],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(RequestValidationError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_the_message_says_what_was_wrong_and_what_to_do() -> None:
    with pytest.raises(RequestValidationError) as caught:
        SamplingParams(temperature=math.nan)
    assert str(caught.value) == "temperature must be a finite number at least 0, got nan; 0 is greedy, None means 1"
    assert isinstance(caught.value, PymistralError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(RequestValidationError) as caught:
        SamplingParams(logits_bias={"a": 1})  # type: ignore[dict-item]
    assert str(caught.value) == "a key of logits_bias must be a whole number of at least 0, got 'a'; it is a token id"
    with pytest.raises(RequestValidationError) as caught:
        SamplingParams(stop_toks=[1.5])  # type: ignore[list-item]
    assert str(caught.value) == "an entry of stop_toks that is no string must be a whole number of at least 0, got 1.5; it is a token id"


def test_numpy_numbers_are_numbers() -> None:
    numbers = {"top_k": np.int64(3), "seed": np.int64(7), "max_len": np.uint8(200), "n_choices": np.int8(2), "top_n_logprobs": np.int32(1)}
    params = SamplingParams(temperature=np.float32(0.5), stop_toks=[np.int16(5)], **numbers)  # type: ignore[arg-type]
    kept = {name: getattr(params, name) for name in numbers}
    assert kept == numbers
    assert {type(value) for value in [*kept.values(), *params.stop_ids]} == {int}, "NumPy's overflow where Python's grow"


def test_stop_tokens() -> None:
    assert SamplingParams(stop_toks="\n").stop_toks == ("\n",)
    params = SamplingParams(stop_toks=["a", 5, "b"])
    assert (params.stop_strings, params.stop_ids) == (("a", "b"), (5,))
    assert SamplingParams().stop_strings == ()


def test_it_is_immutable_and_replace_checks() -> None:
    params = SamplingParams(temperature=1)
    with pytest.raises(FrozenInstanceError):
        params.temperature = 2  # type: ignore[misc]
    assert replace(params, top_k=3).temperature == 1
    with pytest.raises(RequestValidationError):
        replace(params, top_k=0)


def test_the_bias_is_a_copy() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logits_bias=bias)
    bias.clear()
    assert params.logits_bias == {1: 2.0}


@pytest.mark.parametrize(
    "more",
    [
        *({"multiplier": value} for value in (-1, 10**400)),
        *({"base": value} for value in (0.5, 10**400)),
        *({"allowed_length": value} for value in (-1, 10**400)),
        *({"sequence_breakers": value} for value in ("\n", [""], None, 5)),
    ],
)
def test_dry_params_are_checked(more: dict[str, object]) -> None:
    with pytest.raises(RequestValidationError, match=next(iter(more))):
        DrySamplingParams(**more)  # type: ignore[arg-type]


@given(value=st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans(), st.lists(st.integers())))
@pytest.mark.parametrize("field", list(SamplingParams.__dataclass_fields__))
def test_any_value_is_taken_or_refused_cleanly(field: str, value: object) -> None:
    message = ""
    try:
        kept = getattr(SamplingParams(**{field: value}), field)  # type: ignore[arg-type]
    except RequestValidationError as error:
        kept, message = None, str(error)
    assert not message or field in message
    assert not isinstance(kept, float) or math.isfinite(kept)
