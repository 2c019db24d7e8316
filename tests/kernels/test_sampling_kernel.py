"""The sampling kernel against float64 NumPy: every cut, every size of a row, every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from engine import reference_sampler as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from pymistral.kernels.cpu import sampling_layout as at

from pymistral.nn.memory import address
from pymistral.nn.sampling import SamplingProgram, SamplingRow

SIZES = [1, 2, 15, 16, 17, 255, 256, 257, 300, 1000, 4096, 5001]
programs = {size: SamplingProgram(size, threads=1) for size in SIZES}


class Row(SamplingRow):
    """A row with the arrays that it points to, and its parameters in the words of `SamplingParams`."""

    def __init__(
        self, logits: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, **more: Any
    ) -> None:
        super().__init__()
        self.logits, self.params = logits, SimpleNamespace(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        self.top_n = more.get("top_n", -1)
        self.seed, self.position = more.get("seed", 0), more.get("position", 0)
        self.ids, self.values = np.full(max(self.top_n, 0), -1, np.int32), np.zeros(max(self.top_n, 0), np.float32)
        words, numbers = self.words, self.numbers
        words[at.LOGITS], words[at.SEED], words[at.POSITION], words[at.TOP_K] = address(logits), self.seed, self.position, top_k
        words[at.TOP_N], words[at.TOP_IDS], words[at.TOP_VALUES] = self.top_n, address(self.ids), address(self.values)
        numbers[at.TEMPERATURE], numbers[at.TOP_P], numbers[at.MIN_P], numbers[at.REPETITION] = temperature, top_p, min_p, 1.0
        self.mask = more.get("mask")
        if self.mask is not None:
            words[at.MASK] = address(self.mask)

    token = property(lambda self: self.words[at.TOKEN])
    peak = property(lambda self: self.numbers[at.PEAK])

    def check(self, tolerance: float = 1e-6) -> None:
        """Compare everything with the reference."""
        logits = self.logits.astype(np.float64)
        if self.mask is not None:
            logits[~allowed(self.mask, logits.size)] = -np.inf
        greedy = self.params.temperature == 0
        probs = reference.probabilities(logits, self.params.temperature)
        assert self.peak == logits.max()
        if greedy or self.params.top_k == 1:
            assert self.token == logits.argmax()
        else:
            assert reference.is_drawn(self.token, probs, self.params, reference.uniform(self.seed, 0, self.position), tolerance)
        if self.top_n >= 0:
            temperature = self.params.temperature or 1.0
            weights = np.exp((logits - logits.max()) / temperature)
            assert self.numbers[at.TOTAL] == pytest.approx(weights.sum(), rel=1e-6)
            assert self.numbers[at.VALUE] == logits[self.token]
            order = np.argsort(-logits, kind="stable")[: self.top_n]
            assert self.ids.tolist() == sorted(order.tolist())
            np.testing.assert_array_equal(self.values, logits[self.ids])


def allowed(mask: np.ndarray, size: int) -> np.ndarray:
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(bool)


def make_logits(kind: str, size: int, number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    logits = rng.standard_normal(size) * rng.choice([0.1, 1, 3, 10])
    if kind == "ties":
        logits = rng.integers(-2, 3, size).astype(float)
    elif kind == "flat":
        logits[:] = logits[0]
    elif kind == "few":
        logits[rng.random(size) < 0.9] = -np.inf
        logits[rng.integers(size)] = 1.0
    elif kind == "zeros":
        logits = rng.choice([0.0, -0.0, -0.5, 0.5], size)
    elif kind == "far":
        logits[rng.integers(size)] += 1e30
    # Unaligned, and with poison on both sides.
    around = np.full(size + 40, np.nan, np.float32)
    row = around[7 : 7 + size]
    row[:] = logits
    return row


kinds = st.sampled_from(["normal", "ties", "flat", "few", "zeros", "far"])


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(SIZES),
    kinds,
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 2, 7, 40, 255, 256, 257, 900]),
    st.sampled_from([1.0, 0.999999, 0.95, 0.5, 0.1, 1e-6]),
    st.sampled_from([0.0, 1e-5, 0.05, 0.5, 0.999]),
    st.sampled_from([-1, 0, 1, 5, 300]),
    st.integers(0, 2**60),
)
def test_matches_the_reference(
    size: int, kind: str, number: int, temperature: float, top_k: int, top_p: float, min_p: float, top_n: int, seed: int
) -> None:
    logits = make_logits(kind, size, number)
    before = logits.copy()
    top_n = min(top_n, size)
    row = Row(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, top_n=top_n, seed=seed, position=number)
    programs[size].run([row])
    np.testing.assert_array_equal(logits, before)
    row.check()


@pytest.mark.parametrize("size", [49152, 262144])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 40}, {"top_k": 3000, "top_p": 0.7}, {"temperature": 0.0}], ids=str
)
def test_real_vocabularies(size: int, scale: float, options: dict[str, Any]) -> None:
    logits = (np.random.default_rng(size).standard_normal(size) * scale).astype(np.float32)
    program = SamplingProgram(size, threads=1)
    for seed in range(4):
        row = Row(logits, seed=seed, top_n=20, **options)
        program.run([row])
        row.check(3e-6)


def test_what_top_k_leaves_is_exact() -> None:
    rng = np.random.default_rng(1)
    for size in (300, 5001, 4096):
        for logits in (rng.standard_normal(size).astype(np.float32), rng.integers(0, 9, size).astype(np.float32)):
            for wanted in (1, 2, 16, 17, 20, 257, size - 1, size):
                row = Row(logits, top_n=wanted)
                programs[size].run([row])
                row.check()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SIZES), kinds, st.integers(0, 2**32), st.floats(0, 1))
def test_masks(size: int, kind: str, number: int, share: float) -> None:
    rng = np.random.default_rng(number)
    logits = make_logits(kind, size, number)
    logits[~np.isfinite(logits)] = -3.0
    bits = rng.random(32 * -(-size // 32)) < share
    bits[rng.integers(size)] = True
    mask = np.packbits(bits, bitorder="little").view(np.int32)
    logits[~bits[:size]] = rng.choice([np.nan, np.inf, 1e30, 0.0], int((~bits[:size]).sum()))
    for options in ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.01}):
        row = Row(logits, mask=mask, seed=number, **options)
        programs[size].run([row])
        row.check()


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([1, 16, 255, 256, 257, 1000, 5001]),
    kinds,
    st.integers(0, 2**32),
    st.sampled_from([{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.01}]),
    st.sampled_from([0, 1, 5, 40]),
    st.booleans(),
)
def test_what_is_known_of_the_blocks_changes_nothing(
    size: int, kind: str, number: int, options: dict[str, Any], adjusted: int, has_nan: bool
) -> None:
    rng = np.random.default_rng(number)
    columns = -(-size // 16) * 16
    blocks = at.whole_blocks(size) // at.BLOCK
    logits, maxima = np.full((3, columns), np.nan, np.float32), np.full((3, -(-blocks // 16) * 16), np.nan, np.float32)
    for i in range(3):
        logits[i, :size] = make_logits(kind, size, number + i)
    if has_nan:
        logits[2, rng.integers(size)] = np.nan
    for row, known in zip(logits[:, :size], maxima, strict=True):
        known[:blocks] = [row[first : first + at.BLOCK].max() for first in range(0, size, at.BLOCK)]
    program = SamplingProgram(size, threads=1)
    ids = rng.integers(-1, size + 1, (3, adjusted)).astype(np.int32)
    if adjusted:
        ids[rng.integers(3), 0] = logits[0, :size].argmax()  # what is known of its block is no longer so
    values, counts = rng.normal(0, 3, adjusted).astype(np.float32), rng.integers(0, 3, adjusted).astype(np.float32)

    def sampled() -> list[list[int]]:
        rows = [Row(row[:size], seed=number, top_n=min(size, 4), **options) for row in logits]
        for words, numbers in ((row.words, row.numbers) for row in rows):
            for own, ids_at, of in zip(ids, (at.DRY_IDS, at.COUNT_IDS, at.BIAS_IDS), (values, counts, values), strict=True):
                words[ids_at], words[ids_at + 1], words[ids_at + 2] = address(own), address(of), adjusted
            numbers[at.FREQUENCY], numbers[at.PRESENCE], numbers[at.REPETITION] = 0.5, 0.25, 1.5
        program.run(rows)
        if not has_nan:
            assert all(np.isfinite(row.peak) for row in rows)
        return [[*row.words[at.TOKEN :], *row.ids.tolist(), *row.values.view(np.int32).tolist()] for row in rows]

    before, without = logits.copy(), sampled()
    program.expect(logits, maxima)
    assert sampled() == without
    np.testing.assert_array_equal(logits, before)


def test_adjustments_are_written_where_they_are_asked_for() -> None:
    size = 300
    logits = make_logits("normal", size, 5)
    row = Row(logits)
    ids = np.array([299, 0, 17, -1, 300, 2**31 - 1], np.int32)  # the last three are no tokens
    ones, counts = np.array([1, 2, 3, 4, 5, 6], np.float32), np.array([0, 1, 4, 1, 1, 1], np.float32)
    out = np.full(at.whole_blocks(size) + 16, 7, np.float32)
    words, numbers = row.words, row.numbers
    words[at.MODE], words[at.OUT] = at.ADJUST, address(out)
    words[at.DRY_IDS], words[at.DRY_VALUES], words[at.DRY_SIZE] = address(ids), address(ones), 6
    words[at.COUNT_IDS], words[at.COUNT_VALUES], words[at.COUNT_SIZE] = address(ids), address(counts), 6
    words[at.BIAS_IDS], words[at.BIAS_VALUES], words[at.BIAS_SIZE] = address(ids), address(ones), 6
    numbers[at.FREQUENCY], numbers[at.PRESENCE], numbers[at.REPETITION] = 0.5, 0.25, 1.5
    programs[size].run([row])
    expected = logits.astype(np.float64)
    for token, dry, count in zip(ids[:3], ones, counts, strict=False):
        value = expected[token] - dry - 0.5 * count - 0.25 * (count > 0)
        expected[token] = (value / 1.5 if value > 0 else value * 1.5) + dry
    np.testing.assert_allclose(out[:size], expected, rtol=1e-6, atol=1e-6)
    assert (out[at.whole_blocks(size) :] == 7).all()
    words[at.MODE], words[at.LOGITS] = at.ADJUSTED, address(out)
    programs[size].run([row])
    assert reference.is_drawn(row.token, reference.probabilities(expected, 1.0), row.params, reference.uniform(0, 0, 0))


@pytest.mark.parametrize("size", SIZES)
def test_what_is_no_number_is_found_anywhere(size: int) -> None:
    for place in {0, size // 2, size - 1}:
        for bad in (np.nan, np.inf, -np.inf):
            logits = np.full(size, -np.inf if bad < 0 else 1.0, np.float32)
            logits[place] = bad
            row = Row(logits)
            programs[size].run([row])
            np.testing.assert_equal(row.peak, bad)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 1e-6}, {"temperature": 1e6}],
    ids=str,
)
def test_the_only_token_that_has_a_chance(options: dict[str, Any]) -> None:
    for size in SIZES:
        for place in {0, size // 2, size - 1}:
            logits = np.full(size, -np.inf, np.float32)
            logits[place] = -5.0
            row = Row(logits, seed=place, **options)
            programs[size].run([row])
            assert row.token == place


def test_the_ends_of_the_unit_interval() -> None:
    draws = [reference.uniform(3, 0, position) for position in range(50_000)]
    for position in (int(np.argmin(draws)), int(np.argmax(draws))):
        for options in ({}, {"top_p": 0.3}, {"top_k": 77}, {"min_p": 0.9}):
            for kind in ("flat", "few", "normal"):
                row = Row(make_logits(kind, 1000, 2), seed=3, position=position, **options)
                programs[1000].run([row])
                row.check()


def test_random_numbers_are_those_of_the_reference() -> None:
    size = 1 << 16
    program, logits = SamplingProgram(size, threads=1), np.zeros(size, np.float32)
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        for choice in (0, 3):
            for position in (0, 1, 10_000):
                row = Row(logits, seed=seed, position=position)
                row.words[at.CHOICE] = choice
                program.run([row])
                assert row.token == int(reference.uniform(seed, choice, position) * size)


def test_a_row_is_the_same_in_any_company() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40, 5001)).astype(np.float32)

    def rows() -> list[Row]:
        kinds = ({}, {"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.8}, {"min_p": 0.1, "top_n": 4})
        return [Row(logits[i % 30], seed=i, **kinds[i % 5]) for i in range(60)]

    alone, together = rows(), rows()
    for row in alone:
        programs[5001].run([row])
    crowd = SamplingProgram(5001, threads=2)
    for _ in range(20):
        crowd.run(together)
        assert [row.token for row in together] == [row.token for row in alone]
    crowd.run([])


@pytest.mark.parametrize("isa", ["avx2", "generic"])
@pytest.mark.skipif("PYMISTRAL_ISA" in os.environ, reason="this is the other instruction set")
def test_other_instruction_sets(isa: str) -> None:
    if isa == "avx2" and not llvm.get_host_cpu_features().get("avx2"):
        pytest.skip("this CPU has no AVX2")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    done = subprocess.run(command, env={**os.environ, "PYMISTRAL_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
