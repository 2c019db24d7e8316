"""Matrix products of bfloat16 on the tile registers of AMX, for prompts: many tokens go through each weight, so unpacking it pays.

A tile register holds up to 16 rows of 64 bytes. ``tdpbf16ps`` adds to 16 by 16 float32 the products of activations (16 tokens by 32
columns) and weights (16 pairs of columns by 16 rows), 512 in a cycle. Four sums, two tiles of activations and two of weights are in
registers at a time, so each load serves two products.

Activations lie in *wide panels* of `WIDE_TOKENS` tokens: for each 32 columns ``bf16[2][16 tokens][32 columns]``. A pair of weight tiles
is unpacked to ``bf16[columns / 32][2][16 pairs of columns][16 rows][2]``. Weights and activations are rounded to bfloat16, 8 bits each,
which is finer than int8 activations with a scale for 32.

A token's result does not depend on which other tokens are in the batch. But it is not that of `matmul`'s int8 kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vectors
from .geometry import WIDE_GROUP as GROUP
from .geometry import WIDE_SEGMENT as SEGMENT
from .geometry import WIDE_TOKENS
from .helpers import inline
from .matmul import activation_function
from .simd import load_f32x16, load_i64, splat_f32, store_f32x16
from .small_floats import load_bf16x16, load_f16x16, store_bf16x32
from .tiles import FLOAT_FORMATS, TILE_FORMATS
from .unpack import group_of, minimum_vector, scale_vector

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOATS, _INTS = vectors.f32x16.llvm, vectors.i32x16.llvm
_STEP = 2048  # bytes of two tiles: 32 columns of a wide panel, or of a pair of unpacked weight tiles
_TILE = 1024

# Tile registers: the sums of [left][right], then the factors.
_SUMS, _LEFT, _RIGHT = ((0, 1), (2, 3)), (4, 5), (6, 7)


def _tile_shapes(rows: int) -> bytearray:
    """What ``ldtilecfg`` reads, palette 1: registers of 16 rows of 64 bytes; of ``rows`` the sums and the left factors."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:32:2] = 64
    shapes[48:56] = rows
    shapes[[48 + register for register in _RIGHT]] = 16
    return bytearray(shapes.tobytes())


def _call(b: Any, name: str, *values: Any) -> None:
    vectors.call(b, f"llvm.x86.{name}", ir.VoidType(), *values)


def _register(number: int) -> Any:
    return ir.Constant(_I8, number)


def _each_sum(b: Any, count: int, address: Any, stride: Any) -> Any:
    """The accumulators, and where they lie in an output of ``16 count`` rows, ``stride`` apart, by 32 columns."""
    for half in range(count):
        at = b.add(address, b.mul(stride, ir.Constant(_I64, 16 * half)))
        for tile in range(2):
            yield _register(_SUMS[half][tile]), vectors.pointer(b, vectors.row_address(b, at, 64, tile), _I8)


@intrinsic(prefer_literal=True)
def use_tiles(typing_context, rows):
    """Prepare this thread's tile registers; of ``rows`` rows (a literal up to 16) are the sums and the left factors."""

    def codegen(context, b, sig, values):
        constant = cgutils.make_bytearray(_tile_shapes(sig.args[0].literal_value))
        shapes = cgutils.global_constant(b.module, "tile_shapes", constant)
        _call(b, "ldtilecfg", b.bitcast(shapes, _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(rows), codegen


@intrinsic
def release_tiles(typing_context):
    """Leave the tile registers unused: the system need not save them for this thread."""

    def codegen(context, b, sig, values):
        _call(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def clear_sums(typing_context, count):
    """Start ``count`` (a literal, 1 or 2) by two sums from 0."""

    def codegen(context, b, sig, values):
        for half in range(sig.args[0].literal_value):
            for register in _SUMS[half]:
                _call(b, "tilezero", _register(register))
        return context.get_dummy_value()

    return types.void(count), codegen


@intrinsic(prefer_literal=True)
def load_sums(typing_context, count, address, stride):
    """Start from float32 ``[16 count][32]``, rows ``stride`` apart."""

    def codegen(context, b, sig, values):
        for register, pointer in _each_sum(b, sig.args[0].literal_value, *values[1:]):
            _call(b, "tileloadd64", register, pointer, values[2])
        return context.get_dummy_value()

    return types.void(count, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def store_sums(typing_context, count, address, stride):
    def codegen(context, b, sig, values):
        for register, pointer in _each_sum(b, sig.args[0].literal_value, *values[1:]):
            _call(b, "tilestored64", register, pointer, values[2])
        return context.get_dummy_value()

    return types.void(count, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def add_products(typing_context, count, left, left_stride, left_next, right, right_stride, right_next, passing):
    """Add ``left[count][16 rows][32] . right[2][16 pairs][16][2]``: 16 ``count`` rows by 32 columns. All but the addresses are literals:
    bytes from row to row, from one tile to the next, and which side ("left" or "right") passes through the first-level cache, for the other
    to stay.
    """

    def codegen(context, b, sig, values):
        halves = sig.args[0].literal_value
        (left_stride, left_next), (right_stride, right_next) = ([sig.args[i].literal_value for i in pair] for pair in ((2, 3), (5, 6)))

        def load(instruction, register, address, stride):
            _call(b, instruction, _register(register), vectors.pointer(b, address, _I8), ir.Constant(_I64, stride))

        instructions = {"left": ("tileloaddt164", "tileloadd64"), "right": ("tileloadd64", "tileloaddt164")}[sig.args[7].literal_value]
        for half in range(halves):
            load(instructions[0], _LEFT[half], vectors.row_address(b, values[1], left_next, half), left_stride)
        for tile in range(2):
            load(instructions[1], _RIGHT[tile], vectors.row_address(b, values[4], right_next, tile), right_stride)
        for half in range(halves):
            for tile in range(2):
                _call(b, "tdpbf16ps", *map(_register, (_SUMS[half][tile], _LEFT[half], _RIGHT[tile])))
        return context.get_dummy_value()

    return types.void(count, types.intp, left_stride, left_next, types.intp, right_stride, right_next, passing), codegen


# ---- unpacking ------------------------------------------------------------------------------------------------------


def _high_halves(b: Any, low: Any, high: Any) -> Any:
    """In each lane the bfloat16 of ``low`` and, above it, of ``high``; rounded to nearest, ties away from zero."""
    low, high = (b.add(b.bitcast(value, _INTS), vectors.constant(_INTS, 0x8000)) for value in (low, high))
    return b.or_(b.lshr(low, vectors.constant(_INTS, 16)), b.and_(high, vectors.constant(_INTS, -65536)))


@intrinsic(prefer_literal=True)
def unpack_groups(typing_context, layout, block, target, scale, offset, first, last):
    """Groups ``first`` to ``last - 1`` (literals) of a block, as ``quant * scale + offset``, to the two pairs of columns of each."""
    format = TILE_FORMATS[layout.literal_value]

    def codegen(context, b, sig, values):
        _, block_address, target_address, scale_value, offset_value, _, _ = values
        for group in range(sig.args[5].literal_value, sig.args[6].literal_value):
            quants = b.bitcast(group_of(b, format, block_address, group), _INTS)
            column = []
            for place in range(4):
                quant = b.lshr(quants, vectors.constant(_INTS, 8 * place)) if place else quants
                quant = b.and_(quant, vectors.constant(_INTS, 255)) if place < 3 else quant
                value = b.sitofp(quant, _FLOATS)
                column.append(vectors.call(b, "llvm.fmuladd.v16f32", _FLOATS, value, scale_value, offset_value))
            for pair in range(2):
                at = vectors.row_address(b, target_address, 64, 2 * group + pair)
                vectors.store(b, at, _high_halves(b, *column[2 * pair : 2 * pair + 2]))
        return context.get_dummy_value()

    return types.void(layout, types.intp, types.intp, vectors.f32x16, vectors.f32x16, first, last), codegen


@intrinsic
def store_pairs(typing_context, address, low, high):
    """One pair of columns, 16 rows."""

    def codegen(context, b, sig, values):
        vectors.store(b, values[0], _high_halves(b, values[1], values[2]))
        return context.get_dummy_value()

    return types.void(types.intp, vectors.f32x16, vectors.f32x16), codegen


def _unpack_tile(layout: str) -> Any:
    """A function ``(weights, blocks, target)`` that unpacks a tile to every second KB at ``target``."""
    if layout in FLOAT_FORMATS:
        item = FLOAT_FORMATS[layout].item_bytes
        load = {"f32": load_f32x16, "f16": load_f16x16, "bf16": load_bf16x16}[layout]

        @inline
        def unpack_floats(weights, blocks, target):
            for _ in range(blocks):
                for at in range(0, _TILE, 64):
                    store_pairs(target + at, load(weights), load(weights + 16 * item))
                    weights += 32 * item
                target += _STEP

        return unpack_floats

    format = TILE_FORMATS[layout]
    header_bytes, block_bytes, blocks_per_record = format.header_bytes, format.block_bytes, format.columns // 32
    halves, minimum, zero = format.scales == 2, format.minimum, -float(format.zero)

    @inline
    def offset_of(scale, block, header, index):
        """What 0 stands for."""
        if minimum:
            return minimum_vector(layout, block, header, index)
        return scale * splat_f32(zero)

    @inline
    def unpack(weights, blocks, target):
        header = weights
        block = weights + header_bytes
        left = blocks_per_record
        for _ in range(blocks):
            scale = scale_vector(layout, block, header, 0)
            if halves:
                unpack_groups(layout, block, target, scale, offset_of(scale, block, header, 0), 0, 4)
                scale = scale_vector(layout, block, header, 1)
                unpack_groups(layout, block, target, scale, offset_of(scale, block, header, 1), 4, 8)
            else:
                unpack_groups(layout, block, target, scale, offset_of(scale, block, header, 0), 0, 8)
            target += _STEP
            block += block_bytes
            if blocks_per_record > 1:
                left -= 1
                if left == 0:
                    left = blocks_per_record
                    header = block
                    block += header_bytes

    return unpack


# ---- activations ----------------------------------------------------------------------------------------------------


@inline
def widen_row(x, panels, token, columns):
    """``columns`` floats at ``x``, as row ``token`` of wide panels."""
    target = panels + token // WIDE_TOKENS * columns * (2 * WIDE_TOKENS) + token % WIDE_TOKENS * 64
    for _ in range(columns // 32):
        store_bf16x32(target, load_f32x16(x), load_f32x16(x + 64))
        x += 128
        target += _STEP


# ---- kernels --------------------------------------------------------------------------------------------------------


@intrinsic
def fetch_for_sums(typing_context, address, stride):
    """Ask for the cache lines of ``[32 tokens][32 rows]``, to write them."""

    def codegen(context, b, sig, values):
        for token in range(WIDE_TOKENS):
            row = b.add(values[0], b.mul(values[1], ir.Constant(_I64, token)))
            for line in range(2):
                pointer = vectors.pointer(b, vectors.row_address(b, row, 64, line), _I8)
                vectors.call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(_I32, flag) for flag in (1, 3, 1)))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@inline
def _add_segment(activations, weights, blocks):
    for _ in range(blocks):
        add_products(2, activations, 64, _TILE, weights, 64, _TILE, "left")
        activations += _STEP
        weights += _STEP


def _group_product(layout: str) -> Any:
    """A function that multiplies all tokens with some pairs of weight tiles: ``out[pair][token][32 rows]``.

    The columns are taken in segments, so that a pair's unpacked weights stay in the first-level cache while all tokens go through them, and
    the tokens' activations in the second-level cache for all pairs.
    """
    unpack = _unpack_tile(layout)
    format = TILE_FORMATS.get(layout)
    together = 8 if format is not None and format.columns == 256 else 1  # blocks that share a header
    most = 16 if together > 1 else SEGMENT
    group_bytes = format.record_bytes if format is not None else FLOAT_FORMATS[layout].tile_bytes(32)

    @inline
    def group_product(weights, tile_bytes, tiles, panels, blocks, tokens, out, row_bytes, pair_bytes, accumulate, unpacked):
        segments = (blocks + most - 1) // most
        segment = (blocks // together + segments - 1) // segments * together
        for start in range(0, blocks, segment):
            count = min(segment, blocks - start)
            for tile in range(0, tiles, 2):
                first = weights + tile * tile_bytes + start // together * group_bytes
                unpack(first, count, unpacked)
                if tile + 1 < tiles:
                    unpack(first + tile_bytes, count, unpacked + _TILE)
                for token in range(0, tokens, WIDE_TOKENS):
                    target = out + tile // 2 * pair_bytes + token * row_bytes
                    fetch_for_sums(target + WIDE_TOKENS * row_bytes, row_bytes)  # of the next panel
                    if accumulate or start:
                        load_sums(2, target, row_bytes)
                    else:
                        clear_sums(2)
                    _add_segment(panels + (token // WIDE_TOKENS * blocks + start) * _STEP, unpacked, count)
                    store_sums(2, target, row_bytes)

    return group_product


def matmul(*, layout: str) -> Any:
    """``out[token, row] (+)= weights[row] . x[token]``; units are pairs of tiles of 16 rows.

    Slots: 0 weights, 1 wide panels, 2 out (room for whole panels), 3 blocks of 32 columns, 4 bytes of a tile, 5 bytes of an output row,
    6 address of the number of tokens, 7 add to what ``out`` holds, 8 tiles, 9 scratch, 10 bytes of scratch for a thread
    (`geometry.wide_scratch_bytes`), 11 most tokens, whole panels.
    """
    group_product = _group_product(layout)

    def kernel(slots, begin, end, thread):
        panels, blocks, tile_bytes = load_i64(slots + 8), load_i64(slots + 24), load_i64(slots + 32)
        row_bytes, tokens = load_i64(slots + 40), load_i64(load_i64(slots + 48))
        accumulate = load_i64(slots + 56)
        unpacked = load_i64(slots + 72) + thread * load_i64(slots + 80)
        pair_bytes = load_i64(slots + 88) * 128
        sums = unpacked + SEGMENT * _STEP
        use_tiles(16)
        for unit in range(begin, end, GROUP):
            weights = load_i64(slots) + 2 * unit * tile_bytes
            out = load_i64(slots + 16) + unit * 128
            tiles = min(2 * min(end, unit + GROUP), load_i64(slots + 64)) - 2 * unit
            if blocks <= SEGMENT and tiles % 2 == 0:
                group_product(weights, tile_bytes, tiles, panels, blocks, tokens, out, row_bytes, 128, accumulate, unpacked)
                continue
            # Sums that are taken up again lie close together; and of a last tile without a second, 16 of 32 rows are kept.
            group_product(weights, tile_bytes, tiles, panels, blocks, tokens, sums, 128, pair_bytes, 0, unpacked)
            for token in range(tokens):
                for tile in range(tiles):
                    value = load_f32x16(sums + tile // 2 * pair_bytes + 128 * token + tile % 2 * 64)
                    target = out + token * row_bytes + 64 * tile
                    if accumulate:
                        value = value + load_f32x16(target)
                    store_f32x16(target, value)
        release_tiles()

    return kernel


def gated_matmul(*, layout: str, activation: str) -> Any:
    """``activation(gate . x) * (up . x)``, to wide panels for the product that follows; units are pairs of tiles (32 outputs).

    Slots: 0 gate weights, 1 up weights, 2 wide panels, 3 blocks of 32 columns, 4 bytes of a tile, 5 address of the number of tokens, 6 out
    panels, 7 blocks of 32 in an out row, 8 scratch, 9 bytes of scratch for a thread (`geometry.wide_scratch_bytes`), 10 most tokens, whole
    panels.
    """
    group_product = _group_product(layout)
    activate = activation_function(activation)

    def kernel(slots, begin, end, thread):
        panels, blocks, tile_bytes = load_i64(slots + 16), load_i64(slots + 24), load_i64(slots + 32)
        tokens = load_i64(load_i64(slots + 40))
        out, out_blocks = load_i64(slots + 48), load_i64(slots + 56)
        unpacked = load_i64(slots + 64) + thread * load_i64(slots + 72)
        pair_bytes = load_i64(slots + 80) * 128
        sums = unpacked + SEGMENT * _STEP
        use_tiles(16)
        for start in range(begin, end, GROUP // 2):
            pairs = min(GROUP // 2, end - start)
            for number in range(2):
                weights = load_i64(slots + 8 * number) + 2 * start * tile_bytes
                target = sums + number * (GROUP // 2) * pair_bytes
                group_product(weights, tile_bytes, 2 * pairs, panels, blocks, tokens, target, 128, pair_bytes, 0, unpacked)
            for pair in range(pairs):
                gate = sums + pair * pair_bytes
                up = gate + GROUP // 2 * pair_bytes
                for token in range(tokens):
                    at = 128 * token
                    low = activate(load_f32x16(gate + at)) * load_f32x16(up + at)
                    high = activate(load_f32x16(gate + at + 64)) * load_f32x16(up + at + 64)
                    target = out + (token // WIDE_TOKENS * out_blocks + start + pair) * _STEP
                    store_bf16x32(target + token % WIDE_TOKENS * 64, low, high)
        release_tiles()

    return kernel


def widen() -> Any:
    """Rows to wide panels. Units are tokens. Slots: 0 x, 1 bytes of a row, 2 wide panels, 3 columns."""

    def kernel(slots, begin, end, thread):
        x, row_bytes, panels, columns = load_i64(slots), load_i64(slots + 8), load_i64(slots + 16), load_i64(slots + 24)
        for token in range(begin, end):
            widen_row(x + token * row_bytes, panels, token, columns)

    return kernel


TILES_IN_UNIT = 4096


def tile_products() -> Any:
    """What the tile registers can do: `TILES_IN_UNIT` times four products of 16 by 16 by 32 for each unit, nothing loaded.

    Slots: 0 scratch, 1 bytes of scratch for a thread, at least 1024.
    """

    def kernel(slots, begin, end, thread):
        scratch = load_i64(slots) + thread * load_i64(slots + 8)
        use_tiles(16)
        clear_sums(2)
        add_products(2, scratch, 64, 0, scratch, 64, 0, "left")
        for _ in range((end - begin) * TILES_IN_UNIT):
            repeat_products()
        release_tiles()

    return kernel


@intrinsic
def repeat_products(typing_context):
    """Add the products of what is in the registers once more."""

    def codegen(context, b, sig, values):
        for half in range(2):
            for tile in range(2):
                _call(b, "tdpbf16ps", *map(_register, (_SUMS[half][tile], _LEFT[half], _RIGHT[tile])))
        return context.get_dummy_value()

    return types.void(), codegen
