"""The largest logit of each block, which sampling need not look for: on every way that logits are made."""

from __future__ import annotations

import numpy as np
import numpy_reference as ref
import pytest
from pymistral.kernels.cpu.sampling_layout import BLOCK

from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.nn import functional as F
from pymistral.nn import record
from pymistral.nn.graph import Array, Batch
from pymistral.quantization.types import Tensor

COLUMNS = 256


class Model:
    """Some attention, a product, and logits."""

    def __init__(self, out: Tensor, factor: float = 1.0) -> None:
        rng = np.random.default_rng(1)
        self.tables = [ref.matrix(rng.standard_normal((50, columns)).astype(np.float32)) for columns in (COLUMNS, 64, 64)]
        self.inner, _ = ref.random_tensor("Q8_0", COLUMNS, COLUMNS, rng)
        self.out, self.factor = out, factor

    def __call__(self, batch: Batch) -> Array:
        q, k, v = (F.embedding(batch.tokens, table) for table in self.tables)
        x = F.linear(F.attention(q, k, v, head_dim=64, scale=0.1, rope=None), self.inner)
        x = F.linear(x[batch.output_rows], self.out)
        return x if self.factor == 1.0 else x * self.factor


def runner_of(kind: str, rows: int, factor: float = 1.0) -> CpuRunner:
    tensor, _ = ref.random_tensor(kind, rows, COLUMNS, np.random.default_rng(rows))
    graph = record(Model(tensor, factor))
    return CpuRunner(graph, max_position_embeddings=64, max_num_seqs=40, cache_tokens=40 * 64, threads=2)


def check(runner: CpuRunner, logits: np.ndarray) -> None:
    assert runner.program.logits_maxima is not None
    for row, maxima in zip(logits, runner.program.logits_maxima, strict=False):
        wanted = [row[first : first + BLOCK].max() for first in range(0, len(row), BLOCK)]
        np.testing.assert_array_equal(maxima[: len(wanted)], wanted)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("rows", [40, 300, 1003, 4864])
@pytest.mark.parametrize("most", [0, 1 << 62])
def test_of_one_and_many_and_in_lanes(kind: str, rows: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes share products of more than ``most`` bytes; else each makes the logits of its own tokens."""
    monkeypatch.setattr("pymistral.nn.cpu_lanes.most_read_twice", lambda: most)
    runner = runner_of(kind, rows)
    lanes = set()
    for count in (1, 3, 9, 16, 17, 32, 40):
        segments = [Segment([i % 50, (3 * i + 1) % 50], 0, [2 * i], 0) for i in range(count)]
        runner.forward(segments)
        check(runner, runner.forward([Segment([(7 * i + count) % 50], 2, [2 * i], 1, 1) for i in range(count)]))
        lanes.add(runner.program.state.panels_in_lane)
    assert len(lanes) > 1
    check(runner, runner.forward([Segment([5] * 30, 0, [0], 20)]))


def test_none_where_logits_are_not_made_twice_or_change_afterwards() -> None:
    assert runner_of("F32", 300).program.logits_maxima is None
    assert runner_of("Q8_0", 300, factor=0.5).program.logits_maxima is None
