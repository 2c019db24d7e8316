"""A model on an NVIDIA GPU, as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..kernels.cpu.compiler import Progress
from ..kernels.cpu.sampling_layout import LOGITS, MODE, SAMPLE
from ..nn.cuda import CudaModel, Size, stride_of
from ..nn.cuda_gpu import GpuLike
from ..nn.cuda_program import CudaProgram, CudaPrograms
from ..nn.cuda_sampling import GpuSampling
from ..nn.cuda_weights import gpu_layout
from ..nn.graph import TOKENS, Graph
from ..nn.memory import address
from ..nn.pool import available_threads
from ..nn.sampling import SamplingProgram, SamplingRow
from ..nn.state import State
from .runner import PagedRunner, cache_token_bytes
from .types import Segment

_MAX_TOKENS = 2048  # in one step: enough for the tensor cores
_BLOCK_SIZE = 32
_DEFAULT_CONTEXT = 32768  # tokens of KV cache, unless asked otherwise, if memory allows
_RESERVE = 512 << 20  # bytes for logits, sampling, graphs and the driver
_FEW_OUTPUTS = 8  # rows of logits that a step with prompts is made for; with more, it is made for all


class CudaRunner(PagedRunner):
    """Runs a model on a GPU. As `CpuRunner`, it need not remember sequences.

    Parameters
    ----------
    graph
        The model, recorded.
    gpu
        Where it runs.
    max_position_embeddings
        The longest sequence that the model was made for.
    max_num_seqs
        Sequences in one step.
    block_size
        Positions in a block of the KV cache: a multiple of 32.
    cache_tokens
        Room of the KV cache in tokens, over all sequences; None: what the model and the free memory suggest.
    cache_type
        How keys and values are kept: ``auto``, ``f32`` or ``bf16``.
    max_tokens
        Tokens in one step.
    progress
        Told how many kernels are compiled, if any must be.

    Raises
    ------
    ModelLoadError
        A weight's type or shape cannot be used, or the GPU's memory is too small.
    """

    def __init__(
        self,
        graph: Graph,
        gpu: GpuLike,
        *,
        max_position_embeddings: int,
        max_num_seqs: int = 32,
        block_size: int | None = None,
        cache_tokens: int | None = None,
        cache_type: str = "auto",
        max_tokens: int = _MAX_TOKENS,
        progress: Progress | None = None,
    ) -> None:
        if cache_tokens is None:
            free = free_after_weights(graph, gpu, max_tokens)
            cache_tokens = min(max(max_position_embeddings, _DEFAULT_CONTEXT), free // cache_token_bytes(graph, cache_type))
            if cache_tokens < 256:
                raise ModelLoadError(f"the GPU has room for the weights and {max(0, cache_tokens)} tokens of KV cache: too few")
        super().__init__(
            graph,
            max_position_embeddings=max_position_embeddings,
            max_num_seqs=max_num_seqs,
            block_size=block_size or _BLOCK_SIZE,
            cache_tokens=cache_tokens,
            cache_type=cache_type,
            max_tokens=max_tokens,
        )
        self.gpu = gpu
        self.model = CudaModel(graph, self.limits, gpu, progress)
        self.programs = CudaPrograms(self.model)
        stride = stride_of(self.vocab_size)
        self._logits = gpu.pinned(4 * self.max_output_rows * stride).view(np.float32).reshape(self.max_output_rows, stride)
        self._sample_here = SamplingProgram(self.vocab_size, available_threads()).run
        self._sample_there = GpuSampling(gpu, self.vocab_size, self.max_output_rows).run
        self._program: CudaProgram | None = None  # of the last step
        self._waits = False  # whether the GPU may still read the state

    def forward(self, segments: Sequence[Segment], meanwhile: Callable[[], object] | None = None) -> NDArray[np.float32]:
        """Start one flat step and call ``meanwhile``, or before it if its program must be made first; returns where the logits
        ``[rows, vocab_size]`` will be, once `read_logits` or `sample` ask for them.

        Raises
        ------
        ValueError
            The segments do not fit the limits, or name a token, position or block that does not exist: kernels trust these arrays.
        """
        if self._waits:
            self.gpu.synchronize()
            self._waits = False
        outputs = self._fill(self.model.state, segments)
        if segments:
            size = self._size(segments, outputs)
            if meanwhile is not None and size not in self.programs:  # to make one takes longer than a step
                meanwhile()
                meanwhile = None
            self._program = self.programs.of(size)
            self._waits = True
            self.model.copy_state(len(segments))
            self._program.run()
        if meanwhile is not None:
            meanwhile()
        return self._logits[:outputs, : self.vocab_size]

    def _size(self, segments: Sequence[Segment], outputs: int) -> Size:
        """The smallest program that the step fits: powers of two, so that there are few."""
        tokens = sum(len(segment.tokens) for segment in segments)
        prefill = self.model.can_prefill and tokens > len(segments)
        rows = min(1 << (tokens - 1).bit_length(), self.max_batch_tokens)
        few = min(rows, _FEW_OUTPUTS) if prefill and outputs <= _FEW_OUTPUTS else rows
        return Size(rows, min(few, self.max_output_rows), prefill)

    def _divide(self, state: State, segments: Sequence[Segment]) -> tuple[int, int, int]:
        """Query tiles for the attention of prompts, and the sequence of each token for that of single tokens."""
        tokens = items = 0
        tile = self.model.query_tile
        for row, segment in enumerate(segments):
            count = len(segment.tokens)
            state.table_rows[tokens : tokens + count] = row
            firsts = range(0, count, tile)
            for item, first in enumerate(firsts, items):
                state.items[item] = (tokens + first, min(tile, count - first), row)
            items += len(firsts)
            tokens += count
        return items, 0, items

    def _fetch(self, rows: Sequence[int]) -> None:
        """Copy these rows of the last step's logits to the host."""
        program = self._program
        assert program is not None
        for row in rows:
            self.gpu.copy_out(self._logits[row], program.logits + 4 * row * program.stride)
        self.gpu.synchronize()
        self._waits = False

    def read_logits(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits that `forward` returned, with their values."""
        if len(logits):
            first = (address(logits) - address(self._logits)) // self._logits.strides[0]
            self._fetch(range(first, first + len(logits)))
        return logits

    def sample(self, rows: Sequence[SamplingRow]) -> None:
        """Choose a token for each row, from the logits that it names: on the GPU, but for rows that functions of the user's change."""
        here, there, places = [], [], []
        for row in rows:
            place = self._row_of(row)
            if place is None or row.words[MODE] != SAMPLE:
                here.append(row)
            else:
                there.append(row)
                places.append(place)
        if here:
            self._fetch(sorted({place for row in here if (place := self._row_of(row)) is not None}))
            self._sample_here(here)
        if there:
            program = self._program
            assert program is not None
            for first in range(0, len(there), self.max_output_rows):
                part = slice(first, first + self.max_output_rows)
                self._sample_there(there[part], [program.logits + 4 * place * program.stride for place in places[part]])
            self._waits = False

    def _row_of(self, row: SamplingRow) -> int | None:
        """Which of the last step's rows a sampling row names; None: one that is in the host's memory already."""
        offset = row.words[LOGITS] - address(self._logits)
        return int(offset // self._logits.strides[0]) if 0 <= offset < self._logits.nbytes else None


def weight_bytes(graph: Graph) -> int:
    """Of all matrices, on a GPU."""
    return sum(gpu_layout(tensor).nbytes(*tensor.shape) for tensor in graph.matrices)


def step_bytes(graph: Graph, max_tokens: int) -> int:
    """About what lives during a step: rows as wide as the widest product (gate, up, and what they become), and two matrices in bfloat16."""
    widest = largest = 0
    for node in graph.nodes:
        if node.op in ("linear", "gated_linear", "mixture_of_experts") and node.output.rows == TOKENS:
            shapes = [tensor.shape for tensor in Graph([node]).matrices]
            widest = max(widest, max(shape[0] for shape in shapes) * node.attributes.get("top_k", 1))
            largest = max(largest, max(prod(shape) for shape in shapes))
    return 4 * 4 * max_tokens * widest + 2 * 2 * largest


def free_after_weights(graph: Graph, gpu: GpuLike, max_tokens: int = _MAX_TOKENS) -> int:
    """Bytes that will be free for the KV cache."""
    return max(0, gpu.free_memory() - weight_bytes(graph) - step_bytes(graph, max_tokens) - _RESERVE)
