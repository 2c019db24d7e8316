"""How weights and activations lie in memory for the matrix kernels. The one place that states it.

Weights
-------
A matrix ``[rows, columns]`` becomes tiles of 16 rows, one after the other; a tile is a run of records, one for each 32 columns (or for 256,
where the format has scales of scales). Lane ``r`` of every vector belongs to row ``r`` of the tile, so a dot product ends with no
horizontal sum. The 32 columns are 8 *groups* of 4: byte ``4 r + i`` of a group's 64 bytes is row ``r``, column ``4 group + i``, as
``vpdpbusd`` wants it.

A record is, in this order:

- for 256-column formats: ``f16[16]`` super-scale and, with minimums, ``f16[16]`` super-minimum; then 8 times what follows
- quants, the low bits: 8 bits: 8 vectors of 64 bytes, vector ``g`` is group ``g``; 4 bits: 4 vectors, vector ``v`` has group ``2 v`` in the
  low nibbles and ``2 v + 1`` in the high ones; 2 bits: 2 vectors, group ``4 v + i`` in bits ``2 i`` and ``2 i + 1`` of vector ``v``
- the plane of high bits, if any: 1 bit: 1 vector, group ``g`` in bit ``g``; 2 bits: 2 vectors, as the 2-bit quants
- scales, one for 32 columns or one for each half: ``f16[16]``, or ``u8[16]`` / ``i8[16]`` that multiply the super-scale, or ``e8m0[16]``
- minimums alike; `scale="nibbles"` keeps scale (low) and minimum (high) in one byte

A weight is ``scale * (quant - zero) + minimum``, or ``scale * codebook[quant]``; super-scales count ``unit`` times. Nothing is rounded on
the way from a GGUF block to a tile, but for what the next paragraph says.

Formats in *pairs* are for AVX-512, where `Isa.pairs_scales`. Each row and 32 columns have two int16, ``a`` and ``b``, and a weight is
``unit * (a * (quant - 8) + 8 * b)``: 4-bit quants less 8, times int8, sum up to 16 bits, so that one product of pairs (``vpmaddwd``) takes
them times ``a`` and eight times the activations' sum times ``b``.

- `scale="i16 pairs"`: a tile starts with the rows' units, ``f32[16]``; ``a`` and ``b`` are rounded to these, and lie where scales do as
  ``i16[16][2]``
- `scale="u8 pairs"`: scale and minimum of Q4_K, ``u8[16][2]``; the header has ``f16[16]``, the super-scale, or the super-minimum where an
  eighth of that is larger, and ``i16[16]``: the smaller of these two in 16,384ths of the larger, doubled, and 1 more if the minimum is the
  larger. The unit is a 256th of the larger.

Float formats: 16-bit and 32-bit tiles hold, for each column, the 16 rows' values. Tiles of FP8 (E4M3) start with ``f32[n][16]`` scales of
the rows, each for an n-th of the columns, and then hold a byte for each column and row.

Activations
-----------
A panel is up to ``P`` tokens (`Isa.tokens`); for each 32 columns a record of ``64 P`` bytes: ``i8[P][32]`` quants, ``f32[P]`` scales,
``i16[P][2]`` minus the sum of quants by pairs (of the columns 0 and 1 of each group, and of 2 and 3), ``f32[P]`` scale times the sum of
quants, ``i32[P]`` minus that sum (times `int8_dots.SUMS_COUNT`), ``i32[P]`` minus the sum of the first 16, ``i32[P]`` of the last 16; and
these two by pairs as well. What is by pairs is there for AVX2. AVX-512 has in place of the first ``i32[P]``, where the sums of formats in
pairs start: eight times the sum of quants in the upper half, less as much. Where products are those of `winograd` the last two are where
its sums start, of formats in pairs and of others. With `Isa.two_pipes` minus the whole sum is `register_tiles.MAGIC_BITS` more, and those
of the halves are ``f32[P]``, the scale times their sums.

What `logits` multiplies again is quantised to 16 bits, each token for itself: ``P`` is 1, and the quants are ``i16[32]``. In each group of
4 columns the even ones come before the odd ones, as the weights' bytes do when they are taken apart with no shuffle.
"""

from __future__ import annotations

from typing import NamedTuple

ROWS = 16
COLUMNS = 32
GROUPS = 8


class TileFormat(NamedTuple):
    """One way to store weights; the module's text defines the fields.

    Attributes
    ----------
    bits, high_bits
        Low bits of a quant, and bits in the plane above them.
    scale
        ``"f16"``, ``"u8"``, ``"i8"`` (times the super-scale), ``"nibbles"``, ``"e8m0"``, ``"super"`` (the super-scale alone), or
        ``"i16 pairs"`` and ``"u8 pairs"`` (with the minimum).
    minimum
        A minimum goes with each scale, stored as the scale is.
    scale_columns
        Columns that share a scale: 32 or 16.
    columns
        Columns in a record: 32, or 256 with super-scales.
    zero
        What is taken from each quant.
    codebook
        int8 values that quants of up to 4 bits index. Products take them plus ``zero``, which makes them unsigned.
    unit
        What super-scales are multiplied by, a power of two.
    """

    name: str
    bits: int
    high_bits: int = 0
    scale: str = "f16"
    minimum: bool = False
    scale_columns: int = 32
    columns: int = 32
    zero: int = 0
    codebook: tuple[int, ...] = ()
    unit: float = 1.0

    @property
    def largest(self) -> int:
        """The largest quant, as products take it: never negative."""
        return max(self.codebook) + self.zero if self.codebook else (1 << self.bits + self.high_bits) - 1

    @property
    def scales(self) -> int:
        """Scales for each row and 32 columns."""
        return COLUMNS // self.scale_columns

    @property
    def quant_bytes(self) -> int:
        return 64 * self.bits

    @property
    def plane_bytes(self) -> int:
        return 64 * self.high_bits

    @property
    def scale_bytes(self) -> int:
        """Of one vector of scales."""
        return {"f16": 32, "u8": 16, "i8": 16, "nibbles": 16, "e8m0": 16, "super": 0, "i16 pairs": 64, "u8 pairs": 32}[self.scale]

    @property
    def has_pairs(self) -> bool:
        return self.scale.endswith(" pairs")

    @property
    def has_minimum_vectors(self) -> bool:
        return self.minimum and not self.has_pairs and self.scale != "nibbles"

    @property
    def units_bytes(self) -> int:
        """The rows' units, at the start of a tile."""
        return 64 if self.scale == "i16 pairs" else 0

    @property
    def header_bytes(self) -> int:
        """Super-scales at the start of a record of 256 columns."""
        if self.columns == COLUMNS:
            return 0
        return 64 if self.minimum else 32

    @property
    def block_bytes(self) -> int:
        """32 columns, without the header."""
        scale_vectors = self.scales * (2 if self.has_minimum_vectors else 1)
        return self.quant_bytes + self.plane_bytes + scale_vectors * self.scale_bytes

    @property
    def record_bytes(self) -> int:
        return self.header_bytes + self.columns // COLUMNS * self.block_bytes

    def tile_bytes(self, columns: int) -> int:
        """Bytes of 16 rows of ``columns`` columns."""
        return self.units_bytes + columns // self.columns * self.record_bytes

    def nbytes(self, rows: int, columns: int) -> int:
        return -(-rows // ROWS) * self.tile_bytes(columns)


# ggml's 4-bit codebooks: one finer around zero, and the values of the E2M1 floats, doubled
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# What coordinates of the grids stand for; the top bit of a quant is the sign, and in IQ1 that of the shift by 1/8 of -1, 0 and 1.
_IQ2 = (8, 25, 43, 0, -8, -25, -43, 0)
_IQ3_XXS = (4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62)
_IQ3_S = (1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15)
_IQ1 = (-7, 1, 9, 0, -9, -1, 7, 0)


class FloatFormat(NamedTuple):
    """Sixteen rows' values side by side for each column; in ``f8e4m3`` behind ``scales`` of each row."""

    name: str
    item_bytes: int
    scales: int = 0
    columns: int = 1

    def tile_bytes(self, columns: int) -> int:
        return ROWS * (4 * self.scales + columns * self.item_bytes)

    def nbytes(self, rows: int, columns: int) -> int:
        return -(-rows // ROWS) * self.tile_bytes(columns)


STORED_FORMATS: dict[str, TileFormat] = {
    format.name: format
    for format in (
        TileFormat("q4_0", 4, zero=8),
        TileFormat("q4_1", 4, minimum=True),
        TileFormat("q5_0", 4, 1, zero=16),
        TileFormat("q5_1", 4, 1, minimum=True),
        TileFormat("q8_0", 8, zero=128),
        TileFormat("q2_k", 2, scale="nibbles", minimum=True, scale_columns=16, columns=256),
        TileFormat("q3_k", 2, 1, scale="i8", scale_columns=16, columns=256, zero=4),
        TileFormat("q4_k", 4, scale="u8", minimum=True, columns=256),
        TileFormat("q5_k", 4, 1, scale="u8", minimum=True, columns=256),
        TileFormat("q6_k", 4, 2, scale="i8", scale_columns=16, columns=256, zero=32),
        TileFormat("iq4_nl", 4, zero=128, codebook=_NONLINEAR),
        TileFormat("iq4_xs", 4, scale="i8", columns=256, zero=128, codebook=_NONLINEAR),
        TileFormat("iq2_xxs", 2, 1, scale="u8", columns=256, zero=43, codebook=_IQ2, unit=1 / 8),
        TileFormat("iq2_xs", 2, 1, scale="u8", scale_columns=16, columns=256, zero=43, codebook=_IQ2, unit=1 / 8),
        TileFormat("iq2_s", 2, 1, scale="u8", scale_columns=16, columns=256, zero=43, codebook=_IQ2, unit=1 / 8),
        TileFormat("iq3_xxs", 4, scale="u8", columns=256, zero=62, codebook=_IQ3_XXS, unit=1 / 4),
        TileFormat("iq3_s", 4, scale="u8", columns=256, zero=15, codebook=_IQ3_S),
        TileFormat("iq1_s", 2, 1, scale="u8", columns=256, zero=9, codebook=_IQ1, unit=1 / 8),
        TileFormat("iq1_m", 2, 1, scale="u8", scale_columns=16, columns=256, zero=9, codebook=_IQ1, unit=1 / 8),
        TileFormat("mxfp4", 4, scale="e8m0", zero=12, codebook=_E2M1),
        TileFormat("tq1_0", 2, scale="super", columns=256, zero=1),
        TileFormat("tq2_0", 2, scale="super", columns=256, zero=1),
    )
}
PAIRED_FORMATS: dict[str, TileFormat] = {
    "q4_1": TileFormat("q4_1_pairs", 4, scale="i16 pairs", minimum=True),
    "q4_k": TileFormat("q4_k_pairs", 4, scale="u8 pairs", minimum=True, columns=256),
}
TILE_FORMATS = STORED_FORMATS | {format.name: format for format in PAIRED_FORMATS.values()}
FLOAT_FORMATS: dict[str, FloatFormat] = {
    format.name: format
    for format in (FloatFormat("f32", 4), FloatFormat("f16", 2), FloatFormat("bf16", 2), FloatFormat("f8e4m3", 1, scales=1))
}
FP8_LARGEST = 448.0

_SUMMARY_FIELDS = 8  # of four bytes, of one token in one record: its scale and sums


def panel_offsets(tokens: int, item: int = 1) -> list[int]:
    """Where, in a record of a panel of ``tokens``, the scales start, the sums by pairs, the scaled sums, the sums, those of the first and
    of the last half, and then these two by pairs (or what the module's text says of them). Quants have ``item`` bytes.
    """
    return [tokens * (COLUMNS * item + 4 * field) for field in range(_SUMMARY_FIELDS)]


def panel_bytes(tokens: int, columns: int, item: int = 1) -> int:
    """Bytes of one panel of quants of ``item`` bytes."""
    return columns // COLUMNS * tokens * (COLUMNS * item + 4 * _SUMMARY_FIELDS)
