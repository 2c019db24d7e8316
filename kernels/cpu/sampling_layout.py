"""Memory that the sampling kernel (`sampling`) shares with whoever samples. No Numba here, so that a warm start loads none.

A row and its result take `ROW_WORDS` words of eight bytes, in this order. An address or a size of 0 stands for nothing. Ids are int32,
lists of values float32; the parameters from TEMPERATURE on are float64, as are all results but TOKEN.

========================  =============================================================================================
LOGITS                    address of the row, which is afterwards as it was
MODE                      `SAMPLE`; `ADJUST`: write the adjusted row to OUT (room in whole blocks) and stop; `ADJUSTED`: sample as it stands
SEED, CHOICE, POSITION    what the random number depends on
TOP_K                     0: all
TOP_N                     how many of the most likely tokens to write to TOP_IDS and TOP_VALUES; -1: no log probabilities at all
MASK                      a bit for each token that may be chosen, in int32 words; applied before everything, whatever the mode
DRY_...                   what to subtract
COUNT_...                 the tokens seen, and how often each was generated: for the penalties
BIAS_...                  what to add
TEMPERATURE               0: greedy
TOP_P, MIN_P              1 and 0: all
FREQUENCY, PRESENCE       0: none
REPETITION                1: none
TOKEN                     the result, if PEAK is finite
PEAK                      the largest logit; NaN if any is NaN
VALUE, TOTAL              the token's logit, and the sum of exp((logit - PEAK) / TEMPERATURE) before the cuts (greedy: at temperature 1)
========================  =============================================================================================
"""

LOGITS, MODE, OUT, SEED, CHOICE, POSITION, TOP_K, TOP_N, TOP_IDS, TOP_VALUES, MASK = range(11)
DRY_IDS, DRY_VALUES, DRY_SIZE, COUNT_IDS, COUNT_VALUES, COUNT_SIZE, BIAS_IDS, BIAS_VALUES, BIAS_SIZE = range(11, 20)
TEMPERATURE, TOP_P, MIN_P, FREQUENCY, PRESENCE, REPETITION = range(20, 26)
TOKEN, PEAK, VALUE, TOTAL = range(26, 30)
ROW_WORDS = 30

SAMPLE, ADJUST, ADJUSTED = range(3)

BLOCK = 256
"""Logits in a block: what can be skipped when its largest is known."""


def whole_blocks(count: int) -> int:
    """``count``, rounded up to whole blocks."""
    return -(-count // BLOCK) * BLOCK


def scratch_bytes(vocab_size: int) -> int:
    """Scratch of one thread: four rows (logits, weights, a list of values and its ids), two numbers for each block, and one block."""
    row = whole_blocks(vocab_size)
    return 4 * (4 * row + 2 * whole_blocks(row // BLOCK) + 2 * BLOCK)  # the second: lists are written by whole vectors
