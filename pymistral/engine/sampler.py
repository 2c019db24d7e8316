"""From logits to a token: penalties, bias, processors, grammar, temperature, top-k, top-p, min-p, in this order.

The semantics are those of mistral.rs. `Sampler` holds what belongs to one choice: what the kernel reads lies in its `SamplingRow`, and what
must run in Python (logits processors, grammars) runs between two calls of the kernel. A draw depends on the logits and on (seed, choice,
position) alone, so it is the same in every batch and after a preemption.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, log

import numpy as np
from numpy.typing import NDArray

from ..errors import InferenceError
from ..kernels.cpu import sampling_layout as at
from ..nn.memory import address, address_in_step
from ..nn.sampling import SamplingRow
from .types import ConstraintState, LogitsProcessor, Runner, Sampling

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

_FLOAT32 = np.dtype(np.float32)
GREEDY_BELOW = 1e-7
LONGEST_DRY_MATCH = 50


@dataclass(slots=True)
class SampledToken:
    """A token, and its log probability if that was wanted."""

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


class TokenCounts:
    """Which tokens a choice has seen, and how often it generated each, kept up to date token by token."""

    __slots__ = ("_counts", "_ids", "_slots", "_vocab_size")

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots: dict[int, int] = {}
        self._ids = array("i")
        self._counts = array("f")

    def add(self, token: int, generated: bool) -> None:
        slot = self._slots.get(token)
        if slot is None:
            if token >= self._vocab_size:
                return
            slot = self._slots[token] = len(self._ids)
            self._ids.append(token)
            self._counts.append(0.0)
        if generated:
            self._counts[slot] += 1.0

    def addresses(self) -> tuple[int, int, int]:
        """Where the ids and the counts lie until the next `add`, and how many there are."""
        ids, size = self._ids.buffer_info()
        return ids, self._counts.buffer_info()[0], size


class Dry:
    """DRY, "don't repeat yourself": the longer the run of tokens that a next token would repeat, the less likely it becomes.

    ``matches`` maps each earlier position of the last token to how many tokens up to there equal those at the end. The next step's matches
    follow from it, so that no step looks at the whole context.
    """

    __slots__ = ("_allowed", "_base", "_breakers", "_matches", "_multiplier", "_positions", "_tokens")

    def __init__(self, multiplier: float, base: float, allowed_length: int, breakers: frozenset[int]) -> None:
        self._multiplier, self._base, self._allowed, self._breakers = multiplier, base, allowed_length, breakers
        self._positions: dict[int, list[int]] = {}
        self._matches: dict[int, int] = {}
        self._tokens: list[int] = []

    def add(self, token: int) -> None:
        tokens, before = self._tokens, self._matches
        positions = self._positions.setdefault(token, [])
        extends = bool(tokens) and tokens[-1] not in self._breakers
        if extends:
            self._matches = {p: min(before.get(p - 1, 0) + 1, LONGEST_DRY_MATCH) for p in positions}
        else:
            self._matches = dict.fromkeys(positions, 1)
        positions.append(len(tokens))
        tokens.append(token)

    def penalties(self) -> tuple[I32, F32]:
        """Which tokens to make less likely, and what to subtract from their logits."""
        longest: dict[int, int] = {}
        for position, length in self._matches.items():
            follower = self._tokens[position + 1]
            if length >= self._allowed and length > longest.get(follower, 0) and follower not in self._breakers:
                longest[follower] = length
        ids = np.fromiter(longest.keys(), np.int32, len(longest))
        excess = np.fromiter(longest.values(), np.float32, len(longest)) - np.float32(self._allowed)
        with np.errstate(over="ignore"):
            return ids, np.float32(self._multiplier) * np.float32(self._base) ** excess


class Sampler:
    """Chooses the tokens of one choice.

    Parameters
    ----------
    sampling
        The request's parameters.
    tokens
        The prompt and, later, what the engine appends to it: the same list object.
    seed, choice
        What, with the position, the random numbers depend on.
    breakers
        The tokens that end DRY's matches.
    """

    __slots__ = (
        "_allowed",
        "_bias",
        "_dry",
        "_logits",
        "_top",
        "constraint",
        "counts",
        "dry",
        "in_python",
        "processors",
        "row",
        "tokens",
        "vocab_size",
    )

    def __init__(
        self,
        sampling: Sampling,
        tokens: list[int],
        vocab_size: int,
        *,
        seed: int,
        choice: int = 0,
        breakers: frozenset[int] = frozenset(),
        processors: Sequence[LogitsProcessor] = (),
        constraint: ConstraintState | None = None,
        return_logprobs: bool = False,
    ) -> None:
        self.tokens, self.vocab_size = tokens, vocab_size
        self.processors, self.constraint = tuple(processors), constraint
        self.in_python = bool(processors)
        """Python has work to do between the adjustments and the draw."""
        self.row = SamplingRow()
        self._set_parameters(sampling, seed, choice)
        self._set_bias(sampling.logits_bias or {})
        self._set_logprobs(min(sampling.top_n_logprobs, vocab_size) if return_logprobs else -1)
        dry = sampling.dry_params
        numbers = self.row.numbers
        penalised = numbers[at.FREQUENCY] != 0.0 or numbers[at.PRESENCE] != 0.0 or numbers[at.REPETITION] != 1.0
        self.counts = TokenCounts(vocab_size) if penalised else None
        self.dry = Dry(dry.multiplier, dry.base, dry.allowed_length, breakers) if dry is not None and dry.multiplier != 0.0 else None
        for token in tokens if self.counts or self.dry else ():
            self._observe(token, generated=False)

    def _set_parameters(self, sampling: Sampling, seed: int, choice: int) -> None:
        """Everything that is off is made neutral."""
        words, numbers = self.row.words, self.row.numbers
        temperature = 1.0 if sampling.temperature is None else sampling.temperature
        top_k, top_p, min_p = sampling.top_k or 0, sampling.top_p or 1.0, sampling.min_p or 0.0
        words[at.SEED] = signed(seed)
        words[at.CHOICE] = choice
        words[at.TOP_K] = min(max(top_k, 0), self.vocab_size)
        numbers[at.TEMPERATURE] = temperature if temperature >= GREEDY_BELOW else 0.0
        numbers[at.TOP_P] = top_p if 0.0 < top_p < 1.0 else 1.0
        numbers[at.MIN_P] = min_p if 0.0 < min_p < 1.0 else 0.0
        numbers[at.FREQUENCY] = sampling.frequency_penalty or 0.0
        numbers[at.PRESENCE] = sampling.presence_penalty or 0.0
        numbers[at.REPETITION] = 1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty

    def _set_bias(self, bias: Mapping[int, float]) -> None:
        ids, values = np.fromiter(bias.keys(), np.int32, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
        self._bias = ids, values
        words = self.row.words
        words[at.BIAS_IDS], words[at.BIAS_VALUES], words[at.BIAS_SIZE] = address(ids), address(values), len(bias)

    def _set_logprobs(self, top_n: int) -> None:
        ids, values = np.empty(max(top_n, 0), np.int32), np.empty(max(top_n, 0), np.float32)
        self._top = ids, values
        words = self.row.words
        words[at.TOP_N], words[at.TOP_IDS], words[at.TOP_VALUES] = top_n, address(ids), address(values)

    def _set_mask(self, allowed: I32 | None) -> None:
        """The bits of the tokens that a grammar allows; the kernel applies them first of all, and again after the request's functions."""
        if allowed is not None and (allowed.dtype != np.int32 or 32 * allowed.size < self.vocab_size):
            # the kernel trusts it
            raise ValueError(f"a mask of {allowed.size} words of {allowed.dtype} for a vocabulary of {self.vocab_size}")
        self._allowed = allowed
        self.row.words[at.MASK] = 0 if allowed is None else address(allowed)

    def _observe(self, token: int, generated: bool) -> None:
        if self.counts is not None:
            self.counts.add(token, generated)
        if self.dry is not None:
            self.dry.add(token)

    def accept(self, token: int) -> Sequence[int]:
        """Take note of the token that was sampled; return those that the grammar forces to follow, of which note is taken too."""
        forced = self.constraint.accept(token) if self.constraint is not None else ()
        if self.counts is not None or self.dry is not None:
            for observed in (token, *forced):
                self._observe(observed, generated=True)
        return forced

    def prepare(self, logits: int) -> None:
        """Point the row to the logits at an address, and to what has changed since the last token."""
        words = self.row.words
        words[at.LOGITS] = logits
        words[at.POSITION] = len(self.tokens)
        if self.counts is not None:
            words[at.COUNT_IDS], words[at.COUNT_VALUES], words[at.COUNT_SIZE] = self.counts.addresses()
        if self.dry is not None:
            self._dry = ids, values = self.dry.penalties()
            words[at.DRY_IDS], words[at.DRY_VALUES], words[at.DRY_SIZE] = address(ids), address(values), ids.size
        if self.constraint is not None:
            self._set_mask(self.constraint.allowed())
        if self.in_python:
            self._logits: F32 = np.empty(at.whole_blocks(self.vocab_size), np.float32)
            words[at.MODE], words[at.OUT] = at.ADJUST, address(self._logits)

    def guess(self, logits: int, position: int) -> None:
        """Point the row to the logits of another model, which guesses the token of a position that is to be sampled later.

        Parameters and random number are those that the position will have; grammar, functions and DRY are left out.
        """
        words = self.row.words
        words[at.LOGITS], words[at.POSITION], words[at.MODE] = logits, position, at.SAMPLE
        words[at.MASK] = words[at.DRY_SIZE] = 0
        if self.counts is not None:
            words[at.COUNT_IDS], words[at.COUNT_VALUES], words[at.COUNT_SIZE] = self.counts.addresses()

    def process(self) -> Exception | None:
        """Run the request's own functions on the logits that the kernel has adjusted. Returns what they raise."""
        logits = self._logits[: self.vocab_size]
        try:
            for processor in self.processors:
                logits = run_processor(processor, logits, self.tokens)
        except Exception as error:
            return error
        self._logits = np.ascontiguousarray(logits)
        self.row.words[at.MODE], self.row.words[at.LOGITS] = at.ADJUSTED, address(self._logits)
        return None

    def result(self) -> SampledToken | InferenceError:
        """What the kernel made of the row."""
        words, numbers = self.row.words, self.row.numbers
        peak, token = numbers[at.PEAK], words[at.TOKEN]
        if not isfinite(peak):
            what = "NaN" if peak != peak else "infinity" if peak > 0 else "no finite value: every token is forbidden"
            return InferenceError(f"the logits hold {what}")
        if words[at.TOP_N] < 0:
            return SampledToken(token)
        temperature = numbers[at.TEMPERATURE] or 1.0
        norm = peak / temperature + log(numbers[at.TOTAL])
        ids, values = self._top
        top = [(token, value / temperature - norm) for token, value in zip(ids.tolist(), values.tolist(), strict=True)]
        top.sort(key=lambda pair: -pair[1])
        return SampledToken(token, numbers[at.VALUE] / temperature - norm, top)


def run_processor(processor: LogitsProcessor, logits: F32, tokens: Sequence[int]) -> F32:
    """Call a user's function on the logits, and check what it returns."""
    name = getattr(processor, "__name__", type(processor).__name__)
    try:
        result = processor(logits, tokens)
    except BaseException as error:  # SystemExit, too: the thread is that of all requests
        raise InferenceError(f"the logits processor {name} raised {type(error).__name__}: {error}") from error
    if result is None:
        return logits
    try:
        row = np.asarray(result, np.float32)
    except (TypeError, ValueError) as error:
        what = f"a {type(result).__name__} that is no array of numbers"
        raise InferenceError(f"the logits processor {name} returned {what}; return one of shape {logits.shape}, or None") from error
    if row.shape != logits.shape:
        what = f"an array of shape {row.shape}"
        raise InferenceError(f"the logits processor {name} returned {what}; return one of shape {logits.shape}, or None")
    return row


def sample_rows(
    runner: Runner, logits: F32, samplers: Sequence[Sampler], rows: Sequence[int] | None = None
) -> list[SampledToken | Exception]:
    """One token for each sampler, from its row of the logits (``rows``; one each, if that is left out).

    An error takes the place of the token that it prevented, so that it stays its own request's.
    """
    if not samplers:
        return []
    if rows is None:
        rows = range(len(samplers))
    elif len(set(rows)) < len(rows):  # the kernel changes rows while it samples from them
        return [token for sampler, row in zip(samplers, rows, strict=True) for token in sample_rows(runner, logits, [sampler], [row])]
    if logits.dtype != _FLOAT32 or logits.shape[1:] != (runner.vocab_size,) or len(logits) <= max(rows) or logits.strides[1] != 4:
        # the kernel trusts them
        raise ValueError(f"logits of {logits.dtype} {logits.shape} for {max(rows) + 1} rows of {runner.vocab_size}")
    begin, stride = address_in_step(logits[0]), logits.strides[0]
    errors: dict[Sampler, Exception] = {}
    for sampler, row in zip(samplers, rows, strict=True):
        try:
            sampler.prepare(begin + row * stride)
        except Exception as failure:  # noqa: PERF203  (a grammar's)
            errors[sampler] = failure
    if stopovers := [sampler for sampler in samplers if sampler.in_python and sampler not in errors]:
        runner.sample([sampler.row for sampler in stopovers])
        errors |= {sampler: error for sampler in stopovers if (error := sampler.process()) is not None}
    runner.sample([sampler.row for sampler in samplers if sampler not in errors])
    return [errors.get(sampler) or sampler.result() for sampler in samplers]


def signed(seed: int) -> int:
    """The lowest 64 bits, as an int64 holds them."""
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def fresh_seed() -> int:
    return secrets.randbits(64)
