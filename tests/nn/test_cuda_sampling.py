"""Sampling on a GPU against the CPU's: the same tokens, log probabilities and errors, for every parameter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymistral.engine.sampler import Sampler
from pymistral.nn.cuda_sampling import GpuSampling
from pymistral.nn.memory import address
from pymistral.nn.sampling import SamplingProgram
from pymistral.requests.sampling import DrySamplingParams, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from simulated_gpu import make_gpu

VOCABULARY = 700
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "top_n_logprobs": 5},
    {"temperature": 1.3},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.9, "frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.2},
    {"temperature": 0.8, "logits_bias": {3: 5.0, 600: -2.0}, "top_n_logprobs": 3},
    {"temperature": 0.0, "dry_params": DrySamplingParams(multiplier=2.0, base=1.5, allowed_length=2)},
]


class Grammar:
    """Allows the multiples of seven."""

    complete = accepting = False

    def allowed(self) -> Any:
        words = np.zeros(-(-VOCABULARY // 32), np.uint32)
        for token in range(0, VOCABULARY, 7):
            words[token // 32] |= np.uint32(1 << token % 32)
        return words.view(np.int32)

    def accept(self, token: int) -> Any:
        return ()


def sampler(index: int, options: dict[str, Any]) -> Sampler:
    tokens = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6, index % 5]
    constraint = Grammar() if index % 3 == 2 else None
    return Sampler(SamplingParams(**options), tokens, VOCABULARY, seed=index, constraint=constraint, return_logprobs=True)


@pytest.mark.parametrize("kind", ["90", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("count", [1, 3 * len(SETTINGS)])
def test_as_on_the_cpu(count: int, kind: str) -> None:
    gpu = make_gpu(kind)
    logits = (3 * np.random.default_rng(count).standard_normal((count, VOCABULARY))).astype(np.float32)
    if count > 1:
        logits[1, 9] = np.nan
    device = gpu.allocate(logits.nbytes)
    gpu.copy_in(device, logits)
    here, there = ([sampler(i, SETTINGS[i % len(SETTINGS)]) for i in range(count)] for _ in range(2))
    for index, (one, other) in enumerate(zip(here, there, strict=True)):
        one.prepare(address(logits[index]))
        other.prepare(0)
    SamplingProgram(VOCABULARY, 1).run([one.row for one in here])
    sampling = GpuSampling(gpu, VOCABULARY, max(count, 2))
    sampling._make_room(64)  # so that it has to grow
    sampling.run([other.row for other in there], [device + index * logits.strides[0] for index in range(count)])
    for one, other in zip(here, there, strict=True):
        expected, found = one.result(), other.result()
        if isinstance(expected, Exception):
            assert str(found) == str(expected)
            continue
        assert not isinstance(found, Exception)
        assert found.id == expected.id
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [token for token, _ in found.top] == [token for token, _ in expected.top]
        np.testing.assert_allclose([value for _, value in found.top], [value for _, value in expected.top], atol=1e-5)
