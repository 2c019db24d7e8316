"""Checkpoints made from GGUF files: configs in Hugging Face's terms, names, shapes, row order, and what they refuse."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf_files import write_gguf
from numpy.typing import NDArray

from pymistral.errors import ModelLoadError
from pymistral.loading import names
from pymistral.loading.checkpoint import Checkpoint, GgufLoader, load_gguf, open_shards
from pymistral.quantization.types import GgmlType, Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from resident import resident

# a tiny model: 8 tokens, 2 layers, 4 heads of 8 dimensions on 2 key/value heads
SIZES = {"vocab": 8, "hidden": 64, "head": 8, "q": 32, "kv": 16, "qkv": 64, "rope": 4, "ffn": 96, "ffn2": 192}
SIZES |= {"experts": 3, "expert_ffn": 32, "shared_ffn": 48, "one": 1}
METADATA: dict[str, Any] = {
    "context_length": 512,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50000.0,
}
MOE = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48}
TOKENS = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(8)], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}

Write = Callable[..., Path]


def tiny_tensors(architecture: names.Architecture, optional: bool = False) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(0)
    tensors = {}
    for pattern in (*architecture.tensors, *(architecture.optional if optional else ())):
        shape = [SIZES[word] for word in names.shape_words(architecture, pattern) if word != "one"]
        for layer in "01" if "*" in pattern else "":
            tensors[pattern.replace("*", layer)] = random.random(shape, np.float32) + 0.5
        if "*" not in pattern:
            tensors[pattern] = random.random(shape, np.float32) + 0.5
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(
        gguf_name: str = "llama",
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, Any] | None = None,
        *,
        without: str = "",
        optional: bool = False,
        name: str = "tiny.gguf",
    ) -> Path:
        """A tiny model; metadata that is None is left out, as is the key or tensor `without`."""
        architecture = names.ARCHITECTURES.get(gguf_name, names.ARCHITECTURES["llama"])
        specific = METADATA | (MOE if gguf_name.endswith("moe") else {})
        given = {f"{gguf_name}.{key}": value for key, value in specific.items()} | TOKENS | (metadata or {})
        if gguf_name == "llama" and given.get("llama.expert_count"):
            architecture = names.MIXTRAL
        content: dict[str, Any] = tiny_tensors(architecture, optional) | (tensors or {})
        content.pop(without, None)
        given = {key: value for key, value in given.items() if value is not None and key != without}
        write_gguf(tmp_path / name, gguf_name, given, content)
        return tmp_path / name

    return write


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return GgufLoader(path).config_and_weights()


def values(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.in_order().data.view(np.float32).reshape(tensor.shape)


# the real models


def test_smollm2(smollm2_path: Path) -> None:
    config, weights = load(smollm2_path)
    assert config == {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert len(weights) == 272
    assert weights["embed_tokens.weight"].shape == (49152, 576)
    assert weights["embed_tokens.weight"].type == GgmlType.Q8_0
    assert weights["layers.29.mlp.down_proj.weight"].shape == (576, 1536)
    assert weights["layers.29.self_attn.k_proj.weight"].shape == (192, 576)
    assert "lm_head.weight" not in weights


def test_gemma3(gemma3_path: Path) -> None:
    config, weights = load(gemma3_path)
    assert config == {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "norm_weight_offset": 0,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 32768,
        "vocab_size": 262144,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    assert len(weights) == 236
    assert weights["layers.0.self_attn.q_norm.weight"].shape == (256,)
    assert weights["layers.0.pre_feedforward_layernorm.weight"].name == "blk.0.ffn_norm.weight"
    assert weights["layers.0.post_attention_layernorm.weight"].name == "blk.0.post_attention_norm.weight"
    assert weights["layers.0.post_feedforward_layernorm.weight"].name == "blk.0.post_ffw_norm.weight"


# every architecture


@pytest.mark.parametrize("gguf_name", names.ARCHITECTURES)
@pytest.mark.parametrize("optional", [False, True])
def test_every_architecture_loads(write: Write, gguf_name: str, optional: bool) -> None:
    config, weights = load(write(gguf_name, optional=optional))
    architecture = names.ARCHITECTURES[gguf_name]
    assert config["model_type"] == architecture.model_type
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in weights)
    assert config["vocab_size"] == 8
    assert config["rope_theta"] == 50000.0
    assert ("num_experts" in config) == gguf_name.endswith("moe")
    assert config.get("norm_topk_prob") == {"qwen2moe": False, "qwen3moe": True}.get(gguf_name)
    assert ("norm_weight_offset" in config) == gguf_name.startswith("gemma")


def test_mixtral_is_llama_with_experts(write: Write) -> None:
    config, weights = load(write(metadata={"llama.expert_count": 3, "llama.expert_used_count": 2, "llama.feed_forward_length": 32}))
    assert config["model_type"] == "mixtral"
    assert config["num_local_experts"] == 3
    assert config["num_experts_per_tok"] == 2
    assert weights["layers.1.mlp.experts.down_proj.weight"].shape == (3, 64, 32)
    assert weights["layers.1.mlp.gate.weight"].shape == (3, 64)


def test_shared_expert_gate_is_a_matrix(write: Write) -> None:
    _, weights = load(write("qwen2moe"))
    assert weights["layers.0.mlp.shared_expert_gate.weight"].shape == (1, 64)
    with pytest.raises(ModelLoadError, match=r"shape \(32,\), but .* asks for \(64,\)"):
        load(write("qwen2moe", tensors={"blk.0.ffn_gate_inp_shexp.weight": np.ones(32, np.float32)}))


def permute(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """What llama.cpp's converter does to q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("gguf_name", ["llama", "granite"])
@pytest.mark.parametrize("type", [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0])
def test_rows_of_q_and_k_are_in_halves(write: Write, gguf_name: str, type: GGMLQuantizationType) -> None:
    random = np.random.default_rng(1)
    q, k = random.random((32, 64), np.float32), random.random((16, 64), np.float32)
    bias = random.random(16, np.float32)
    path = write(
        gguf_name,
        tensors={
            "blk.1.attn_q.weight": (quants.quantize(permute(q, 4), type), type),
            "blk.1.attn_k.weight": (quants.quantize(permute(k, 2), type), type),
            "blk.1.attn_k.bias": permute(bias, 2),
        },
    )
    _, weights = load(path)
    for name, expected in (("q", q), ("k", k)):
        found = weights[f"layers.1.self_attn.{name}_proj.weight"]
        assert found.type == type
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found.in_order().data, quants.quantize(expected, type).view(np.uint8).reshape(-1))
    np.testing.assert_array_equal(values(weights["layers.1.self_attn.k_proj.bias"]), bias)


def test_other_architectures_keep_their_rows(write: Write) -> None:
    _, weights = load(write("qwen2"))
    expected = tiny_tensors(names.ARCHITECTURES["qwen2"])["blk.1.attn_q.weight"]
    np.testing.assert_array_equal(values(weights["layers.1.self_attn.q_proj.weight"]), expected)


# config


def scaling(**entries: Any) -> dict[str, Any]:
    return {f"llama.rope.scaling.{key}": value for key, value in entries.items()}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        (scaling(type="none", factor=4.0), None),
        (scaling(type="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (scaling(factor=2.0), {"rope_type": "linear", "factor": 2.0}),
        (scaling(type="linear", factor=0.0), None),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            scaling(type="yarn", factor=4.0, original_context_length=128, yarn_beta_fast=16.0),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
        ),
        (
            scaling(type="yarn", factor=4.0, attn_factor=0.5),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "attention_factor": pytest.approx(0.5 * (0.1 * np.log(4) + 1)),
            },
        ),
    ],
)
def test_rope_scaling(write: Write, metadata: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert load(write(metadata=metadata))[0]["rope_scaling"] == expected


def test_llama3_rope_factors(write: Write) -> None:
    _, weights = load(write(tensors={"rope_freqs.weight": np.array([1, 1, 4, 8], np.float32)}))
    assert values(weights["rope_freqs.weight"]).tolist() == [1, 1, 4, 8]
    for bad in (0, np.nan, np.inf, -1):
        with pytest.raises(ModelLoadError, match=r"'rope_freqs.weight' has values that are not finite and above 0"):
            load(write(tensors={"rope_freqs.weight": np.array([1, 1, 4, bad], np.float32)}))


def test_phi3_longrope(write: Write) -> None:
    factors = {f"rope_factors_{kind}.weight": np.arange(1, 5, dtype=np.float32) * scale for kind, scale in (("long", 2), ("short", 1))}
    metadata = {"phi3.rope.scaling.original_context_length": 128, "phi3.rope.scaling.attn_factor": 1.19}
    config, weights = load(write("phi3", metadata, factors))
    assert config["rope_scaling"] == {
        "rope_type": "longrope",
        "long_factor": [2, 4, 6, 8],
        "short_factor": [1, 2, 3, 4],
        "original_max_position_embeddings": 128,
        "attention_factor": 1.19,
    }
    assert config["original_max_position_embeddings"] == 128
    assert weights["layers.0.mlp.gate_up_proj.weight"].shape == (192, 64)
    assert weights["layers.0.self_attn.qkv_proj.weight"].shape == (64, 64)
    with pytest.raises(ModelLoadError, match="no rope_factors_short"):
        load(write("phi3", metadata, factors, without="rope_factors_short.weight"))


def test_partial_rotation(write: Write) -> None:
    assert load(write(metadata={"llama.rope.dimension_count": 4}))[0]["partial_rotary_factor"] == 0.5


def test_head_dim_comes_from_the_hidden_size(write: Write) -> None:
    metadata = {"qwen2.attention.key_length": None, "qwen2.attention.value_length": None, "qwen2.embedding_length": 32}
    narrow = {
        name: array[..., :32] if array.shape[-1] == 64 else array[:32] if array.shape[0] == 64 else array
        for name, array in tiny_tensors(names.ARCHITECTURES["qwen2"]).items()
    }
    assert load(write("qwen2", metadata, narrow))[0]["head_dim"] == 8


def test_values_per_layer_that_agree(write: Write) -> None:
    metadata = {"llama.feed_forward_length": [96, 96], "llama.attention.head_count_kv": [2, 2]}
    assert load(write(metadata=metadata))[0]["intermediate_size"] == 96


def test_sliding_windows(write: Write) -> None:
    window = {"gemma3.attention.sliding_window": 128}
    both, full = ["sliding_attention"] * 2, ["full_attention"] * 2
    assert load(write("gemma3", window))[0]["layer_types"] == both
    assert load(write("gemma3"))[0]["layer_types"] == full
    assert load(write("gemma3", window | {"gemma3.attention.sliding_window_pattern": 1}))[0]["layer_types"] == full
    array = load(write("gemma3", window | {"gemma3.attention.sliding_window_pattern": [False, True]}))[0]
    assert array["layer_types"] == ["full_attention", "sliding_attention"]
    assert load(write("gemma2"))[0]["layer_types"] == ["sliding_attention", "full_attention"]
    assert load(write("gemma2"))[0]["sliding_window"] == 4096
    assert "layer_types" not in load(write("phi3", {"phi3.attention.sliding_window": 64}))[0]


def test_query_scale_of_the_largest_gemmas(write: Write) -> None:
    assert load(write("gemma3"))[0]["query_pre_attn_scalar"] == 8
    layers = {
        name.replace(".0.", f".{layer}."): array
        for layer in range(62)
        for name, array in tiny_tensors(names.ARCHITECTURES["gemma3"]).items()
        if ".0." in name
    }
    assert load(write("gemma3", {"gemma3.block_count": 62}, layers))[0]["query_pre_attn_scalar"] == 16


def test_granite_multipliers(write: Write) -> None:
    metadata = {
        "granite.attention.scale": 0.0078125,
        "granite.embedding_scale": 12.0,
        "granite.logit_scale": 8.0,
        "granite.residual_scale": 0.22,
    }
    config, _ = load(write("granite", metadata))
    assert config["attention_multiplier"] == 0.0078125
    assert config["embedding_multiplier"] == 12.0
    assert config["logits_scaling"] == 8.0
    assert config["residual_multiplier"] == 0.22


def test_granite_scale_of_0_is_that_of_the_heads(write: Write) -> None:
    """As llama.cpp reads it: scores that are all 0 would attend to everything alike."""
    assert load(write("granite", {"granite.attention.scale": 0.0}))[0]["attention_multiplier"] == 8**-0.5
    with pytest.raises(ModelLoadError, match=r"granite.attention.scale is -1.0, not above 0"):
        load(write("granite", {"granite.attention.scale": -1.0}))


# what is refused


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
@pytest.mark.parametrize("value", [0.0, -30.0])
def test_soft_caps_are_above_0(write: Write, cap: str, value: float) -> None:
    """Logits are divided by them."""
    path = write("gemma2", {f"gemma2.{cap}": value})
    with pytest.raises(ModelLoadError, match=rf"^{re.escape(str(path))}: gemma2\.{cap} is {value}, not above 0\. Fetch the file again"):
        load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "it has no llama.block_count"),
        ({"llama.block_count": 0}, "llama.block_count is 0, not above 0"),
        ({"llama.block_count": 2**31 - 1}, "llama.block_count is 2147483647, more than the 20 tensors"),
        ({"llama.block_count": 2**32 - 1}, "llama.block_count is 4294967295, not a whole number"),
        ({"llama.block_count": "2"}, "llama.block_count is '2', not a whole number"),
        ({"llama.block_count": True}, "llama.block_count is True, not a whole number"),
        ({"llama.feed_forward_length": [96, 64]}, "llama.feed_forward_length differs from layer to layer"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "not a finite number"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "epsilon is 0.0, not above 0"),
        ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base is inf"),
        ({"llama.rope.freq_base": -1.0}, "llama.rope.freq_base is -1.0, not above 0"),
        ({"llama.attention.head_count_kv": 3}, "head_count_kv is 3, which does not divide the 4"),
        ({"llama.attention.head_count_kv": 0}, "head_count_kv is 0"),
        ({"llama.attention.key_length": 7}, "heads have 7 dimensions"),
        ({"llama.attention.value_length": 4}, "heads have 8 dimensions and values 4"),
        ({"llama.attention.key_length": None, "llama.attention.head_count": 6}, "64 does not divide into 6 attention heads"),
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count is 16"),
        (scaling(type="ntk", factor=2.0), "rope.scaling.type 'ntk' is not supported. Supported: none, linear"),
        (scaling(type=3), "rope.scaling.type is a int, not a string"),
        (scaling(factor=-2.0), "rope.scaling.factor is -2.0"),
        ({"llama.expert_count": 3, "llama.expert_used_count": 4}, "expert_used_count is 4 of 3"),
        ({"tokenizer.ggml.tokens": None}, "neither tokenizer.ggml.tokens nor a vocab_size"),
        ({"tokenizer.ggml.bos_token_id": "1"}, "bos_token_id is '1', not a token id"),
        ({"llama.embedding_length": 32}, r"'token_embd.weight' has the shape \(8, 64\), but .* asks for \(8, 32\)"),
        ({"llama.feed_forward_length": 64}, r"'blk.0.ffn_gate.weight' has the shape \(96, 64\), but .* asks for \(64, 64\)"),
        ({"llama.block_count": 3}, "lacks the tensors 'blk.2.attn_norm.weight', .* and 4 more of a 'llama' model"),
    ],
)
def test_metadata_that_contradicts_itself_or_the_tensors(write: Write, metadata: dict[str, Any], message: str) -> None:
    path = write(metadata=metadata)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_experts_in_a_dense_architecture(write: Write) -> None:
    with pytest.raises(ModelLoadError, match=r"qwen2.expert_count is 3, but 'qwen2' models have no experts"):
        load(write("qwen2", {"qwen2.expert_count": 3}))


def test_unknown_architecture_lists_the_known(write: Write) -> None:
    with pytest.raises(
        ModelLoadError, match=r"architecture 'rwkv9' is not supported. Supported GGUF architectures: llama, qwen2, .*gemma3"
    ):
        load(write("rwkv9"))


def test_missing_tensor_is_named(write: Write) -> None:
    with pytest.raises(ModelLoadError, match=r"lacks the tensors 'blk.1.attn_v.weight' of"):
        load(write(without="blk.1.attn_v.weight"))


def test_tensor_types_that_cannot_be_weights(write: Write) -> None:
    with pytest.raises(ModelLoadError, match=r"'blk.0.attn_norm.weight' is stored as Q8_0"):
        load(
            write(
                tensors={
                    "blk.0.attn_norm.weight": (
                        quants.quantize(np.ones(64, np.float32), GGMLQuantizationType.Q8_0),
                        GGMLQuantizationType.Q8_0,
                    )
                }
            )
        )
    with pytest.raises(ModelLoadError, match=r"'blk.0.ffn_up.weight' is stored as I32"):
        load(write(tensors={"blk.0.ffn_up.weight": np.ones((96, 64), np.int32)}))


def test_unexpected_tensor_is_ignored_and_logged(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, weights = load(write(tensors={"blk.0.surprise.weight": np.ones(3, np.float32)}))
    assert "ignored the tensors 'blk.0.surprise.weight'" in caplog.text
    assert not any("surprise" in name for name in weights)


# files in parts


@pytest.fixture
def shards(write: Write, tmp_path: Path) -> Callable[..., list[Path]]:
    def shards(**changes: Any) -> list[Path]:
        """The tiny llama in three files; `changes` to the metadata of the last."""
        whole = tiny_tensors(names.ARCHITECTURES["llama"])
        paths = []
        for index in range(3):
            metadata = {f"llama.{key}": value for key, value in METADATA.items()} | TOKENS if index == 0 else {}
            split = {"split.no": (index, 2), "split.count": (3, 2), "split.tensors.count": (len(whole), 5)}
            if index == 2:
                split |= {f"split.{key}": value for key, value in changes.items()}
            from gguf import GGUFValueType

            typed = {key: (value, GGUFValueType(type)) for key, (value, type) in split.items()}
            path = tmp_path / f"tiny-0000{index + 1}-of-00003.gguf"
            write_gguf(path, "llama", metadata | typed, dict(list(whole.items())[index::3]))
            paths.append(path)
        return paths

    return shards


def test_any_shard_loads_all(shards: Callable[..., list[Path]], write: Write) -> None:
    expected = load(write())
    for path in shards():
        config, weights = load(path)
        assert config == expected[0]
        assert list(weights) == list(expected[1])
        assert all((weights[name].in_order().data == tensor.in_order().data).all() for name, tensor in expected[1].items())


def test_shards_that_do_not_fit(shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"00003-of-00003.gguf: its split.no or split.count contradicts its name"):
        open_shards(shards(no=(1, 2))[0])
    with pytest.raises(ModelLoadError, match=r"one of 4 files, but is not named like NAME-00001-of-00004.gguf"):
        open_shards(shards(count=(4, 2))[2])
    paths = shards()
    paths[1].rename(tmp_path / "other.gguf")
    with pytest.raises(ModelLoadError, match=r"tiny-00002-of-00003.gguf: no such file"):
        open_shards(paths[0])
    with pytest.raises(ModelLoadError, match=r"other.gguf: it is one of 3 files"):
        open_shards(tmp_path / "other.gguf")
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ModelLoadError, match=r"00002-of-00003.gguf: its split.no"):
        open_shards(paths[0])


# the whole checkpoint


@pytest.fixture
def fake_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer_from_gguf(metadata: Any) -> Any:
        if "tokenizer.ggml.broken" in metadata:
            raise ModelLoadError("tokenizer.ggml.broken is there")
        return SimpleNamespace(vocab_size=len(metadata["tokenizer.ggml.tokens"]), end_token_ids=(2, 5))

    module = ModuleType("pymistral.loading.tokenizer_gguf")
    module.tokenizer_from_gguf = tokenizer_from_gguf  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pymistral.loading.tokenizer_gguf", module)


@pytest.mark.usefixtures("fake_tokenizer")
def test_load_gguf(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    metadata = {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.eom_token_id": 99,
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
        "general.sampling.penalty_repeat": 1.05,
    }
    path = write(metadata=metadata)
    checkpoint = load_gguf(str(path))
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.path == path
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.eos_token_ids == (2, 4, 5)
    assert "eom_token_id, which is 99" in caplog.text
    assert checkpoint.generation_config == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "eos_token_id": [2, 4, 5],
    }
    assert checkpoint.config["bos_token_id"] == 1
    assert load_gguf(write()).chat_template is None


@pytest.mark.usefixtures("fake_tokenizer")
def test_tokenizer_errors_name_the_file(write: Write) -> None:
    path = write(metadata={"tokenizer.ggml.broken": True})
    with pytest.raises(ModelLoadError, match="broken is there") as caught:
        load_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_tokenizer_that_is_not_supported_can_be_given(write: Write, tmp_path: Path) -> None:
    path = write(metadata={"tokenizer.ggml.model": "t5"})
    with pytest.raises(ModelLoadError, match=r"tokenizer\.ggml\.model is 't5'.*with_tokenizer_json"):
        load_gguf(path)
    vocab = {f"t{i}": i for i in range(8)}
    own = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    elsewhere = tmp_path / "tokenizer.json"
    elsewhere.write_text(json.dumps({**own, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}}))
    loader = GgufLoader(path)
    checkpoint = loader.checkpoint(*loader.config_and_weights(), elsewhere)
    assert checkpoint.tokenizer.encode("t3 t1") == [3, 1]
    assert checkpoint.eos_token_ids == (2,)


def test_load_gguf_of_the_real_models(smollm2_path: Path, gemma3_path: Path) -> None:
    pytest.importorskip("pymistral.loading.tokenizer_gguf")
    smollm2, gemma3 = load_gguf(smollm2_path), load_gguf(gemma3_path)
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode("Hello, world")) == "Hello, world"
    assert "<|im_start|>" in (smollm2.chat_template or "")
    assert 2 in smollm2.eos_token_ids
    assert {1, 106} <= set(gemma3.eos_token_ids)
    assert gemma3.chat_template is None


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads what Linux says of memory")
def test_what_was_read_of_the_file_takes_no_memory(smollm2_path: Path) -> None:
    """The vocabulary and its merges are 1.6 MB. What is a view of the file reads it again."""
    before = resident(smollm2_path)
    checkpoint = load_gguf(smollm2_path)
    assert resident(smollm2_path) - before < 1000
    assert checkpoint.tokenizer.encode("Hello world") == [19556, 905]
