"""Recording: what may be recorded, and what the lowering refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy_reference as ref
import pytest

from pymistral.errors import ModelLoadError
from pymistral.nn import Array, Batch, Rope, record
from pymistral.nn import functional as F
from pymistral.nn.cpu import compile_graph
from pymistral.nn.eager import evaluate
from pymistral.nn.graph import OUTPUTS, TOKENS, Tokens
from pymistral.nn.state import Limits, State
from pymistral.quantization.types import BLOCK_SIZES, GgmlType, Tensor

LIMITS = Limits(max_tokens=4, max_outputs=2, max_sequences=1, block_size=32, num_blocks=1, max_blocks=1)
TABLE = ref.matrix(np.zeros((10, 32), np.float32), "embed")


def test_what_a_recording_holds() -> None:
    weight = ref.matrix(np.zeros((10, 32), np.float32), "lm_head")

    def model(batch: Batch) -> Array:
        x = F.embedding(batch.tokens, TABLE, scale=2.0)
        return F.linear((x + x * 0.5)[batch.output_rows], weight)

    graph = record(model)
    assert [node.op for node in graph.nodes] == ["embedding", "scale", "add", "take_rows", "linear"]
    assert [(node.output.rows, node.output.columns) for node in graph.nodes] == [(TOKENS, 32)] * 3 + [(OUTPUTS, 32), (OUTPUTS, 10)]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda batch: F.embedding(batch.tokens, TABLE), ValueError, "must end with the logits"),
        (lambda batch: Array(OUTPUTS, 10), ValueError, "must end with the logits"),
        (
            lambda batch: (F.embedding(batch.tokens, TABLE)[batch.output_rows], F.embedding(batch.tokens, TABLE))[0],
            ValueError,
            "must end with",
        ),
        (lambda batch: F.embedding(batch.tokens, TABLE) + 1.0, ValueError, "shapes differ"),
        (lambda batch: F.embedding(batch.tokens, TABLE) + F.embedding(batch.tokens, TABLE)[batch.output_rows], ValueError, "shapes differ"),
        (lambda batch: F.embedding(batch.tokens, TABLE)[0], TypeError, "indexed by batch.output_rows only"),
        (lambda batch: F.linear(np.zeros((2, 32), np.float32), TABLE), TypeError, "NumPy array while a model is recorded"),
        (lambda batch: F.linear(F.embedding(batch.tokens, TABLE), ref.matrix(np.zeros((5, 31)), "w")), ValueError, r"w: shape \(5, 31\)"),
        (lambda batch: F.linear(F.embedding(batch.tokens, TABLE), ref.vector(np.zeros(32))), ValueError, r"norm: shape \(32,\)"),
        (
            lambda batch: F.rms_norm(F.embedding(batch.tokens, TABLE), ref.vector(np.zeros(31)), 1e-5),
            ValueError,
            "does not scale 32 columns",
        ),
        (lambda batch: F.embedding(batch.tokens, ref.vector(np.zeros(32))), ValueError, "an embedding is a matrix"),
    ],
)
def test_what_cannot_be_recorded(model: Callable[[Batch], Array], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        record(model)
    # and nothing of the failed recording is left behind
    with pytest.raises(RuntimeError, match="outside a recording"):
        F.embedding(Tokens(), TABLE)


def test_gated_linear_wants_equal_matrices() -> None:
    x, gate = np.zeros((1, 32), np.float32), ref.matrix(np.zeros((64, 32)), "gate")
    with pytest.raises(ValueError, match=r"gate \(64, 32\) and up \(32, 32\) must have the same shape"):
        F.gated_linear(x, gate, ref.matrix(np.zeros((32, 32)), "up"), "silu")
    with pytest.raises(ValueError, match="activation 'tanh'"):
        F.gated_linear(x, gate, gate, "tanh")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ((64, 32, 64), {}, "do not divide into heads of 32"),
        ((64, 48, 48), {}, "do not divide into heads of 32"),
        ((96, 64, 64), {}, "do not divide into heads of 32"),
        ((64, 64, 64), {"head_dim": 0}, "do not divide into heads of 0"),
        ((64, 64, 64), {"rope": Rope(np.ones(17), 8)}, "17 rotated pairs do not fit"),
        ((64, 64, 64), {"window": 0}, "window of 0"),
        ((64, 64, 64), {"window": -5}, "window of -5"),
        ((64, 64, 64), {"q_norm": F.HeadNorm(ref.vector(np.ones(64)), 1e-6)}, "does not scale 32 columns"),
        ((64, 64, 64), {"k_norm": F.HeadNorm(ref.vector(np.ones(31)), 1e-6)}, "does not scale 32 columns"),
        (
            (64, 64, 64),
            {"q_norm": F.HeadNorm(ref.vector(np.ones(32)), 1e-6), "k_norm": F.HeadNorm(ref.vector(np.ones(32)), 1e-5)},
            "epsilons of the head norms differ",
        ),
    ],
)
def test_attention_that_does_not_fit(columns: tuple[int, int, int], options: dict[str, object], message: str) -> None:
    arrays = [np.zeros((2, n), np.float32) for n in columns]
    with pytest.raises(ValueError, match=message):
        F.attention(*arrays, **{"head_dim": 32, "scale": 1.0, "rope": None, **options})  # type: ignore[type-var, arg-type]


def test_a_head_of_odd_size() -> None:
    x = np.zeros((1, 24), np.float32)
    with pytest.raises(ModelLoadError, match="multiple of 16"):
        F.attention(x, x, x, head_dim=24, scale=1.0, rope=None)


UNSUPPORTED = [type for type in GgmlType if type.name not in (*ref.QUANTIZED, *ref.FLOATS)]


@pytest.mark.parametrize("type", UNSUPPORTED, ids=lambda type: type.name)
def test_types_without_tiles(type: GgmlType) -> None:
    block, size = BLOCK_SIZES[type]
    columns = max(block, 32)
    tensor = Tensor("layers.0.mlp.up_proj.weight", type, (4, columns), np.zeros(4 * columns // block * size, np.uint8))
    with pytest.raises(ModelLoadError, match=rf"up_proj.weight' is stored as {type.name}, which is not supported; these are: .*Q4_K"):
        F.linear(np.zeros((1, columns), np.float32), tensor)


def test_a_norm_of_quantised_weights() -> None:
    weight = replace(ref.random_tensor("Q8_0", 1, 32, np.random.default_rng(0))[0], shape=(32,), name="norm.weight")
    with pytest.raises(ModelLoadError, match=r"'norm.weight' is stored as Q8_0; a vector must be F32, F16 or BF16"):
        F.rms_norm(np.ones((1, 32), np.float32), weight, 1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_norm_of_short_floats(kind: str) -> None:
    tensor, values = ref.random_tensor(kind, 1, 32, np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32)
    assert np.allclose(F.rms_norm(x, replace(tensor, shape=(32,)), 1e-5), ref.rms_norm(x, values[0], 1e-5), rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [(name, 0, "must be positive") for name, value in vars(LIMITS).items() if isinstance(value, int)]
    + [("max_tokens", -3, "must be positive"), ("block_size", 48, "multiple of 32"), ("block_size", 8, "multiple of 32")],
)
def test_limits(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LIMITS, **{field: value})


def test_state_fits_the_limits() -> None:
    state = State(Limits(max_tokens=7, max_outputs=3, max_sequences=2, block_size=64, num_blocks=9, max_blocks=5))
    assert (len(state.tokens), len(state.positions), len(state.output_rows)) == (7, 7, 3)
    assert state.cache_slots.shape == (1, 7)
    assert state.block_tables.shape[:2] == (1, 2)
    assert state.count("one") == 1
    state.counts[0] = 6
    assert state.count("tokens") == 6


def test_every_weight_is_packed_once() -> None:
    def model(batch: Batch) -> Array:
        return F.linear(F.embedding(batch.tokens, TABLE)[batch.output_rows], TABLE)

    program = compile_graph(record(model), LIMITS, threads=1)
    assert program.weight_bytes == 16 * 32 * 4
    assert program.logits.shape[1] == 10


def test_evaluate_checks_its_arrays() -> None:
    x = np.zeros((3, 32), np.float32)
    with pytest.raises(ValueError, match="arrays of 3 rows"):
        evaluate(lambda x, y: x + y, x, x[:2])
    with pytest.raises(ValueError, match="must return what it computed last"):
        evaluate(lambda x: (x, x + x)[0], x)
    with pytest.raises(ValueError, match="expected an array"):
        F.linear(np.zeros(32, np.float32), TABLE)
    assert F.linear(x[:0], TABLE).shape == (0, 10)
