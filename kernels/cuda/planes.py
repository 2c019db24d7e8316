"""How weights lie in a GPU's memory: for each row, blocks of 32 columns, the parts of all blocks in planes of their own.

A lane of a warp reads one block, so that a warp reads consecutive bytes of each plane:

- quants, the low bits: 32-bit words that hold four columns, a byte each: with 8 bits word ``g`` has columns ``4 g`` to ``4 g + 3``; with 4
  bits word ``w`` has groups ``2 w`` (low nibbles) and ``2 w + 1``; with 2 bits word ``w`` has group ``4 w + i`` in bits ``2 i`` and
  ``2 i + 1`` of its bytes
- the plane of high bits, if any, likewise
- scales of the block, then its minimums
- for formats with records of 256 columns: their super-scale and, with minimums, super-minimum (float16)

Every plane is ``[rows][blocks]`` and starts at a multiple of 256 bytes. Floats are one plane; rows are filled up with zeros
to whole blocks.

These are the tiles of `kernels.cpu.tiles` with a row's items side by side: every storage type that becomes tiles becomes planes, unrounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu.tiles import COLUMNS, FLOAT_FORMATS, ROWS, STORED_FORMATS, FloatFormat, TileFormat

Macros = tuple[tuple[str, str], ...]

_TILES = 16  # that are turned into planes together: they fit a core's cache
_SCALES = {"f16": 0, "u8": 1, "i8": 2, "nibbles": 3, "e8m0": 4, "super": 5}  # weights.cuh


def _whole(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


@dataclass(frozen=True)
class Layout:
    """The planes of one format: `name` is that of its tiles, say ``q4_k`` or ``bf16``."""

    name: str

    @property
    def format(self) -> TileFormat | FloatFormat:
        return STORED_FORMATS.get(self.name) or FLOAT_FORMATS[self.name]

    @property
    def is_float(self) -> bool:
        return self.name in FLOAT_FORMATS

    @cached_property
    def macros(self) -> Macros:
        """What weights.cuh wants to know."""
        format = self.format
        if isinstance(format, FloatFormat):
            return (("FLOAT_BYTES", str(format.item_bytes)), ("BF16", str(int(format.name == "bf16"))))
        values: dict[str, Any] = {
            "FLOAT_BYTES": 0,
            "BITS": format.bits,
            "HIGH": format.high_bits,
            "SCALE": _SCALES[format.scale],
            "MINIMUM": int(format.minimum),
            "HALVES": format.scales,
            "ZERO": 0 if format.codebook else format.zero,
            "UNIT": f"{format.unit}f",
        }
        if format.codebook:
            table = np.zeros(16, np.int8)
            table[: len(format.codebook)] = format.codebook
            values["CODEBOOK"] = ",".join(f"{word:#x}u" for word in table.view(np.uint32))
        return tuple((name, str(value)) for name, value in values.items())

    def _plane_items(self) -> list[int]:
        """Bytes of a block in each plane; of 256 columns in the last."""
        format = self.format
        if isinstance(format, FloatFormat):
            return [COLUMNS * format.item_bytes]
        scales = (format.block_bytes - format.quant_bytes - format.plane_bytes) // ROWS
        return [format.quant_bytes // ROWS, format.plane_bytes // ROWS, scales, format.header_bytes // ROWS]

    def nbytes(self, rows: int, columns: int) -> int:
        """Of a matrix; a multiple of 256."""
        blocks = -(-columns // COLUMNS)
        *items, last = [*self._plane_items(), 0] if self.is_float else self._plane_items()
        return sum(_whole(rows * blocks * item) for item in items) + _whole(rows * (blocks // 8) * last)

    def pack(self, tiles: NDArray[np.uint8], rows: int, columns: int, run: Callable[..., Iterable[None]] = map) -> NDArray[np.uint8]:
        """Planes from a matrix in tiles; ``run`` is `map`, or that of threads."""
        format = self.format
        count = -(-rows // ROWS)
        if tiles.size != format.nbytes(rows, columns):
            raise ValueError(f"{self.name} [{rows}, {columns}] has {format.nbytes(rows, columns)} bytes of tiles, not {tiles.size}")
        out = np.zeros(self.nbytes(rows, columns), np.uint8)
        blocks = -(-columns // COLUMNS)
        if isinstance(format, FloatFormat):
            item = format.item_bytes
            source = tiles.reshape(count, columns, ROWS, item).transpose(0, 2, 1, 3).reshape(count * ROWS, columns, item)[:rows]
            out[: rows * blocks * COLUMNS * item].reshape(rows, blocks * COLUMNS, item)[:, :columns] = source
            return out
        per_record = format.columns // COLUMNS
        records = tiles.reshape(count, columns // format.columns, format.record_bytes)
        bodies = records[..., format.header_bytes :].reshape(count, blocks, format.block_bytes)
        quants, planes = format.quant_bytes, format.quant_bytes + format.plane_bytes
        # The parts of blocks, with the bytes of an item: there is a vector of one for each of 16 rows.
        parts = [(bodies[..., :quants], 4), (bodies[..., quants:planes], 4), (bodies[..., planes:], format.scale_bytes // ROWS)]
        if per_record > 1:
            parts.append((records[..., : format.header_bytes], 2))
        at = 0
        targets = []
        for part, _ in parts:
            row_bytes = part[0].size // ROWS
            targets.append(out[at : at + rows * row_bytes].reshape(rows, row_bytes))
            at += _whole(rows * row_bytes)

        def by_row(first: int) -> None:
            """Some tiles: their vectors -> the items of each row, side by side."""
            some = slice(first, first + _TILES)
            for (part, item), target in zip(parts, targets, strict=True):
                if part.size:
                    vectors = np.ascontiguousarray(part[some]).view(f"u{item}").reshape(-1, target.shape[1] // item, ROWS)
                    own = target[first * ROWS : (first + _TILES) * ROWS]
                    by_rows = np.ascontiguousarray(vectors.transpose(0, 2, 1))
                    own[:] = by_rows.view(np.uint8).reshape(-1, target.shape[1])[: len(own)]

        for _ in run(by_row, range(0, count, _TILES)):
            pass
        return out


# FP8 has no kernel here: its tiles bring scales of rows
LAYOUTS: dict[str, Layout] = {name: Layout(name) for name in (*STORED_FORMATS, *FLOAT_FORMATS) if name != "f8e4m3"}
