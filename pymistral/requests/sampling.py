"""How the next token is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from ..errors import ModelLoadError, RequestValidationError

StopTokens = str | Sequence[str | int]
"""What ends an answer: one string, or strings and token ids in any mix."""

DRY_SEQUENCE_BREAKERS = ("\n", ":", '"', "*")

_MOST = 1e30  # of what is added to logits, or multiplies them: these are float32, and what grows out of it must stay so


@dataclass(frozen=True, kw_only=True)
class DrySamplingParams:
    """DRY (Don't Repeat Yourself): tokens that would continue a repetition are made less likely, the more the longer it is.

    Parameters
    ----------
    multiplier
        Strength of the penalty; 0 turns it off.
    base
        The penalty grows by this factor with each token beyond `allowed_length`.
    allowed_length
        Repetitions up to this many tokens are free.
    sequence_breakers
        Strings that no repetition reaches across.
    """

    multiplier: float = 0.0
    base: float = 1.75
    allowed_length: int = 2
    sequence_breakers: Sequence[str] = DRY_SEQUENCE_BREAKERS

    def __post_init__(self) -> None:
        _number("multiplier", self.multiplier, at_least=0, remedy="0 turns DRY off, 0.8 is a usual value")
        _number("base", self.base, at_least=1, remedy="1.75 is the usual value")
        _integer("allowed_length", self.allowed_length, at_least=0, at_most=2**31 - 1, remedy="2 is the usual value")
        breakers = self.sequence_breakers
        if isinstance(breakers, str) or not isinstance(breakers, Iterable) or not all(isinstance(s, str) and s for s in breakers):
            raise RequestValidationError(f"sequence_breakers must be a list of non-empty strings, got {breakers!r}")
        object.__setattr__(self, "sequence_breakers", tuple(breakers))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. What is left out stays open: temperature 1, nothing cut, nothing penalised.

    The object is immutable and checked when made; `dataclasses.replace` gives a changed copy.

    Parameters
    ----------
    temperature
        Divides the logits. 0 is greedy; None means 1.
    top_k
        Draw from the `top_k` most likely tokens only.
    top_p
        Draw from the smallest set of tokens whose probabilities sum to at least `top_p`.
    min_p
        Drop tokens less likely than `min_p` times the most likely one.
    top_n_logprobs
        How many of the most likely tokens to report at each position, when logprobs are asked for.
    frequency_penalty
        Subtracted from a token's logit once for every time it was generated.
    presence_penalty
        Subtracted once from the logit of a token that was generated at all.
    repetition_penalty
        Logits of tokens seen before are divided by it when positive, multiplied when negative. 1 changes nothing.
    stop_toks
        Strings or token ids that end the answer. They are not part of it.
    max_len
        The most tokens to generate. None: until the context is full.
    logits_bias
        Token id to a number that is added to its logit.
    n_choices
        How many answers to generate for the same prompt.
    dry_params
        Parameters of DRY sampling.
    seed
        The same seed gives the same answer, whatever else the engine works on.

    Raises
    ------
    RequestValidationError
        A value is of the wrong type, not finite or out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_n_logprobs: int = 0
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop_toks: StopTokens | None = None
    max_len: int | None = None
    logits_bias: Mapping[int, float] | None = None
    n_choices: int = 1
    dry_params: DrySamplingParams | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            _number("temperature", self.temperature, at_least=0, remedy="0 is greedy, None means 1")
        if self.top_k is not None:
            _integer("top_k", self.top_k, at_least=1, remedy="None means no cut")
        if self.top_p is not None:
            _number("top_p", self.top_p, above=0, at_most=1, remedy="None means no cut")
        if self.min_p is not None:
            _number("min_p", self.min_p, at_least=0, at_most=1, remedy="None means no cut")
        _integer("top_n_logprobs", self.top_n_logprobs, at_least=0, remedy="0 reports the chosen token alone")
        if self.frequency_penalty is not None:
            _number("frequency_penalty", self.frequency_penalty, at_least=-_MOST, at_most=_MOST, remedy="None means no penalty")
        if self.presence_penalty is not None:
            _number("presence_penalty", self.presence_penalty, at_least=-_MOST, at_most=_MOST, remedy="None means no penalty")
        if self.repetition_penalty is not None:
            _number("repetition_penalty", self.repetition_penalty, at_least=1 / _MOST, at_most=_MOST, remedy="None means no penalty")
        if self.max_len is not None:
            _integer("max_len", self.max_len, at_least=1, remedy="None means until the context is full")
        _integer("n_choices", self.n_choices, at_least=1, at_most=1 << 16, remedy="1 is the default")
        if self.seed is not None:
            _integer("seed", self.seed, at_least=0, at_most=2**64 - 1, remedy="None draws a fresh one")
        if self.dry_params is not None and not isinstance(self.dry_params, DrySamplingParams):
            raise RequestValidationError(f"dry_params must be DrySamplingParams, got {self.dry_params!r}")
        if self.stop_toks is not None:
            object.__setattr__(self, "stop_toks", _stop_tokens(self.stop_toks))
        if self.logits_bias is not None:
            object.__setattr__(self, "logits_bias", _logits_bias(self.logits_bias))
        for name in ("top_k", "top_n_logprobs", "max_len", "n_choices", "seed"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(value))  # NumPy's whole numbers would overflow in sums

    @classmethod
    def deterministic(cls) -> SamplingParams:
        """Greedy: always the most likely token."""
        return cls(temperature=0.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings among `stop_toks`."""
        return tuple(stop for stop in self.stop_toks or () if isinstance(stop, str))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids among `stop_toks`."""
        return tuple(stop for stop in self.stop_toks or () if not isinstance(stop, str))


def _number(
    name: str,
    value: object,
    *,
    remedy: str,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    if math.isfinite(number) and at_least <= number <= at_most and number > above:
        return
    limits = [f"at least {at_least:g}"] if at_least > -math.inf else [f"above {above:g}"] if above > -math.inf else []
    limits += [f"at most {at_most:g}"] if at_most < math.inf else []
    problem = f"{name} must be a finite number {' and '.join(limits)}".rstrip()
    raise RequestValidationError(f"{problem}, got {value!r}", f"; {remedy}")


def _integer(name: str, value: object, *, remedy: str, at_least: int, at_most: int | None = None) -> None:
    if isinstance(value, Integral) and not isinstance(value, bool) and at_least <= int(value) <= (at_most or math.inf):
        return
    limits = f"of at least {at_least}" + (f" and at most {at_most}" if at_most is not None else "")
    raise RequestValidationError(f"{name} must be a whole number {limits}, got {value!r}", f"; {remedy}")


def _stop_tokens(stop: StopTokens) -> tuple[str | int, ...]:
    if not isinstance(stop, str | Sequence) or isinstance(stop, bytes | bytearray):  # whose bytes would be taken for token ids
        raise RequestValidationError(f"stop_toks must be a string or a list of strings and token ids, got {stop!r}")
    stops: tuple[str | int, ...] = (stop,) if isinstance(stop, str) else tuple(stop)
    for entry in stops:
        if isinstance(entry, str):
            if not entry:
                raise RequestValidationError("stop_toks holds an empty string, which would end every answer at once; leave it out")
        else:
            _integer("an entry of stop_toks that is no string", entry, at_least=0, remedy="it is a token id")
    return tuple(entry if isinstance(entry, str) else int(entry) for entry in stops)


def _logits_bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestValidationError(f"logits_bias must map token ids to numbers, got {bias!r}")
    for token, value in bias.items():
        _integer("a key of logits_bias", token, at_least=0, remedy="it is a token id")
        _number(f"logits_bias[{token}]", value, at_least=-_MOST, at_most=_MOST, remedy="-100 bans a token in effect, 100 forces it")
    return dict(bias)


def generation_defaults(config: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from ``generation_config.json``, where 0 and 1 stand for what is off, and nothing at all for greedy."""
    recommended = {name: config[name] for name in ("temperature", "top_k", "top_p", "min_p") if config.get(name) is not None}
    if config.get("do_sample") is False or not recommended:
        sampling = SamplingParams.deterministic()
    else:
        neutral = {"top_k": (0, -1), "top_p": (1,), "min_p": (0,)}
        recommended = {name: value for name, value in recommended.items() if value not in neutral.get(name, ())}
        sampling = _recommended(SamplingParams(), recommended)
    penalty = config.get("repetition_penalty")
    return sampling if penalty in (None, 1) else _recommended(sampling, {"repetition_penalty": penalty})


def _recommended(sampling: SamplingParams, values: dict[str, Any]) -> SamplingParams:
    try:
        return replace(sampling, **values)
    except RequestValidationError as error:
        raise ModelLoadError(f"the model's generation config recommends what cannot be: {error.problem}") from error
