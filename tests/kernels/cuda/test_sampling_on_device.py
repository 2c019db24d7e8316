"""The device's sampler against the reference, and against the CPU's where both must give one token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Gpu
from engine import reference_sampler as reference
from numpy.typing import NDArray
from pymistral.kernels.cpu import sampling_layout as at
from pymistral.kernels.cuda import sampling


class Row:
    """A row of logits and its parameters."""

    def __init__(self, logits: NDArray[np.float32], **options: Any) -> None:
        self.logits, self.options = logits, options
        self.params = SimpleNamespace(
            temperature=options.get("temperature", 1.0),
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p", 1.0),
            min_p=options.get("min_p", 0.0),
        )
        self.top_n = options.get("top_n", -1)
        self.seed, self.position = options.get("seed", 0), options.get("position", 0)
        self.lists: dict[int, NDArray[Any]] = options.get("lists", {})
        self.mask = options.get("mask")

    def check(self, tolerance: float = 1e-6) -> None:
        logits = self.logits.astype(np.float64)
        if self.mask is not None:
            logits[~np.unpackbits(self.mask.view(np.uint8), bitorder="little")[: logits.size].astype(bool)] = -np.inf
        assert self.numbers[at.PEAK] == logits.max()
        token = int(self.words[at.TOKEN])
        if self.params.temperature == 0 or self.params.top_k == 1:
            assert token == logits.argmax()
        else:
            probs = reference.probabilities(logits, self.params.temperature)
            assert reference.is_drawn(token, probs, self.params, reference.uniform(self.seed, 0, self.position), tolerance)
        if self.top_n >= 0:
            weights = np.exp((logits - logits.max()) / (self.params.temperature or 1.0))
            assert self.numbers[at.TOTAL] == pytest.approx(weights.sum(), rel=1e-6)
            assert self.numbers[at.VALUE] == logits[token]
            order = np.argsort(-logits, kind="stable")[: self.top_n]
            assert self.ids.tolist() == sorted(order.tolist())
            np.testing.assert_array_equal(self.values, logits[self.ids])


def run(gpu: Gpu, rows: list[Row], more: int = 1) -> None:
    """Sample all rows in one launch that is made for ``more`` besides."""
    size = len(rows[0].logits)
    words = np.zeros((len(rows) + more, at.ROW_WORDS), np.int64)
    numbers = words.view(np.float64)
    alive, ids, values = [], [], []
    for row, own, floats in zip(rows, words, numbers, strict=False):
        params = row.params
        ids.append(gpu.put(np.full(max(row.top_n, 1), -1, np.int32)))
        values.append(gpu.put(np.zeros(max(row.top_n, 1), np.float32)))
        alive.append(gpu.put(row.logits))
        own[at.LOGITS], own[at.SEED], own[at.POSITION], own[at.TOP_K] = alive[-1].address, row.seed, row.position, params.top_k
        own[at.TOP_N], own[at.TOP_IDS], own[at.TOP_VALUES] = row.top_n, ids[-1].address, values[-1].address
        floats[at.TEMPERATURE], floats[at.TOP_P], floats[at.MIN_P] = params.temperature, params.top_p, params.min_p
        floats[at.REPETITION] = 1.0
        if row.mask is not None:
            alive.append(gpu.put(row.mask))
            own[at.MASK] = alive[-1].address
        for word, array in row.lists.items():
            alive.append(gpu.put(array))
            own[word] = alive[-1].address
        for word, value in row.options.get("words", {}).items():
            own[word] = value
        for word, value in row.options.get("numbers", {}).items():
            floats[word] = value
    descriptions = gpu.put(words)
    scratch = gpu.put(np.full(sampling.scratch_floats(size, len(rows) + more), np.nan, np.float32))
    count = gpu.count(len(rows))
    gpu.run(sampling.sample(descriptions.address, size, scratch.address, count=count.address, max_rows=len(rows) + more))
    result = descriptions.get()
    for index, row in enumerate(rows):
        row.words, row.numbers = result[index], result[index].view(np.float64)
        row.ids, row.values = ids[index].get(), values[index].get()
        if row.top_n >= 0:
            row.ids, row.values = row.ids[: row.top_n], row.values[: row.top_n]
    assert not result[len(rows) :].any()


def make_logits(kind: str, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
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
    return logits.astype(np.float32)


KINDS = ["normal", "ties", "flat", "few", "zeros", "far"]


@pytest.mark.parametrize("size", [1, 2, 33, 512, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(gpu: Gpu, kind: str, size: int) -> None:
    rng = np.random.default_rng([size, KINDS.index(kind)])
    rows = []
    for number in range(12):
        options = {
            "temperature": rng.choice([0.0, 0.3, 1.0, 2.5], p=[0.1, 0.3, 0.3, 0.3]),
            "top_k": int(rng.choice([0, 0, 1, 2, 7, 40, 257, 900])),
            "top_p": rng.choice([1.0, 0.999999, 0.95, 0.5, 0.1, 1e-6]),
            "min_p": rng.choice([0.0, 1e-5, 0.05, 0.5, 0.999]),
            "top_n": min(size, int(rng.choice([-1, 0, 1, 5, 300]))),
            "seed": int(rng.integers(2**60)),
            "position": number,
        }
        rows.append(Row(make_logits(kind, size, rng), **options))
    run(gpu, rows)
    for row in rows:
        row.check()


def test_a_large_vocabulary(gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal(49152) * 2).astype(np.float32)
    options: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 3000, "top_p": 0.7, "min_p": 0.01}, {"temperature": 0.0}]
    rows = [Row(logits, seed=seed, top_n=20, **own) for seed, own in enumerate(options)]
    run(gpu, rows)
    for row in rows:
        row.check(3e-6)


def test_masks(gpu: Gpu) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for number, options in enumerate([{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.01}]):
        bits = rng.random(320) < 0.1
        bits[7] = True
        logits = make_logits("normal", 300, rng)
        logits[~bits[:300]] = rng.choice([np.nan, np.inf, 1e30, 0.0], int((~bits[:300]).sum()))
        rows.append(Row(logits, mask=np.packbits(bits, bitorder="little").view(np.int32), seed=number, **options))
    run(gpu, rows)
    for row in rows:
        row.check()


def test_adjustments(gpu: Gpu) -> None:
    rng = np.random.default_rng(2)
    logits = make_logits("normal", 300, rng)
    ids = np.array([299, 0, 17, -1, 300, 2**31 - 1], np.int32)  # the last three are no tokens
    ones, counts = np.array([1, 2, 3, 4, 5, 6], np.float32), np.array([0, 1, 4, 1, 1, 1], np.float32)
    out = gpu.put(np.full(308, 7, np.float32))
    lists = {at.DRY_IDS: ids, at.DRY_VALUES: ones, at.COUNT_IDS: ids, at.COUNT_VALUES: counts, at.BIAS_IDS: ids, at.BIAS_VALUES: ones}
    words = {at.DRY_SIZE: 6, at.COUNT_SIZE: 6, at.BIAS_SIZE: 6}
    numbers = {at.FREQUENCY: 0.5, at.PRESENCE: 0.25, at.REPETITION: 1.5}
    adjust = Row(logits, lists=lists, words={**words, at.MODE: at.ADJUST, at.OUT: out.address}, numbers=numbers)
    sample = Row(logits, lists=lists, words=words, numbers=numbers, seed=5)
    run(gpu, [adjust, sample])
    expected = logits.astype(np.float64)
    for token, dry, count in zip(ids[:3], ones, counts, strict=False):
        value = expected[token] - dry - 0.5 * count - 0.25 * (count > 0)
        expected[token] = (value / 1.5 if value > 0 else value * 1.5) + dry
    np.testing.assert_allclose(out.get()[:300], expected, rtol=1e-6, atol=1e-6)
    assert np.all(out.get()[300:] == 7)
    token = int(sample.words[at.TOKEN])
    assert reference.is_drawn(token, reference.probabilities(expected, 1.0), sample.params, reference.uniform(5, 0, 0))


def test_what_is_no_number_is_found(gpu: Gpu) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        rows = []
        for place in (0, 150, 299):
            logits = np.full(300, -np.inf if bad < 0 else 1.0, np.float32)
            logits[place] = bad
            rows.append(Row(logits))
        run(gpu, rows)
        for row in rows:
            np.testing.assert_equal(row.numbers[at.PEAK], bad)


def test_random_numbers_are_those_of_the_reference(gpu: Gpu) -> None:
    size = 1 << 12
    rows = []
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        rows += [Row(np.zeros(size, np.float32), seed=seed, position=position, words={at.CHOICE: 3}) for position in (0, 10_000)]
    run(gpu, rows, more=0)
    for row in rows:
        assert row.words[at.TOKEN] == int(reference.uniform(row.seed, 3, row.position) * size)
