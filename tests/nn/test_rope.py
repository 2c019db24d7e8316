"""Rotary frequencies against transformers, and the table of rotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy_reference as ref
import pytest

from pymistral.errors import ModelLoadError
from pymistral.nn import Rope, Weights
from pymistral.quantization.types import GgmlType, Tensor

GOLDENS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "rope_goldens.json").read_text())


@pytest.mark.parametrize("name", GOLDENS)
def test_as_transformers(name: str) -> None:
    golden = GOLDENS[name]
    rope = Rope.from_config(golden, golden["head_dim"])
    assert rope.pairs == len(golden["inverse_frequencies"])
    # transformers computes in float32: a power, a division, and where frequencies are blended a few operations more
    assert np.allclose(rope.inverse_frequencies, golden["inverse_frequencies"], rtol=20 * ref.EPSILON * 2, atol=0)
    assert rope.factor == pytest.approx(golden["factor"], rel=1e-6)


def test_the_table() -> None:
    inverse = 10000.0 ** -(np.arange(8) / 8)
    rope = Rope(inverse, 3000, 1.5)
    rope.prepare(10)
    rope.prepare(2500)
    rope.prepare(5)
    angles = np.arange(2500)[:, None] * inverse
    assert np.allclose(rope.table[:2500, 0], 1.5 * np.cos(angles), atol=1e-7)
    assert np.allclose(rope.table[:2500, 1], 1.5 * np.sin(angles), atol=1e-7)
    rope.prepare(3000)
    with pytest.raises(ValueError, match="position 3000 is beyond the 3000"):
        rope.prepare(3001)


def test_overrides() -> None:
    config = {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 64}
    plain = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    local = Rope.from_config(config, 32, theta=10000.0, scaling={})
    assert np.allclose(local.inverse_frequencies, plain)
    divided = Rope.from_config({"max_position_embeddings": 64}, 32, factors=np.arange(1.0, 17.0))
    assert np.allclose(divided.inverse_frequencies, plain / np.arange(1, 17))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "spiral"}, "type 'spiral' is not supported"),
        ({"type": "linear"}, "type 'linear' lacks 'factor'"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks 'original_max_position_embeddings'"),
        ({"rope_type": "yarn"}, "lacks 'factor'"),
        ({"rope_type": "linear", "factor": "much"}, "linear' has a value that cannot be"),
        ({"rope_type": "linear", "factor": None}, "linear' has a value that cannot be"),
        ({"rope_type": "linear", "factor": 0.0}, "not finite|cannot be"),
        ({"rope_type": "yarn", "factor": 0.0}, "not finite|cannot be"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": -1}, "yarn' has a value that cannot be"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": float("inf")}, "yarn' has a value that cannot be"),
        ({"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}, "must hold 16 numbers above 0"),
    ],
)
def test_scalings_that_cannot_be(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        Rope.from_config({"rope_scaling": scaling, "max_position_embeddings": 64}, 32)


@pytest.mark.parametrize(
    "config",
    [{"rope_theta": 0.0}, {"rope_theta": -5.0}, {"rope_theta": float("nan")}, {"partial_rotary_factor": 1.5}, {"partial_rotary_factor": 0}],
)
def test_configurations_that_cannot_be(config: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match=next(iter(config))):
        Rope.from_config({"max_position_embeddings": 64, **config}, 32)


def test_divisors_of_a_checkpoint() -> None:
    def weights(tensor: Tensor) -> Weights:
        return Weights({"rope_freqs.weight": tensor})

    assert Weights({}).rope_factors() is None
    good = weights(ref.vector(np.arange(1.0, 17.0))).rope_factors()
    assert good is not None
    assert np.array_equal(good, np.arange(1, 17))
    with pytest.raises(ModelLoadError, match=r"rope_freqs.*F16"):
        weights(Tensor("rope_freqs.weight", GgmlType.F16, (16,), np.zeros(32, np.uint8))).rope_factors()
    for wrong in (np.ones(15), np.zeros(16), -np.ones(16), np.full(16, np.nan)):
        with pytest.raises(ModelLoadError, match="16 numbers above 0"):
            Rope.from_config({"max_position_embeddings": 64}, 32, factors=wrong)


def test_more_positions_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("pymistral.nn.rope.zeros", full)
    with pytest.raises(ModelLoadError, match=r"max_position_embeddings=2147483647: .* memory .* Set a smaller number"):
        Rope.from_config({"max_position_embeddings": 2**31 - 1}, 16)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_factor_below_zero_turns_nothing_back(kind: str) -> None:
    scaling = {"rope_type": kind, "factor": -1.5, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ModelLoadError, match=r"not finite and above 0"):
        Rope.from_config({"max_position_embeddings": 128, "rope_theta": 10_000.0, "rope_scaling": scaling}, 16)
