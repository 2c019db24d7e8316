"""From rows of logits to tokens."""

from __future__ import annotations

from .launch import Kernel, Launch
from .operands import ceil_div


def scratch_floats(vocab_size: int, max_rows: int) -> int:
    """float32 of scratch that `sample` needs."""
    return 2 * ceil_div(vocab_size, 4) * 4 * max_rows


def sample(descriptions: int, vocab_size: int, scratch: int, *, count: int, max_rows: int) -> Launch:
    """Sample rows: ``descriptions`` int64 ``[rows][ROW_WORDS]`` as `kernels.cpu.sampling_layout` states, with device addresses in them."""
    return Launch(Kernel("sample", "sampling.cu", "pipp"), (max_rows, 1, 1), 1024, 0, (descriptions, vocab_size, scratch, count))
