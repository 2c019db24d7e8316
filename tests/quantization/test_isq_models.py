"""Models that are quantised when they are loaded: how far from float32 they are, what they say, and what they take."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import score
from pymistral import IsqType, LayerTopology, ModelBuilder, RequestBuilder, Topology
from pymistral.blocking import BlockingModel
from pymistral.errors import ModelLoadError
from pymistral.quantization.isq import LAYOUTS

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_model import make_model
from gguf_to_safetensors import convert

GOLDEN = Path(__file__).parents[1] / "goldens" / "smollm2-135m-instruct-q4_1.npz"
POSITIONS = 96
# The mean KL divergence from float32 that a type may have, about 1.5 times what was found. These weights lie on a grid of Q4_1, which
# Q4_1, Q5_1, Q4K and Q5K find again; `benchmarks.accuracy --isq` takes them off it.
LIMITS = {
    IsqType.Q8_0: 0.008,
    IsqType.Q6K: 0.016,
    IsqType.Q5K: 0.015,
    IsqType.Q5_1: 0.008,
    IsqType.F8E4M3: 0.07,
    IsqType.Q5_0: 0.12,
    IsqType.Q4K: 0.015,
    IsqType.Q4_1: 0.006,
    IsqType.Q4_0: 0.5,
    IsqType.Q3K: 0.7,
    IsqType.MXFP4: 1.5,
    IsqType.Q2K: 2.5,
}


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(smollm2_path, tmp_path_factory.mktemp("smollm2"))


def divergence(model: BlockingModel) -> float:
    with np.load(GOLDEN) as golden:
        return score(model.logits(golden["tokens"][:POSITIONS].tolist()), golden, POSITIONS)[0]


def weight_bytes(model: BlockingModel) -> int:
    return int(model.inner._engine._core.runner.program.weight_bytes)  # type: ignore[attr-defined]


def test_every_type(folder: Path) -> None:
    """One model, quantised again and again: each time from the file, so that the last is as good as the first."""
    assert LIMITS.keys() == LAYOUTS.keys()
    found, sizes = {}, {}
    request = RequestBuilder().add_message("user", "What is the capital of France?").set_sampler_max_len(8)
    with BlockingModel.from_builder(ModelBuilder(folder, isq=IsqType.Q2K, threads=2)) as model:
        for isq in (IsqType.Q2K, *(isq for isq in LAYOUTS if isq != IsqType.Q2K)):
            if isq != IsqType.Q2K:
                model.re_isq_model(isq)
            found[isq], sizes[isq] = divergence(model), weight_bytes(model)
            answer = model.send_chat_request(request)
            assert 1 <= answer.usage.completion_tokens <= 8
    print({isq.value: f"{kl:.4f}" for isq, kl in found.items()})
    assert {isq: kl for isq, kl in found.items() if kl > LIMITS[isq]} == {}
    for worse, better in (
        (IsqType.Q2K, IsqType.Q3K),
        (IsqType.Q3K, IsqType.Q4K),
        (IsqType.Q4_0, IsqType.Q5_0),
        (IsqType.Q5_0, IsqType.Q8_0),
    ):
        assert found[worse] > found[better]
        assert sizes[worse] < sizes[better]


def test_a_gguf_file_is_quantised_from_what_it_holds(smollm2_path: Path) -> None:
    topology = Topology().with_range((0, 10), LayerTopology(isq="q8_0"))
    with BlockingModel.from_builder(ModelBuilder(smollm2_path, threads=2)) as model:
        plain, size = divergence(model), weight_bytes(model)
    with BlockingModel.from_builder(ModelBuilder(smollm2_path, topology=topology, threads=2)) as model:
        assert abs(divergence(model) - plain) < 0.004
        assert weight_bytes(model) > 1.1 * size


async def test_it_serves_while_it_is_quantised_again(smollm2_path: Path) -> None:
    request = RequestBuilder().add_message("user", "Count from 1 to 30.").set_sampler_max_len(60)
    async with await ModelBuilder(smollm2_path, threads=2).build() as model:
        change = asyncio.create_task(model.re_isq_model("q8_0"))
        answers = [await model.send_chat_request(request)]
        while not change.done():
            answers.append(await model.send_chat_request(request))
        await change
        answers.append(await model.send_chat_request(request))
        assert all(answer.usage.completion_tokens == 60 or answer.choices[0].finish_reason == "stop" for answer in answers)
        assert "2" in (answers[-1].choices[0].message.content or "")
        with pytest.raises(ModelLoadError, match="not known"):
            await model.re_isq_model("q99")


async def test_a_model_that_has_no_file() -> None:
    async with make_model() as model:
        with pytest.raises(ModelLoadError, match="not loaded from a file"):
            await model.re_isq_model(4)


def test_topology_beyond_the_model(smollm2_path: Path) -> None:
    builder = ModelBuilder(smollm2_path, topology=Topology().with_range((0, 31), LayerTopology(isq=4)), threads=2)
    with pytest.raises(ModelLoadError, match="names layer 30, but the model has the layers 0 to 29"):
        BlockingModel.from_builder(builder)
