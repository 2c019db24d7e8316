"""Matrix products of bfloat16 on CPUs that multiply pairs of it: twice as many products in an instruction as of float32.

Weights are tiles as `matmul.float_matmul` takes them, and are not rounded; activations are, to the wide panels of `amx`. On CPUs with AMX
this is for the tokens that do not go through its tile registers.
"""

from __future__ import annotations

from typing import Any

from .geometry import WIDE_TOKENS
from .helpers import inline
from .matmul import AHEAD, ask_for, write
from .register_tiles import dot_pairs_grid, zero_tile
from .simd import load_i64
from .small_floats import load_bf16_pairs

_RECORD = 64 * WIDE_TOKENS  # bytes of 32 columns of a panel


def matmul() -> Any:
    """``out[token, row] (+)= weights[row] . x[token]``; units are tiles of 16 rows. Like `matmul.matmul` it writes whole panels.

    Slots: 0 weights, 1 wide panels, 2 out, 3 blocks of 32 columns, 4 bytes of a tile, 5 bytes of an output row, 6 address of the number of
    tokens, 7 add to what ``out`` holds.
    """

    def product_of(tokens):
        @inline
        def product(w, x, blocks, ahead):
            tile = zero_tile(tokens)
            for _ in range(blocks):
                if tokens > 1:
                    for line in range(w, w + 1024, 64):
                        ask_for(line, ahead)
                for pair in range(16):
                    tile = dot_pairs_grid(tile, tokens, (load_bf16_pairs(w + 64 * pair),), x + 4 * pair, 64)
                w += 1024
                x += _RECORD
            return tile

        return product

    one, eight, sixteen = product_of(1), product_of(8), product_of(16)

    def kernel(slots, begin, end, thread):
        weights, panels, out = load_i64(slots), load_i64(slots + 8), load_i64(slots + 16)
        blocks, tile_bytes, row_bytes = load_i64(slots + 24), load_i64(slots + 32), load_i64(slots + 40)
        tokens, accumulate = load_i64(load_i64(slots + 48)), load_i64(slots + 56)
        for unit in range(begin, end):
            w = weights + unit * tile_bytes
            token = 0
            while token < tokens:
                x = panels + token // WIDE_TOKENS * blocks * _RECORD + token % WIDE_TOKENS * 64
                target = out + token * row_bytes + unit * 64
                left = tokens - token
                ahead = AHEAD if token == 0 else 0
                if left >= 16:
                    write(sixteen(w, x, blocks, ahead), target, row_bytes, accumulate)
                    token += 16
                elif left > 1:
                    write(eight(w, x, blocks, ahead), target, row_bytes, accumulate)
                    token += 8
                else:
                    write(one(w, x, blocks, ahead), target, row_bytes, accumulate)
                    token += 1

    return kernel
