"""From logits to a token: penalties, bias, processors, grammar, temperature, top-k, top-p, min-p, in this order.

The semantics are those of mistral.rs. `Sampler` holds what belongs to one choice; `sample_row` is a pure function of flat arrays.
A draw depends on the logits and on (seed, choice, position) alone, so it is the same in every batch and after a preemption.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InferenceError
from .types import ConstraintState, LogitsProcessor, Sampling

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

MASK64 = (1 << 64) - 1
GREEDY_BELOW = 1e-7
LONGEST_DRY_MATCH = 50
BLOCK = 64


@dataclass(slots=True)
class SampledToken:
    """A token, and its log probability if that was wanted."""

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


class Parameters(NamedTuple):
    """The numbers of `SamplingParams` with everything that is off made neutral."""

    temperature: float
    """0 for greedy."""
    top_k: int
    """0 for all."""
    top_p: float
    """1 for all."""
    min_p: float
    """0 for all."""
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float

    @classmethod
    def of(cls, sampling: Sampling) -> Parameters:
        temperature = 1.0 if sampling.temperature is None else sampling.temperature
        top_k, top_p, min_p = sampling.top_k or 0, sampling.top_p or 1.0, sampling.min_p or 0.0
        return cls(
            temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
            top_k=max(top_k, 0),
            top_p=top_p if 0.0 < top_p < 1.0 else 1.0,
            min_p=min_p if 0.0 < min_p < 1.0 else 0.0,
            frequency_penalty=sampling.frequency_penalty or 0.0,
            presence_penalty=sampling.presence_penalty or 0.0,
            repetition_penalty=1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty,
        )


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: three rounds of SplitMix64 (doi:10.1145/2714064.2660195)."""
    state = 0
    for word in (seed, choice, position):
        state = (state + word + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


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

    def arrays(self) -> tuple[I32, F32]:
        """Views, to be dropped before the next `add`."""
        return np.frombuffer(self._ids, np.int32), np.frombuffer(self._counts, np.float32)


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
        "_adjusts",
        "_bias",
        "choice",
        "constraint",
        "counts",
        "dry",
        "greedy",
        "logprobs",
        "parameters",
        "plain",
        "processors",
        "seed",
        "tokens",
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
        self.parameters = Parameters.of(sampling)
        self.tokens, self.seed, self.choice = tokens, seed, choice
        self.processors, self.constraint = tuple(processors), constraint
        self.logprobs = sampling.top_n_logprobs if return_logprobs else -1
        self.greedy = self.parameters.temperature == 0.0 or self.parameters.top_k == 1
        bias = sampling.logits_bias or {}
        self._bias = (np.fromiter(bias.keys(), np.int32, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))) if bias else None
        p, dry = self.parameters, sampling.dry_params
        penalised = p.frequency_penalty != 0.0 or p.presence_penalty != 0.0 or p.repetition_penalty != 1.0
        self.counts = TokenCounts(vocab_size) if penalised else None
        self.dry = Dry(dry.multiplier, dry.base, dry.allowed_length, breakers) if dry is not None and dry.multiplier != 0.0 else None
        for token in tokens if self.counts or self.dry else ():
            self._observe(token, generated=False)
        self._adjusts = bool(penalised or self.dry or bias or processors or constraint is not None)
        self.plain = self.greedy and not self._adjusts and not return_logprobs
        """The most likely token is all that is wanted."""

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

    def adjusted(self, logits: F32) -> F32:
        """The logits with everything applied that acts on them before the temperature. The row itself is not changed."""
        if not self._adjusts:
            return logits
        logits = logits.copy()
        if self.dry is not None:
            ids, penalties = self.dry.penalties()
            logits[ids] -= penalties
        if self.counts is not None:
            penalise(logits, *self.counts.arrays(), self.parameters)
        if self._bias is not None:
            logits[self._bias[0]] += self._bias[1]
        for processor in self.processors:
            logits = run_processor(processor, logits, self.tokens)
        if self.constraint is not None and (allowed := self.constraint.allowed()) is not None:
            forbid(logits, allowed)
        return logits

    def sample(self, logits: F32) -> SampledToken:
        """The next token. Raises `InferenceError` for logits that are not numbers, and whatever a processor raises."""
        logits = self.adjusted(logits)
        u = 0.0 if self.greedy else uniform(self.seed, self.choice, len(self.tokens))
        return sample_row(logits, self.parameters, u, self.logprobs)


def run_processor(processor: LogitsProcessor, logits: F32, tokens: Sequence[int]) -> F32:
    """Call a user's function on the logits, and check what it returns."""
    try:
        result = processor(logits, tokens)
    except Exception as error:
        name = getattr(processor, "__name__", type(processor).__name__)
        raise InferenceError(f"the logits processor {name} raised {type(error).__name__}: {error}") from error
    if result is None:
        return logits
    row = np.asarray(result, np.float32)
    if row.shape != logits.shape:
        raise InferenceError(f"a logits processor returned an array of shape {row.shape}; return one of shape {logits.shape}, or None")
    return row


def forbid(logits: F32, allowed: I32) -> None:
    """Set the logits of all tokens whose bit is not set to minus infinity, in place."""
    bits = np.unpackbits(allowed.view(np.uint8), bitorder="little", count=logits.size)
    np.copyto(logits, np.float32(-inf), where=bits == 0)


def penalise(logits: F32, ids: I32, counts: F32, p: Parameters) -> None:
    """Frequency and presence penalties for what was generated, the repetition penalty for the prompt too, in place."""
    values = logits[ids]
    values -= counts * np.float32(p.frequency_penalty)
    values -= (counts > 0.0) * np.float32(p.presence_penalty)
    if p.repetition_penalty != 1.0:
        factor = np.float32(p.repetition_penalty)
        values = np.where(values > 0.0, values / factor, values * factor)
    logits[ids] = values


def sample_row(logits: F32, p: Parameters, u: float, top_n: int) -> SampledToken:
    """Draw a token with the random number ``u``; report log probabilities if ``top_n`` is not negative.

    Those are of the distribution after temperature and before the cuts; greedy reports temperature 1.
    """
    best = int(logits.argmax())
    peak = float(logits[best])
    if not isfinite(peak):
        what = "NaN" if peak != peak else "infinity" if peak > 0 else "no finite value: every token is forbidden"
        raise InferenceError(f"the logits hold {what}")
    token = best if p.temperature == 0.0 or p.top_k == 1 else draw(logits, peak, p, u)
    if top_n < 0:
        return SampledToken(token)
    temperature = p.temperature or 1.0
    norm = peak / temperature + log(float(weights(logits, peak, temperature).sum(dtype=np.float64)))
    top = [(int(i), float(logits[i]) / temperature - norm) for i in largest(logits, top_n)]
    return SampledToken(token, float(logits[token]) / temperature - norm, top)


def weights(logits: F32, peak: float, temperature: float) -> F32:
    """Probabilities times a constant, 1 for the most likely token."""
    scaled: F32 = logits - np.float32(peak)
    if temperature != 1.0:
        scaled *= np.float32(1.0 / temperature)
    np.exp(scaled, out=scaled)
    return scaled


def draw(logits: F32, peak: float, p: Parameters, u: float) -> int:
    """Invert the distribution function at ``u``: in the vocabulary's order if no cut is on, else from the most likely token down."""
    if p.top_k == 0 and p.top_p == 1.0 and p.min_p == 0.0:
        return draw_from_all(weights(logits, peak, p.temperature), u)
    kept, kept_weights = candidates(logits, peak, p)
    sums = np.cumsum(kept_weights)
    index = int(np.searchsorted(sums, u * sums[-1], side="right"))
    return int(kept[min(index, int(np.count_nonzero(kept_weights)) - 1)])


def draw_from_all(probabilities: F32, u: float) -> int:
    """Find the block of the vocabulary first, then the token in it: adding up everything one by one would take far longer."""
    starts = np.arange(0, probabilities.size, BLOCK)
    sums = np.cumsum(np.add.reduceat(probabilities, starts), dtype=np.float64)
    target = u * sums[-1]
    block = int(np.searchsorted(sums, target, side="right"))
    members = probabilities[block * BLOCK : (block + 1) * BLOCK]
    inside = np.cumsum(members, dtype=np.float64)
    index = int(np.searchsorted(inside, target - (sums[block - 1] if block else 0.0), side="right"))
    # The two sums round differently: never step over the last token that has a chance.
    return block * BLOCK + min(index, int(np.flatnonzero(members)[-1]))


def candidates(logits: F32, peak: float, p: Parameters) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that top-k, then top-p, then min-p leave, most likely first, and their weights."""
    floor = p.temperature * log(p.min_p) + peak if p.min_p > 0.0 else -inf
    if 0 < p.top_k < logits.size:
        ids = largest(logits, p.top_k)
        total = 0.0
    elif p.top_p < 1.0:
        everything = weights(logits, peak, p.temperature)
        total = float(everything.sum(dtype=np.float64))
        ids = nucleus(logits, everything, p.top_p * total)
    else:
        return min_p_alone(logits, peak, floor, p.temperature)
    values = logits[ids].astype(np.float64)
    kept_weights = np.exp((values - peak) / p.temperature)
    keep = ids.size
    if p.top_p < 1.0:
        before = np.cumsum(kept_weights) - kept_weights
        keep = int(np.searchsorted(before, p.top_p * (total or kept_weights.sum()), side="left"))
    if p.min_p > 0.0:
        keep = min(keep, int(np.count_nonzero(values > floor)))
    return ids[: max(keep, 1)], kept_weights[: max(keep, 1)]


def min_p_alone(logits: F32, peak: float, floor: float, temperature: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens above min-p's floor; no other cut is on."""
    ids = np.flatnonzero(logits > floor)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return ids, np.exp((logits[ids].astype(np.float64) - peak) / temperature)


def nucleus(logits: F32, probabilities: F32, mass: float) -> NDArray[np.int64]:
    """The most likely tokens, enough of them to hold a mass. Nearly always a few suffice."""
    count = 64
    while True:
        ids = largest(logits, count)
        if ids.size == logits.size or float(probabilities[ids].sum(dtype=np.float64)) > mass:
            return ids
        count *= 8


def largest(logits: F32, count: int) -> NDArray[np.int64]:
    """The ``count`` largest, in order; the lower id first among equals.

    The maxima of small blocks give a threshold that few others pass, which is many times faster than a partition of everything.
    """
    if count <= 0:
        return np.empty(0, np.int64)
    if count >= logits.size:
        ids = np.arange(logits.size)
    else:
        few = count * 2 * BLOCK < logits.size
        values = np.maximum.reduceat(logits, np.arange(0, logits.size, BLOCK)) if few else logits.copy()
        values.partition(values.size - count)
        ids = np.flatnonzero(logits >= values[values.size - count])
    return ids[np.argsort(-logits[ids], kind="stable")[:count]]


def fresh_seed() -> int:
    return secrets.randbits(64)


def sample_rows(logits: Iterable[F32], samplers: Sequence[Sampler]) -> list[SampledToken | Exception]:
    """One token for each row. An error takes the place of the token that it prevented, so that it stays its own request's."""
    sampled: list[SampledToken | Exception] = []
    for row, sampler in zip(logits, samplers, strict=True):
        try:
            if sampler.plain:
                best = int(row.argmax())
                if isfinite(row[best]):
                    sampled.append(SampledToken(best))
                    continue
            sampled.append(sampler.sample(row))
        except Exception as error:
            sampled.append(error)
    return sampled
