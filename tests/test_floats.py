"""Floats in other floats, against NumPy and the format's own rules."""

from __future__ import annotations

import numpy as np
import pytest

from pymistral.quantization.floats import as_floats, float_values, matrices_as
from pymistral.quantization.types import GgmlType, Tensor


def tensor(values: np.ndarray, type: GgmlType = GgmlType.F32) -> Tensor:
    return Tensor("t", type, values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    values = np.array([[1.0, -2.5, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7, np.inf, -np.inf, np.nan, 3.4e38, 1e-40, -0.0]], np.float32)
    found = float_values(as_floats(tensor(values), GgmlType.BF16))
    expected = np.array([[1.0, -2.5, 1.0, 1 + 2**-6, 1 + 2**-7, np.inf, -np.inf, np.nan, np.inf, 2**-133, -0.0]], np.float32)
    np.testing.assert_array_equal(found, expected)
    assert float_values(as_floats(tensor(np.float32([[np.nan]])), GgmlType.BF16)).shape == (1, 1)


@pytest.mark.parametrize("through", [GgmlType.F16, GgmlType.BF16])
def test_there_and_back(through: GgmlType) -> None:
    values = np.random.default_rng(0).standard_normal((7, 33)).astype(np.float32)
    there = as_floats(tensor(values), through)
    back = as_floats(there, GgmlType.F32)
    assert as_floats(back, through).data.tobytes() == there.data.tobytes()
    np.testing.assert_allclose(float_values(back), values, rtol=2**-8)
    if through == GgmlType.F16:
        assert there.data.tobytes() == values.astype(np.float16).tobytes()


def test_vectors_and_quantised_matrices_stay() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "a": tensor(rng.standard_normal((4, 32)).astype(np.float32)),
        "norm": tensor(rng.standard_normal(32).astype(np.float32)),
        "q": Tensor("q", GgmlType.Q8_0, (4, 32), np.zeros(4 * 34, np.uint8)),
    }
    found = matrices_as(weights, GgmlType.BF16)
    assert [found[name].type for name in weights] == [GgmlType.BF16, GgmlType.F32, GgmlType.Q8_0]
