"""Mixtures of experts: quantised with the model running, and from FP8 files."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pymistral import ModelBuilder, RequestBuilder
from pymistral.blocking import BlockingModel
from pymistral.errors import ModelLoadError
from pymistral.quantization.floats import FP8_VALUES

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from test_parity import GOLDENS, golden
from tiny import write_folder
from tiny_gguf import write_gguf

MIXTURES = [path for path in GOLDENS if path.stem in ("mixtral", "qwen2_moe", "qwen3_moe")]
Values = dict[str, NDArray[Any]]


def checkpoint(path: Path, folder: Path, form: str) -> tuple[Path, list[int]]:
    config, values, tokens, _ = golden(path)
    if form == "gguf":
        return write_gguf(folder / "tiny.gguf", config | {"mlp_only_layers": []}, values), tokens
    return write_folder(folder / "tiny", config, values), tokens


def loaded(path: Path, **options: Any) -> BlockingModel:
    return BlockingModel.from_builder(ModelBuilder(path, threads=2, **options))


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
def test_quantised_again(path: Path, form: str, tmp_path: Path) -> None:
    """The same as when it is loaded so; and near the floats, where there are 8 bits."""
    if form == "gguf" and path.stem == "qwen2_moe":
        pytest.skip("GGUF has no word for its dense layers")
    file, tokens = checkpoint(path, tmp_path, form)
    with loaded(file) as model:
        floats = model.logits(tokens)
        errors = {}
        for isq in ("q8_0", "q4k", "fp8", "mxfp4"):
            model.re_isq_model(isq)
            again = model.logits(tokens)
            with loaded(file, isq=isq) as other:
                np.testing.assert_array_equal(again, other.logits(tokens))
            # of most tokens: where the router is undecided, another expert makes another token
            errors[isq] = np.median(np.abs(again - floats).max(axis=1))
    print({isq: f"{error:.4f}" for isq, error in errors.items()})
    assert 0 < errors["q8_0"] < 0.2
    assert errors["q8_0"] < errors["q4k"] < errors["mxfp4"]
    assert 0 < errors["fp8"] < errors["mxfp4"]


async def test_it_serves_while_it_is_quantised_again(tmp_path: Path) -> None:
    file, _ = checkpoint(next(path for path in MIXTURES if path.stem == "qwen3_moe"), tmp_path, "safetensors")
    request = RequestBuilder().add_message("user", "abc").set_sampler_max_len(40).set_deterministic_sampler()
    async with await ModelBuilder(file, threads=2).build() as model:
        changes = asyncio.create_task(quantise_in_turn(model, ("q8_0", "q4_0", "q8_0")))
        answers = [await model.send_chat_request(request)]
        while not changes.done():
            answers.append(await model.send_chat_request(request))
        await changes
        assert all(answer.choices[0].finish_reason in ("stop", "length") for answer in answers)
        last = await model.send_chat_request(request)
    async with await ModelBuilder(file, threads=2, isq="q8_0").build() as model:
        assert (await model.send_chat_request(request)).choices[0].message.content == last.choices[0].message.content


async def quantise_in_turn(model: Any, types: tuple[str, ...]) -> None:
    for isq in types:
        await model.re_isq_model(isq)


# FP8


def in_fp8(values: Values, rows: int, columns: int) -> tuple[Values, Values, dict[str, str]]:
    """The projections (by any name) in FP8 with a scale for each block; what they stand for; the types."""
    stored, meant, dtypes = dict(values), dict(values), {}
    numbers = FP8_VALUES[:127].astype(np.float64)
    for name, matrix in values.items():
        if matrix.ndim < 2 or ("_proj." not in name and ".experts." not in name):
            continue
        scales = np.zeros((-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns)), np.float32)
        for i, j in np.ndindex(scales.shape):
            scales[i, j] = np.abs(matrix[rows * i : rows * (i + 1), columns * j : columns * (j + 1)]).max() / 448
        full = np.repeat(np.repeat(scales, rows, 0), columns, 1)[: matrix.shape[0], : matrix.shape[1]]
        nearest = np.abs(np.abs(matrix / full)[..., None] - numbers).argmin(-1).astype(np.uint8)
        stored[name] = np.where(matrix < 0, nearest | 128, nearest)
        stored[f"{name}_scale_inv"] = scales
        meant[name] = FP8_VALUES[stored[name]] * full
        dtypes[name] = "F8_E4M3"
    return stored, meant, dtypes


@pytest.mark.parametrize("path", [*MIXTURES, *(path for path in GOLDENS if path.stem == "phi3")], ids=lambda path: path.stem)
def test_fp8_checkpoints(path: Path, tmp_path: Path) -> None:
    config, values, tokens, _ = golden(path)
    values["model.embed_tokens.weight"] = values["model.embed_tokens.weight"].astype(np.float16)  # type: ignore[assignment]
    stored, meant, dtypes = in_fp8(values, 24, 48)
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 48]}
    with loaded(write_folder(tmp_path / "floats", config, meant)) as model:
        floats, nbytes = model.logits(tokens), weight_bytes(model)
    with loaded(write_folder(tmp_path / "fp8", config, stored, **dtypes)) as model:
        errors = np.abs(model.logits(tokens) - floats).max(axis=1)
        print(f"at first {errors[0]:.1e}, median {np.median(errors):.1e}, largest {errors.max():.1e}")
        # both keep keys and values in bfloat16, so that the last bit of a product may decide how one is rounded
        assert errors[0] < 2e-5
        assert np.median(errors) < 1e-2
        assert weight_bytes(model) < 0.6 * nbytes
        model.re_isq_model("q8_0")
        assert 1e-4 < np.median(np.abs(model.logits(tokens) - floats).max(axis=1)) < 0.2


def weight_bytes(model: BlockingModel) -> int:
    return int(model.inner._engine._core.runner.program.weight_bytes)  # type: ignore[attr-defined]


def test_experts_whose_scales_differ(tmp_path: Path) -> None:
    """A kernel walks over all experts of a layer by the size of the first."""
    config, values, _, _ = golden(next(path for path in MIXTURES if path.stem == "mixtral"))
    stored, _, dtypes = in_fp8(values, 24, 48)
    name = next(name for name in dtypes if ".experts.1." in name)
    stored[f"{name}_scale_inv"] = np.ones((), np.float32)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [24, 48]}
    with pytest.raises(ModelLoadError, match=r"experts.1.* is F8E4M3 with 1 scales a row .*beside it are F8E4M3 with 4 scales a row"):
        loaded(write_folder(tmp_path / "tiny", config, stored, **dtypes))
