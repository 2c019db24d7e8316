"""The engine over a GPU's runner: checks, batches, what is not finite, sampling. In the simulator, and on a GPU with ``-m gpu``."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy_reference as ref
import pytest
from numpy.typing import NDArray

from pymistral.engine.core import EngineCore
from pymistral.engine.cuda_runner import CudaRunner, step_bytes
from pymistral.engine.types import Delta, EngineRequest, Event, Segment
from pymistral.errors import ModelLoadError
from pymistral.nn import Array, Batch, Rope, record
from pymistral.nn import functional as F
from pymistral.requests.sampling import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_model import ByteTokenizer
from simulated_gpu import SimulatedGpu, make_gpu

VOCABULARY, HIDDEN, CONTEXT = 40, 64, 300
KINDS = ["90", "75", pytest.param("gpu", marks=pytest.mark.gpu)]


def runner(
    kind: str, exact: bool = False, table: NDArray[np.float32] | None = None, vocabulary: int = VOCABULARY, **options: Any
) -> CudaRunner:
    """One layer of attention over embeddings, which are given as they are or random."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((vocabulary, HIDDEN)).astype(np.float32) if table is None else table
    embed, back = ref.matrix(table), ref.identity(HIDDEN, "F32" if exact else "F16")
    head = ref.matrix(rng.standard_normal((vocabulary, HIDDEN)).astype(np.float32))
    rope = Rope(10000.0 ** -(np.arange(16) / 16), CONTEXT)

    def model(batch: Batch) -> Array:
        x = F.embedding(batch.tokens, embed)
        x = x + F.linear(F.attention(x, F.linear(x, back), F.linear(x, back), head_dim=32, scale=0.2, rope=rope), back)
        return F.linear(x[batch.output_rows], head)

    settings = {"max_position_embeddings": CONTEXT, "max_num_seqs": 4, "cache_tokens": 1024, "max_tokens": 128, **options}
    return CudaRunner(record(model), make_gpu(kind), **settings)


def logits(run: CudaRunner, *segments: Segment) -> NDArray[np.float32]:
    return run.read_logits(run.forward(segments)).copy()


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment([1], CONTEXT, list(range(10)), 1), "does not fit"),
        (Segment([1] * 200, 0, list(range(20)), 1), "holds 128 tokens"),
        (Segment([1], 32, [0], 1), "does not cover 33 positions"),
        (Segment([1], 0, [32], 1), "does not exist"),
        (Segment([VOCABULARY], 0, [0], 1), "does not exist"),
    ],
)
def test_segments_that_cannot_be(segment: Segment, message: str) -> None:
    run = runner("90")
    with pytest.raises(ValueError, match=message):
        run.forward([segment])


def test_types_of_the_cache() -> None:
    """float32 for a quantised model as well; what only the CPU has is refused."""
    text = list(range(20))
    exact, wide, narrow = (
        np.concatenate([logits(run, Segment([token], at, [0], 1)) for at, token in enumerate(text)])  # several would be in bfloat16
        for run in (runner("90", True), runner("90", cache_type="f32"), runner("90"))
    )
    np.testing.assert_allclose(wide, exact, atol=2e-3)
    assert np.abs(narrow - exact).max() > np.abs(wide - exact).max()
    with pytest.raises(ModelLoadError, match="KV cache of int8 is there on the CPU only; on a GPU there are bf16 and f32"):
        runner("90", cache_type="int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [False, True])
def test_batches_and_chunks(exact: bool, kind: str) -> None:
    """Whatever else is in a step, and however a text is cut: the same logits, but for bfloat16 in the attention of long chunks."""
    run = runner(kind, exact)
    text = np.random.default_rng(1).integers(0, VOCABULARY, 90).tolist()
    whole = logits(run, Segment(text[:80], 0, [3, 4, 5], 40), Segment([7] * 20, 0, [9], 1))[:40]
    for cuts in ([0, 80], [0, 33, 79, 80], [0, *range(72, 81)]):
        for start, end in itertools.pairwise(cuts):
            found = logits(run, Segment([7] * 5, 0, [9], 1), Segment(text[start:end], start, [0, 1, 2], min(40, end - start)))[1:]
            expected = whole[max(0, start - 40) : max(0, end - 40)]
            np.testing.assert_allclose(found[len(found) - len(expected) :], expected, atol=2e-5 if exact else 0.08)
    assert logits(run).shape == (0, VOCABULARY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3.4e38])
def test_what_is_not_finite_stays_in_its_sequence(poison: float, kind: str) -> None:
    """Beside it in a step, and in the blocks that it leaves behind."""
    table = np.random.default_rng(1).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    table[7] = poison
    run = runner(kind, False, table)
    tokens = [1, 2, 3, 4, 5]
    clean = logits(run, Segment(tokens, 0, [3], 5), Segment([2] * 20, 0, [8], 1))[:5]
    bad = logits(run, Segment([7] * 90, 0, [0, 1, 2], 1))
    assert not np.isfinite(bad).all()
    found = logits(run, Segment(tokens, 0, [1], 5), Segment([7] * 20, 0, [9], 1))[:5]
    np.testing.assert_allclose(found, clean, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_over_it(kind: str) -> None:
    """Greedy choices, seeds, masks and a function of the user's: alone or beside others, the same tokens."""
    core = EngineCore(runner(kind, True, vocabulary=256), ByteTokenizer(), eos_token_ids=[255], prefix_cache_n=0)

    def generate(*samplings: dict[str, Any]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in samplings]

        def collect(index: int) -> Any:
            def on_event(event: Event) -> None:
                if isinstance(event, Delta):
                    found[index] += event.tokens

            return on_event

        for index, options in enumerate(samplings):
            processors = options.pop("processors", ())
            sampling = SamplingParams(max_len=5, **options)
            core.add(core.prepare(EngineRequest([65 + index, 66, 67], sampling, logits_processors=processors), collect(index)))
        while core.busy:
            core.step()
        return found

    def only_nine(row: NDArray[np.float32], tokens: Any) -> NDArray[np.float32]:
        row[:] = -np.inf
        row[9] = 1.0
        return row

    mixed = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 3, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "seed": 4, "frequency_penalty": 0.5},
        {"temperature": 0.0, "processors": (only_nine,)},
    ]
    together = generate(*(dict(options) for options in mixed))
    assert together[3] == [9] * 5
    assert all(len(tokens) == 5 for tokens in together)
    again = generate(*(dict(options) for options in mixed))
    assert again == together
    assert generate({"temperature": 0.0})[0] == together[0]


def test_what_is_done_meanwhile_does_not_wait_for_a_program_to_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner("90", True)
    order: list[str] = []

    def note(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: (order.append(name), original(*arguments))[1])

    note(run.gpu, "capture")
    note(run.model, "copy_state")
    for _ in range(2):
        run.forward([Segment([1], 0, [0], 1)], lambda: order.append("meanwhile"))
    assert order == ["meanwhile", "capture", "copy_state", "copy_state", "meanwhile"]


def test_too_little_memory() -> None:
    graph = runner("90").model.graph
    gpu = SimulatedGpu(memory=(512 << 20) + step_bytes(graph, 2048) + (64 << 10))
    with pytest.raises(ModelLoadError, match="tokens of KV cache: too few"):
        CudaRunner(graph, gpu, max_position_embeddings=CONTEXT)
