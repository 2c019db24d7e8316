"""What the engine knows of a request while it lives: one `Job` for the request, one `Sequence` for each of its choices."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from time import perf_counter

from .kv_cache import BlockTables, chain_key
from .sampler import SampledToken, Sampler
from .text import TextStream
from .types import Delta, EngineRequest, OnEvent, Segment, TokenLogprob, Usage


class Job:
    """A request on its way through the engine."""

    __slots__ = ("done", "first_step", "first_token", "on_event", "request", "sequences", "submitted", "unforked", "usage", "wake")

    def __init__(self, request: EngineRequest, on_event: OnEvent, wake: Callable[[], object] | None = None) -> None:
        self.request, self.on_event, self.wake = request, on_event, wake
        self.sequences: list[Sequence] = []
        """One per choice."""
        self.unforked = True
        """Only the first choice runs; the others start when it has worked through the prompt."""
        self.usage = Usage(prompt_tokens=len(request.prompt_tokens))
        self.done = False
        self.submitted = perf_counter()
        self.first_step = self.first_token = 0.0

    def final_usage(self) -> Usage:
        """The usage at this moment, which is the job's last."""
        end, usage = perf_counter(), self.usage
        usage.completion_tokens = sum(len(sequence.tokens) - sequence.prompt_length for sequence in self.sequences)
        usage.total_seconds = end - self.submitted
        usage.queue_seconds = (self.first_step or end) - self.submitted
        if self.first_step:
            usage.prompt_seconds = (self.first_token or end) - self.first_step
        if self.first_token:
            usage.completion_seconds = end - self.first_token
        return usage


class Sequence:
    """One choice: its tokens, how many of them are in the cache, and where.

    The invariant of the cache: positions below ``computed`` are written, and ``blocks`` covers those of them that are still seen, and those
    of the current step.
    """

    __slots__ = (
        "accepted",
        "blocks",
        "choice",
        "computed",
        "draft",
        "finished",
        "job",
        "keys",
        "logprobs",
        "max_tokens",
        "order",
        "prompt_length",
        "registered",
        "sampler",
        "scheduled",
        "segment",
        "stops",
        "text",
        "tokens",
        "unread",
        "unsent",
        "unsent_text",
    )

    def __init__(
        self,
        job: Job,
        choice: int,
        tokens: list[int],
        max_tokens: int,
        stops: dict[int, str | int | None],
        sampler: Sampler,
        text: TextStream,
        blocks: BlockTables,
    ) -> None:
        self.job, self.choice = job, choice
        self.order = (0, choice)
        self.tokens = tokens
        self.prompt_length = len(tokens)
        self.max_tokens = max_tokens
        """The length, prompt included, at which to stop."""
        self.stops = stops
        """The tokens that end it, and what it then reports."""
        self.sampler, self.text = sampler, text
        self.computed = 0
        self.scheduled = 0
        self.keys: list[bytes] = []
        self.registered = 0
        """How many blocks of the table are known to the prefix cache, or have been offered to it."""
        self.segment = Segment((), 0, (), 0)
        self.use(blocks)
        self.draft: Tokens[int] = ()
        """Guesses that the step computes behind the scheduled tokens."""
        self.accepted = 0
        """How many of them were sampled, too."""
        self.unread: list[SampledToken] = []
        """Tokens whose text has not been looked at."""
        self.unsent: list[int] = []
        self.unsent_text = ""
        self.logprobs: list[TokenLogprob] = []
        self.finished = False

    def read(self) -> None:
        """Look at the text of new tokens."""
        while self.unread:
            token = self.unread.pop(0)
            self.unsent.append(token.id)
            if token.logprob is not None:
                self.logprobs.append(TokenLogprob(token.id, token.logprob, token.top))
            self.unsent_text += self.text.push(token.id)

    def take_delta(self) -> Delta:
        """What was read and not sent."""
        delta = Delta(self.choice, self.unsent_text, self.unsent, self.logprobs)
        self.unsent, self.unsent_text, self.logprobs = [], "", []
        return delta

    def use(self, blocks: BlockTables) -> None:
        """Have these block tables."""
        self.blocks = blocks
        self.segment.block_table, *self.segment.further_tables = blocks.tables

    def extend_keys(self, count: int, block_size: int) -> None:
        """Have the keys of the first ``count`` full blocks."""
        for block in range(len(self.keys), count):
            parent = self.keys[-1] if self.keys else b""
            self.keys.append(chain_key(parent, self.tokens[block * block_size : (block + 1) * block_size]))

    def schedule(self, count: int) -> None:
        """Describe the next ``count`` tokens as a segment for the runner."""
        start, end = self.computed, self.computed + count
        segment = self.segment
        segment.tokens = self.tokens[start:end]
        segment.start = start
        segment.outputs = 1 if end == len(self.tokens) else 0
        segment.generated = max(0, end - max(start, self.prompt_length))
        self.scheduled = count
        self.draft, self.accepted = (), 0

    def schedule_draft(self, draft: Tokens[int]) -> None:
        """Add guesses to the segment, each of which wants logits."""
        self.draft = draft
        self.segment.tokens = [*self.segment.tokens, *draft]
        self.segment.outputs += len(draft)
        self.segment.generated += len(draft)
