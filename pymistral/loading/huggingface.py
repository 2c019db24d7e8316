"""Checkpoints from folders as Hugging Face lays them out: ``config.json``, safetensors, ``tokenizer.json`` and what goes with them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..nn.rope import frequencies
from ..quantization.floats import float_values
from ..quantization.types import GgmlType, SafetensorsType, Tensor
from . import names
from .checkpoint import MAX_INTEGER, Checkpoint, some
from .safetensors import StoredTensor, read_json, read_weights
from .tokenizer import Tokenizer
from .tokenizer_json import tokenizer_from_json

logger = logging.getLogger(__name__)

TYPES = {"F32": GgmlType.F32, "F16": GgmlType.F16, "BF16": GgmlType.BF16}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
FP8_SCALES = ("weight_scale_inv", "weight_scale")
FP8_METHODS = (None, "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark")  # quant_method of checkpoints that may be in FP8
MAX_HEAD_DIM = 1024
MOST_TENSORS = 1_000_000  # that a checkpoint is believed to have before its files are there
# buffers that old checkpoints carry along, and the scales of quantised ones
NO_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$|\.(input|activation|weight|[kv])_scale(_inv)?$")


def load_folder(path: str | Path) -> Checkpoint:
    """Load a folder of Hugging Face's form.

    Raises
    ------
    ModelLoadError
        A file is missing or damaged, the architecture is unknown, or the tensors do not fit it.
    """
    loader = FolderLoader(Path(path))
    return loader.checkpoint(*loader.config_and_weights())


class FolderLoader:
    """Reads ``config.json`` and the weights. Both are untrusted: each value is checked before anything is sized by it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise no_config(folder)
        self.whole: str | None = None  # the type of a model of which text is a part only
        self.architecture, self.given = self._architecture(read_json(folder / "config.json"))
        self._check_quantization()

    def fail(self, message: str, remedy: str = "Fetch the folder again, or convert the model again with current tools.") -> NoReturn:
        raise ModelLoadError(f"{self.folder}: {message}. {remedy}")

    def _architecture(self, config: dict[str, Any]) -> tuple[names.Architecture, dict[str, Any]]:
        """What the model is, and the part of the configuration that is about text."""
        model_type, text = config.get("model_type"), config.get("text_config")
        if not isinstance(model_type, str):
            self.fail(f"config.json: model_type is {model_type!r:.80}, not a string")
        if model_type not in names.MODEL_TYPES and isinstance(text, dict):
            inner = str(text.get("model_type", f"{model_type}_text"))
            if inner in names.MODEL_TYPES:
                self.whole = model_type
                shared = ("tie_word_embeddings", "quantization_config", "eos_token_id")
                outer: dict[str, Any] = {key: config[key] for key in shared if key in config}
                model_type, config = inner, {**outer, **text}
        if model_type not in names.MODEL_TYPES:
            known = ", ".join(sorted(names.MODEL_TYPES))
            classes = config.get("architectures")
            called = f" ({', '.join(map(str, classes))})" if isinstance(classes, list) and classes else ""
            missing = f"{model_type!r:.80} lacks its row in pymistral/loading/names.py and its file in pymistral/models"
            remedy = f"Supported: {known}. What is missing: {missing} (see docs/adding-a-model.md)."
            self.fail(f"the architecture {model_type!r:.80}{called:.80} is not supported", remedy)
        return names.MODEL_TYPES[model_type], config

    def _check_quantization(self) -> None:
        """FP8 is read as it is stored; what other methods store are no matrices of the shapes that the architecture asks for."""
        if how := self._other_quantization():
            remedy = "Of such checkpoints those in FP8 are supported: take one of these, the model in floats, or a GGUF file."
            self.fail(
                f"config.json: quantization_config says that the weights are quantised as {how!r:.80}, which is not supported", remedy
            )

    def _other_quantization(self) -> str | None:
        """The method or the type of weights that are quantised, but not in FP8."""
        given = self._quantization()
        if given.get("quant_method") not in FP8_METHODS:
            return str(given["quant_method"])
        for weights in self._quantized_groups():  # compressed-tensors knows integers, too
            kind = f"{weights.get('type', 'float')}{weights.get('num_bits', 8)}"
            if kind != "float8":
                return kind
        if "FP8" not in (algorithm := str(given.get("quant_algo", "FP8"))):  # of modelopt: NVFP4, for instance
            return algorithm
        return f"{given['bits']} bits" if "quant_method" not in given and "bits" in given else None  # MLX names no method

    def check_config(self) -> None:
        """Refuse what ``config.json`` alone rules out: the weights need not be there."""
        self.config(MOST_TENSORS)

    def checkpoint(self, config: dict[str, Any], weights: dict[str, Tensor], tokenizer_json: Path | None = None) -> Checkpoint:
        """All of it, given `config_and_weights`, with the folder's own tokenizer or that of a ``tokenizer.json``."""
        tokenizer = tokenizer_from_json(tokenizer_json or self.folder / "tokenizer.json")
        generation_config = read_optional(self.folder / "generation_config.json")
        return Checkpoint(
            path=self.folder,
            config=config,
            weights=weights,
            tokenizer=tokenizer,
            chat_template=chat_template(self.folder),
            generation_config=generation_config,
            eos_token_ids=_end_tokens(generation_config, config, tokenizer),
        )

    # config

    def config_and_weights(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.whole is not None:
            logger.warning("%s: a %r model; only its text part is loaded", self.folder, self.whole)
        stored = self._stored()
        config = self.config(len(stored))
        return config, self.weights(config, stored)

    def config(self, tensors: int) -> dict[str, Any]:
        """What models and loaders read, checked and complete; no more layers and experts than so many tensors can be."""
        given = {key: value for key, value in self.given.items() if value is not None}
        config: dict[str, Any] = {"rope_theta": 10_000.0, "tie_word_embeddings": False, **self.architecture.defaults, **given}
        config["model_type"] = self.architecture.model_type
        self._attention(config)
        for name in SIZES:
            self.size(config, name)
        if config["num_hidden_layers"] > tensors:  # before anything is listed for each layer
            self.fail(f"num_hidden_layers is {config['num_hidden_layers']}, more than {tensors} tensors allow")
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        if heads % kv_heads:
            self.fail(f"config.json: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
        if config["head_dim"] % 16 or config["head_dim"] > MAX_HEAD_DIM:
            self.fail(f"config.json: head_dim is {config['head_dim']}, not a multiple of 16 up to {MAX_HEAD_DIM}", "Use another model.")
        if type(config["tie_word_embeddings"]) is not bool:  # "false" would be true
            self.fail(f"config.json: tie_word_embeddings is {config['tie_word_embeddings']!r:.80}, not true or false")
        self.positive(config, "rms_norm_eps")
        self._rope(config)
        self._activation(config)
        self._experts(config, tensors)
        if "no_rope_layer_interval" in config:
            config["no_rope_layers"] = names.no_rope_layers(config)
        self._windows(config)
        return config

    def size(self, config: Mapping[str, Any], name: str) -> int:
        """A whole number above 0."""
        if name not in config:
            self.fail(f"config.json lacks {name}")
        value = config[name]
        if type(value) is not int or not 0 < value <= MAX_INTEGER:
            self.fail(f"config.json: {name} is {value!r:.80}, not a whole number from 1 to {MAX_INTEGER}")
        return value

    def positive(self, config: Mapping[str, Any], name: str) -> None:
        if name not in config:
            self.fail(f"config.json lacks {name}")
        if not isinstance(config[name], (int, float)) or isinstance(config[name], bool) or not 0 < config[name] < 1e30:
            self.fail(f"config.json: {name} is {config[name]!r:.80}, not a finite number above 0")

    def _attention(self, config: dict[str, Any]) -> None:
        heads, hidden = self.size(config, "num_attention_heads"), self.size(config, "hidden_size")
        config.setdefault("num_key_value_heads", heads)
        if "head_dim" not in config:
            if hidden % heads:
                self.fail(f"hidden_size={hidden} does not divide into num_attention_heads={heads}")
            config["head_dim"] = hidden // heads
        for name in ("query_pre_attn_scalar", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
            if name in config:
                self.positive(config, name)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if name in self.given and self.given[name] is None:
                config[name] = None
            elif name in config:
                self.positive(config, name)

    def _rope(self, config: dict[str, Any]) -> None:
        """transformers 5 writes ``rope_parameters``, before it was ``rope_theta`` and ``rope_scaling``: the latter is what models see."""
        config.setdefault("rope_scaling", None)
        parameters = config.pop("rope_parameters", None)
        if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):
            local = parameters.get("sliding_attention")
            if isinstance(local, dict) and "rope_theta" in local:
                config["rope_local_base_freq"] = local["rope_theta"]
            parameters = parameters["full_attention"]
        if isinstance(parameters, dict):
            parameters = dict(parameters)
            for name in ("rope_theta", "partial_rotary_factor"):
                if name in parameters:
                    config[name] = parameters.pop(name)
            config["rope_scaling"] = parameters
        scaling = config["rope_scaling"]
        if scaling is not None and not isinstance(scaling, dict):
            self.fail(f"config.json: rope_scaling is {scaling!r:.80}, not an object")
        if scaling and scaling.get("rope_type", scaling.get("type")) == "default":
            config["rope_scaling"] = None
        elif scaling and "original_max_position_embeddings" in config:
            config["rope_scaling"] = {"original_max_position_embeddings": config["original_max_position_embeddings"], **scaling}
        for name in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
            if name in config:
                self.positive(config, name)
        if config.get("partial_rotary_factor", 1) > 1:
            self.fail(f"config.json: partial_rotary_factor is {config['partial_rotary_factor']}, above 1")
        try:
            frequencies(config, config["head_dim"])
        except ModelLoadError as error:
            self.fail(f"config.json: {error}")

    def _activation(self, config: dict[str, Any]) -> None:
        expected = self.architecture.config.get("hidden_act") or "gelu_pytorch_tanh"
        given = config.get("hidden_activation") or config.get("hidden_act", expected)
        if given == "gelu" and expected.startswith("gelu"):  # early Gemma files say gelu and mean its tanh form
            return
        if given != expected:
            problem = f"config.json: the activation is {given!r:.80}, but {config['model_type']} models have {expected}"
            self.fail(problem, "Use another model.")

    def _experts(self, config: dict[str, Any], tensors: int) -> None:
        if not _has_experts(self.architecture):
            return
        if "num_local_experts" in config:
            config["num_experts"] = config["num_local_experts"]
        experts, used = self.size(config, "num_experts"), self.size(config, "num_experts_per_tok")
        if used > experts:
            self.fail(f"config.json: num_experts_per_tok is {used}, but there are {experts} experts")
        config.setdefault("moe_intermediate_size", config["intermediate_size"])
        self.size(config, "moe_intermediate_size")
        step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
        if type(step) is not int or step < 1 or not isinstance(dense, list):
            self.fail("config.json: decoder_sparse_step or mlp_only_layers is of a wrong type")
        layers = range(config["num_hidden_layers"])
        config["mlp_only_layers"] = [layer for layer in layers if layer in dense or (layer + 1) % step != 0]
        if (len(layers) - len(config["mlp_only_layers"])) * experts > tensors:
            self.fail(f"config.json: num_experts is {experts}, more than {tensors} tensors allow")
        if "blk.*.ffn_gate_shexp.weight" in self.architecture.tensors:
            self.size(config, "shared_expert_intermediate_size")

    def _windows(self, config: dict[str, Any]) -> None:
        """``sliding_window``, and ``layer_types`` where not all layers have it."""
        layers = config["num_hidden_layers"]
        if "sliding_window" in self.given and self.given["sliding_window"] is None:
            config["sliding_window"] = None
        if not config.get("sliding_window") or config.get("use_sliding_window") is False:
            config["sliding_window"] = None
            config["layer_types"] = ["full_attention"] * layers
            return
        self.size(config, "sliding_window")
        types = config.get("layer_types")
        if types is None:
            types = self._layer_types(config)
        known = {"full_attention", "sliding_attention"}
        if not isinstance(types, list) or len(types) != layers or not all(isinstance(kind, str) and kind in known for kind in types):
            self.fail(f"config.json: layer_types must say full_attention or sliding_attention for each of the {layers} layers")
        config["layer_types"] = types

    def _layer_types(self, config: Mapping[str, Any]) -> list[str]:
        pattern = config.get("sliding_window_pattern", self.architecture.sliding_window_pattern)
        if pattern is not None:
            self.size({"sliding_window_pattern": pattern}, "sliding_window_pattern")
        first = config.get("max_window_layers", 0)
        if type(first) is not int or first < 0:
            self.fail(f"config.json: max_window_layers is {first!r:.80}, not a whole number from 0")
        types = []
        for i in range(config["num_hidden_layers"]):
            if config["model_type"] == "qwen2_moe":
                sliding = i % 2 == 0 and i < config["max_window_layers"]
            elif "max_window_layers" in config:
                sliding = i >= config["max_window_layers"]
            elif config["model_type"] == "smollm3":
                sliding = not config["no_rope_layers"][i]
            else:
                sliding = pattern is None or (i + 1) % pattern != 0
            types.append("sliding_attention" if sliding else "full_attention")
        return types

    # tensors

    def weights(self, config: dict[str, Any], stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
        if config["tie_word_embeddings"]:
            stored.pop("lm_head.weight", None)
        weights: dict[str, Tensor] = {}
        missing, known = [], set()
        for name, shape, required in self._expected(config):
            if name in stored:
                known.add(name)
                weights[name] = self._tensor(stored, name, shape)
            elif required:
                missing.append(name)
        if missing:
            self.fail(f"the safetensors lack {some(missing)} of a {config['model_type']!r} model")
        unexpected = [name for name in stored if name not in known and not NO_WEIGHTS.search(name)]
        if unexpected:
            model_type = config["model_type"]
            logger.warning("%s: ignored the tensors %s, which are not part of a %r model", self.folder, some(unexpected), model_type)
        config["attention_bias"] = "layers.0.self_attn.q_proj.bias" in weights
        config["mlp_bias"] = "layers.0.mlp.gate_proj.bias" in weights
        return weights

    def _stored(self) -> dict[str, StoredTensor]:
        """What the files hold, by canonical name."""
        stored: dict[str, StoredTensor] = {}
        for name, tensor in read_weights(self.folder).items():
            canonical = name
            for pattern, replacement in names.RENAMED_IN_HUGGING_FACE:
                canonical = re.sub(pattern, replacement, canonical)
            if canonical in stored:
                self.fail(f"the tensors {stored[canonical].name[:80]!r} and {name[:80]!r} are both {canonical[:80]!r}")
            stored[canonical] = tensor
        return stored

    def _expected(self, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Canonical name and shape of every tensor that the model may have, and whether it must."""
        sizes = names.sizes(config)
        architecture, layers = self.architecture, config["num_hidden_layers"]
        sparse = [_has_experts(architecture) and layer not in config["mlp_only_layers"] for layer in range(layers)]
        for pattern in (*architecture.tensors, *architecture.optional, *(names.MLP if _has_experts(architecture) else ())):
            words = names.shape_words(architecture, pattern)
            shape = tuple(sizes[word] for word in words)
            canonical = names.canonical_name(architecture, pattern)
            required = pattern in architecture.tensors or (pattern == "output.weight" and not config["tie_word_embeddings"])
            if "*" not in canonical:
                yield canonical, shape, required
                continue
            for layer in range(layers):
                name = canonical.replace("*", str(layer))
                if pattern in names.MLP and _has_experts(architecture):
                    if not sparse[layer]:
                        yield name, shape, True
                elif pattern in names.EXPERTS + names.SHARED_EXPERT and not sparse[layer]:
                    continue
                elif ".experts." in name:
                    for expert in range(config["num_experts"]):
                        yield name.replace(".experts.", f".experts.{expert}."), shape[1:], required
                else:
                    yield name, shape, required

    def _tensor(self, stored: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = stored[name]
        if tensor.shape != shape:
            self.fail(f"{tensor.path.name}: tensor {tensor.name!r} has the shape {tensor.shape}, but config.json asks for {shape}")
        if tensor.dtype not in (*TYPES, "F64", "F8_E4M3") or (tensor.dtype == "F8_E4M3" and len(shape) != 2):
            remedy = f"Supported: {', '.join(TYPES)}, F64, and F8_E4M3 for matrices."
            self.fail(f"{tensor.path.name}: tensor {tensor.name!r} is stored as {tensor.dtype}, which is not supported", remedy)
        if tensor.dtype in TYPES:
            return Tensor(tensor.name, TYPES[tensor.dtype], shape, tensor.data)
        if tensor.dtype == "F64":
            values = tensor.data.view(np.float64).astype(np.float32)
            return Tensor(tensor.name, GgmlType.F32, shape, values.view(np.uint8))
        prefix = name.removesuffix("weight")
        scale = next((stored[prefix + kind] for kind in FP8_SCALES if prefix + kind in stored), None)
        scales = np.ones((1, 1), np.float32) if scale is None else self._scales(tensor, scale)
        return Tensor(tensor.name, SafetensorsType.F8E4M3, shape, tensor.data, scales=self._scales_of_rows(tensor, scales))

    def _scales_of_rows(self, tensor: StoredTensor, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """A scale for each share of each row, from one for all, one for each row, or one for each block of the matrix."""
        rows, columns = tensor.shape
        if scales.shape in ((1, 1), (rows, 1)):
            return np.broadcast_to(scales, (rows, 1))
        block_rows, block_columns = self._scale_block()
        if scales.shape != (-(-rows // block_rows), -(-columns // block_columns)):
            self.fail(
                f"{tensor.path.name}: the scales {scales.shape} of tensor {tensor.name!r} do not fit its shape {tensor.shape} "
                f"and blocks of {block_rows} by {block_columns}"
            )
        share = math.gcd(block_columns, columns)  # a last block may be narrower
        chosen: NDArray[np.float32] = scales[np.arange(rows)[:, None] // block_rows, np.arange(0, columns, share) // block_columns]
        return chosen

    def _scale_block(self) -> tuple[int, int]:
        """Rows and columns that share a scale, as ``quantization_config`` says in transformers' words or in compressed-tensors'."""
        blocks = [self._quantization().get("weight_block_size"), *(group.get("block_structure") for group in self._quantized_groups())]
        block = next((block for block in blocks if block is not None), [128, 128])
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            self.fail(f"config.json: the blocks of quantization_config are {block!r:.80}, not two whole numbers above 0")
        return block[0], block[1]

    def _quantization(self) -> dict[str, Any]:
        given = self.given.get("quantization_config")
        return given if isinstance(given, dict) else {}

    def _quantized_groups(self) -> list[dict[str, Any]]:
        """What compressed-tensors and modelopt say of the weights of each group of layers."""
        groups = self._quantization().get("config_groups")
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
        return [entry for entry in weights if isinstance(entry, dict)]

    def _scales(self, tensor: StoredTensor, scale: StoredTensor) -> NDArray[np.float32]:
        if len(scale.shape) > 2 or math.prod(scale.shape) < 1 or scale.dtype not in TYPES:
            found = f"{scale.dtype} {scale.shape}"
            self.fail(f"{scale.path.name}: the scale {scale.name!r} is {found}, no scale of {tensor.name!r} {tensor.shape}")
        values = float_values(Tensor(scale.name, TYPES[scale.dtype], scale.shape or (1,), scale.data))
        if not np.isfinite(values).all():
            self.fail(f"{scale.path.name}: the scale {scale.name!r} has values that are not finite")
        return values.reshape(scale.shape if len(scale.shape) == 2 else (-1, 1))


def no_config(where: str | Path) -> ModelLoadError:
    """What is said of a folder, or of a repository before it is fetched."""
    return ModelLoadError(f"{where} holds no config.json: it is not a model folder of Hugging Face's form")


def _has_experts(architecture: names.Architecture) -> bool:
    return names.EXPERTS[0] in architecture.tensors


# ---- beside the weights ----------------------------------------------------------------------------------------------


def read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def chat_template(folder: Path) -> str | None:
    """The folder's chat template: ``chat_template.jinja``, ``chat_template.json``, or what ``tokenizer_config.json`` holds."""
    if (folder / "chat_template.jinja").is_file():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{folder / 'chat_template.jinja'}: cannot read the file: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_optional(folder / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if template is not None:
            if not isinstance(template, str):
                raise ModelLoadError(f"{folder / name}: chat_template is a {type(template).__name__}, not a string")
            return template
    return None


def _end_tokens(generation_config: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that the configurations name, and those that the tokenizer knows by their text."""
    ids: list[int] = []
    for source in (generation_config, config):
        value = source.get("eos_token_id")
        named = value if isinstance(value, list) else [value]
        ids += [token for token in named if type(token) is int and 0 <= token < config["vocab_size"]]
    return tuple(dict.fromkeys([*ids, *tokenizer.end_token_ids]))
