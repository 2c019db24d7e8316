"""Matrix products: tiles of quantised weights by panels of int8 activations, and float tiles by float activations.

`tiles` states the layouts. A unit of work is a tile of 16 rows; a kernel is handed a range of them and takes every panel of tokens
through each.
All token counts of a panel share one order of floating-point operations, so that a token's result does not depend on what else is in the
batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import register_tiles, vectors
from .geometry import UNPACKED_BLOCK, gated_tokens, multiplies_sums, panels_at_once, unpacked_bytes
from .helpers import inline
from .int8_dots import SUMS_COUNT, add_groups, centre_of, start_dot_tile, takes_signed
from .int16_dots import WORDS, add_word_groups
from .isa import current_isa
from .quantize import quantize_block
from .register_tiles import (
    add_pairs,
    add_scaled,
    add_tiles,
    add_to_tile,
    fma_tile,
    multiply_tile,
    scale_magic_tile,
    scale_tile,
    start_magic,
    start_pairs,
    store_tile,
    sum_tile,
    zero_tile,
)
from .simd import (
    exp,
    hidden,
    load_f32x16,
    load_i32,
    load_i64,
    maximum,
    prefetch,
    prefetch_to_l2,
    prefetch_to_write,
    splat_f32,
    store_f32x16,
)
from .small_floats import load_bf16x16, load_f8x16, load_f16x16
from .tiles import FLOAT_FORMATS, TILE_FORMATS, panel_bytes, panel_offsets
from .unpack import group_of, minimum_vector, pair_factors, pair_units, pair_vector, scale_vector
from .winograd import summed_product

AHEAD = 1792  # bytes: so much before their use weights are asked for, which Zen 3's own prefetching is too late for
_FAR = 8 * AHEAD  # and so much for the second-level cache
_MOST_FETCHED = 2 << 20  # bytes of keys and values that a product asks for: what second-level caches have room for
_FETCHED_AT_ONCE = 512  # bytes, with each block of weights: the products of short rows have few, and must come to the end of their share
_RECORDS_AHEAD = 4  # of activations, that other cores made
_PANEL = current_isa().tokens
_TAKES_TWO = panels_at_once() == 2


@intrinsic(prefer_literal=True)
def dot_groups(typing_context, tile, layout, block, activations, item, first, last, unpacked):
    """Add the products of groups ``first`` to ``last - 1`` of the block of 32 columns at ``block``; all but the addresses are literals.

    ``item`` is the bytes of an activation, 1 or 2; ``unpacked`` is 1 if `unpack_block` wrote what is at ``block``, else 0.
    """
    format = TILE_FORMATS[layout.literal_value]
    word = ir.IntType(32)

    def codegen(context, b, sig, values):
        total, _, address, x, *_ = values
        size, begin, end, ready = (sig.args[i].literal_value for i in (4, 5, 6, 7))
        signed = takes_signed(format.zero, size)

        def quants(group):
            if ready:
                weights = vectors.load(b, vectors.row_address(b, address, 64, group), vectors.i8x64.llvm)
            else:
                weights = group_of(b, format, address, group)
            return b.xor(weights, vectors.constant(weights.type, 0x80)) if signed else weights

        def activations(at, t, vector):
            base = b.add(x, ir.Constant(ir.IntType(64), at))
            return b.bitcast(register_tiles.scalar_row(b, base, 32 * size, t, word), vector)

        if size == 2:
            return add_word_groups(b, total, range(begin, end), quants, lambda group, pair, t: activations(8 * group + 4 * pair, t, WORDS))
        largest = 128 if signed else format.largest
        four = lambda group, t: activations(4 * group, t, vectors.i8x64.llvm)  # noqa: E731
        centre = 0 if signed else centre_of(end - begin, largest)

        def start(t):
            offset = panel_offsets(current_isa().tokens)[{(0, 8): 1, (0, 4): 6, (4, 8): 7}[begin, end]]
            minus_sums = register_tiles.scalar_row(b, b.add(x, ir.Constant(ir.IntType(64), offset)), 4, t, word)
            pairs = b.bitcast(vectors.halves(b, minus_sums)[0], ir.VectorType(ir.IntType(16), 16))
            return b.mul(pairs, vectors.constant(pairs.type, centre))

        starts = [start(t) for t in range(total.type.count)] if centre else None
        return add_groups(b, total, range(begin, end), quants, four, largest=largest, signed=signed, starts=starts)

    return tile(tile, layout, types.intp, types.intp, item, first, last, unpacked), codegen


@intrinsic(prefer_literal=True)
def unpack_block(typing_context, layout, block, target):
    """The quants of a block, as unsigned bytes: eight groups of 64."""
    format = TILE_FORMATS[layout.literal_value]

    def codegen(context, b, sig, values):
        for group in range(8):
            vectors.store(b, vectors.row_address(b, values[2], 64, group), group_of(b, format, values[1], group))
        return context.get_dummy_value()

    return types.void(layout, types.intp, types.intp), codegen


# ---- kernels --------------------------------------------------------------------------------------------------------


@cache
def _block_product(layout: str, tokens: int, item: int, unpacked: int) -> Any:
    """A function ``(tile, quants, block, header, factors, record) -> tile`` that adds the products of a block of 32 columns.

    Of a format in pairs the tile counts units.
    """
    format = TILE_FORMATS[layout]
    scales_at, starts_at, scaled_sums_at, sums_at, first_at, last_at, *_ = panel_offsets(current_isa().tokens if item == 1 else 1, item)
    halves, minimum, pairs = format.scales == 2, format.minimum, format.has_pairs and item == 1
    magic, from_panel = item == 1 and current_isa().two_pipes, format.zero == 128
    format_zero, corrects = float(format.zero), minimum or format.zero not in (0, 128)
    exact = int(format.scale != "e8m0")  # those go up to 2**127
    # what the sums of quants have too much
    zero = 0 if takes_signed(format.zero, item) else format.zero - (centre_of(8 // format.scales, format.largest) if item == 1 else 0)

    @inline
    def in_pairs(tile, quants, block, header, factors, x):
        dots = start_pairs(tokens, x + starts_at, 4)
        dots = dot_groups(dots, layout, quants, x, item, 0, 8, unpacked)
        return add_pairs(tile, dots, pair_vector(layout, block, factors), x + scales_at, 4)

    @inline
    def in_halves(tile, quants, block, header, factors, x):
        dots = start_dot_tile(tokens, zero, x + first_at, 4, 1)
        dots = dot_groups(dots, layout, quants, x, item, 0, 4, unpacked)
        tile = scale_tile(tile, dots, scale_vector(layout, block, header, 0), x + scales_at, 4)
        dots = start_dot_tile(tokens, zero, x + last_at, 4, 1)
        dots = dot_groups(dots, layout, quants, x, item, 4, 8, unpacked)
        tile = scale_tile(tile, dots, scale_vector(layout, block, header, 1), x + scales_at, 4)
        if minimum:
            sums = sum_tile(tokens, x + first_at, 4)
            tile = scale_tile(tile, sums, minimum_vector(layout, block, header, 0), x + scales_at, 4)
            sums = sum_tile(tokens, x + last_at, 4)
            tile = scale_tile(tile, sums, minimum_vector(layout, block, header, 1), x + scales_at, 4)
        return tile

    @inline
    def whole(tile, quants, block, header, factors, x):
        dots = start_dot_tile(tokens, zero, x + sums_at, 4, SUMS_COUNT)
        dots = dot_groups(dots, layout, quants, x, item, 0, 8, unpacked)
        tile = scale_tile(tile, dots, scale_vector(layout, block, header, 0), x + scales_at, 4)
        if minimum:
            tile = fma_tile(tile, minimum_vector(layout, block, header, 0), x + scaled_sums_at, 4)
        return tile

    @inline
    def correction(block, header, scale, index):
        """What the activations' sum is multiplied with."""
        if minimum:
            return minimum_vector(layout, block, header, index)  # nothing is taken from these quants
        return splat_f32(-format_zero) * scale

    @inline
    def whole_with_magic(tile, quants, block, header, factors, x):
        dots = start_pairs(tokens, x + sums_at, 4) if from_panel else start_magic(tokens)
        dots = dot_groups(dots, layout, quants, x, item, 0, 8, unpacked)
        scale = scale_vector(layout, block, header, 0)
        tile = scale_magic_tile(tile, dots, scale, x + scales_at, 4, exact)
        if corrects:
            tile = fma_tile(tile, correction(block, header, scale, 0), x + scaled_sums_at, 4)
        return tile

    @inline
    def halves_with_magic(tile, quants, block, header, factors, x):
        dots = dot_groups(start_magic(tokens), layout, quants, x, item, 0, 4, unpacked)
        scale = scale_vector(layout, block, header, 0)
        tile = scale_magic_tile(tile, dots, scale, x + scales_at, 4, exact)
        if corrects:
            tile = fma_tile(tile, correction(block, header, scale, 0), x + first_at, 4)
        dots = dot_groups(start_magic(tokens), layout, quants, x, item, 4, 8, unpacked)
        scale = scale_vector(layout, block, header, 1)
        tile = scale_magic_tile(tile, dots, scale, x + scales_at, 4, exact)
        if corrects:
            tile = fma_tile(tile, correction(block, header, scale, 1), x + last_at, 4)
        return tile

    if pairs:
        return in_pairs
    if magic:
        return halves_with_magic if halves else whole_with_magic
    return in_halves if halves else whole


@cache
def _tile_products(layout: str, tokens: int, item: int, unpacked: int, twice: bool) -> Any:
    """As `tile_product`, but returns two tiles: of ``tokens`` tokens each of one panel and of the one at ``y``, if ``twice``; else the same
    one twice.

    Two panels at once read and unpack weights once, and wait for the memory half as often, with twice as much to do meanwhile: of 16 tokens
    from the memory a panel takes 84 cycles for a block of Q4_1 where it takes 92 after the other (Zen 4).
    """
    format = TILE_FORMATS[layout]
    sums = multiplies_sums(layout) and tokens == _PANEL and item == 1
    add_block = _block_product(layout, tokens, item, unpacked)
    summed_weights, add_summed = summed_product(layout)
    record = panel_bytes(current_isa().tokens if item == 1 else 1, 32, item)
    blocks_per_record = format.columns // 32
    header_bytes, block_bytes = format.header_bytes, format.block_bytes
    units_bytes, pairs = format.units_bytes, format.has_pairs and item == 1
    at_once = _FETCHED_AT_ONCE * (1 + twice)
    # With AVX-512 LLVM would load all that a block needs before it asks for another, and have no registers for that. There a core reads
    # the weights of one token faster by itself (Zen 4); those of several it would wait for, and more of them can be on their way to the
    # second-level cache than to the first.
    asks_before = current_isa().has_avx512
    asks = tokens >= 4 or not asks_before

    @inline
    def ask(block, ahead, x, y, first, fetch, fetch_end):
        if first:
            for line in range(_RECORDS_AHEAD * record, (_RECORDS_AHEAD + 1) * record, 64):
                prefetch(x + line)
                if twice:
                    prefetch(y + line)
        if asks:
            for line in range(block, block + block_bytes, 64):
                if asks_before:
                    ask_for(line, ahead)
                else:
                    prefetch(line + ahead)
        if fetch < fetch_end:
            for line in range(0, at_once, 64):
                prefetch_to_l2(fetch + line)
            fetch += at_once
        return fetch

    @inline
    def products(weights, quants, x, y, blocks, ahead, first, fetch, fetch_end):
        tile = other = zero_tile(tokens)
        total, other_total = tile, other  # of records of pairs, in floats
        header = weights
        block = weights + units_bytes + header_bytes
        left = blocks_per_record
        for _ in range(blocks):
            if asks_before:
                fetch = ask(block, ahead, x, y, first, fetch, fetch_end)
            if not unpacked:
                quants = block
            if left == blocks_per_record:
                factors = pair_factors(layout, header)
            if sums:
                of_block = summed_weights(block, header, factors)
                tile = add_summed(tile, of_block, x)
                if twice:
                    other = add_summed(other, of_block, y)
            else:
                tile = add_block(tile, quants, block, header, factors, x)
                if twice:
                    other = add_block(other, quants, block, header, factors, y)
            if not asks_before:
                fetch = ask(block, ahead, x, y, first, fetch, fetch_end)
            # LLVM would else count once for both panels. But dot products whose address is a sum of two registers take two of Intel's
            # operations, and 8 tokens then 60 cycles in place of 49.
            x = hidden(x + record)
            if twice:
                y = hidden(y + record)
            quants += UNPACKED_BLOCK
            block += block_bytes
            if blocks_per_record > 1:
                left -= 1
                if left == 0:
                    left = blocks_per_record
                    if pairs:
                        units = pair_units(layout, header)
                        total, tile = add_scaled(total, tile, units), zero_tile(tokens)
                        if twice:
                            other_total, other = add_scaled(other_total, other, units), zero_tile(tokens)
                    header = block
                    block += header_bytes
        if pairs and blocks_per_record > 1:
            return total, other_total
        if pairs:
            units = pair_units(layout, header)
            return multiply_tile(tile, units), multiply_tile(other, units)
        return tile, other

    return products


@cache
def tile_product(layout: str, tokens: int, item: int = 1, unpacked: int = 0) -> Any:
    """A function ``(weights, quants, panel, blocks, ahead, first, fetch, fetch_end) -> tile``: 16 rows by ``tokens`` tokens of one panel of
    int8, or by one token's int16 (``item=2``).

    ``quants`` is where the tile was unpacked to, if it was. Memory is asked for what lies ``ahead`` bytes behind each block: `AHEAD` where
    the weights come from memory, the bytes of a tile or two for the tile that will be unpacked next, and 0 where both are there; if it is
    the ``first`` product with the panel, for activations that other cores may have made; and, bit by bit, for what lies between ``fetch``
    and ``fetch_end``.
    """
    products = _tile_products(layout, tokens, item, unpacked, False)

    @inline
    def product(weights, quants, x, blocks, ahead, first=False, fetch=0, fetch_end=0):
        return products(weights, quants, x, x, blocks, ahead, first, fetch, fetch_end)[0]

    return product


@cache
def _unpack_tile(layout: str) -> Any:
    """A function ``(weights, blocks, target)`` that unpacks the quants of a tile, which come from memory."""
    format = TILE_FORMATS[layout]
    blocks_per_record = format.columns // 32
    header_bytes, block_bytes = format.header_bytes, format.block_bytes

    @inline
    def unpack_tile(weights, blocks, target):
        block = weights + header_bytes
        left = blocks_per_record
        for _ in range(blocks):
            unpack_block(layout, block, target)
            for line in range(0, block_bytes, 64):
                prefetch(block + AHEAD + line)
            target += UNPACKED_BLOCK
            block += block_bytes
            if blocks_per_record > 1:
                left -= 1
                if left == 0:
                    left = blocks_per_record
                    block += header_bytes

    return unpack_tile


@inline
def ask_for(line, ahead):
    """Ask for what lies ``ahead`` bytes behind a line in one cache, and for what lies further in the other."""
    prefetch(line + ahead)
    prefetch_to_l2(line + _FAR // AHEAD * ahead)


@inline
def write(tile, target, row_bytes, accumulate):
    """A tile to its rows of the output, or onto what they hold."""
    store_tile(add_to_tile(tile, target, row_bytes) if accumulate else tile, target, row_bytes)


@inline
def paired_tokens(tokens):
    """How many of the tokens are taken by two panels: a last one with more than four is taken as a whole one."""
    return (tokens + _PANEL - 5) // (2 * _PANEL) * (2 * _PANEL)


@inline
def place_of(index, in_lane):
    """Where panel ``index`` lies: lanes of so many panels lie a panel apart (see `nn.cpu_lanes`); 0 is no lane."""
    return index + index // in_lane if in_lane else index


def matmul(*, layout: str) -> Any:
    """``out[token, row] (+)= weights[row] . x[token]``; units are tiles of 16 rows.

    Slots: 0 weights, 1 panels, 2 out, 3 blocks of 32 columns, 4 bytes of a tile,
    5 bytes of an output row, 6 address of the number of tokens, 7 add to what ``out`` holds, 8 scratch, 9 bytes of scratch for a thread
    (`geometry.unpacked_bytes`; where these are 0, neither is read), 10 panels of a lane (see `place_of`).
    """
    panel = _PANEL
    record = panel_bytes(panel, 32)
    one, four, full = (tile_product(layout, tokens) for tokens in (1, min(4, panel), panel))
    two_panels = _tile_products(layout, panel, 1, 0, True)
    unpacks = unpacked_bytes(layout, 32) > 0
    full_unpacked, unpack_tile = tile_product(layout, panel, unpacked=1), _unpack_tile(layout)

    def kernel(slots, begin, end, thread):
        weights = load_i64(slots)
        panels = load_i64(slots + 8)
        out = load_i64(slots + 16)
        blocks = load_i64(slots + 24)
        tile_bytes = load_i64(slots + 32)
        row_bytes = load_i64(slots + 40)
        tokens = load_i64(load_i64(slots + 48))
        accumulate = load_i64(slots + 56)
        in_lane = load_i64(slots + 80)
        whole = 0  # tokens of panels that share what is unpacked
        if unpacks and tokens >= 3 * panel:
            whole = tokens // panel * panel
            quants = load_i64(slots + 64) + thread * load_i64(slots + 72)
            for unit in range(begin, end):
                w = weights + unit * tile_bytes
                unpack_tile(w, blocks, quants)
                for start in range(0, whole, panel):
                    place = place_of(start // panel, in_lane)
                    ahead = tile_bytes if start == 0 else 0
                    many = full_unpacked(w, quants, panels + place * blocks * record, blocks, ahead)
                    write(many, out + place * panel * row_bytes + unit * 64, row_bytes, accumulate)
        if _TAKES_TWO:
            whole = paired_tokens(tokens)
            for start in range(0, whole, 2 * panel):
                first, second = place_of(start // panel, in_lane), place_of(start // panel + 1, in_lane)
                x, y = panels + first * blocks * record, panels + second * blocks * record
                ahead = AHEAD if start == 0 else 0
                for unit in range(begin, end):
                    target = out + first * panel * row_bytes + unit * 64
                    other = out + second * panel * row_bytes + unit * 64
                    for row in range(panel):
                        prefetch_to_write(target + row * row_bytes)
                        prefetch_to_write(other + row * row_bytes)
                    many, more = two_panels(weights + unit * tile_bytes, 0, x, y, blocks, ahead, unit == begin, 0, 0)
                    write(many, target, row_bytes, accumulate)
                    write(more, other, row_bytes, accumulate)
        for start in range(whole, tokens, panel):
            place = place_of(start // panel, in_lane)
            x = panels + place * blocks * record
            left = min(panel, tokens - start)
            ahead = AHEAD if start == 0 else 0
            for unit in range(begin, end):
                w = weights + unit * tile_bytes
                target = out + place * panel * row_bytes + unit * 64
                if left == 1:
                    write(one(w, 0, x, blocks, ahead), target, row_bytes, accumulate)
                elif left <= 4:
                    write(four(w, 0, x, blocks, ahead), target, row_bytes, accumulate)
                else:
                    write(full(w, 0, x, blocks, ahead), target, row_bytes, accumulate)

    return kernel


def activation_function(name: str) -> Any:
    """``silu``, ``gelu`` (its tanh form, as Gemma's) or ``relu``, on a vector."""

    @inline
    def silu(x):
        return x / (splat_f32(1.0) + exp(splat_f32(0.0) - x))

    @inline
    def gelu(x):
        # 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x**3)
        u = splat_f32(0.7978845608028654) * x * (splat_f32(1.0) + splat_f32(0.044715) * x * x)
        return x / (splat_f32(1.0) + exp(splat_f32(-2.0) * u))

    @inline
    def relu(x):
        return maximum(splat_f32(0.0), x)  # in this order NaN stays NaN

    return {"silu": silu, "gelu": gelu, "relu": relu}[name]


def gated_matmul(*, layout: str, activation: str) -> Any:
    """``activation(gate . x) * (up . x)``, quantised at once for the product that follows; units are pairs of tiles (32 outputs).

    It keeps the multipliers busy if there are many tokens, and the memory idle, for which the next attention would wait: so it asks for the
    keys and values of the next layer.

    Slots: 0 gate weights, 1 up weights, 2 panels, 3 blocks of 32 columns, 4 bytes of a tile, 5 address of the number of tokens, 6 out
    panels, 7 blocks of 32 in an out row, 8 scratch, 9 bytes of scratch for a thread (`geometry.gated_scratch_bytes`), 10 the largest quant
    of out, 11 key cache of the next layer or 0, 12 its value cache, 13 bytes of one of their blocks, 14 blocks that are read (int32: how
    many, and which), 15 panels of a lane (see `place_of`), 16 lanes, or 0, 17 bytes from the blocks that one lane's thread reads to those
    of the next.
    """
    panel, most = _PANEL, gated_tokens()
    record = panel_bytes(panel, 32)
    one, four, full = (tile_product(layout, tokens) for tokens in (1, min(4, panel), panel))
    two_panels = _tile_products(layout, panel, 1, 0, True)
    unpacks = unpacked_bytes(layout, 32) > 0
    full_unpacked, unpack_tile = tile_product(layout, panel, unpacked=1), _unpack_tile(layout)
    activate = activation_function(activation)

    @inline
    def tile_of(slots, unit, part, tile_bytes):
        """Parts 0 and 2 are of the gate, 1 and 3 of up."""
        return load_i64(slots + 8 * (part % 2)) + (2 * unit + part // 2) * tile_bytes

    @inline
    def combine(gate, up, tokens, target, largest):
        # Two loops: one would be a long chain of dependencies for each token, of which a core has few in flight.
        for at in range(0, 128 * tokens, 64):
            store_f32x16(gate + at, activate(load_f32x16(gate + at)) * load_f32x16(up + at))
        for token in range(tokens):
            at = gate + 128 * token
            quantize_block(load_f32x16(at), load_f32x16(at + 64), target, token, largest)

    @inline
    def product(w, x, y, blocks, left, target, ahead, first, fetch, fetch_end):
        if left == 1:
            store_tile(one(w, 0, x, blocks, ahead), target, 128)
        elif left <= 4:
            store_tile(four(w, 0, x, blocks, ahead), target, 128)
        elif _TAKES_TWO and left > panel:
            many, more = two_panels(w, 0, x, y, blocks, ahead, first, fetch, fetch_end)
            store_tile(many, target, 128)
            store_tile(more, target + panel * 128, 128)
        else:
            store_tile(full(w, 0, x, blocks, ahead, first, fetch, fetch_end), target, 128)

    @inline
    def in_cache(slots, read, at):
        """Where byte ``at`` is of each block's keys and values, one block after the other."""
        block_bytes = load_i64(slots + 104)
        piece = at // block_bytes
        block = load_i32(read + 4 + 4 * (piece // 2))
        return load_i64(slots + 88 + 8 * (piece % 2)) + block * block_bytes + at % block_bytes

    def kernel(slots, begin, end, thread):
        panels = load_i64(slots + 16)
        blocks = load_i64(slots + 24)
        tile_bytes = load_i64(slots + 32)
        tokens = load_i64(load_i64(slots + 40))
        out = load_i64(slots + 48)
        out_blocks = load_i64(slots + 56)
        largest = np.float32(load_i64(slots + 80))
        gate = load_i64(slots + 64) + thread * load_i64(slots + 72)
        up = gate + most * 128
        in_lane = load_i64(slots + 120)
        fetched, products, lanes = 0, 1, max(1, load_i64(slots + 128))  # bytes, and by how many products, of a thread or of all
        read = load_i64(slots + 112) + thread * load_i64(slots + 136)
        if load_i64(slots + 88) and tokens >= panel:
            fetched = min(2 * load_i32(read) * load_i64(slots + 104), _MOST_FETCHED)
            products = (1 if _TAKES_TWO else min(2, tokens // panel)) * 4 * out_blocks
        whole = 0  # tokens of panels that share what is unpacked
        if unpacks and tokens >= 3 * panel:
            whole = tokens // panel * panel
            quants = up + most * 128
            for unit in range(begin, end):
                for part in range(hidden(4)):
                    unpack_tile(tile_of(slots, unit, part, tile_bytes), blocks, quants + part * blocks * UNPACKED_BLOCK)
                for start in range(0, whole, panel):
                    place = place_of(start // panel, in_lane)
                    x = panels + place * blocks * record
                    ahead = 2 * tile_bytes if start == 0 else 0
                    for part in range(hidden(4)):  # `full_unpacked` is long
                        w, target = tile_of(slots, unit, part, tile_bytes), gate + part % 2 * (up - gate) + part // 2 * 64
                        store_tile(full_unpacked(w, quants + part * blocks * UNPACKED_BLOCK, x, blocks, ahead), target, 128)
                    combine(gate, up, panel, out + (place * out_blocks + unit) * record, largest)
        paired = paired_tokens(tokens) if _TAKES_TWO else 0
        start = whole
        while start < tokens:
            step = 2 * panel if start < paired else panel
            place, other = place_of(start // panel, in_lane), place_of(start // panel + 1, in_lane)
            x, y = panels + place * blocks * record, panels + other * blocks * record
            left = min(step, tokens - start)
            ahead = AHEAD if start == 0 else 0
            for unit in range(begin, end):
                for first in range(0, left, panel):
                    quantized = out + ((other if first else place) * out_blocks + unit) * record
                    for line in range(0, record, 64):
                        prefetch_to_write(quantized + line)
                for part in range(hidden(4)):  # `product` is long
                    w, target = tile_of(slots, unit, part, tile_bytes), gate + part % 2 * (up - gate) + part // 2 * 64
                    fetch, fetch_end, index = 0, 0, 4 * (start // panel * out_blocks + unit) + part
                    if fetched and index < products:
                        index = index * lanes % products  # a thread's share of the units asks for all that its lane reads
                        at = index * fetched // products // 64 * 64
                        fetch = in_cache(slots, read, at)
                        fetch_end = fetch + (index + lanes) * fetched // products - at
                    product(w, x, y, blocks, left, target, ahead, unit == begin and part == 0, fetch, fetch_end)
                for first in range(0, left, panel):
                    quantized = out + ((other if first else place) * out_blocks + unit) * record
                    combine(gate + first * 128, up + first * 128, min(panel, left - first), quantized, largest)
            start += step

    return kernel


@cache
def float_tile_product(layout: str, tokens: int) -> Any:
    """A function ``(weights, x, columns, row_bytes, scales) -> tile``: 16 rows by ``tokens`` rows of float32; ``scales`` is of f8e4m3."""
    item = FLOAT_FORMATS[layout].item_bytes
    asks = tokens >= 4 and current_isa().has_avx512

    @inline
    def weights_of(at):
        if layout == "f8e4m3":
            return load_f8x16(at)
        if layout == "f32":
            return load_f32x16(at)
        if layout == "f16":
            return load_f16x16(at)
        return load_bf16x16(at)

    @inline
    def plain(w, x, columns, row_bytes):
        tile = zero_tile(tokens)
        for column in range(columns):
            if asks:
                ask_for(w + 16 * item * column, AHEAD)
            tile = fma_tile(tile, weights_of(w + 16 * item * column), x + 4 * column, row_bytes)
        return tile

    @inline
    def scaled(w, x, columns, row_bytes, scales):
        total = zero_tile(tokens)
        share = columns // scales
        values = w + 64 * scales
        for i in range(scales):
            tile = plain(values + 16 * share * i, x + 4 * share * i, share, row_bytes)
            total = add_tiles(total, multiply_tile(tile, load_f32x16(w + 64 * i)))
        return total

    @inline
    def product(w, x, columns, row_bytes, scales):
        return scaled(w, x, columns, row_bytes, scales) if layout == "f8e4m3" else plain(w, x, columns, row_bytes)

    return product


def float_matmul(*, layout: str) -> Any:
    """`matmul` for tiles of floats: activations stay float32. Slots as there, but 1 is x, 3 the columns, 8 the bytes of a row of x."""
    item = FLOAT_FORMATS[layout].item_bytes
    panel = _PANEL
    one, four, full = (float_tile_product(layout, tokens) for tokens in (1, 4, panel))

    def kernel(slots, begin, end, thread):
        weights = load_i64(slots)
        out = load_i64(slots + 16)
        columns = load_i64(slots + 24)
        tile_bytes = load_i64(slots + 32)
        row_bytes = load_i64(slots + 40)
        tokens = load_i64(load_i64(slots + 48))
        accumulate = load_i64(slots + 56)
        x_row = load_i64(slots + 64)
        scales = (tile_bytes - 16 * item * columns) // 64
        for unit in range(begin, end):
            w = weights + unit * tile_bytes
            token = 0
            while token < tokens:
                x = load_i64(slots + 8) + token * x_row
                target = out + token * row_bytes + unit * 64
                if tokens - token >= panel:
                    write(full(w, x, columns, x_row, scales), target, row_bytes, accumulate)
                    token += panel
                elif tokens - token >= 4:
                    write(four(w, x, columns, x_row, scales), target, row_bytes, accumulate)
                    token += 4
                else:
                    write(one(w, x, columns, x_row, scales), target, row_bytes, accumulate)
                    token += 1

    return kernel
