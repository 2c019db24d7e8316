"""From a row of logits to a token: mask, penalties, bias, then temperature, top-k, top-p, min-p and a draw: the order of mistral.rs.

Nothing is ever sorted. A cut is a threshold, found by bisection on the bits of the floats over a list that shrinks as it goes; blocks of
the row that cannot matter are skipped, since the largest value of each is known. The draw inverts the distribution function in the
vocabulary's order.

Rows are worked on in whole blocks of `BLOCK` (see `row_blocks`). Weights are probabilities times a constant, 1 for the most likely token.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
from numba import njit

from . import sampling_layout as at
from .helpers import inline
from .pipeline import OPTIONS
from .row_blocks import (
    block_address,
    blocks_of,
    copy_maxima,
    find_again,
    find_maxima,
    first_equal,
    largest_of,
    pad_last_block,
)
from .sampling_layout import BLOCK
from .simd import (
    at_least,
    bits_mask,
    bits_to_f32,
    count_ones,
    count_trailing_zeros,
    exp,
    f32_to_bits,
    fma,
    greater,
    lane_numbers,
    less_i32,
    load_f32,
    load_f32x16,
    load_f64,
    load_i32,
    load_i64,
    load_u16,
    mask_bits,
    select,
    splat_f32,
    splat_i32,
    store_f32,
    store_f32x16,
    store_f64,
    store_i32,
    store_i64,
    store_selected,
    sum_lanes,
)

ZERO, ONE = np.float32(0.0), np.float32(1.0)
_MOST_FOUND_AGAIN = 32  # tokens that were adjusted: the largest of more blocks is found as fast in all of them

routine = njit(**OPTIONS)  # as `inline`, for what is called from several places and is large


@inline
def word(row, index):
    return load_i64(row + 8 * index)


@inline
def number(row, index):
    return load_f64(row + 8 * index)


# ---- before the temperature -----------------------------------------------------------------------------------------


@inline
def copy_allowed(row, tail, count, mask, out):
    """Copy a row in whole blocks; what the mask does not allow becomes minus infinity."""
    for block in range(blocks_of(count)):
        source = block_address(row, tail, count, block)
        for first in range(0, BLOCK, 16):
            index = block * BLOCK + first
            values = load_f32x16(source + 4 * first)
            if mask and index < count:
                values = select(bits_mask(load_u16(mask + index // 8)), values, splat_f32(-inf))
            store_f32x16(out + 4 * index, values)


@inline
def add_to_tokens(row, count, factor, ids, values, size):
    for entry in range(size):
        token = load_i32(ids + 4 * entry)
        if 0 <= token < count:
            store_f32(row + 4 * token, load_f32(row + 4 * token) + factor * load_f32(values + 4 * entry))


@inline
def penalise(row, count, ids, counts, size, frequency, presence, repetition):
    """Frequency and presence for what was generated, repetition for every token on the list."""
    for entry in range(size):
        token = load_i32(ids + 4 * entry)
        if 0 <= token < count:
            times = load_f32(counts + 4 * entry)
            value = load_f32(row + 4 * token) - times * frequency
            if times > 0:
                value -= presence
            if repetition != 1:
                value = value / repetition if value > 0 else value * repetition
            store_f32(row + 4 * token, value)


@inline
def adjust(request, row, count):
    add_to_tokens(row, count, -ONE, word(request, at.DRY_IDS), word(request, at.DRY_VALUES), word(request, at.DRY_SIZE))
    penalise(
        row,
        count,
        word(request, at.COUNT_IDS),
        word(request, at.COUNT_VALUES),
        word(request, at.COUNT_SIZE),
        np.float32(number(request, at.FREQUENCY)),
        np.float32(number(request, at.PRESENCE)),
        np.float32(number(request, at.REPETITION)),
    )
    add_to_tokens(row, count, ONE, word(request, at.BIAS_IDS), word(request, at.BIAS_VALUES), word(request, at.BIAS_SIZE))


@inline
def _keep_tokens(row, count, ids, size, kept, puts_back):
    """Copy the logits of the tokens on a list to ``kept``, or back; returns where the next list's go."""
    for entry in range(size):
        token = load_i32(ids + 4 * entry)
        if 0 <= token < count:
            if puts_back:
                store_f32(row + 4 * token, load_f32(kept + 4 * entry))
            else:
                store_f32(kept + 4 * entry, load_f32(row + 4 * token))
    return kept + 4 * size


@inline
def keep_adjusted(request, row, count, kept, puts_back):
    """Copy the logits that `adjust` changes to ``kept``, or back."""
    kept = _keep_tokens(row, count, word(request, at.DRY_IDS), word(request, at.DRY_SIZE), kept, puts_back)
    kept = _keep_tokens(row, count, word(request, at.COUNT_IDS), word(request, at.COUNT_SIZE), kept, puts_back)
    _keep_tokens(row, count, word(request, at.BIAS_IDS), word(request, at.BIAS_SIZE), kept, puts_back)


# ---- thresholds -----------------------------------------------------------------------------------------------------


@inline
def order_of(value):
    """An integer that orders floats as their values do."""
    bits = f32_to_bits(value)
    return bits if bits < (1 << 31) else -1 - (bits - (1 << 31))


@inline
def float_at(order):
    return bits_to_f32(order if order >= 0 else (1 << 31) - 1 - order)


@inline
def measure(values, size, bound, unit):
    """What those of a list add up to that are greater than the bound; their number, if the unit is 1 and not 0."""
    units, slope, limit, zero = splat_f32(unit), splat_f32(np.float32(1.0) - unit), splat_f32(bound), splat_f32(0.0)
    total = 0.0
    for first in range(0, size, BLOCK):
        x, y = zero, zero
        for index in range(first, min(first + BLOCK, size), 32):
            u, v = load_f32x16(values + 4 * index), load_f32x16(values + 4 * index + 64)
            x = x + select(greater(u, limit), fma(u, slope, units), zero)
            y = y + select(greater(v, limit), fma(v, slope, units), zero)
        total += sum_lanes(x + y)
    return total


@inline
def end_list(values, size):
    """Lists are read thirty-two at a time: nothing of what follows counts."""
    store_f32x16(values + 4 * size, splat_f32(-inf))
    store_f32x16(values + 4 * size + 64, splat_f32(-inf))


@inline
def shrink(values, size, bound, turn):
    """Keep what is greater than the bound; if ``turn`` is all ones, what is not. Returns how many are left."""
    kept = 0
    for index in range(0, size, 16):
        value = load_f32x16(values + 4 * index)
        bits = (mask_bits(greater(value, splat_f32(bound))) ^ turn) & ((1 << min(size - index, 16)) - 1)
        store_selected(values + 4 * kept, bits_mask(bits), value)
        kept += count_ones(bits)
    end_list(values, kept)
    return kept


@routine
def threshold(values, size, target, unit, low, high):
    """The largest value such that it and those above it reach the target: their sum if the unit is 0, their number if it is 1.

    The list is used up. Returns the value, how many of those equal to it are needed, and how many there are.

    Parameters
    ----------
    low, high
        Bounds of the answer, both of which it may be, and of the list. If all of it does not reach the target, the answer is ``low``.
    """
    lowest, highest = order_of(low), order_of(high)
    while lowest < highest:
        middle = (lowest + highest) >> 1
        bound = float_at(middle)
        above = measure(values, size, bound, unit)
        turn = 0
        if above >= target:
            lowest = middle + 1
        else:
            highest = middle
            target -= above
            turn = 0xFFFF
        size = shrink(values, size, bound, turn)
    value = float_at(lowest)
    needed = np.int64(np.ceil(target / (value if unit == 0 else ONE)))
    return value, max(needed, 1), size


@inline
def gather(row, tail, count, maxima, floor, out):
    """List what is at least ``floor``. ``maxima`` has for each block a number that none of it exceeds."""
    size = 0
    for block in range(blocks_of(count)):
        if load_f32(maxima + 4 * block) < floor:
            continue
        source = block_address(row, tail, count, block)
        for first in range(source, source + 4 * BLOCK, 64):
            value = load_f32x16(first)
            keep = at_least(value, splat_f32(floor))
            store_selected(out + 4 * size, keep, value)
            size += count_ones(mask_bits(keep))
    end_list(out, size)
    return size


@routine
def largest(row, tail, count, maxima, peak, wanted, ids, values, spare):
    """List the ``wanted`` largest with their ids, in the order of ids; of equals the first ones. Returns how many there are."""
    floor, ties = np.float32(-inf), count
    if wanted < count:
        blocks = blocks_of(count)
        if wanted <= blocks:  # as many blocks have a maximum that large
            for first in range(0, blocks, 16):
                store_f32x16(spare + 4 * first, load_f32x16(maxima + 4 * first))
            end_list(spare, blocks)
            floor, _, _ = threshold(spare, blocks, np.float64(wanted), ONE, floor, peak)
        size = gather(row, tail, count, maxima, floor, spare)
        floor, ties, _ = threshold(spare, size, np.float64(wanted), ONE, floor, peak)
    size = 0
    for block in range(blocks_of(count)):
        if load_f32(maxima + 4 * block) < floor:
            continue
        source = block_address(row, tail, count, block)
        for first in range(0, BLOCK, 16):
            bits = mask_bits(at_least(load_f32x16(source + 4 * first), splat_f32(floor)))
            while bits:
                lane = first + count_trailing_zeros(bits)
                bits &= bits - 1
                value = load_f32(source + 4 * lane)
                if value == floor:
                    if ties == 0:
                        continue
                    ties -= 1
                if size < wanted:
                    store_i32(ids + 4 * size, block * BLOCK + lane)
                    store_f32(values + 4 * size, value)
                    size += 1
    return size


# ---- the distribution -----------------------------------------------------------------------------------------------


@routine
def weigh(row, tail, count, peak, temperature, weights, sums):
    """The weight of each, and their sum in each block. Returns the sum of all."""
    scale = splat_f32(np.float32(1.0 / temperature))
    top = splat_f32(peak)
    total = 0.0
    for block in range(blocks_of(count)):
        source = block_address(row, tail, count, block)
        out = weights + block * (4 * BLOCK)
        x, y = splat_f32(0.0), splat_f32(0.0)
        for first in range(0, 4 * BLOCK, 128):
            u, v = weight(load_f32x16(source + first), top, scale), weight(load_f32x16(source + first + 64), top, scale)
            store_f32x16(out + first, u)
            store_f32x16(out + first + 64, v)
            x, y = x + u, y + v
        part = sum_lanes(x + y)
        store_f32(sums + 4 * block, part)
        total += part
    return total


@inline
def weight(logits, peak, scale):
    x = (logits - peak) * scale
    return select(greater(x, splat_f32(-87.0)), exp(x), splat_f32(0.0))


@inline
def cut(weights, count, sums, total, top_p, min_p, spare):
    """What top-p and min-p leave: the weights above a floor, and those equal to it up to an index. Returns both."""
    floor, last = np.float32(min_p), np.int64(-1)
    if top_p < 1:
        target = top_p * total
        # All that weigh less than this add up to less than top-p leaves out.
        low = max(floor, np.float32(0.99 * (1.0 - top_p) * total / count))
        size = gather(weights, weights + (count // BLOCK) * (4 * BLOCK), count, sums, low, spare)
        value, needed, ties = threshold(spare, size, target, ZERO, low, ONE)
        if value > floor:
            floor = value
            last = count if needed >= ties else nth_equal(weights, count, value, needed)
    return floor, last


@inline
def nth_equal(weights, count, value, n):
    """The index of the ``n``-th weight that is equal to a value."""
    for index in range(count):
        if load_f32(weights + 4 * index) == value:
            n -= 1
            if n == 0:
                return index
    return count


@inline
def sum_kept(weights, count, sums, floor, last):
    """Replace the sums of the blocks by those of what a cut leaves. Returns the sum of all."""
    below = splat_f32(bits_to_f32(f32_to_bits(floor) - 1))  # floor > 0
    total = 0.0
    for block in range(blocks_of(count)):
        part = np.float32(0.0)
        if load_f32(sums + 4 * block) >= floor:
            kept = splat_f32(0.0)
            for first in range(0, BLOCK, 16):
                index = block * BLOCK + first
                value = load_f32x16(weights + 4 * index)
                bound = select(less_i32(lane_numbers(), splat_i32(last + 1 - index)), below, splat_f32(floor))
                kept = kept + select(greater(value, bound), value, splat_f32(0.0))
            part = sum_lanes(kept)
        store_f32(sums + 4 * block, part)
        total += part
    return total


@inline
def draw(weights, count, sums, target, floor, last):
    """The token at which the sum of the kept weights passes the target."""
    before, chosen, inside = 0.0, 0, 0.0
    for block in range(blocks_of(count)):
        part = np.float64(load_f32(sums + 4 * block))
        if part > 0:
            before, chosen, inside = before + inside, block, part
            if before + inside > target:
                break
    # Adding up one by one rounds otherwise: what has no chance must not be drawn even if the target is never passed.
    token = 0
    for index in range(chosen * BLOCK, min((chosen + 1) * BLOCK, count)):
        value = load_f32(weights + 4 * index)
        if value > floor or (value == floor and index <= last):
            token = index
            before += value
            if before > target:
                break
    return token


@inline
def uniform(seed, choice, position):
    """A number in [0, 1) that depends on its arguments alone: three rounds of SplitMix64 (doi:10.1145/2714064.2660195)."""
    state = np.uint64(0)
    for item in (seed, choice, position):
        state = state + np.uint64(item) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return np.float64(state >> np.uint64(11)) * 2.0**-53


# ---- the kernel -----------------------------------------------------------------------------------------------------


def sample() -> Any:
    """Sample rows; units are rows. Of those that are adjusted no two may have the same logits, which are changed for a while.

    Slots: 0 addresses of the rows' descriptions (`sampling_layout`), 1 vocabulary size, 2 scratch, 3 bytes of it for a thread; of rows with
    the largest of each block known (0 if there are none): 4 where they begin, 5 where they end, 6 bytes of a row, 7 the known, 8 bytes of
    a row of these, which are whole vectors.
    """

    def kernel(slots, begin, end, thread):
        requests, count = load_i64(slots), load_i64(slots + 8)
        blocks = blocks_of(count)
        row_bytes = blocks * (4 * BLOCK)
        block_bytes = blocks_of(blocks) * (4 * BLOCK)
        copy = load_i64(slots + 16) + thread * load_i64(slots + 24)
        weights = copy + row_bytes
        ids = weights + row_bytes
        maxima = ids + row_bytes
        sums = maxima + block_bytes
        last_block = sums + block_bytes
        values = last_block + 4 * BLOCK  # last: lists end with sixteen more
        for unit in range(begin, end):
            request = load_i64(requests + 8 * unit)
            mode, mask = word(request, at.MODE), word(request, at.MASK)
            row = word(request, at.LOGITS)
            tail = last_block
            changes = word(request, at.DRY_SIZE) + word(request, at.COUNT_SIZE) + word(request, at.BIAS_SIZE)
            # A few logits are changed where they lie, and put back when the token is known.
            in_place = 0 < changes <= count and mode == at.SAMPLE and not mask
            if in_place:
                keep_adjusted(request, row, count, copy, False)
                adjust(request, row, count)
            pad_last_block(row, count, tail)
            if mode == at.ADJUST or mask or (changes and mode == at.SAMPLE and not in_place):
                out = word(request, at.OUT) if mode == at.ADJUST else copy
                copy_allowed(row, tail, count, mask, out)
                row, tail = out, out + (blocks - 1) * (4 * BLOCK)
                if mode != at.ADJUSTED:
                    adjust(request, row, count)
            if mode == at.ADJUST:
                continue

            begin_known, end_known = load_i64(slots + 32), load_i64(slots + 40)
            if begin_known <= row < end_known and changes <= _MOST_FOUND_AGAIN:
                number_of_row = (row - begin_known) // load_i64(slots + 48)
                copy_maxima(load_i64(slots + 56) + number_of_row * load_i64(slots + 64), maxima, count)
                if in_place:
                    find_again(row, tail, count, maxima, word(request, at.DRY_IDS), word(request, at.DRY_SIZE))
                    find_again(row, tail, count, maxima, word(request, at.COUNT_IDS), word(request, at.COUNT_SIZE))
                    find_again(row, tail, count, maxima, word(request, at.BIAS_IDS), word(request, at.BIAS_SIZE))
            else:
                find_maxima(row, tail, count, maxima)
            peak = largest_of(maxima, count)
            store_f64(request + 8 * at.PEAK, peak)
            if not -inf < peak < inf:
                if in_place:
                    keep_adjusted(request, row, count, copy, True)
                continue
            token = first_equal(row, tail, count, maxima, peak)
            temperature, top_k, top_n = number(request, at.TEMPERATURE), word(request, at.TOP_K), word(request, at.TOP_N)
            if top_n >= 0:
                store_f64(request + 8 * at.TOTAL, weigh(row, tail, count, peak, temperature if temperature > 0 else 1.0, weights, sums))
            if temperature > 0 and top_k != 1:
                few = 0 < top_k < count
                size = count
                if few:
                    size = largest(row, tail, count, maxima, peak, top_k, ids, values, weights)
                    pad_last_block(values, size, last_block)
                    total = weigh(values, last_block, size, peak, temperature, weights, sums)
                elif top_n < 0:
                    total = weigh(row, tail, count, peak, temperature, weights, sums)
                else:
                    total = number(request, at.TOTAL)
                top_p, min_p = number(request, at.TOP_P), number(request, at.MIN_P)
                floor, last = np.float32(0.0), np.int64(-1)
                if top_p < 1 or min_p > 0:
                    floor, last = cut(weights, size, sums, total, top_p, min_p, values)
                    total = sum_kept(weights, size, sums, floor, last)
                u = uniform(word(request, at.SEED), word(request, at.CHOICE), word(request, at.POSITION))
                token = draw(weights, size, sums, u * total, floor, last)
                if few:
                    token = load_i32(ids + 4 * token)
            store_i64(request + 8 * at.TOKEN, token)
            if top_n >= 0:
                store_f64(request + 8 * at.VALUE, load_f32(row + 4 * token))
            if top_n > 0:
                if row != copy:
                    pad_last_block(row, count, last_block)
                largest(row, tail, count, maxima, peak, min(top_n, count), word(request, at.TOP_IDS), word(request, at.TOP_VALUES), weights)
            if in_place:
                keep_adjusted(request, row, count, copy, True)

    return kernel
