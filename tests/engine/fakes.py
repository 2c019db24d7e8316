"""A runner whose logits are a hash of the whole prefix as it stands in the paged cache, and a byte tokenizer."""

from __future__ import annotations

import codecs
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pymistral.engine import ChoiceFinished, Delta, RequestFailed, RequestFinished, Segment
from pymistral.nn.sampling import SamplingProgram

EOS, BOS, STOP_TOKEN = 256, 257, 258
VOCAB = 260
SPECIAL = {EOS: "<eos>", BOS: "<bos>", STOP_TOKEN: "<stop>", 259: "<pad>"}
MASK = (1 << 64) - 1
IDS = np.arange(1, VOCAB + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def prefix_hash(tokens: Sequence[int]) -> int:
    state = 1469598103934665603
    for token in tokens:
        state = ((state ^ (token + 1)) * 1099511628211) & MASK
    return state


def logits_of(tokens: Sequence[int], eos_bonus: float = 0.0) -> np.ndarray:
    """Pseudo-random logits in [0, 8), printable ASCII preferred."""
    with np.errstate(over="ignore"):
        x = IDS + np.uint64(prefix_hash(tokens))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    row = ((x >> np.uint64(40)).astype(np.float32)) * np.float32(8.0 / (1 << 24))
    row[32:127] += 4.0
    row[EOS] += eos_bonus
    return row


class FakeRunner:
    """Stores the token and the position in each slot, reads them back through the block table, and complains about misuse."""

    vocab_size = VOCAB

    prompts_apart = False
    parts = 3  # of a step of prompts, where they are apart
    panel_tokens = 1
    windows: Sequence[int | None] = (None,)

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_batch_tokens: int = 32,
        max_sequence_length: int = 128,
        eos_bonus: float = 0.0,
        delay: float = 0.0,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        self.windows = windows
        self.num_blocks, self.block_size, self.max_num_seqs = num_blocks, block_size, max_num_seqs
        self.max_batch_tokens, self.max_output_rows, self.max_sequence_length = max_batch_tokens, max_batch_tokens, max_sequence_length
        self.eos_bonus, self.delay = eos_bonus, delay
        self.slots: dict[tuple[int, int], tuple[int, list[int]]] = {}
        """What each slot holds: the group of layers that it was written for, and the text up to its position."""
        self.fail_on: int | None = None
        self.steps: list[list[tuple[int, int]]] = []
        self.computed = 0
        self.sample = SamplingProgram(VOCAB, threads=1).run

    def read_logits(self, logits: np.ndarray) -> np.ndarray:
        return logits

    @property
    def prompt_pass(self) -> FakeRunner | None:
        return self if self.prompts_apart else None

    def begin(self, segments: Sequence[Segment]) -> None:
        assert not any(s.generated for s in segments)
        copies = [
            Segment(list(s.tokens), s.start, list(s.block_table), s.outputs, 0, [list(t) for t in s.further_tables]) for s in segments
        ]
        self.pass_segments: list[Segment] | None = copies
        self.parts_left = self.parts

    def proceed(self, seconds: float) -> np.ndarray | None:
        assert self.pass_segments is not None, "there is no step to go on with"
        for s in self.pass_segments:
            self.write(s)  # what another sequence has by then is spoiled
        self.parts_left = 0 if seconds == float("inf") else self.parts_left - 1
        return None if self.parts_left > 0 else self.forward(self.pass_segments)

    def forward(self, segments: Sequence[Segment], meanwhile: Callable[[], object] | None = None) -> np.ndarray:
        if any(s.generated < len(s.tokens) for s in segments):
            self.pass_segments = None
        if self.delay:
            time.sleep(self.delay)
        assert 0 < len(segments) <= self.max_num_seqs
        assert sum(len(s.tokens) for s in segments) <= self.max_batch_tokens
        assert sum(s.outputs for s in segments) <= self.max_output_rows
        self.steps.append([(s.start, len(s.tokens)) for s in segments])
        self.computed += sum(len(s.tokens) for s in segments)
        users = Counter(block for s in segments for block in self.visible(s))
        for s in segments:
            assert len(s.tokens) > 0
            assert s.outputs <= len(s.tokens)
            assert s.start + len(s.tokens) <= len(s.block_table) * self.block_size
            assert s.start + len(s.tokens) <= self.max_sequence_length
            blocks = self.visible(s)
            assert len(set(blocks)) == len(blocks)
            assert all(0 <= block < self.num_blocks for block in blocks)
            assert all(users[block] == 1 for block in self.write(s)), "a block that another sequence reads was written"
        rows = []
        for s in segments:
            prefix = self.read(s)
            if self.fail_on is not None and self.fail_on in prefix:
                raise ValueError("the runner met a token that it cannot bear")
            rows += [logits_of(prefix[: len(prefix) - s.outputs + 1 + i], self.eos_bonus) for i in range(s.outputs)]
        if meanwhile is not None:
            meanwhile()
        return np.stack(rows) if rows else np.empty((0, VOCAB), np.float32)

    def tables(self, s: Segment) -> list[Sequence[int]]:
        groups = len(self.windows)
        if groups > 1 and not s.further_tables:
            return [[groups * block + group for block in s.block_table] for group in range(groups)]
        assert len(s.further_tables) == groups - 1
        return [s.block_table, *s.further_tables]

    def visible(self, s: Segment) -> list[int]:
        """The blocks that hold what the tokens of a segment see."""
        oldest = [0 if window is None else max(0, s.start - window + 1) for window in self.windows]
        return [b for table, at in zip(self.tables(s), oldest, strict=True) for b in table[at // self.block_size :]]

    def write(self, s: Segment) -> list[int]:
        """Store a segment's tokens; returns the blocks that they went to."""
        written = []
        for group, table in enumerate(self.tables(s)):
            text = self.text(table, s.start)
            for position, token in enumerate(s.tokens, s.start):
                text = [*text, token]
                written.append(table[position // self.block_size])
                self.slots[written[-1], position % self.block_size] = (group, text)
        return written

    def text(self, table: Sequence[int], end: int) -> list[int]:
        """All tokens before a position."""
        return self.slots[table[(end - 1) // self.block_size], (end - 1) % self.block_size][1] if end else []

    def read(self, s: Segment) -> list[int]:
        """The whole text up to a segment's end, if each group has what it sees of it."""
        end = s.start + len(s.tokens)
        whole = self.text(s.block_table, end)
        assert whole[s.start :] == list(s.tokens)
        for group, (table, window) in enumerate(zip(self.tables(s), self.windows, strict=True)):
            for position in range(0 if window is None else max(0, s.start - window + 1), end):
                found = self.slots[table[position // self.block_size], position % self.block_size]
                assert found == (group, whole[: position + 1]), "a slot holds something else"
        return whole


class ByteStream:
    def __init__(self, skip_special_tokens: bool) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.skip = skip_special_tokens

    def step(self, token: int) -> str:
        if token in SPECIAL:
            return "" if self.skip else SPECIAL[token]
        return self.decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class ByteTokenizer:
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return ([BOS] if add_special_tokens else []) + list(text.encode())

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        stream = ByteStream(skip_special_tokens)
        return "".join(stream.step(token) for token in tokens) + stream.flush()

    def token_to_id(self, token: str) -> int | None:
        for special, text in SPECIAL.items():
            if text == token:
                return special
        return ord(token) if len(token) == 1 and ord(token) < 128 else None

    def decode_stream(self, *, skip_special_tokens: bool = True, keep: Sequence[str] = ()) -> ByteStream:
        return ByteStream(skip_special_tokens)


@dataclass
class Dry:
    multiplier: float = 0.8
    base: float = 1.75
    allowed_length: int = 2
    sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")


@dataclass
class Params:
    """The fields of ``SamplingParams``."""

    temperature: float | None = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_n_logprobs: int = 0
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop_toks: Sequence[str | int] | None = None
    max_len: int | None = None
    logits_bias: dict[int, float] | None = None
    n_choices: int = 1
    dry_params: Dry | None = None
    seed: int | None = None


class WrongOrder(BaseException):
    """No `Exception`, which the engine would take for a receiver's own trouble and only log."""


@dataclass
class Collector:
    """Gathers a request's events and checks their order."""

    events: list[Any] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    finished: dict[int, ChoiceFinished] = field(default_factory=dict)
    end: RequestFinished | RequestFailed | None = None

    def __call__(self, event: Any) -> None:
        if self.end is not None:
            raise WrongOrder(f"{event} after the last event")
        self.events.append(event)
        if isinstance(event, Delta):
            if event.choice in self.finished or not (event.text or event.tokens):
                raise WrongOrder(f"{event} of a choice that has ended, or with nothing in it")
            self.texts[event.choice] = self.texts.get(event.choice, "") + event.text
            self.tokens.setdefault(event.choice, []).extend(event.tokens)
            self.logprobs.setdefault(event.choice, []).extend(event.logprobs)
        elif isinstance(event, ChoiceFinished):
            if event.choice in self.finished or event.text != self.texts.get(event.choice, ""):
                raise WrongOrder(f"{event} of a choice that has ended, or with another text")
            self.finished[event.choice] = event
        else:
            self.end = event
