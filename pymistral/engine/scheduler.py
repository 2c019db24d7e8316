"""Which tokens the next step computes: first come, first served, over a pool of blocks that may run out."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as Tokens
from operator import attrgetter
from statistics import median

from .kv_cache import BlockTables, PagedCache
from .sequence import Sequence

by_order = attrgetter("order")

MOST_FORCED = 32
"""More tokens than that after the prompt are no text that a grammar forced upon a stream, but a sequence that was preempted."""

_PASS_TOKENS = 256
"""Tokens of prompts in a step of their own, which streams wait for part by part: so many that unpacking all weights is little of
it, so few that a prompt which comes meanwhile need not wait long."""


_NEAREST = 9  # steps without prompts that say what streams take alone
_FEWEST = 3  # of these, so that no single one decides
_WITH_PROMPTS = 512  # steps in a row: what streams take behind one with a prompt is a third more than alone, and must not count for much


class PrefillPacer:
    """How many tokens of prompts may join a step that running streams wait for.

    It stretches a step to ``stretch`` times what the streams take alone. Both what they take alone and what a prompt token adds are judged
    by the latest steps, so that neither a step that the machine held up nor a lucky one decides: the former by the median, the latter by
    the third quartile, since streams notice what is too much, and not what is too little. The number at most doubles from step to step:
    a few tokens hide in a step that waits for memory, and say little about many. Where only fewer streams ran alone lately, or more, the
    difference is counted as tokens of prompts are: else prompts would be held responsible for streams that are more, and wait. And while
    prompts keep coming, a step now and then goes without: else nobody would know what streams take alone, whose texts grow.

    Kernels compute whole panels of tokens, and one or four for the rest: what a step takes is judged by the tokens that it computes in this
    sense, and a panel that is begun is filled.
    """

    def __init__(self, stretch: float = 2.5, least: int = 4, panel: int = 1) -> None:
        self.stretch, self.least, self.panel = stretch, least, panel
        self._alone: deque[tuple[int, float]] = deque(maxlen=63)
        """Streams and seconds of the latest steps without prompts, the last one first."""
        self._added: deque[tuple[float, int]] = deque(maxlen=8)
        """Seconds for each token that prompts made a step compute, and tokens of prompts, of the latest steps that had some."""
        self._in_a_row = 0

    def allowance(self, streams: int) -> int:
        """Tokens of prompts for the next step; none if it is time to see what streams take alone."""
        self._in_a_row += 1
        if self._in_a_row > _WITH_PROMPTS:
            self._in_a_row = 0
            return 0
        count, alone = self._nearest(streams)
        seconds = sorted(self._added)[len(self._added) * 3 // 4][0] if self._added else 0.0
        if not (count and seconds):
            return max(32, self.least)
        most = 2 * max(tokens for _, tokens in self._added)
        alone = max(alone + (streams - count) * seconds, alone * min(1.0, streams / count))
        room = (self.stretch - 1.0) * alone / seconds
        tokens = max(self.least, min(most, int(room)))
        while tokens > self.least and self._computed(streams + tokens) - streams > room:
            tokens -= 1
        while self._computed(streams + tokens + 1) == self._computed(streams + tokens):
            tokens += 1
        return tokens

    def room(self, streams: int, seconds: float) -> float:
        """Seconds that a step has for prompts, if streams take so long in it: more than alone, since prompts are in the caches, too.

        At least half as long, since what they take alone may be known of fewer streams or shorter texts only.
        """
        known, alone = self._known(streams)
        return max(0.5 * seconds, self.stretch * (alone if known else seconds) - seconds)

    def observe(self, streams: int, prompt_tokens: int, seconds: float) -> None:
        if prompt_tokens == 0:
            self._in_a_row = 0
            self._alone.appendleft((streams, seconds))
        elif streams == 0 or prompt_tokens >= self.least:  # the end of a prompt says nothing
            known, alone = self._known(streams) if streams else (0, 0.0)
            computed = self._computed(streams + prompt_tokens) - known
            self._added.append((max(seconds - alone, 0.1 * seconds) / computed, prompt_tokens))

    def _computed(self, tokens: int) -> int:
        whole = tokens // self.panel * self.panel
        rest = tokens - whole
        return whole + next((part for part in (0, 1, 4) if rest <= part < self.panel), self.panel)

    def _nearest(self, streams: int) -> tuple[float, float]:
        """How many streams the latest steps without prompts had that are nearest to so many, and the seconds; zeros if these are few."""
        nearest = sorted(self._alone, key=lambda step: abs(step[0] - streams))[:_NEAREST]
        if len(nearest) < _FEWEST:
            return 0, 0.0
        count, seconds = (median(values) for values in zip(*nearest, strict=True))
        return count, seconds

    def _known(self, streams: int) -> tuple[float, float]:
        """How many of the streams, and what they take alone at least: of what more take, the share by number."""
        count, seconds = self._nearest(streams)
        return (streams, seconds * streams / count) if count > streams else (count, seconds)


class Scheduler:
    """Waiting and running sequences, oldest first, and the blocks that they hold.

    The oldest running sequence is never preempted while there is a younger one, and the pool holds at least one sequence of any length
    that is accepted: so each one ends, whatever the load.

    Parameters
    ----------
    max_num_seqs
        How many sequences may run at once.
    max_batch_tokens
        How many tokens a step may have.
    prompts_apart
        Prompts are computed in other numbers than what is generated, so that only blocks of prompts are shared.
    prefill_chunk
        How many tokens of prompts a step may have while streams run; ``None`` adapts it to their pace.
    panel_tokens
        How many tokens the kernels compute at once.
    """

    def __init__(
        self,
        cache: PagedCache,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        prefix_cache: bool = True,
        prompts_apart: bool = False,
        prefill_chunk: int | None = None,
        panel_tokens: int = 1,
    ) -> None:
        self.cache, self.pool, self.block_size = cache, cache.pool, cache.block_size
        self.prompts_apart = prompts_apart
        self.max_num_seqs, self.max_batch_tokens = max_num_seqs, max_batch_tokens
        self.prefix_cache, self.prefill_chunk = prefix_cache, prefill_chunk
        self.pacer = PrefillPacer(least=3 if panel_tokens > 1 else 4, panel=panel_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.streams = 0
        self.prompt_tokens = 0
        """What the latest step was made of."""
        self.under_way: list[Sequence] = []
        """Prompts in a step of their own that is not through (`Runner.prompt_pass`). It is begun anew if one of them leaves."""
        self.forgotten = 0
        """How many such steps were given up since one was through."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its order; nearly always that is one end of the queue."""
        waiting = self.waiting
        if not waiting or sequence.order > waiting[-1].order:
            waiting.append(sequence)
        else:
            place = next(i for i, other in enumerate(waiting) if other.order > sequence.order)
            waiting.insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        sequence.finished = True
        if sequence in self.running:
            self._stop(sequence)
            self._register(sequence)
            self._forget(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, streams first, with their segments set; empty only if there is nothing to do, or prompts are
        under way alone."""
        batch: list[Sequence] = []
        prefilling: list[Sequence] = []
        block_size, running = self.block_size, self.running
        index = tokens = 0
        while index < len(running):
            sequence = running[index]
            index += 1
            if sequence in self.under_way:
                continue
            pending = len(sequence.tokens) - sequence.computed
            if len(sequence.blocks) * block_size < self._reach(sequence) and not self._grow(sequence):
                continue
            if pending > MOST_FORCED or (sequence.computed < sequence.prompt_length and (pending > 1 or self.prompts_apart)):
                prefilling.append(sequence)
                continue
            if pending > 1:  # a grammar forced these, and a stream waits for them; those after it have their token each all the same
                pending = min(pending, self.max_batch_tokens - tokens - (len(running) - index))
            sequence.schedule(pending)
            batch.append(sequence)
            tokens += pending
        self.streams = len(batch)
        if self.under_way:
            self.prompt_tokens = sum(sequence.scheduled for sequence in self.under_way)
        elif prefilling or self.waiting:
            self._schedule_prompts(batch, prefilling, self.max_batch_tokens - tokens)
        else:
            self.prompt_tokens = 0
        return batch

    def _schedule_prompts(self, batch: list[Sequence], prefilling: list[Sequence], budget: int) -> None:
        if batch:
            budget = min(budget, self._prefill_tokens(len(batch)))
        before = budget
        for sequence in prefilling:
            if budget <= 0:
                break
            budget -= self._schedule_chunk(sequence, budget, batch)
        while budget > 0 and self.waiting and len(self.running) < self.max_num_seqs and self._admit(self.waiting[0]):
            budget -= self._schedule_chunk(self.waiting.popleft(), budget, batch)
        self.prompt_tokens = before - budget

    def _prefill_tokens(self, streams: int) -> int:
        if self.prefill_chunk is not None:
            return self.prefill_chunk
        return _PASS_TOKENS if self.prompts_apart else self.pacer.allowance(streams)

    def _schedule_chunk(self, sequence: Sequence, budget: int, batch: list[Sequence]) -> int:
        count = min(len(sequence.tokens) - sequence.computed, budget)
        if self.prompts_apart:  # a chunk is of one kind; what was generated before a preemption is computed with the streams
            of_prompt = sequence.prompt_length - sequence.computed
            count = min(count, of_prompt if of_prompt > 0 else MOST_FORCED if self.streams else count)
        sequence.schedule(count)
        batch.append(sequence)
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if there are blocks for all its tokens, and one to spare for each that runs already."""
        cache, length = self.cache, len(sequence.tokens)
        found = cache.new_tables()
        if self.prefix_cache:
            # At least one token is computed, for its logits.
            count = min(length - 1, self._shareable(sequence)) // self.block_size
            sequence.extend_keys(count, self.block_size)
            found = cache.find(sequence.keys[:count])
        shared = found.held()
        missing = cache.most_blocks(length) - len(shared)
        spare = len(cache.windows) * len(self.running)
        if self.pool.num_free - self.pool.count_idle(shared) < missing + spare + self._promised():
            return False
        self._start(sequence, found)
        return True

    def _promised(self) -> int:
        """Blocks that prompts on their way will still take: with windows they do not take all at once."""
        if not self.cache.slides:
            return 0
        under_way = (s for s in self.running if len(s.tokens) - len(s.blocks) * self.block_size > self.block_size)
        return sum(max(0, self.cache.most_blocks(len(sequence.tokens)) - len(sequence.blocks.held())) for sequence in under_way)

    def _start(self, sequence: Sequence, shared: BlockTables) -> None:
        self.pool.share(shared.held())
        sequence.use(shared)
        sequence.registered = len(shared)
        sequence.computed = len(shared) * self.block_size
        self.cache.grow(shared, self._reach(sequence))
        insort(self.running, sequence, key=by_order)

    def _reach(self, sequence: Sequence) -> int:
        """How many positions the tables must cover: all tokens, or, where windows give blocks back on the way, those of the next step."""
        length = len(sequence.tokens)
        return min(length, sequence.computed + self.max_batch_tokens) if self.cache.slides else length

    def _forget(self, sequence: Sequence) -> None:
        """Give back all that a sequence has in the cache."""
        self.pool.release(sequence.blocks.held())
        sequence.use(self.cache.new_tables())
        sequence.computed = sequence.registered = 0

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Start another choice of the prompt that ``parent`` has computed: it shares the full blocks and computes the rest by itself."""
        full = parent.prompt_length // self.block_size
        missing = -(-(parent.prompt_length + 1) // self.block_size) - full
        room = len(self.cache.windows) * (missing + len(self.running)) + self._promised()
        if len(self.running) < self.max_num_seqs and self.pool.num_free >= room:
            child.keys = parent.keys[:full]
            self._start(child, self.cache.prefix(parent.blocks, full))
        else:
            self.add(child)

    def _grow(self, sequence: Sequence) -> bool:
        """Give a sequence blocks for its new tokens, at the cost of the youngest ones; ``False`` if it was the youngest itself."""
        while not self.cache.grow(sequence.blocks, self._reach(sequence)):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Send a sequence back to the queue. It will compute its tokens again, except for what is still in the prefix cache."""
        self._stop(sequence)
        self._forget(sequence)
        self.preemptions += 1
        self.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence in self.under_way:
            self.forget_pass()

    def forget_pass(self) -> None:
        """Give up the step that prompts are under way in. They are scheduled anew."""
        self.forgotten += bool(self.under_way)
        self.under_way = []

    def end_pass(self) -> list[Sequence]:
        """The prompts of a step that is through."""
        ended, self.under_way, self.forgotten = self.under_way, [], 0
        return ended

    def advance(self, batch: list[Sequence]) -> None:
        """The step has been computed: its tokens are in the cache, blocks that became full may be shared, and windows have moved on."""
        for sequence in batch:
            if sequence.finished:  # while the step was computed
                continue
            sequence.computed += sequence.scheduled
            if sequence.computed // self.block_size > sequence.registered:
                self._register(sequence)
            if self.cache.slides:
                self.cache.slide(sequence.blocks, sequence.computed)

    def extend(self, sequence: Sequence, draft: Tokens[int]) -> None:
        """Let the step compute guesses behind a stream's tokens, as far as free blocks reach: nobody makes room for them."""
        blocks, length = sequence.blocks, len(sequence.tokens)
        draft = draft[: (len(blocks) + self.pool.num_free // len(self.cache.windows)) * self.block_size - length]
        self.cache.grow(blocks, length + len(draft))
        sequence.schedule_draft(draft)

    def trim(self, sequence: Sequence) -> None:
        """Free the blocks that hold nothing but guesses that did not come true."""
        self.cache.cut(sequence.blocks, sequence.computed)

    def _shareable(self, sequence: Sequence) -> int:
        """Tokens whose keys and values are what any prompt that starts with them would have."""
        return sequence.prompt_length if self.prompts_apart else len(sequence.tokens)

    def _register(self, sequence: Sequence) -> None:
        """Let later prompts find the blocks that have become full."""
        full = min(sequence.computed, self._shareable(sequence)) // self.block_size
        if not self.prefix_cache or full <= sequence.registered:
            return
        sequence.extend_keys(full, self.block_size)
        for block in range(sequence.registered, full):
            self.cache.register(sequence.blocks, block, sequence.keys[block])
        sequence.registered = full
