"""Sizes that whoever records a program needs of the kernels. No Numba here, so that a warm start loads none."""

from __future__ import annotations

from .isa import current_isa
from .tiles import panel_bytes

ATTENTION_CHUNK = 256
WIDE_TOKENS = 32  # in a panel of `amx`
WIDE_GROUP = 4  # pairs of weight tiles that share a pass over the activations
WIDE_SEGMENT = 18  # times 32 columns of a pair of weight tiles, unpacked, stay in the first-level cache


def whole_panels(tokens: int) -> int:
    """``tokens``, rounded up to whole panels."""
    panel = current_isa().tokens
    return -(-tokens // panel) * panel


def panels_bytes(tokens: int, columns: int) -> int:
    """Bytes of the int8 panels of up to ``tokens`` rows of ``columns``."""
    panel = current_isa().tokens
    return -(-tokens // panel) * panel_bytes(panel, columns)


def gated_scratch_bytes() -> int:
    """Scratch of one thread in `matmul.gated_matmul`: gate and up, float32 [tokens][32] each."""
    return 2 * current_isa().tokens * 128


def attends_by_tiles(group: int, head_dim: int) -> bool:
    """Whether `amx_attention` can be used."""
    return current_isa().has_amx and group <= 16 and head_dim % 32 == 0


def query_tile_tokens(group: int, head_dim: int) -> int:
    """Tokens in a query tile of `attention`, so that its ``tokens * group`` rows fit the registers."""
    return max(1, (32 if attends_by_tiles(group, head_dim) else current_isa().tokens) // group)


def attention_scratch_bytes(group: int, head_dim: int) -> int:
    """Scratch of one thread in `attention`: queries, scores, a chunk's outputs and all outputs, and four numbers for each row."""
    if attends_by_tiles(group, head_dim):
        return 32 * (head_dim // 2 + ATTENTION_CHUNK + 16 + 2 * head_dim + 4) * 4
    rows = query_tile_tokens(group, head_dim) * group
    return rows * (head_dim // 2 + ATTENTION_CHUNK + 2 * head_dim + 4) * 4 + 64


def partial_floats(group: int, head_dim: int) -> int:
    """Of one chunk's result for one key/value head, kept for `attention.merge`: outputs, maxima and sums of ``group`` rows."""
    return group * (head_dim + 2)


def panel_tokens() -> int:
    """Tokens in a panel."""
    return current_isa().tokens


def panel_row_bytes(columns: int) -> int:
    """Bytes of int8 panels for each of their rows."""
    return panel_bytes(1, columns)


def gathered_rows(choices: int, experts: int) -> int:
    """Rows that ``choices`` may take when each of the experts' rows start at a whole panel (see `moe`)."""
    return choices + min(choices, experts) * (panel_tokens() - 1)


EXPERTS_SCRATCH_BYTES = 128  # of one thread in `moe.experts`: the slots of a matrix kernel


def wide_panels_bytes(tokens: int, columns: int) -> int:
    """Bytes of the wide panels (see `amx`) of up to ``tokens`` rows of ``columns``."""
    return wide_tokens(tokens) * columns * 2


def wide_scratch_bytes(max_tokens: int) -> int:
    """Scratch of one thread in `amx`: a segment of a pair of unpacked tiles, and a group's products."""
    return WIDE_SEGMENT * 2048 + WIDE_GROUP * wide_tokens(max_tokens) * 128


def wide_tokens(tokens: int) -> int:
    """``tokens``, rounded up to whole wide panels."""
    return -(-tokens // WIDE_TOKENS) * WIDE_TOKENS
