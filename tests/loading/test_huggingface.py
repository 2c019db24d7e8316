"""Folders of Hugging Face's form: configurations of every age, names, FP8, tokenizers, and what is refused."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymistral import ModelBuilder
from pymistral.errors import ModelLoadError
from pymistral.loading.checkpoint import Checkpoint
from pymistral.loading.huggingface import FolderLoader, load_folder
from pymistral.models.registry import supported_model_types
from pymistral.quantization.floats import FP8_VALUES, float_values
from pymistral.quantization.types import GgmlType, SafetensorsType

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny import BYTES, byte_tokenizer, tiny_values, write_folder, write_safetensors

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 0,
}
LAYER = {
    "input_layernorm": [32],
    "post_attention_layernorm": [32],
    **{f"self_attn.{name}_proj": [32, 32] for name in "qkvo"},
    "mlp.gate_proj": [64, 32],
    "mlp.up_proj": [64, 32],
    "mlp.down_proj": [32, 64],
}
SHAPES = {
    "model.embed_tokens.weight": [256, 32],
    "model.norm.weight": [32],
    "lm_head.weight": [256, 32],
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()},
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(shapes: dict[str, list[int]] | None = None, tensors: dict[str, Any] | None = None, without: str = "", **config: Any) -> Path:
        given = {**CONFIG, **config}
        values: dict[str, Any] = tiny_values(SHAPES | (shapes or {}), str(given["model_type"]).startswith("gemma")) | (tensors or {})
        values.pop(without, None)
        return write_folder(tmp_path / "model", {key: value for key, value in given.items() if key != without}, values)

    return write


def test_load(write: Write) -> None:
    checkpoint = load_folder(write())
    assert set(checkpoint.weights) == {name.removeprefix("model.") for name in SHAPES}
    assert checkpoint.config["head_dim"] == 16
    assert checkpoint.config["num_key_value_heads"] == 2
    assert checkpoint.config["rope_theta"] == 10000.0
    assert checkpoint.config["rope_scaling"] is None
    assert checkpoint.config["sliding_window"] is None
    assert checkpoint.eos_token_ids == (0,)
    assert checkpoint.chat_template == "{{ messages[0].content }}"
    weight = checkpoint.weights["layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(float_values(weight), tiny_values(SHAPES, False)["model.layers.0.mlp.down_proj.weight"])


# names


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model.", "language_model."])
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    tensors = {name.replace("model.", prefix): value for name, value in tiny_values(SHAPES, False).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    assert set(load_folder(write_folder(tmp_path, CONFIG, tensors)).weights) == {name.removeprefix("model.") for name in SHAPES}


def test_two_tensors_of_one_name(write: Write) -> None:
    with pytest.raises(ModelLoadError, match=r"'model.norm.weight' and 'norm.weight' are both 'norm.weight'"):
        load_folder(write({"norm.weight": [32]}))


def test_a_text_part(write: Write) -> None:
    """A multimodal model's configuration holds the text's; its class knows what that leaves out."""
    text = {key: CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
    shapes = {f"model.layers.0.{name}.weight": [32] for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")}
    shapes |= {f"model.layers.0.self_attn.{name}_norm.weight": [16] for name in "qk"}
    config = load_folder(write(shapes, without="lm_head.weight", model_type="gemma3", text_config=text)).config
    assert config["model_type"] == "gemma3_text"
    assert config["layer_types"] == ["sliding_attention"]
    assert (config["query_pre_attn_scalar"], config["rope_local_base_freq"], config["norm_weight_offset"]) == (256, 10_000.0, 1)
    assert config["max_position_embeddings"] == 131_072


# configurations


@pytest.mark.parametrize("new", [True, False])
def test_rope_of_both_ages(write: Write, new: bool) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    given = {"rope_parameters": {**scaling, "rope_theta": 7.0, "partial_rotary_factor": 0.5}}
    old = {"rope_scaling": scaling, "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    config = load_folder(write(**(given if new else old))).config
    assert (config["rope_scaling"], config["rope_theta"], config["partial_rotary_factor"]) == (scaling, 7.0, 0.5)


def test_a_window_that_is_off(write: Write) -> None:
    shapes = {f"model.layers.0.self_attn.{name}_proj.bias": [32] for name in "qkv"}
    config = load_folder(write(shapes, model_type="qwen2", sliding_window=64, use_sliding_window=False)).config
    assert config["sliding_window"] is None
    config = load_folder(write(shapes, model_type="qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=0)).config
    assert (config["sliding_window"], config["layer_types"]) == (64, ["sliding_attention"])


def test_mistral_without_a_window(write: Write) -> None:
    assert load_folder(write(model_type="mistral")).config["sliding_window"] == 4096
    assert load_folder(write(model_type="mistral", sliding_window=None)).config["sliding_window"] is None


def test_tied_heads(write: Write) -> None:
    assert "lm_head.weight" not in load_folder(write(tie_word_embeddings=True)).weights
    with pytest.raises(ModelLoadError, match=r"lack 'lm_head.weight'"):
        load_folder(write(without="lm_head.weight"))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"model_type": "rwkv9"},
            r"'rwkv9' \(LlamaForCausalLM\) is not supported. Supported: gemma, .*qwen3_moe.*What is missing: 'rwkv9' lacks",
        ),
        ({"model_type": ["llama"]}, "model_type is .*, not a string"),
        ({"hidden_size": 33}, "hidden_size=33 does not divide into num_attention_heads=2"),
        ({"hidden_size": "32"}, "hidden_size is '32', not a whole number from 1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers is 1073741824, more than 12 tensors"),
        ({"num_hidden_layers": 2}, "lack 'layers.1.input_layernorm.weight', .* and 4 more of a 'llama' model"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=2"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, not a finite number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": "x"}, "rope_theta is 'x'"),
        ({"rope_scaling": [1]}, "rope_scaling is .1., not an object"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2, above 1"),
        ({"hidden_act": "xielu"}, "activation is 'xielu', but llama models have silu"),
        ({"sliding_window": 8, "layer_types": ["chunked"]}, "layer_types must say"),
        ({"model_type": "mistral", "sliding_window": 8, "max_window_layers": "x"}, "max_window_layers is 'x', not a whole number from 0"),
        ({"intermediate_size": 32}, r"gate_proj.weight' has the shape \(64, 32\), but config.json asks for \(32, 32\)"),
    ],
)
def test_refused_configurations(write: Write, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelLoadError, match=problem) as error:
        load_folder(write(**config))
    assert "model: " in str(error.value)


def test_more_experts_than_tensors(write: Write) -> None:
    with pytest.raises(ModelLoadError, match="num_experts is 1000000000, more than 12 tensors"):
        load_folder(write(model_type="mixtral", num_local_experts=1_000_000_000))
    with pytest.raises(ModelLoadError, match="num_experts_per_tok is 9, but there are 8 experts"):
        load_folder(write(model_type="mixtral", num_experts_per_tok=9))


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "rms_norm_eps", "max_position_embeddings"])
def test_keys_that_are_missing(write: Write, name: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"config.json lacks {name}"):
        load_folder(write(without=name))


def test_every_declared_architecture_has_a_model() -> None:
    from pymistral.loading import names

    assert set(names.MODEL_TYPES) == set(supported_model_types())


def test_files_that_are_missing(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"holds no config.json"):
        load_folder(tmp_path)
    folder = write()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"holds no tokenizer.json. Fetch"):
        load_folder(folder)
    (folder / "tokenizer.model").touch()
    with pytest.raises(ModelLoadError, match=r"It has tokenizer.model: convert that"):
        load_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config.json: the file is not valid JSON"):
        load_folder(folder)


# tensors


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_a_missing_tensor_is_named(write: Write, name: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"lack '{name.removeprefix('model.')}' of a 'llama' model"):
        load_folder(write(without=name))


def test_a_wrong_shape_is_named(write: Write) -> None:
    with pytest.raises(
        ModelLoadError, match=r"model.safetensors: tensor 'model.norm.weight' has the shape \(31,\), but config.json asks for \(32,\)"
    ):
        load_folder(write({"model.norm.weight": [31]}))


def test_other_tensors_are_ignored_aloud(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_folder(write({"model.surprise": [3]}))
    assert "ignored the tensors 'surprise'" in caplog.text


def test_integers_are_no_weights(write: Write) -> None:
    with pytest.raises(ModelLoadError, match=r"'model.norm.weight' is stored as I64, which is not supported"):
        load_folder(write(tensors={"model.norm.weight": np.ones(32, np.int64)}))


def test_float64(write: Write) -> None:
    checkpoint = load_folder(write(tensors={"model.norm.weight": np.full(32, 0.25)}))
    np.testing.assert_array_equal(float_values(checkpoint.weights["norm.weight"]), 0.25)


# FP8


def load_fp8(tmp_path: Path, quants: Any, scale_name: str, scale: Any, **config: Any) -> Checkpoint:
    name = "model.layers.0.mlp.down_proj"
    tensors: dict[str, Any] = {**tiny_values(SHAPES, False), f"{name}.weight": quants, f"{name}.{scale_name}": scale}
    return load_folder(write_folder(tmp_path, {**CONFIG, **config}, tensors, **{f"{name}.weight": "F8_E4M3"}))


def test_fp8_values() -> None:
    finite = FP8_VALUES[np.isfinite(FP8_VALUES)]
    assert (FP8_VALUES[0x7E], FP8_VALUES[1], FP8_VALUES[0x38], FP8_VALUES[0xB8], len(finite)) == (448, 2**-9, 1, -1, 254)


# compressed-tensors' words; 32 rows in blocks of 20, whose last one is narrower
COMPRESSED = {"quantization_config": {"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [20, 64]}}}}}


@pytest.mark.parametrize(
    ("scale_name", "scale", "config"),
    [
        ("weight_scale_inv", np.arange(1, 5, dtype=np.float32).reshape(2, 2), {"quantization_config": {"weight_block_size": [16, 32]}}),
        ("weight_scale_inv", np.arange(1, 4, dtype=np.float32).reshape(1, 3), {"quantization_config": {"weight_block_size": [128, 28]}}),
        ("weight_scale", np.arange(1, 3, dtype=np.float32).reshape(2, 1), COMPRESSED),
        ("weight_scale", np.arange(1, 33, dtype=np.float32).reshape(32, 1), {}),
        ("weight_scale", np.arange(1, 33, dtype=np.float32), {}),
        ("weight_scale", np.float32(0.5).reshape(()), {}),
        ("weight_scale", np.float32([0.5]), {}),
    ],
)
def test_fp8(tmp_path: Path, scale_name: str, scale: Any, config: dict[str, Any]) -> None:
    quants = np.random.default_rng(0).integers(0, 127, (32, 64)).astype(np.uint8)
    checkpoint = load_fp8(tmp_path, quants, scale_name, scale, **config)
    block = config["quantization_config"].get("weight_block_size", [20, 64]) if config else (1 if scale.size > 1 else 32, 64)
    full = np.repeat(np.repeat(scale.reshape(scale.shape if scale.ndim == 2 else (-1, 1)), block[0], 0), block[1], 1)[:32, :64]
    weight = checkpoint.weights["layers.0.mlp.down_proj.weight"]
    assert weight.type == SafetensorsType.F8E4M3
    assert not weight.data.flags.owndata
    np.testing.assert_array_equal(float_values(weight), FP8_VALUES[quants] * full)


@pytest.mark.parametrize(
    ("scale", "block", "problem"),
    [
        (np.ones((3, 3), np.float32), [16, 32], r"scales \(3, 3\) of tensor .* do not fit its shape \(32, 64\)"),
        (np.ones((2, 2), np.float32), [0, 32], "blocks of quantization_config are"),
        (np.ones((2, 2), np.float32), "16", "blocks of quantization_config are"),
        (np.ones((5, 1), np.float32), None, r"scales \(5, 1\) .* and blocks of 128 by 128"),
        (np.full((2, 2), np.inf, np.float32), [16, 32], "not finite"),
        (np.ones((2, 2), np.int64), [16, 32], "no scale of"),
    ],
)
def test_fp8_scales_that_do_not_fit(tmp_path: Path, scale: Any, block: Any, problem: str) -> None:
    with pytest.raises(ModelLoadError, match=problem):
        load_fp8(tmp_path, np.zeros((32, 64), np.uint8), "weight_scale_inv", scale, quantization_config={"weight_block_size": block})


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": ["awq"]}, r"\['awq'\]"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}}, "int4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ({"group_size": 64, "bits": 4}, "4 bits"),  # MLX
    ],
)
def test_weights_that_are_quantised_in_another_way(write: Write, quantization: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"weights are quantised as .{named}., which is not supported. Of such .* FP8 are supported"):
        load_folder(write(quantization_config=quantization))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "quark"},
    ],
)
def test_methods_that_may_be_fp8(write: Write, quantization: dict[str, Any]) -> None:
    load_folder(write(quantization_config=quantization))


# beside the weights


def test_chat_templates(write: Write) -> None:
    folder = write()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]})
    )
    assert load_folder(folder).chat_template == "d"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert load_folder(folder).chat_template == "j"
    (folder / "chat_template.jinja").write_text("é")
    assert load_folder(folder).chat_template == "é"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(ModelLoadError, match="chat_template is a int, not a string"):
        load_folder(folder)


def test_generation_config(write: Write) -> None:
    folder = write()
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [5, 6, 999]}))
    checkpoint = load_folder(folder)
    assert checkpoint.generation_config["temperature"] == 0.6
    assert checkpoint.eos_token_ids == (5, 6, 0)


def tokenizer_of(folder: Path, **config: Any) -> Any:
    from pymistral.loading.tokenizer_json import tokenizer_from_json

    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_from_json(folder / "tokenizer.json")


def test_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**byte_tokenizer(), "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}})
    )
    tokenizer = tokenizer_of(tmp_path, eos_token={"content": BYTES[0]})
    text = "héllo\n" + BYTES[0] + "x"
    ids = [*"héllo\n".encode(), 0, ord("x")]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == "héllo\nx"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.bos_token_id) == (256, 0, None)
    assert tokenizer.id_to_bytes(0xC3) == b"\xc3"
    assert tokenizer.end_token_ids == (0,)
    stream = tokenizer.decode_stream()
    assert "".join(stream.step(token) for token in ids) + stream.flush() == "héllo\nx"
    assert tokenizer.encode("\ud800") == list("\ufffd".encode())
    assert tokenizer.encode_continuation("") == []


def test_special_tokens_in_a_continuation_are_text(tmp_path: Path) -> None:
    """What is special would end the text that a grammar demands; what was added as text is one token there as well."""
    description = byte_tokenizer()
    special = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = [{"id": 256, "content": "<eos>", "special": True, **special}, {"id": 257, "content": "<td>", "special": False, **special}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({**description, "added_tokens": added}))
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.encode("<eos><td>") == [256, 257]
    assert tokenizer.encode_continuation("x<eos><td>") == [*b"x<eos>", 257]
    assert tokenizer.encode("<eos>") == [256]


def test_bos_and_eos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    tokenizer = tokenizer_of(tmp_path, bos_token="A", eos_token="B", add_bos_token=True, add_eos_token=True)
    assert tokenizer.encode("x") == [65, 120, 66]
    assert tokenizer.encode("x", add_special_tokens=False) == [120]


def test_sentencepiece_in_json(tmp_path: Path) -> None:
    """A vocabulary of "▁" and byte tokens, as Llama 2's and Gemma's."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "▁", "a", "b", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))])}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    description = {
        **byte_tokenizer(),
        "added_tokens": [],
        "pre_tokenizer": None,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, {**replace, "pattern": {"String": " "}, "content": "▁"}],
        },
        "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["▁ a"], "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = tokenizer_of(tmp_path, bos_token="<s>", add_bos_token=True)
    ids = tokenizer.encode("a bé")
    assert ids == [1, 5, 2, 4, *(6 + byte for byte in "é".encode())]
    assert tokenizer.decode(ids[1:]) == "a bé"
    assert tokenizer.id_to_bytes(5) == b" a"
    assert tokenizer.encode_continuation("a a") == [3, 5]
    assert tokenizer.encode_continuation(" a") == [5]


def test_a_tokenizer_from_elsewhere(write: Write, tmp_path: Path) -> None:
    """In place of a folder's own, which need not be there."""
    folder = write()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"holds no tokenizer\.json"):
        load_folder(folder)
    elsewhere = tmp_path / "other.json"
    elsewhere.write_text(json.dumps(byte_tokenizer()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "B"}))
    loader = FolderLoader(folder)
    checkpoint = loader.checkpoint(*loader.config_and_weights(), elsewhere)
    assert checkpoint.tokenizer.encode("Az") == [65, 122]
    assert 66 in checkpoint.eos_token_ids


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', b"null"])
def test_damaged_tokenizers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: "):
        tokenizer_of(tmp_path)


def test_mixed_shards(write: Write) -> None:
    folder = write()
    tensors = tiny_values(SHAPES, False)
    (folder / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[:6]), dict(list(tensors.items())[6:])]
    index = {}
    for number, half in enumerate(halves, 1):
        name = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / name, {key: value.astype(np.float16) for key, value in half.items()})
        index |= dict.fromkeys(half, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert load_folder(folder).weights["norm.weight"].type == GgmlType.F16


def test_what_a_model_refuses_names_its_folder(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("pymistral.nn.rope.zeros", full)
    path = write()
    with pytest.raises(ModelLoadError, match=r"max_position_embeddings=128: the system has no memory") as caught:
        ModelBuilder(path, force_cpu=True).load()
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("tied", ["false", 1, [], 0.0])
def test_tied_is_true_or_false(write: Write, tied: Any) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json: tie_word_embeddings is .*, not true or false"):
        load_folder(write(tie_word_embeddings=tied))
