"""An engine whose model says noise, over a real vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pymistral.engine.constraint import GrammarCompiler
from pymistral.engine.core import EngineCore
from pymistral.engine.types import Segment
from pymistral.loading.checkpoint import load_gguf
from pymistral.nn.sampling import SamplingProgram


class NoiseRunner:
    """Random logits, in which what ends a string is a little more likely than in nature."""

    max_num_seqs, max_batch_tokens, max_output_rows = 32, 512, 64
    block_size, num_blocks, max_sequence_length = 32, 2048, 1024

    prompts_apart = False
    prompt_pass = None
    panel_tokens = 1
    windows: Sequence[int | None] = (None,)

    def __init__(self, vocab_size: int, closing: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self._rng = np.random.default_rng(0)
        self._rows = (1.5 * self._rng.standard_normal((64, vocab_size))).astype(np.float32)
        self._rows[:, list(closing)] += 1.5
        self.sample = SamplingProgram(vocab_size, threads=1).run

    def read_logits(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits

    def forward(self, segments: Sequence[Segment], meanwhile: Callable[[], object] | None = None) -> NDArray[np.float32]:
        if meanwhile is not None:
            meanwhile()
        return self._rows[self._rng.integers(0, len(self._rows), sum(segment.outputs for segment in segments))]


@pytest.fixture(scope="module")
def noise(smollm2_path: Path) -> tuple[EngineCore, GrammarCompiler]:
    checkpoint = load_gguf(smollm2_path)
    tokenizer = checkpoint.tokenizer
    closing = [token for token in range(tokenizer.vocab_size) if tokenizer.id_to_bytes(token)[:1] in (b'"', b"}", b"]")]
    core = EngineCore(NoiseRunner(tokenizer.vocab_size, closing), tokenizer, eos_token_ids=checkpoint.eos_token_ids)
    return core, GrammarCompiler(tokenizer, tokenizer.vocab_size, checkpoint.eos_token_ids)
