"""What crosses the engine's border: the runner below it, the requests that come in, the events that go out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import PymistralError
from ..nn.sampling import SamplingRow

FinishReason = Literal["stop", "length", "canceled"]
LogitsProcessor = Callable[[NDArray[np.float32], Sequence[int]], "NDArray[np.float32] | None"]


@dataclass(slots=True, eq=False)
class Segment:
    """Consecutive tokens of one sequence that a step computes.

    The engine reuses one object per sequence: a runner reads it during ``forward`` and keeps nothing of it but its block table.
    """

    tokens: Sequence[int]
    start: int
    """The position of ``tokens[0]``; everything before it is in the cache already."""
    block_table: Sequence[int]
    """The physical block of each logical block; covers ``start + len(tokens)`` positions. An ``array('i')``, so a buffer too. As long as a
    sequence goes on by single tokens it may only grow, or be replaced by another object: a runner need not read all of it again."""
    outputs: int
    """How many of the last tokens want logits: 0 for a part of a prompt, 1 as a rule, more for speculation and scoring."""
    generated: int = 0
    """How many of the last tokens were generated: they are not part of the prompt."""
    further_tables: Sequence[Sequence[int]] = ()
    """The block tables of the groups of layers after the first, where there are several (`Runner.windows`). Left out, the sequence keeps
    all its positions in all layers, and a block of ``block_table`` stands for as many consecutive blocks as there are groups."""


class PromptPass(Protocol):
    """A step of prompts alone, which is computed part by part: streams that run beside it wait for a part at most."""

    def begin(self, segments: Sequence[Segment]) -> None:
        """Take up a step. One that was not through is forgotten."""
        ...

    def proceed(self, seconds: float) -> NDArray[np.float32] | None:
        """Compute for about so long; returns the logits once the step is through, as `Runner.forward` does."""
        ...


class Runner(Protocol):
    """A model with its paged KV cache. It writes keys and values through block tables, and need not remember sequences."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def panel_tokens(self) -> int:
        """How many tokens the kernels compute at once: fewer take as long."""

    @property
    def prompts_apart(self) -> bool:
        """Prompts are computed in other numbers than what is generated: a prompt must not find a generated token in the prefix cache."""

    @property
    def prompt_pass(self) -> PromptPass | None:
        """How to compute prompts part by part, where they are apart. `forward` with tokens of prompts forgets a step of it."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_batch_tokens(self) -> int: ...
    @property
    def max_output_rows(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def max_sequence_length(self) -> int: ...
    @property
    def windows(self) -> Sequence[int | None]:
        """How many of the latest positions each group of layers sees; ``None``: all. Blocks of one pool hold the positions of any group."""

    def forward(self, segments: Sequence[Segment], meanwhile: Callable[[], object] | None = None) -> NDArray[np.float32]:
        """Run one flat step; return logits ``[rows, vocab_size]`` in segment order, valid until the next call.

        ``meanwhile`` is called when the step has begun, for the device or other threads to compute in the time that it takes. It does not
        raise.

        They may still be on a device: `sample` knows them by their addresses; `read_logits` before Python does.
        """
        ...

    def read_logits(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits that `forward` returned, for Python to read."""
        ...

    def sample(self, rows: Sequence[SamplingRow]) -> None:
        """Choose a token for each row, from the logits that it names."""
        ...


class DecodeStream(Protocol):
    """Incremental detokenisation of one choice."""

    def step(self, token: int) -> str: ...
    def flush(self) -> str: ...


class Tokenizer(Protocol):
    """The part of a tokenizer that the engine uses."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def decode_stream(self, *, skip_special_tokens: bool = True, keep: Sequence[str] = ()) -> DecodeStream: ...


class DryParams(Protocol):
    """What the engine reads of ``DrySamplingParams``."""

    @property
    def multiplier(self) -> float: ...
    @property
    def base(self) -> float: ...
    @property
    def allowed_length(self) -> int: ...
    @property
    def sequence_breakers(self) -> Sequence[str]: ...


class Sampling(Protocol):
    """What the engine reads of ``SamplingParams``; a field that is ``None`` is off (temperature: 1)."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def top_n_logprobs(self) -> int: ...
    @property
    def frequency_penalty(self) -> float | None: ...
    @property
    def presence_penalty(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def stop_toks(self) -> Sequence[str | int] | None: ...
    @property
    def max_len(self) -> int | None: ...
    @property
    def logits_bias(self) -> Mapping[int, float] | None: ...
    @property
    def n_choices(self) -> int: ...
    @property
    def dry_params(self) -> DryParams | None: ...
    @property
    def seed(self) -> int | None: ...


class ConstraintState(Protocol):
    """How far one choice has come in a grammar."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        ...

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""
        ...

    def allowed(self) -> NDArray[np.int32] | None:
        """A bit for each token, the lowest first, set for those that may come next; ``None`` for all. Asked for once per token."""
        ...

    def accept(self, token: int) -> Sequence[int]:
        """Advance by a token; return those that must follow it, which count as accepted too."""
        ...


class Constraint(Protocol):
    """A compiled grammar."""

    def start(self) -> ConstraintState: ...


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One prompt and how to continue it.

    Parameters
    ----------
    prompt_tokens
        The tokenized prompt, at least one token.
    sampling
        ``SamplingParams``, or anything with the same attributes.
    logits_processors
        Called in order with a copy of the logits row (float32, ``[vocab_size]``) and the tokens so far (prompt and generated; not to be
        changed); each returns the new row, or ``None`` if it changed the row in place.
    return_logprobs
        Report the log probability of each token, and of the ``top_n_logprobs`` most likely ones.
    constraint
        A grammar that the text must follow.
    deadline
        The value of ``time.monotonic()`` at which to give up.
    truncate
        Cut the start of a prompt that is too long, instead of refusing it.
    skip_special_tokens
        Leave special tokens out of the text.
    keep
        Special tokens that stay in the text nevertheless: the markup of tool calls, for instance.
    """

    prompt_tokens: list[int]
    sampling: Sampling
    logits_processors: Sequence[LogitsProcessor] = ()
    return_logprobs: bool = False
    constraint: Constraint | None = None
    deadline: float | None = None
    truncate: bool = False
    skip_special_tokens: bool = True
    keep: Sequence[str] = ()


@dataclass(slots=True)
class TokenLogprob:
    """The natural log probability of a sampled token, before top-k, top-p and min-p, and the most likely tokens beside it."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """What a request cost. Tokens of all choices; seconds of the wall clock."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Prompt tokens whose keys and values were in the prefix cache already."""
    completion_tokens: int = 0
    drafted_tokens: int = 0
    """Tokens that were guessed ahead and checked by the model (see `engine.speculative`)."""
    accepted_tokens: int = 0
    """Guessed tokens that turned out to be what the model itself says; they are among the completion tokens."""
    queue_seconds: float = 0.0
    """From submission until the first step that worked on it."""
    prompt_seconds: float = 0.0
    """From then until the first token."""
    completion_seconds: float = 0.0
    """From the first token until the end."""
    total_seconds: float = 0.0


@dataclass(slots=True)
class Delta:
    """New text of one choice, with the tokens sampled since the last delta (a stop token is not among them)."""

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]


@dataclass(slots=True)
class ChoiceFinished:
    """The end of one choice, with all its text and the stop string or token that ended it, if one did."""

    choice: int
    reason: FinishReason
    text: str
    stop: str | int | None = None


@dataclass(slots=True)
class RequestFinished:
    """The last event of a request that ended well or was canceled."""

    usage: Usage


@dataclass(slots=True)
class RequestFailed:
    """The last event of a request that an error ended, with the text of each choice so far."""

    error: PymistralError
    texts: list[str]
    usage: Usage


Event = Delta | ChoiceFinished | RequestFinished | RequestFailed
OnEvent = Callable[[Event], Any]


@dataclass(slots=True)
class EngineStats:
    """Counters of an engine, all since its start except for the first block, which is now."""

    waiting: int
    running: int
    num_blocks: int
    free_blocks: int
    """Blocks that no sequence uses; the cached ones are among them."""
    cached_blocks: int
    """Blocks that no sequence uses but that hold a prefix which a later prompt may share."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: int = 0
    canceled: int = 0
    failed: int = 0
