"""A mixture of experts: choose experts for each token, gather tokens by expert, multiply, and add up what the experts say.

Tokens that chose the same expert become consecutive rows, so that a weight is read once for all of them. Each expert's rows start at a
whole panel; the products themselves are `matmul`'s kernels, handed one expert's weights and rows at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import matmul
from .geometry import DENSE_SLOTS, unpacked_bytes
from .helpers import inline
from .quantize import quantize_row
from .simd import (
    exp,
    first_lane,
    fma,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    splat_f32,
    store_f32,
    store_f32x16,
    store_i32,
    store_i64,
)
from .tiles import FLOAT_FORMATS


def route() -> Any:
    """The best experts of each token and their weights: softmax over all, then the ``top_k`` largest. Units are tokens.

    Slots: 0 router logits, 1 bytes of a row, 2 experts, 3 top_k, 4 make the weights add up to 1, 5 chosen experts (int32 [tokens][top_k]),
    6 their weights (f32, alike).
    """

    def kernel(slots, begin, end, thread):
        experts, top_k = load_i64(slots + 16), load_i64(slots + 24)
        normalize = load_i64(slots + 32)
        for token in range(begin, end):
            logits = load_i64(slots) + token * load_i64(slots + 8)
            chosen = load_i64(slots + 40) + 4 * token * top_k
            weights = load_i64(slots + 48) + 4 * token * top_k
            peak = load_f32(logits)
            for expert in range(1, experts):
                peak = max(peak, load_f32(logits + 4 * expert))
            total = splat_f32(0.0)
            for expert in range(experts):
                total = total + exp(splat_f32(load_f32(logits + 4 * expert) - peak))
            last, last_value = -1, peak
            kept = splat_f32(0.0)
            for k in range(top_k):
                best, best_value = -1, peak
                for expert in range(experts):
                    value = load_f32(logits + 4 * expert)
                    follows = last < 0 or value < last_value or (value == last_value and expert > last)
                    if follows and (best < 0 or value > best_value):
                        best, best_value = expert, value
                last, last_value = max(best, 0), best_value
                weight = exp(splat_f32(best_value - peak))
                kept = kept + weight
                store_i32(chosen + 4 * k, last)
                store_f32(weights + 4 * k, first_lane(weight))
            scale = splat_f32(1.0) / (kept if normalize else total)
            for k in range(top_k):
                store_f32(weights + 4 * k, load_f32(weights + 4 * k) * first_lane(scale))

    return kernel


def group() -> Any:
    """Give every (token, choice) a row, by expert. One unit.

    Slots: 0 chosen experts (int32), 1 address of the number of tokens, 2 top_k, 3 experts, 4 rows of a panel, 5 rows of each expert,
    6 first row of each expert, 7 experts that have rows (all int64), 8 address of their number, 9 row of each choice (int32).
    """

    def kernel(slots, begin, end, thread):
        chosen = load_i64(slots)
        choices = load_i64(load_i64(slots + 8)) * load_i64(slots + 16)
        experts, panel = load_i64(slots + 24), load_i64(slots + 32)
        counts, firsts, active = load_i64(slots + 40), load_i64(slots + 48), load_i64(slots + 56)
        rows = load_i64(slots + 72)
        for _ in range(begin, end):
            for expert in range(experts):
                store_i64(counts + 8 * expert, 0)
            for choice in range(choices):
                count = counts + 8 * load_i32(chosen + 4 * choice)
                store_i64(count, load_i64(count) + 1)
            row = 0
            used = 0
            for expert in range(experts):
                count = load_i64(counts + 8 * expert)
                store_i64(firsts + 8 * expert, row)
                store_i64(counts + 8 * expert, 0)
                if count:
                    store_i64(active + 8 * used, expert)
                    used += 1
                    row += (count + panel - 1) // panel * panel
            store_i64(load_i64(slots + 64), used)
            for choice in range(choices):
                expert = load_i32(chosen + 4 * choice)
                count = load_i64(counts + 8 * expert)
                store_i32(rows + 4 * choice, load_i64(firsts + 8 * expert) + count)
                store_i64(counts + 8 * expert, count + 1)

    return kernel


def gather(*, panels: str) -> Any:
    """Copy each token to the rows of its choices: as floats, or quantised to int8 panels (``panels="yes"``). Units are choices.

    Slots: 0 x, 1 bytes of a row, 2 rows of the choices, 3 top_k, 4 out, 5 columns (a multiple of 16), 6 the largest quant.
    """
    quantized = panels == "yes"

    def kernel(slots, begin, end, thread):
        row_bytes, rows, top_k = load_i64(slots + 8), load_i64(slots + 16), load_i64(slots + 24)
        out, columns = load_i64(slots + 32), load_i64(slots + 40)
        largest = np.float32(load_i64(slots + 48))
        for choice in range(begin, end):
            x = load_i64(slots) + choice // top_k * row_bytes
            row = load_i32(rows + 4 * choice)
            if quantized:
                quantize_row(x, out, row, columns, largest)
            else:
                for at in range(0, 4 * columns, 64):
                    store_f32x16(out + row * row_bytes + at, load_f32x16(x + at))

    return kernel


def activate(*, activation: str, panels: str) -> Any:
    """``activation(gate) * up`` in the rows of the choices: in place of gate, and quantised to int8 panels if asked. Units are choices.

    Slots: 0 gate, 1 up, 2 bytes of a row, 3 rows of the choices, 4 panels, 5 columns (a multiple of 16), 6 the largest
    quant.
    """
    quantized = panels == "yes"
    function = matmul.activation_function(activation)

    def kernel(slots, begin, end, thread):
        row_bytes, rows, columns = load_i64(slots + 16), load_i64(slots + 24), load_i64(slots + 40)
        largest = np.float32(load_i64(slots + 48))
        for choice in range(begin, end):
            row = load_i32(rows + 4 * choice)
            gate, up = load_i64(slots) + row * row_bytes, load_i64(slots + 8) + row * row_bytes
            for at in range(0, 4 * columns, 64):
                store_f32x16(gate + at, function(load_f32x16(gate + at)) * load_f32x16(up + at))
            if quantized:
                quantize_row(gate, load_i64(slots + 32), row, columns, largest)

    return kernel


def experts(*, layout: str) -> Any:
    """A matrix product for each expert that has rows. Units are equal pieces of all tiles of these experts: how many there are shows late.

    Slots: 0 to 15 those of `matmul.matmul` or `matmul.float_matmul`, for expert 0 and row 0; 16 experts that have rows, 17 rows of each
    expert, 18 first row of each expert (all int64), 19 tiles of an expert, 20 bytes of its weights, 21 bytes of a row of the input,
    22 scratch, 23 bytes of scratch for a thread, 24 address of the number of experts that have rows, 25 pieces.
    """
    product = inline(matmul.float_matmul(layout=layout) if layout in FLOAT_FORMATS else matmul.matmul(layout=layout))
    unpacks = layout not in FLOAT_FORMATS and unpacked_bytes(layout, 32) > 0

    def kernel(slots, begin, end, thread):
        active, counts, firsts = load_i64(slots + 128), load_i64(slots + 136), load_i64(slots + 144)
        tiles, weight_bytes, input_bytes = load_i64(slots + 152), load_i64(slots + 160), load_i64(slots + 168)
        own = load_i64(slots + 176) + thread * load_i64(slots + 184)
        for slot in range(DENSE_SLOTS):
            store_i64(own + 8 * slot, load_i64(slots + 8 * slot))
        if unpacks:
            store_i64(own + 64, own + 8 * DENSE_SLOTS)
        total, pieces = load_i64(load_i64(slots + 192)) * tiles, load_i64(slots + 200)
        unit, last = begin * total // pieces, end * total // pieces
        while unit < last:
            expert = load_i64(active + unit // tiles * 8)
            first_row = load_i64(firsts + 8 * expert)
            store_i64(own, load_i64(slots) + expert * weight_bytes)
            store_i64(own + 8, load_i64(slots + 8) + first_row * input_bytes)
            store_i64(own + 16, load_i64(slots + 16) + first_row * load_i64(slots + 40))
            store_i64(own + 48, counts + 8 * expert)
            tile = unit % tiles
            stop = min(tiles, tile + last - unit)
            product(own, tile, stop, thread)
            unit += stop - tile

    return kernel


def combine() -> Any:
    """``out[token]`` is the sum of its choices' rows, by weight. Units are tokens.

    Slots: 0 rows of all choices, 1 bytes of a row, 2 row of each choice (int32), 3 weight of each choice (f32), 4 top_k, 5 out, 6 columns
    (a multiple of 16).
    """

    def kernel(slots, begin, end, thread):
        row_bytes, rows, weights = load_i64(slots + 8), load_i64(slots + 16), load_i64(slots + 24)
        top_k, columns = load_i64(slots + 32), load_i64(slots + 48)
        for token in range(begin, end):
            out = load_i64(slots + 40) + token * row_bytes
            for at in range(0, 4 * columns, 64):
                total = splat_f32(0.0)
                for choice in range(token * top_k, (token + 1) * top_k):
                    row = load_i64(slots) + load_i32(rows + 4 * choice) * row_bytes
                    total = fma(splat_f32(load_f32(weights + 4 * choice)), load_f32x16(row + at), total)
                store_f32x16(out + at, total)

    return kernel
