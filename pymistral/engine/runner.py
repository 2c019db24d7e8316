"""A model as the engine sees it: a recorded program with its paged KV cache, fed one flat step at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..kernels.cpu.compiler import Progress
from ..kernels.cpu.geometry import ATTENTION_CHUNK
from ..nn.cpu import compile_for_prompts
from ..nn.cpu_program import CpuProgram
from ..nn.graph import Graph
from ..nn.pool import available_threads
from ..nn.sampling import SamplingProgram
from ..nn.state import SPLIT_SEQUENCES, Limits
from .types import Segment

logger = logging.getLogger("pymistral")

_MAX_TOKENS = 512  # in one step
_MAX_OUTPUTS = 64  # rows of logits in one step
_BLOCK_SIZE = 32
_DEFAULT_CONTEXT = 32768  # tokens of KV cache, unless asked otherwise, if memory allows


Programs = tuple[CpuProgram, CpuProgram]
"""For the tokens of prompts, and for those that are generated."""


class CpuRunner:
    """Runs a model on the CPU. It remembers nothing of sequences: segments say where their keys and values lie.

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
        progress: Progress | None = None,
    ) -> None:
        self.block_size = block_size or _BLOCK_SIZE
        if cache_tokens is None:
            cache_tokens = _suggested_cache(max_position_embeddings, cache_token_bytes(graph))
        self.num_blocks = -(-cache_tokens // self.block_size)
        self.max_sequence_length = min(max_position_embeddings, self.num_blocks * self.block_size)
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max(_MAX_TOKENS, max_num_seqs)
        self.max_output_rows = max(_MAX_OUTPUTS, max_num_seqs)
        self._limits = Limits(
            max_tokens=self.max_batch_tokens,
            max_outputs=self.max_output_rows,
            max_sequences=max_num_seqs,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_blocks=-(-self.max_sequence_length // self.block_size),
        )
        self.threads = threads or available_threads()
        self.prompt_program, self.program = self.compile(graph, progress)
        self.vocab_size = self.program.logits.shape[1]
        # A model may give logits for more ids, or fewer, than it has embeddings for.
        self._embeddings = min(
            (node.attributes["weight"].shape[0] for node in graph.nodes if node.op == "embedding"), default=self.vocab_size
        )
        self.sample = SamplingProgram(self.vocab_size, self.threads).run

    @property
    def prompts_apart(self) -> bool:
        return self.prompt_program is not self.program

    def compile(self, graph: Graph, progress: Progress | None = None) -> Programs:
        """Programs of these limits, for `use`. Another thread may run steps in the meantime."""
        return compile_for_prompts(graph, self._limits, threads=self.threads, progress=progress)

    def use(self, programs: Programs) -> None:
        """Run these programs from now on: the same model with other weights, and an empty cache."""
        shape, before = programs[0].logits.shape, self.program.logits.shape
        if shape != before:
            raise ValueError(f"logits {shape} in place of {before}: another model")
        self.prompt_program, self.program = programs

    def forward(self, segments: Sequence[Segment]) -> NDArray[np.float32]:
        """Run one flat step; returns logits ``[rows, vocab_size]`` in segment order, valid until the next call.

        Raises
        ------
        ValueError
            The segments do not fit the limits, or name a token, position or block that does not exist: kernels trust these arrays.
        """
        if not self.prompts_apart or all(segment.generated == len(segment.tokens) for segment in segments):
            return self._run(self.program, segments)
        for segment in segments:
            count = len(segment.tokens)
            if not (count and 0 <= segment.generated <= count and 0 <= segment.outputs <= count):
                raise ValueError(f"segment of {count} tokens, {segment.generated} generated, with {segment.outputs} outputs does not fit")
        prompts = [part for segment in segments if (part := _prompt_part(segment)).tokens]
        generated = [part for segment in segments if (part := _generated_part(segment)).tokens]
        of_prompts = self._run(self.prompt_program, prompts)
        if not generated:
            return of_prompts
        of_generated = self._run(self.program, generated)
        logits = np.empty((len(of_prompts) + len(of_generated), self.vocab_size), np.float32)
        row = first = second = 0
        for segment in segments:
            for part, source, at in ((_prompt_part(segment), of_prompts, first), (_generated_part(segment), of_generated, second)):
                logits[row : row + part.outputs] = source[at : at + part.outputs]
                row += part.outputs
            first += _prompt_part(segment).outputs
            second += _generated_part(segment).outputs
        return logits

    def _run(self, program: CpuProgram, segments: Sequence[Segment]) -> NDArray[np.float32]:
        state = program.state
        tokens = outputs = items = merges = partials = 0
        split = len(segments) <= SPLIT_SEQUENCES  # few sequences: their chunks are dealt out to the threads
        longest = 0
        for row, segment in enumerate(segments):
            count, start = len(segment.tokens), segment.start
            end = start + count
            if tokens + count > self.max_batch_tokens or row >= self.max_num_seqs:
                raise ValueError(f"a step holds {self.max_batch_tokens} tokens of {self.max_num_seqs} sequences at most")
            if count < 1 or start < 0 or end > self.max_sequence_length or not 0 <= segment.outputs <= count:
                raise ValueError(f"segment of {count} tokens from position {start} with {segment.outputs} outputs does not fit")
            longest = max(longest, end)
            self._place(state, segment, row, tokens, count, start, end)
            chunks = -(-end // ATTENTION_CHUNK)
            if split and count == 1 and chunks > 1:
                state.merges[merges] = (tokens, partials, chunks)
                for chunk in range(chunks):
                    state.items[items] = (tokens, 1, row, chunk, partials + chunk)
                    items += 1
                merges += 1
                partials += chunks
            else:
                for first in range(0, count, state.query_tile):
                    state.items[items] = (tokens + first, min(state.query_tile, count - first), row, -1, 0)
                    items += 1
            tokens += count
            if outputs + segment.outputs > self.max_output_rows:
                raise ValueError(f"a step gives {self.max_output_rows} rows of logits at most")
            if segment.outputs:
                state.output_rows[outputs : outputs + segment.outputs] = range(tokens - segment.outputs, tokens)
                outputs += segment.outputs
        for rope in state.ropes:
            rope.prepare(longest)
        state.counts[:4] = (tokens, outputs, items, merges)
        program.run()
        return program.logits[:outputs]

    def _place(self, state: Any, segment: Segment, row: int, at: int, count: int, start: int, end: int) -> None:
        """Write one segment's tokens, positions, cache slots and block table into the state."""
        size = self.block_size
        table = segment.block_table
        blocks = -(-end // size)
        if len(table) < blocks:
            raise ValueError(f"a block table of {len(table)} blocks of {size} does not cover {end} positions")
        used = state.block_tables[row, :blocks]
        used[:] = table[:blocks]
        if count == 1:
            token, block = segment.tokens[0], int(used[-1])
            if not 0 <= token < self._embeddings or not 0 <= int(used.min()) <= int(used.max()) < self.num_blocks:
                raise ValueError(f"token {token} or block {block} does not exist")
            state.tokens[at] = token
            state.positions[at] = start
            state.cache_slots[at] = block * size + start % size
            return
        place = slice(at, at + count)
        state.tokens[place] = segment.tokens
        ids = state.tokens[place]
        if ids.min() < 0 or ids.max() >= self._embeddings or used.min() < 0 or used.max() >= self.num_blocks:
            raise ValueError("a token or block does not exist")
        positions = np.arange(start, end, dtype=np.int32)
        state.positions[place] = positions
        state.cache_slots[place] = used[positions // size] * size + positions % size


def _prompt_part(segment: Segment) -> Segment:
    count = len(segment.tokens) - segment.generated
    return Segment(segment.tokens[:count], segment.start, segment.block_table, max(0, segment.outputs - segment.generated))


def _generated_part(segment: Segment) -> Segment:
    count = len(segment.tokens) - segment.generated
    outputs = min(segment.outputs, segment.generated)
    return Segment(segment.tokens[count:], segment.start + count, segment.block_table, outputs)


def cache_token_bytes(graph: Graph) -> int:
    """Bytes of KV cache for one token: keys and values, in bfloat16, or float32 for a model in float32."""
    item = 4 if graph.exact else 2
    return sum(2 * item * node.inputs[1].columns for node in graph.nodes if node.op == "attention")


def _suggested_cache(max_position_embeddings: int, token_bytes: int) -> int:
    """Tokens: the model's context, but at most a quarter of the memory. It is taken only as it fills."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    affordable = memory // 4 // max(1, token_bytes)
    tokens = min(max(max_position_embeddings, _DEFAULT_CONTEXT), affordable)
    if tokens < 256:
        raise ModelLoadError(
            f"a KV cache of {tokens} tokens is all that a quarter of this machine's memory holds; set its size with with_paged_attn"
        )
    return tokens
