"""Sizes that whoever records a program needs of the kernels. No Numba here, so that a warm start loads none."""

from __future__ import annotations

from collections.abc import Iterable

from .isa import current_isa
from .sampling_layout import BLOCK
from .tiles import TILE_FORMATS, panel_bytes

ATTENTION_CHUNK = 256
_FLOAT_ROWS = 48  # query rows in an item of `float_attention`
FLOAT_LINE = 4 * ATTENTION_CHUNK + 64  # bytes of its rows of scores: rows do not compete for the same lines of the cache
QUERY_TILES = 4  # pairs of tiles of query rows in an item of `amx_attention`
WIDE_TOKENS = 32  # in a panel of `amx`
WIDE_GROUP = 4  # pairs of weight tiles that share a pass over the activations
WIDE_SEGMENT = 18  # times 32 columns of a pair of weight tiles, unpacked, stay in the first-level cache


def whole_panels(tokens: int) -> int:
    """``tokens``, rounded up to whole panels."""
    panel = current_isa().tokens
    return -(-tokens // panel) * panel


def panels_bytes(tokens: int, columns: int) -> int:
    """Bytes of the panels of up to ``tokens`` rows of ``columns``."""
    panel = current_isa().tokens
    return -(-tokens // panel) * panel_bytes(panel, columns)


LOGITS_GROUP = BLOCK // 16  # tiles whose largest logit `logits.product` finds: what sampling wants to know


def logits_groups(vocabulary: int) -> int:
    """In a row of logits, rounded up to whole vectors."""
    return -(-vocabulary // (16 * 16 * LOGITS_GROUP)) * 16


def word_row_bytes(columns: int) -> int:
    """Bytes of a row of ``columns`` as int16, with what describes it: the scratch of a thread in `logits.refine`."""
    return panel_bytes(1, columns, 2)


UNPACKED_BLOCK = 512  # bytes of 16 rows by 32 columns


def unpacked_bytes(layout: str, columns: int) -> int:
    """Scratch of one thread in `matmul.matmul`, for a tile whose quants are unpacked once for all panels.

    None but for types that take more than a mask or a shift, on AVX2: unpacking took a fifth of the time of a panel of six tokens there.
    """
    format = TILE_FORMATS[layout]
    return 16 * columns if current_isa().name == "avx2" and (format.high_bits or format.codebook) else 0


def multiplies_sums(layout: str) -> bool:
    """Whether whole panels are multiplied as `winograd` does: by 4-bit quants, 32 of which share a scale."""
    format = TILE_FORMATS.get(layout)
    if format is None or not current_isa().adds_beside or format.scales > 1 or format.codebook:
        return False
    return format.bits == 4 and not format.high_bits and (format.zero == 8 or format.has_pairs)


def largest_activation(layouts: Iterable[str]) -> int:
    """What activations are quantised to that weights of these layouts are multiplied with: a byte has to hold their sums with quants."""
    return 120 if any(multiplies_sums(layout) for layout in layouts) else 127


def panels_at_once() -> int:
    """Panels that share a pass over the weights: with 32 registers two."""
    return 2 if current_isa().has_avx512 else 1


def gated_tokens() -> int:
    """Tokens whose gates `matmul.gated_matmul` has at once."""
    return panels_at_once() * current_isa().tokens


def gated_scratch_bytes(layout: str, columns: int) -> int:
    """Scratch of one thread in `matmul.gated_matmul`: gate and up, float32 [tokens][32] each, and four tiles that may be unpacked."""
    return 2 * gated_tokens() * 128 + 4 * unpacked_bytes(layout, columns)


def multiplies_bf16(layout: str, columns: int) -> bool:
    """Whether `bf16_matmul` takes a matrix."""
    return current_isa().has_bf16 and layout == "bf16" and columns % 32 == 0


_CACHE_ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "bf16 pairs": 2, "int16": 2, "f8e4m3": 1, "int8": 1}


_SCALED = ("int16", "int8", "f8e4m3")


def cache_layout(cache_type: str) -> str:
    """How keys and values of a type lie in memory: see `rope.rope_and_cache`."""
    return "bf16 pairs" if cache_type == "bf16" and current_isa().has_bf16 else cache_type


def cache_item_bytes(layout: str) -> int:
    """Bytes of one dimension of a key or value."""
    return _CACHE_ITEM_BYTES[layout]


def usual_cache_type() -> str:
    """The type of 16 bits that this CPU multiplies fastest."""
    isa = current_isa()
    return "int16" if isa.name in ("avx512vnni", "avxvnni", "avx2") and not isa.has_bf16 else "bf16"


def cache_scale_group(layout: str, head_dim: int) -> int:
    """Dimensions of a key or value in integers, or of 8 bits, that share a scale."""
    return head_dim if layout == "int16" else 32 if head_dim % 32 == 0 else 16


def cache_row_bytes(layout: str, head_dim: int) -> int:
    """Bytes of the key, or of the value, that one head has at one position, with its scales."""
    scales = head_dim // cache_scale_group(layout, head_dim) if layout in _SCALED else 0
    return head_dim * cache_item_bytes(layout) + 2 * scales


def attention_module(layout: str, group: int, head_dim: int) -> str:
    """Which module's kernel attends to such a cache."""
    if layout == "int16":
        return "int16_attention"
    if layout != "bf16 pairs":
        return "float_attention"
    return "amx_attention" if current_isa().has_amx and group <= 16 and head_dim % 32 == 0 else "attention"


def register_rows() -> int:
    """Query rows whose sums for 16 or 32 positions fill the registers: 16 of 4 floats, 16 of 8 floats, or 32 of 16."""
    isa = current_isa()
    return 12 if isa.has_avx512 else 3 if isa.name == "generic" else 6


def float_rows(group: int) -> int:
    """Query rows in an item of `float_attention`, at most."""
    return max(_FLOAT_ROWS, group)


def query_tile_tokens(module: str, group: int) -> int:
    """Tokens in an item of attention, at most."""
    if module == "amx_attention":
        return QUERY_TILES * (32 // group)
    rows = float_rows(group) if module in ("float_attention", "int16_attention") else register_rows()
    return max(1, rows // group)


def attention_scratch_bytes(module: str, group: int, head_dim: int) -> int:
    """Scratch of one thread: queries, scores, a chunk's outputs and all outputs, and four numbers for each row."""
    if module == "amx_attention":
        pair = 32 * (head_dim // 2 + head_dim + 2) * 4  # queries, outputs, maxima and sums
        return 32 * (ATTENTION_CHUNK + 16 + head_dim + 2) * 4 + QUERY_TILES * pair
    if module == "float_attention":  # scores twice, and what is widened
        return float_rows(group) * (3 * 4 * head_dim + 16 + 2 * FLOAT_LINE) + 64 * max(ATTENTION_CHUNK, head_dim)
    if module == "int16_attention":  # queries of 16 bits, two numbers more for each row, a chunk's scales, integer sums, and places
        rows = float_rows(group) * (2 * 4 * head_dim + 2 * head_dim + 24 + FLOAT_LINE)
        return rows + 8 * ATTENTION_CHUNK + 4 * group * head_dim + ATTENTION_CHUNK // 2
    rows = query_tile_tokens(module, group) * group
    return rows * (head_dim // 2 + ATTENTION_CHUNK + 2 * head_dim + 4) * 4 + 64


def partial_floats(group: int, head_dim: int) -> int:
    """Of one chunk's result for one key/value head, kept for `attention.merge`: outputs, maxima and sums of ``group`` rows."""
    return group * (head_dim + 2)


def panel_tokens() -> int:
    """Tokens in a panel."""
    return current_isa().tokens


def most_read_twice() -> int:
    """Bytes of a matrix that two threads may both read for a panel of tokens each, so that nothing goes from one to the other. Where the
    last-level cache is far, reading more takes as long as that."""
    return 256 << 10 if current_isa().far_cache else 1 << 62


def panel_row_bytes(columns: int) -> int:
    """Bytes of int8 panels for each of their rows."""
    return panel_bytes(1, columns)


def gathered_rows(choices: int, experts: int) -> int:
    """Rows that ``choices`` may take when each of the experts' rows start at a whole panel (see `moe`)."""
    return choices + min(choices, experts) * (panel_tokens() - 1)


DENSE_SLOTS = 16  # of a matrix kernel, at the start of the slots of `moe.experts`


def experts_scratch_bytes(layout: str, columns: int) -> int:
    """Scratch of one thread in `moe.experts`: the slots of a matrix kernel, and its scratch."""
    return 8 * DENSE_SLOTS + (unpacked_bytes(layout, columns) if layout in TILE_FORMATS else 0)


def wide_panels_bytes(tokens: int, columns: int) -> int:
    """Bytes of the wide panels (see `amx`) of up to ``tokens`` rows of ``columns``."""
    return wide_tokens(tokens) * columns * 2


def wide_scratch_bytes(max_tokens: int) -> int:
    """Scratch of one thread in `amx`: a segment of a pair of unpacked tiles, and a group's products."""
    return WIDE_SEGMENT * 2048 + WIDE_GROUP * wide_tokens(max_tokens) * 128


def wide_tokens(tokens: int) -> int:
    """``tokens``, rounded up to whole wide panels."""
    return -(-tokens // WIDE_TOKENS) * WIDE_TOKENS
