"""Speculative decoding: guess the next tokens cheaply, and let the model check all guesses in one step.

A step of a few tokens takes hardly longer than a step of one, since both read all weights once. So a *drafter* guesses how a text goes
on, the step computes the guesses behind the last token, and the engine then samples position by position, exactly as it does without
guesses: with the same sampler, penalties, grammar and random number, which depends on (seed, choice, position) alone. As long as the
sampled token is the one that was guessed, the logits of the next position are valid, too, and that position is sampled. The first token
that differs from the guess is still the model's own, and what was computed behind it is forgotten.

So the text is the very text that the model writes by itself, at any temperature, whatever the drafter says, and its distribution is the
model's. Speculative sampling as published (arXiv:2211.17192, arXiv:2302.01318) couples the same two distributions in another way: it
accepts a guess with probability min(1, p / q), which accepts more often at high temperatures, but needs the whole of both distributions
after all cuts for each position, and gives another text than the model alone for the same seed. Here a seed means the same text with and
without a draft.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence as Tokens
from heapq import heapify, heapreplace
from math import isfinite
from statistics import median
from time import perf_counter
from typing import Protocol

from ..kernels.cpu import sampling_layout as at
from ..nn.memory import address
from .kv_cache import BlockPool
from .sequence import Sequence
from .types import Runner, Segment

MOST_STREAMS = 8
"""With more running streams than this the step has work enough, and nothing is guessed."""


class Drafter(Protocol):
    """Guesses how texts go on."""

    @property
    def computes(self) -> bool:
        """Whether guesses are computed, by a model that may have to read a whole prompt first; else they take next to no time."""
        ...

    @property
    def seconds(self) -> float:
        """What a guess takes; 0 for next to nothing, or as long as it is not known."""
        ...

    def draft(self, wanted: list[tuple[Sequence, int]]) -> list[Tokens[int]]:
        """For each sequence at most so many tokens that may follow ``sequence.tokens``; none is a good answer, too."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        ...


class PromptLookup:
    """Guesses that a text goes on as it did when its last ``n`` tokens occurred in it before: good for edits, quotes and repetitions."""

    computes, seconds = False, 0.0

    def __init__(self, n: int) -> None:
        self.n = n
        self._indexes: dict[Sequence, NgramIndex] = {}

    def draft(self, wanted: list[tuple[Sequence, int]]) -> list[Tokens[int]]:
        return [self._index(sequence).continuation(sequence.tokens, count) for sequence, count in wanted]

    def release(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)

    def _index(self, sequence: Sequence) -> NgramIndex:
        if sequence not in self._indexes:
            self._indexes[sequence] = NgramIndex(self.n)
        return self._indexes[sequence]


class NgramIndex:
    """Where each run of ``n`` tokens of a growing text ended last, kept up to date token by token."""

    __slots__ = ("_ends", "_indexed", "n")

    def __init__(self, n: int) -> None:
        self.n = n
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = n

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        """What followed the last ``n`` tokens when they occurred before, up to ``count`` tokens; a text that went in circles goes on so."""
        n, ends = self.n, self._ends
        for end in range(self._indexed, len(tokens)):
            ends[tuple(tokens[end - n : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        end = ends.get(tuple(tokens[-n:]), len(tokens))
        found = tokens[end : end + count]
        return (found * (count // len(found) + 1))[:count] if found else []


class DraftModel:
    """Lets a smaller model of the same vocabulary guess. It has a KV cache of its own, which follows the accepted text.

    Its guesses are drawn with the request's sampling parameters and the random number that the position will have, so that two models that
    agree about the distribution mostly draw the same token.
    """

    computes = True

    def __init__(self, runner: Runner, vocab_size: int) -> None:
        self.runner = runner
        self.vocab_size = min(runner.vocab_size, vocab_size)
        self.pool = BlockPool(runner.num_blocks // len(runner.windows))  # one table for all groups of layers: all positions stay
        self._caches: dict[Sequence, DraftCache] = {}
        self._recent: deque[float] = deque(maxlen=15)
        """Seconds for each guess, of the latest steps."""

    @property
    def seconds(self) -> float:
        return median(self._recent) if len(self._recent) >= 5 else 0.0

    def draft(self, wanted: list[tuple[Sequence, int]]) -> list[Tokens[int]]:
        guesses: list[list[int]] = [[] for _ in wanted]
        drafts = [
            Draft(sequence, cache, min(count, self.runner.max_sequence_length - len(sequence.tokens)), guess)
            for (sequence, count), guess in zip(wanted, guesses, strict=True)
            if (cache := self._cache(sequence, count)) is not None
        ]
        segments = self._catch_up(drafts)
        while segments:
            begin, tokens = perf_counter(), sum(len(segment.tokens) for segment in segments)
            logits = self.runner.forward(segments)
            row, stride = address(logits), logits.strides[0]
            ready = [draft for draft in drafts if draft.segment.outputs]
            for place, draft in enumerate(ready):
                draft.sequence.sampler.guess(row + place * stride, len(draft.sequence.tokens) + len(draft.guess))
            self.runner.sample([draft.sequence.sampler.row for draft in ready])
            if tokens <= 4 * len(segments):  # to read a prompt is no guess
                self._recent.append((perf_counter() - begin) / len(segments))
            drafts = [draft for draft in ready if draft.take(self.vocab_size)]
            segments = [draft.segment for draft in drafts]
        return list(guesses)

    def release(self, sequence: Sequence) -> None:
        if (cache := self._caches.pop(sequence, None)) is not None:
            self.pool.release(cache.block_table)

    def _cache(self, sequence: Sequence, count: int) -> DraftCache | None:
        """The sequence's cache, with room for its tokens and ``count`` guesses; ``None`` if there is none."""
        if sequence not in self._caches:
            self._caches[sequence] = DraftCache()
        cache, size = self._caches[sequence], self.runner.block_size
        cache.keep(sequence.tokens)
        length = len(sequence.tokens) + count
        missing = -(-length // size) - len(cache.block_table)
        if missing > self.pool.num_free or len(sequence.tokens) >= self.runner.max_sequence_length:
            return None
        cache.block_table.extend(self.pool.allocate() for _ in range(missing))
        return cache

    def _catch_up(self, drafts: list[Draft]) -> list[Segment]:
        """The first step: what was accepted since the last guesses. A long prompt takes several calls; no guess comes before its end."""
        budget = self.runner.max_batch_tokens
        segments = []
        for draft in drafts:
            tokens, cache = draft.sequence.tokens, draft.cache
            part = tokens[cache.computed : cache.computed + budget]
            end = cache.computed + len(part)
            generated = max(0, end - max(cache.computed, draft.sequence.prompt_length))
            draft.segment = Segment(part, cache.computed, cache.block_table, int(end == len(tokens)), generated)
            if part:
                segments.append(draft.segment)
            cache.computed = end
            budget -= len(part)
        return segments


class DraftCache:
    """What a draft model remembers of a sequence: the blocks, and what they hold."""

    __slots__ = ("block_table", "computed", "guesses")

    def __init__(self) -> None:
        self.block_table = array("i")
        self.computed = 0
        """Positions that hold tokens of the text."""
        self.guesses: list[int] = []
        """What was written behind them."""

    def keep(self, tokens: Tokens[int]) -> None:
        """Of the guesses, those that came true count as written."""
        for guess in self.guesses:
            if self.computed < len(tokens) - 1 and tokens[self.computed] == guess:
                self.computed += 1
            else:
                break
        self.guesses = []


class Draft:
    """The guesses for one sequence while they are made."""

    __slots__ = ("cache", "count", "guess", "segment", "sequence")

    def __init__(self, sequence: Sequence, cache: DraftCache, count: int, guess: list[int]) -> None:
        self.sequence, self.cache, self.count, self.guess = sequence, cache, count, guess
        self.segment = Segment((), 0, cache.block_table, 0)

    def take(self, vocab_size: int) -> bool:
        """Note the sampled token; whether another is wanted, whose segment is then set."""
        row = self.sequence.sampler.row
        token = row.words[at.TOKEN]
        if not (isfinite(row.numbers[at.PEAK]) and token < vocab_size):
            return False
        self.guess.append(token)
        if len(self.guess) >= self.count:
            return False
        position = len(self.sequence.tokens) + len(self.guess) - 1
        self.segment = Segment((token,), position, self.cache.block_table, 1, 1)
        self.cache.guesses.append(token)
        return True


class Likelihood:
    """How likely a guess for a sequence comes true: a running estimate, which slowly forgets."""

    __slots__ = ("_hits", "_misses")

    PRIOR = (1.0, 1.0)
    MEMORY = 0.97

    def __init__(self) -> None:
        self._hits = self._misses = 0.0

    @property
    def value(self) -> float:
        hits, misses = self.PRIOR
        return (self._hits + hits) / (self._hits + self._misses + hits + misses)

    def observe(self, drafted: int, accepted: int) -> None:
        """Once for each step, also for those without a guess: a text changes, and what failed is tried again some time."""
        self._hits = self._hits * self.MEMORY + accepted
        self._misses = self._misses * self.MEMORY + (accepted < drafted)


class StepCost:
    """What a step takes: ``fixed + each * tokens`` seconds, by a regression over the latest steps.

    Before it has seen steps of different sizes it believes that 16 tokens take twice the time of one.
    """

    MEMORY = 0.95
    BELIEF = 0.5  # the weight of that belief, as a variance of the numbers of tokens

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._variance = self._covariance = 0.0
        self.fixed, self.each = 15.0, 1.0

    def observe(self, tokens: int, seconds: float) -> None:
        if self._weight:
            seconds = min(seconds, 3.0 * (self.fixed + self.each * tokens))  # a machine that was busy with something else
        keep = self.MEMORY
        self._weight = keep * self._weight + 1.0
        share = 1.0 / self._weight
        more, longer = tokens - self._tokens, seconds - self._seconds
        self._tokens += share * more
        self._seconds += share * longer
        self._variance = (1.0 - share) * (self._variance + share * more * more)
        self._covariance = (1.0 - share) * (self._covariance + share * more * longer)
        believed = self._seconds / (self._tokens + 15.0)
        slope = (self._covariance + self.BELIEF * believed) / (self._variance + self.BELIEF)
        self.each = min(max(slope, believed / 16.0), self._seconds / self._tokens)
        self.fixed = self._seconds - self.each * self._tokens


class Speculation:
    """Decides how much to guess, so that the rate of all streams together grows.

    Parameters
    ----------
    drafter
        Who guesses.
    gamma
        The most tokens to guess for a sequence in a step.
    """

    def __init__(self, drafter: Drafter, gamma: int) -> None:
        self.drafter, self.gamma = drafter, gamma
        self.cost = StepCost()
        self._likelihoods: dict[Sequence, Likelihood] = {}

    def draft(self, streams: list[Sequence], tokens: int, room: int) -> list[tuple[Sequence, Tokens[int]]]:
        """Guesses for the streams of a step of ``tokens`` tokens, at most ``room`` of them."""
        if len(streams) > MOST_STREAMS:
            return []
        most = [min(self.gamma, sequence.max_tokens - len(sequence.tokens) - 1) for sequence in streams]
        lengths = self.lengths([self._likelihood(sequence).value for sequence in streams], most, tokens, room)
        wanted = [(sequence, length) for sequence, length in zip(streams, lengths, strict=True) if length > 0]
        drafts = self.drafter.draft(wanted) if wanted else []
        return [(sequence, draft) for (sequence, _), draft in zip(wanted, drafts, strict=True) if draft]

    def lengths(self, likelihoods: list[float], most: list[int], tokens: int, room: int) -> list[int]:
        """How many tokens to guess for each stream.

        A guess is worth its time, that of guessing included, if its chance of being accepted, per second that it adds, is above what the
        step yields per second so far.
        """
        lengths = [0] * len(most)
        chances = [(-chance, stream) for stream, chance in enumerate(likelihoods) if most[stream] > 0]
        heapify(chances)
        gain, seconds = float(len(most)), self.cost.fixed + self.cost.each * tokens
        each = self.cost.each + self.drafter.seconds
        while chances and room > 0:
            chance, stream = -chances[0][0], chances[0][1]
            if chance * seconds <= gain * each:
                break
            lengths[stream] += 1
            room -= 1
            gain += chance
            seconds += each
            further = likelihoods[stream] if lengths[stream] < most[stream] else 0.0
            heapreplace(chances, (-chance * further, stream))
        return lengths

    def observe(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """A step of a running sequence has been sampled."""
        self._likelihood(sequence).observe(drafted, accepted)

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._likelihoods.pop(sequence, None)
        self.drafter.release(sequence)

    def _likelihood(self, sequence: Sequence) -> Likelihood:
        if sequence not in self._likelihoods:
            self._likelihoods[sequence] = Likelihood()
        return self._likelihoods[sequence]
