"""A model as the engine sees it: a recorded program with its paged KV cache, fed one flat step at a time."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..kernels.cpu.compiler import Progress
from ..kernels.cpu.geometry import ATTENTION_CHUNK, cache_layout, cache_row_bytes, panel_tokens, usual_cache_type
from ..nn.cache_groups import cache_groups
from ..nn.cpu import compile_for_prompts
from ..nn.cpu_program import CpuProgram
from ..nn.cpu_weights import Packing
from ..nn.graph import Graph
from ..nn.pool import available_threads
from ..nn.sampling import SamplingProgram
from ..nn.state import READ_BLOCKS, SPLIT_TOKENS, Limits, State
from .types import PromptPass, Segment

logger = logging.getLogger("pymistral")

_MAX_TOKENS = 512  # in one step
_MAX_OUTPUTS = 64  # rows of logits in one step
_BLOCK_SIZE = _BLOCK_UNIT = 32  # positions; blocks, and the chunks in which attention is dealt out, are multiples of the latter
_MISSING = 4  # tokens of a panel: so few that the others take as long as a whole one
_DEFAULT_CONTEXT = 32768  # tokens of KV cache, unless asked otherwise, if memory allows


Programs = tuple[CpuProgram, CpuProgram]
"""For the tokens of prompts, and for those that are generated."""


class LastStep(NamedTuple):
    """The last step, if it was one of single tokens: where it was written, the rows of its tokens, and the sequences' block tables."""

    state: State
    rows: list[int]
    tables: list[Sequence[int]]


class PagedRunner(ABC):
    """What runners of all devices share: their sizes, and writing a step into the arrays that kernels read."""

    @property
    def prompts_apart(self) -> bool:
        return False

    @property
    def prompt_pass(self) -> PromptPass | None:
        return None

    @property
    def panel_tokens(self) -> int:
        return 1

    def __init__(
        self,
        graph: Graph,
        *,
        max_position_embeddings: int,
        max_num_seqs: int,
        block_size: int,
        cache_tokens: int,
        cache_type: str,
        max_tokens: int,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        self.block_size, self.windows = block_size, windows
        self.num_blocks = -(-cache_tokens // block_size) * len(windows)
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max(max_tokens, max_num_seqs)
        self.max_sequence_length = min(max_position_embeddings, self.num_blocks * block_size)
        self.max_output_rows = max(_MAX_OUTPUTS, max_num_seqs)
        self.limits = Limits(
            max_tokens=self.max_batch_tokens,
            max_outputs=self.max_output_rows,
            max_sequences=max_num_seqs,
            block_size=block_size,
            num_blocks=self.num_blocks,
            max_blocks=-(-self.max_sequence_length // block_size),
            groups=len(windows),
            cache_type=cache_type,
        )
        # A model may give logits for more ids, or fewer, than it has embeddings for.
        self.vocab_size = graph.nodes[-1].output.columns
        self._embeddings = min(
            (node.attributes["weight"].shape[0] for node in graph.nodes if node.op == "embedding"), default=self.vocab_size
        )
        self._last_step: LastStep | None = None

    def _fill(self, state: State, segments: Sequence[Segment]) -> int:
        """Write a step into the state; returns its rows of logits.

        Raises
        ------
        ValueError
            The segments do not fit the limits, or name a token, position or block that does not exist: kernels trust these arrays.
        """
        last, self._last_step = self._last_step, None  # nothing follows a step that is refused
        if last is not None and last.state is state and self._write_next(last, segments):
            self._last_step = last
            return len(segments)
        rows = self._write(state, segments)
        if _single_tokens(segments):
            self._last_step = LastStep(state, rows, [segment.block_table for segment in segments])
        return len(rows)

    def _write(self, state: State, segments: Sequence[Segment]) -> list[int]:
        """Write any step; returns the rows whose logits are wanted. Raises as `_fill` does."""
        tokens = longest = 0
        output_rows: list[int] = []
        for row, segment in enumerate(segments):
            count, start = len(segment.tokens), segment.start
            end = start + count
            tokens = state.next_row(tokens, row)
            if tokens + count > self.max_batch_tokens or row >= self.max_num_seqs:
                raise ValueError(f"a step holds {self.max_batch_tokens} tokens of {self.max_num_seqs} sequences at most")
            if count < 1 or start < 0 or end > self.max_sequence_length or not 0 <= segment.outputs <= count:
                raise ValueError(f"segment of {count} tokens from position {start} with {segment.outputs} outputs does not fit")
            longest = max(longest, end)
            self._place(state, segment, row, tokens, count, start, end)
            tokens += count
            output_rows += range(tokens - segment.outputs, tokens)
            if len(output_rows) > self.max_output_rows:
                raise ValueError(f"a step gives {self.max_output_rows} rows of logits at most")
        state.output_rows[: len(output_rows)] = output_rows
        for rope in state.ropes:
            rope.prepare(longest)
        state.counts[:5] = (tokens, len(output_rows), *self._divide(state, segments))
        return output_rows

    def _write_next(self, last: LastStep, segments: Sequence[Segment]) -> bool:
        """Write a step whose segments are the tokens that follow those of the last one: little changes but the tokens, and where they go.

        Returns whether it is such a step. If not, some of it may have been written.
        """
        state = last.state
        if len(last.rows) != len(segments):
            return False
        tokens, positions, slots = state.tokens.data, state.positions.data, state.cache_slots.data  # faster, one by one
        begun, longest = [], 0
        for row, (at, table, segment) in enumerate(zip(last.rows, last.tables, segments, strict=True)):
            start = segment.start
            if segment.block_table is not table or positions[at] != start - 1 or len(segment.tokens) != 1 or segment.outputs != 1:
                return False
            token = segment.tokens[0]
            if not 0 <= token < self._embeddings:
                return False
            tokens[at], positions[at] = token, start
            longest = max(longest, start + 1)
            if start % _BLOCK_UNIT == 0:
                begun.append(row)
            else:
                for group in range(len(self.windows)):
                    slots[group, at] += 1
        if longest > self.max_sequence_length:
            return False
        for rope in state.ropes:
            rope.prepare(longest)
        for row in begun:  # its block may be another one, and its attention be dealt out in another way
            start = segments[row].start
            self._place(state, segments[row], row, last.rows[row], 1, start, start + 1)
        if begun:
            state.counts[2:5] = self._divide(state, segments)
        return True

    @abstractmethod
    def _divide(self, state: State, segments: Sequence[Segment]) -> tuple[int, int, int]:
        """Write how attention is dealt out; returns the numbers of items, of merges, and of the first items that hold all output rows."""

    def _place(self, state: State, segment: Segment, row: int, at: int, count: int, start: int, end: int) -> None:
        """Write one segment's tokens, positions, cache slots and block tables into the state."""
        size = self.block_size
        tables = self._tables(segment)
        blocks = -(-end // size)
        for group, table in enumerate(tables):
            if len(table) < blocks:
                raise ValueError(f"a block table of {len(table)} blocks of {size} does not cover {end} positions")
            used = table[:blocks]
            if min(used) < 0 or max(used) >= self.num_blocks:
                raise ValueError("a block does not exist")
            state.write_table(group, row, used)
        if count == 1:
            token = segment.tokens[0]
            if not 0 <= token < self._embeddings:
                raise ValueError(f"token {token} does not exist")
            state.tokens[at] = token
            state.positions[at] = start
            for group, table in enumerate(tables):
                state.cache_slots[group, at] = table[blocks - 1] * state.parts_of_block * size + start % size
            return
        place = slice(at, at + count)
        state.tokens[place] = segment.tokens
        ids = state.tokens[place]
        if ids.min() < 0 or ids.max() >= self._embeddings:
            raise ValueError("a token does not exist")
        positions = np.arange(start, end, dtype=np.int32)
        state.positions[place] = positions
        state.cache_slots[:, place] = state.slots(row, positions)

    def _tables(self, segment: Segment) -> Sequence[Sequence[int]]:
        """A block table for each group of layers."""
        groups = len(self.windows)
        if groups == 1:
            return (segment.block_table,)
        if not segment.further_tables:
            return [[groups * block + group for block in segment.block_table] for group in range(groups)]
        if len(segment.further_tables) != groups - 1:
            raise ValueError(f"{1 + len(segment.further_tables)} block tables for {groups} groups of layers")
        return (segment.block_table, *segment.further_tables)


class CpuRunner(PagedRunner):
    """Runs a model on the CPU. It need not remember sequences: segments say where their keys and values lie.

    Parameters
    ----------
    graph
        The model, recorded.
    max_position_embeddings
        The longest sequence that the model was made for.
    threads
        Threads that compute; None: the cores that this process may use.
    max_num_seqs
        Sequences in one step.
    block_size
        Positions in a block of the KV cache: a multiple of 32.
    cache_tokens
        Room of the KV cache in tokens, over all sequences; None: what the model and the free memory suggest.
    cache_type
        How keys and values are kept: ``auto``, ``f32``, ``f16``, ``bf16``, ``int16``, ``f8e4m3`` or ``int8``.
    progress
        Told how many kernels are compiled, if any must be.

    Raises
    ------
    ModelLoadError
        A weight's type or shape cannot be used, or the cache is too small.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        max_position_embeddings: int,
        threads: int | None = None,
        max_num_seqs: int = 32,
        block_size: int | None = None,
        cache_tokens: int | None = None,
        cache_type: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        if cache_tokens is None:
            cache_tokens = _suggested_cache(max_position_embeddings, cache_token_bytes(graph, cache_type, usual_cache_type()))
        super().__init__(
            graph,
            max_position_embeddings=max_position_embeddings,
            max_num_seqs=max_num_seqs,
            block_size=block_size or _BLOCK_SIZE,
            cache_tokens=cache_tokens,
            cache_type=cache_type,
            max_tokens=_MAX_TOKENS,
            windows=cache_groups(graph).windows,
        )
        self.threads = threads or available_threads()
        self.prompt_program, self.program = compile_for_prompts(graph, self.limits, threads=self.threads, progress=progress)
        self._sampling = SamplingProgram(self.vocab_size, self.threads)
        self._sampling.expect(self.program.logits, self.program.logits_maxima)
        self.sample = self._sampling.run
        self._pass_outputs = 0

    @property
    def prompts_apart(self) -> bool:
        return self.prompt_program is not self.program

    @property
    def prompt_pass(self) -> PromptPass | None:
        return self if self.prompts_apart else None

    @property
    def panel_tokens(self) -> int:
        return panel_tokens()

    @property
    def packing(self) -> Packing:
        """The weights on their way into tiles, which goes on for a while when the runner is made. A step waits for it."""
        return self.program.packing

    def compile(self, graph: Graph) -> Programs:
        """Programs of these limits, for `use`. Another thread may run steps in the meantime.

        Raises
        ------
        ModelLoadError
            A weight cannot be quantised, or is not a number.
        """
        programs = compile_for_prompts(graph, self.limits, threads=self.threads)
        programs[0].packing.wait()
        return programs

    def use(self, programs: Programs) -> None:
        """Run these programs from now on: the same model with other weights, and an empty cache."""
        shape, before = programs[0].logits.shape, self.program.logits.shape
        if shape != before:
            raise ValueError(f"logits {shape} in place of {before}: another model")
        self.prompt_program, self.program = programs
        self._sampling.expect(self.program.logits, self.program.logits_maxima)

    def forward(self, segments: Sequence[Segment], meanwhile: Callable[[], object] | None = None) -> NDArray[np.float32]:
        """Run one flat step; returns logits ``[rows, vocab_size]`` in segment order, valid until the next call.

        Other threads compute while this one calls ``meanwhile``, which must not raise; then it computes as well.

        Raises
        ------
        ValueError
            The segments do not fit the limits, or name a token, position or block that does not exist: kernels trust these arrays.
        """
        if not self.prompts_apart or all(segment.generated == len(segment.tokens) for segment in segments):
            return self._run(self.program, segments, meanwhile)
        for segment in segments:
            count = len(segment.tokens)
            if not (count and 0 <= segment.generated <= count and 0 <= segment.outputs <= count):
                raise ValueError(f"segment of {count} tokens, {segment.generated} generated, with {segment.outputs} outputs does not fit")
        parts = [_divided(segment) for segment in segments]
        of_prompts = self._run(self.prompt_program, [prompt for prompt, _ in parts if prompt.tokens], meanwhile)
        generated = [part for _, part in parts if part.tokens]
        if not generated:
            return of_prompts
        of_generated = self._run(self.program, generated)
        logits = np.empty((len(of_prompts) + len(of_generated), self.vocab_size), np.float32)
        row = first = second = 0
        for prompt, part in parts:
            middle, end = row + prompt.outputs, row + prompt.outputs + part.outputs
            logits[row:middle] = of_prompts[first : first + prompt.outputs]
            logits[middle:end] = of_generated[second : second + part.outputs]
            row, first, second = end, first + prompt.outputs, second + part.outputs
        return logits

    def begin(self, segments: Sequence[Segment]) -> None:
        """Take up a step of prompts alone, for `proceed`. Raises as `forward` does."""
        self._pass_outputs = self._fill(self.prompt_program.state, segments)
        self.prompt_program.begin()

    def proceed(self, seconds: float) -> NDArray[np.float32] | None:
        return self.prompt_program.logits[: self._pass_outputs] if self.prompt_program.proceed(seconds) else None

    def _run(self, program: CpuProgram, segments: Sequence[Segment], meanwhile: Callable[[], object] | None = None) -> NDArray[np.float32]:
        outputs = self._fill(program.state, segments)
        program.run(meanwhile)
        return program.logits[:outputs]

    def _write(self, state: State, segments: Sequence[Segment]) -> list[int]:
        state.set_lanes(len(segments), self._panels_in_lane(segments) if state is self.program.state else 0)
        return super()._write(state, segments)

    def _panels_in_lane(self, segments: Sequence[Segment]) -> int:
        """How many panels of tokens each thread takes for itself, if each token is a sequence of its own and they fill such; else 0."""
        count, lanes = len(segments), self.threads * panel_tokens()  # tokens in a panel for each
        panels = -(-count // lanes)
        if count <= SPLIT_TOKENS or panels * lanes - count >= _MISSING or not _single_tokens(segments):
            return 0
        return panels if self.program.has_lanes(panels) else 0

    def _divide(self, state: State, segments: Sequence[Segment]) -> tuple[int, int, int]:
        """Query tiles of long segments. In a step of few sequences the positions of a single token are dealt out in chunks, in a step of
        few tokens those of each."""
        self._write_read_blocks(state, segments)
        tokens = merges = partials = 0
        items: list[tuple[int, ...]] = []
        others: list[tuple[int, ...]] = []  # without output rows
        few_sequences = len(segments) <= SPLIT_TOKENS
        few_tokens = not self.prompts_apart and sum(len(segment.tokens) for segment in segments) <= SPLIT_TOKENS
        for row, segment in enumerate(segments):
            count = len(segment.tokens)
            tokens = state.next_row(tokens, row)
            if segment.start + count > ATTENTION_CHUNK and (few_tokens or (few_sequences and count == 1)):
                for token in range(tokens, tokens + count):
                    chunks = -(-(segment.start + token - tokens + 1) // ATTENTION_CHUNK)
                    state.merges[merges] = (token, partials, chunks)
                    items += [(token, 1, row, chunk, partials + chunk) for chunk in range(chunks)]
                    merges += 1
                    partials += chunks
            else:
                for first in range(0, count, state.query_tile):
                    of = others if first + state.query_tile <= count - segment.outputs else items
                    of.append((tokens + first, min(state.query_tile, count - first), row, -1, 0))
            tokens += count
        with_outputs = len(items)
        items += others
        if items:
            state.items[: len(items)] = items
        return len(items), merges, with_outputs

    def _write_read_blocks(self, state: State, segments: Sequence[Segment]) -> None:
        """Write which blocks of the cache attention will read, for whoever has time to fetch them: none in a step of few sequences."""
        if not state.panels_in_lane:
            self._write_blocks(state, 0, segments if len(segments) > SPLIT_TOKENS else (), READ_BLOCKS)
            return
        state.read_blocks[0, :, 0] = 0
        for lane, (_, (first, last, _)) in enumerate(state.lanes.tolist()):
            self._write_blocks(state, 1 + lane, segments[first:last], state.most_read)

    def _write_blocks(self, state: State, index: int, segments: Sequence[Segment], most: int) -> None:
        for group, window in enumerate(self.windows):
            blocks: list[int] = []
            for segment in segments:
                if len(blocks) >= most:
                    break
                first = max(0, segment.start + 1 - window) // self.block_size if window else 0
                blocks += self._tables(segment)[group][first : -(-(segment.start + len(segment.tokens)) // self.block_size)]
            blocks = blocks[:most]
            read = state.read_blocks[index, group, : len(blocks) + 1]
            read[:] = (len(blocks), *blocks)
            read[1:] *= state.parts_of_block

    def read_logits(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of `forward`, for Python to read: they are as they should be."""
        return logits


def _single_tokens(segments: Sequence[Segment]) -> bool:
    """Whether each is one token of a sequence, whose logits are wanted."""
    return all(len(segment.tokens) == segment.outputs == 1 for segment in segments)


def _divided(segment: Segment) -> tuple[Segment, Segment]:
    """What is of the prompt, and what was generated; either may be empty."""
    count = len(segment.tokens) - segment.generated
    outputs = min(segment.outputs, segment.generated)
    table, further = segment.block_table, segment.further_tables
    prompt = Segment(segment.tokens[:count], segment.start, table, segment.outputs - outputs, further_tables=further)
    return prompt, Segment(segment.tokens[count:], segment.start + count, table, outputs, further_tables=further)


def cache_token_bytes(graph: Graph, cache_type: str = "auto", usual: str = "bf16") -> int:
    """Bytes of KV cache for one token: the keys and values of all layers, with their scales. ``auto`` is ``usual`` (`Graph.cache_type`)."""
    layout = cache_layout(graph.cache_type(cache_type, usual))
    heads = [(node.inputs[1].columns, node.attributes["head_dim"]) for node in graph.nodes if node.op == "attention"]
    return sum(2 * (columns // head_dim) * cache_row_bytes(layout, head_dim) for columns, head_dim in heads)


def _suggested_cache(max_position_embeddings: int, token_bytes: int) -> int:
    """Tokens: the model's context, but at most a quarter of the memory. It is taken only as it fills."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    affordable = memory // 4 // max(1, token_bytes)
    tokens = min(max(max_position_embeddings, _DEFAULT_CONTEXT), affordable)
    if tokens < 256:
        raise ModelLoadError(
            f"a KV cache of {tokens} tokens is all that a quarter of this machine's memory holds; take a smaller model",
            ", or set the cache's size with with_paged_attn",
        )
    return tokens
