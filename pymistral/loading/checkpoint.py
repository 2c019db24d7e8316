"""A loaded checkpoint, in Hugging Face's terms, and the loader that makes one from GGUF files."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..quantization.types import GgmlType, Tensor
from . import names
from .gguf import GgufFile

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_INTEGER = (1 << 31) - 1
FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
NOT_FOR_WEIGHTS = (GgmlType.I8, GgmlType.I16, GgmlType.I32, GgmlType.I64, GgmlType.F64, GgmlType.Q8_1, GgmlType.Q8_K)


@dataclass
class Checkpoint:
    """All that a model file says.

    Attributes
    ----------
    path
        The file or folder, for messages.
    config
        Keys and meanings of Hugging Face's ``config.json``.
    weights
        Canonical name (Hugging Face's, without the leading ``model.``) to tensor. ``lm_head.weight`` is absent when it is tied to
        the embedding; the experts of a layer are one tensor, ``mlp.experts.up_proj.weight`` ``(experts, out, in)``, from GGUF, and one
        each, ``mlp.experts.0.up_proj.weight``, from Hugging Face.
    tokenizer
        Text to tokens and back.
    chat_template
        Jinja source, if the file has one.
    generation_config
        Keys of Hugging Face's ``generation_config.json``: what the model's author recommends.
    eos_token_ids
        Every token that ends a turn.
    """

    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    chat_template: str | None
    generation_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]


def load_gguf(path: str | Path) -> Checkpoint:
    """Load a GGUF file, or all files of one that was split, given any of them.

    Raises
    ------
    ModelLoadError
        A file is missing, damaged, of an unknown architecture, or its tensors do not fit the architecture.
    """
    loader = GgufLoader(path)
    return loader.checkpoint(*loader.config_and_weights())


class GgufLoader:
    """Reads what GGUF files say about a model, in Hugging Face's terms. Metadata is untrusted: each value is checked when it is read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = open_shards(self.path)
        self.metadata = files[0].metadata
        self.tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
        self.prefix = self.text("general.architecture") or self.fail("it has no general.architecture")
        self.architecture = self._architecture()

    def fail(self, message: str, remedy: str = "Fetch the file again, or convert the model again with current tools.") -> NoReturn:
        raise ModelLoadError(f"{self.path}: {message}. {remedy}")

    def _architecture(self) -> names.Architecture:
        if self.prefix == "llama" and self.integer("llama.expert_count"):
            return names.MIXTRAL
        architecture = names.ARCHITECTURES.get(self.prefix)
        if architecture is None:
            known = ", ".join(names.ARCHITECTURES)
            self.fail(f"the architecture {self.prefix[:80]!r} is not supported", f"Supported GGUF architectures: {known}.")
        return architecture

    # metadata, one value at a time

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(f"{key} is a {type(value).__name__}, not a string")
        return value

    def integer(self, key: str) -> int | None:
        value = self._uniform(key)
        if value is None:
            return None
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
            self.fail(f"{key} is {value!r:.80}, not a whole number from 0 to {MAX_INTEGER}")
        return int(value)

    def real(self, key: str) -> float | None:
        value = self._uniform(key)
        if value is None:
            return None
        if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool) or not -1e30 < value < 1e30:
            self.fail(f"{key} is {value!r:.80}, not a finite number")
        return float(str(np.float32(value)))  # float32's shortest decimal: the 1e-05 that the author wrote, not 9.99999974e-06

    def _uniform(self, key: str) -> object:
        """The value, or of an array with a value per layer the one that all layers share."""
        value = self.metadata.get(key)
        if not isinstance(value, np.ndarray):
            return value
        if not value.size or (value != value[0]).any():
            self.fail(f"{key} differs from layer to layer, which {self.prefix!r} models do not support", "Use another model file.")
        return value[0]

    def checkpoint(self, config: dict[str, Any], weights: dict[str, Tensor], tokenizer_json: Path | None = None) -> Checkpoint:
        """All of it, given `config_and_weights`, with the file's own tokenizer or that of a ``tokenizer.json``."""
        if tokenizer_json is None:
            tokenizer = self._tokenizer()
        else:
            from .tokenizer_json import tokenizer_from_json

            tokenizer = tokenizer_from_json(tokenizer_json)
        eos_token_ids = self.eos_token_ids(tokenizer)
        checkpoint = Checkpoint(
            path=self.path,
            config=config,
            weights=weights,
            tokenizer=tokenizer,
            chat_template=self.text("tokenizer.chat_template"),
            generation_config=self.generation_config(eos_token_ids),
            eos_token_ids=eos_token_ids,
        )
        self.metadata.forget()
        return checkpoint

    def _tokenizer(self) -> Tokenizer:
        from .tokenizer_gguf import tokenizer_from_gguf

        try:
            return tokenizer_from_gguf(self.metadata)
        except ModelLoadError as error:
            problem, in_python = f"{self.path}: {error}", ". A tokenizer.json for it can be given with with_tokenizer_json."
            raise ModelLoadError(problem, in_python) from error

    # config

    def config_and_weights(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = self.config()
        weights = self.weights(config)
        config["tie_word_embeddings"] = "lm_head.weight" not in weights
        config["attention_bias"] = "layers.0.self_attn.q_proj.bias" in weights
        config["mlp_bias"] = "layers.0.mlp.gate_proj.bias" in weights
        if "rope_factors_long.weight" in weights:
            config["rope_scaling"] = self._longrope(config, weights)
        return config, weights

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"model_type": self.architecture.model_type, "rope_theta": 10_000.0, **self.architecture.config}
        for key in names.REQUIRED_KEYS:
            if f"{self.prefix}.{key}" not in self.metadata:
                self.fail(f"it has no {self.prefix}.{key}")
        for key, name in names.INTEGERS.items():
            if (integer := self.integer(f"{self.prefix}.{key}")) is not None:
                config[name] = integer
        for key, name in names.REALS.items():
            if (real := self.real(f"{self.prefix}.{key}")) is not None:
                config[name] = real
        self._check_sizes(config)
        self._vocabulary(config)
        self._experts(config)
        self._attention(config)
        self._rope(config)
        if "no_rope_layer_interval" in config:
            config["no_rope_layers"] = names.no_rope_layers(config)
        for key, name in names.SPECIAL_TOKENS.items():
            config[name] = self.token_id(key, config["vocab_size"])
        return config

    def _check_sizes(self, config: dict[str, Any]) -> None:
        for key in names.REQUIRED_KEYS:
            name = names.INTEGERS.get(key) or names.REALS[key]
            if not config[name] > 0:
                self.fail(f"{self.prefix}.{key} is {config[name]}, not above 0")
        if config["num_hidden_layers"] > len(self.tensors):  # before anything is listed for each layer
            self.fail(f"{self.prefix}.block_count is {config['num_hidden_layers']}, more than the {len(self.tensors)} tensors of the file")
        for key, name in names.REALS.items():
            if name != "attention_multiplier" and not config.get(name, 1) > 0:  # of which 0 says nothing
                self.fail(f"{self.prefix}.{key} is {config[name]}, not above 0")

    def _vocabulary(self, config: dict[str, Any]) -> None:
        tokens = self.metadata.length("tokenizer.ggml.tokens")
        if tokens is not None:
            config["vocab_size"] = tokens
        elif "vocab_size" not in config:
            self.fail("it has neither tokenizer.ggml.tokens nor a vocab_size")

    def _experts(self, config: dict[str, Any]) -> None:
        experts, used = config.pop("num_experts", 0), config.pop("num_experts_per_tok", 0)
        words = {word for name in self.architecture.tensors for word in names.shape_words(self.architecture, name)}
        if "experts" not in words:
            if experts:
                self.fail(f"{self.prefix}.expert_count is {experts}, but {self.prefix!r} models have no experts")
            return
        if not 1 <= used <= experts:
            self.fail(f"{self.prefix}.expert_used_count is {used} of {experts} experts, not 1 or more of them")
        config |= {"num_experts": experts, "num_experts_per_tok": used}
        if config["model_type"] == "mixtral":
            config |= {"num_local_experts": experts, "moe_intermediate_size": config["intermediate_size"]}
        config.setdefault("moe_intermediate_size", config["intermediate_size"] // used)
        if "shared_ffn" in words:
            config.setdefault("shared_expert_intermediate_size", config["intermediate_size"])
        norm = self.metadata.get(f"{self.prefix}.expert_weights_norm")
        if isinstance(norm, bool):
            config["norm_topk_prob"] = norm

    def _attention(self, config: dict[str, Any]) -> None:
        heads = config["num_attention_heads"]
        key_value_heads = config.setdefault("num_key_value_heads", heads)
        if not key_value_heads or heads % key_value_heads:
            self.fail(f"{self.prefix}.attention.head_count_kv is {key_value_heads}, which does not divide the {heads} attention heads")
        if "head_dim" not in config:
            if config["hidden_size"] % heads:
                self.fail(f"the hidden size {config['hidden_size']} does not divide into {heads} attention heads")
            config["head_dim"] = config["hidden_size"] // heads
        head_dim, value_dim = config["head_dim"], self.integer(f"{self.prefix}.attention.value_length")
        if not head_dim or head_dim % 2 or value_dim not in (None, head_dim):
            self.fail(f"heads have {head_dim} dimensions and values {value_dim or head_dim}; they must be equal, even and above 0")
        if config["model_type"] == "granite":
            scale = config["attention_multiplier"] = config.get("attention_multiplier") or head_dim**-0.5  # 0: not said
            if scale < 0:
                self.fail(f"{self.prefix}.attention.scale is {scale}, not above 0")
        if self.architecture.query_scale_from_hidden is not None:
            from_hidden = config["num_hidden_layers"] == self.architecture.query_scale_from_hidden
            config["query_pre_attn_scalar"] = config["hidden_size"] // heads if from_hidden else head_dim
        self._sliding_window(config)

    def _sliding_window(self, config: dict[str, Any]) -> None:
        layers = config["num_hidden_layers"]
        if not config.get("sliding_window"):
            config["sliding_window"] = None
            if self.architecture.sliding_window_pattern is not None:
                config["layer_types"] = ["full_attention"] * layers
            return
        key = f"{self.prefix}.attention.sliding_window_pattern"
        pattern = self.metadata.get(key, self.architecture.sliding_window_pattern)
        if pattern is None:
            return
        if isinstance(pattern, (np.ndarray, list)):
            if len(pattern) != layers or isinstance(pattern, list):
                self.fail(f"{key} has {len(pattern)} entries, not a truth value for each of the {layers} layers")
            sliding = [bool(item) for item in pattern]
        elif isinstance(pattern, int) and 0 < pattern <= MAX_INTEGER:
            config["sliding_window_pattern"] = pattern
            sliding = [(layer + 1) % pattern != 0 for layer in range(layers)]
        else:
            self.fail(f"{key} is {pattern!r:.80}, not a whole number above 0")
        config["layer_types"] = ["sliding_attention" if item else "full_attention" for item in sliding]

    def _rope(self, config: dict[str, Any]) -> None:
        head_dim = config["head_dim"]
        rotated = self.integer(f"{self.prefix}.rope.dimension_count") or head_dim
        if rotated % 2 or rotated > head_dim:
            self.fail(f"{self.prefix}.rope.dimension_count is {rotated}, not an even number up to the head's {head_dim} dimensions")
        if rotated != head_dim:
            config["partial_rotary_factor"] = rotated / head_dim
        original = self.integer(f"{self.prefix}.rope.scaling.original_context_length")
        if original:
            config["original_max_position_embeddings"] = original
        config["rope_scaling"] = self._rope_scaling(original or config["max_position_embeddings"])

    def _rope_scaling(self, original_context: int) -> dict[str, Any] | None:
        scaling = f"{self.prefix}.rope.scaling"
        kind = self.text(f"{scaling}.type") or "linear"  # what GGUF means by a factor alone
        factor = self.real(f"{scaling}.factor") or self.real(f"{self.prefix}.rope.scale_linear") or 1.0
        if factor < 0:
            self.fail(f"{scaling}.factor is {factor}, not above 0")
        if kind in ("none", "longrope") or factor == 1.0:  # longrope has its factors in tensors
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            self.fail(f"{scaling}.type {kind[:80]!r} is not supported", "Supported: none, linear, yarn, longrope.")
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original_context}
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := self.real(f"{scaling}.{key}")) is not None:
                yarn[name] = value
        multiplier = (self.real(f"{scaling}.attn_factor") or 1.0) * (self.real(f"{scaling}.yarn_attn_factor") or 1.0)
        if multiplier != 1.0:  # GGUF's scales what Hugging Face's replaces
            yarn["attention_factor"] = multiplier * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        return yarn

    def _longrope(self, config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
        if "rope_factors_short.weight" not in weights:
            self.fail("it has the tensor rope_factors_long.weight but no rope_factors_short.weight")
        longrope = {
            "rope_type": "longrope",
            "long_factor": self._rope_factors(weights.pop("rope_factors_long.weight")).tolist(),
            "short_factor": self._rope_factors(weights.pop("rope_factors_short.weight")).tolist(),
            "original_max_position_embeddings": config.get("original_max_position_embeddings", config["max_position_embeddings"]),
        }
        attention_factor = self.real(f"{self.prefix}.rope.scaling.attn_factor")
        if attention_factor:
            longrope["attention_factor"] = attention_factor
        return longrope

    # tensors

    def weights(self, config: dict[str, Any]) -> dict[str, Tensor]:
        sizes = names.sizes(config)
        layers = config["num_hidden_layers"]
        weights: dict[str, Tensor] = {}
        missing, known = [], set()
        for pattern in (*self.architecture.tensors, *self.architecture.optional):
            expected = tuple(sizes[word] for word in names.shape_words(self.architecture, pattern))
            canonical = names.canonical_name(self.architecture, pattern)
            for layer in map(str, range(layers)) if "*" in pattern else ("",):
                name = pattern.replace("*", layer)
                tensor = self.tensors.get(name)
                if tensor is not None:
                    known.add(name)
                    weights[canonical.replace("*", layer)] = self._checked(tensor, expected)
                elif pattern in self.architecture.tensors:
                    missing.append(name)
        if missing:
            self.fail(f"it lacks the tensors {some(missing)} of a {self.prefix!r} model")
        if unexpected := [name for name in self.tensors if name not in known]:
            logger.warning("%s: ignored the tensors %s, which are not part of a %r model", self.path, some(unexpected), self.prefix)
        if "rope_freqs.weight" in weights:
            self._rope_factors(weights["rope_freqs.weight"])
        if self.architecture.permuted:
            _unpermute_all(weights, config)
        return weights

    def _checked(self, tensor: Tensor, expected: tuple[int, ...]) -> Tensor:
        stored = expected[1:] if expected[0] == 1 and len(tensor.shape) < len(expected) else expected
        if tensor.shape != stored:
            self.fail(f"tensor {tensor.name!r} has the shape {tensor.shape}, but this {self.prefix!r} model's metadata asks for {stored}")
        if tensor.type in NOT_FOR_WEIGHTS or (len(expected) == 1 and tensor.type not in FLOATS):
            self.fail(f"tensor {tensor.name!r} is stored as {tensor.type.name}, which is no type for it")
        return tensor if stored == expected else replace(tensor, shape=expected)

    def _rope_factors(self, tensor: Tensor) -> NDArray[np.float32]:
        if tensor.type != GgmlType.F32:
            self.fail(f"tensor {tensor.name!r} is stored as {tensor.type.name}, not as F32")
        factors = tensor.data.view(np.float32)
        if not (np.isfinite(factors) & (factors > 0)).all():
            self.fail(f"tensor {tensor.name!r} has values that are not finite and above 0")
        return factors

    # generation

    def token_id(self, key: str, vocab_size: int) -> int | None:
        token = self.metadata.get(key)
        if token is None:
            return None
        if not isinstance(token, int) or isinstance(token, bool):
            self.fail(f"{key} is {token!r:.80}, not a token id")
        if not 0 <= token < vocab_size:
            logger.warning("%s: ignored %s, which is %d with a vocabulary of %d tokens", self.path, key, token, vocab_size)
            return None
        return token

    def eos_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that metadata names, and those that the tokenizer knows by their text: metadata often lacks the one chats use."""
        ids = [self.token_id(key, tokenizer.vocab_size) for key in names.END_TOKENS]
        return tuple(dict.fromkeys(token for token in (*ids, *tokenizer.end_token_ids) if token is not None))

    def generation_config(self, eos_token_ids: Sequence[int]) -> dict[str, Any]:
        config: dict[str, Any] = {}
        for key, name in names.SAMPLING.items():
            value = self.integer(key) if name == "top_k" else self.real(key)
            if value is not None:
                config[name] = value
        if eos_token_ids:
            config["eos_token_id"] = list(eos_token_ids)
        return config


def open_shards(path: Path) -> list[GgufFile]:
    """Open a GGUF file; if it is one of several, all of them, the one with the metadata first."""
    file = GgufFile.open(path)
    count = _shard_number(file, "split.count", 1)
    if count <= 1:
        return [file]
    match = SHARD_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        expected = f"NAME-00001-of-{count:05}.gguf"
        raise ModelLoadError(f"{path}: it is one of {count} files, but is not named like {expected}. Give it its old name back.")
    stem = match["stem"]
    shards = [GgufFile.open(path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf")) for number in range(1, count + 1)]
    seen: set[str] = set()
    for index, shard in enumerate(shards):
        if _shard_number(shard, "split.no", index) != index or _shard_number(shard, "split.count", count) != count:
            raise ModelLoadError(f"{shard.path}: its split.no or split.count contradicts its name. Fetch the files again.")
        if twice := seen & shard.tensors.keys():
            raise ModelLoadError(f"{shard.path}: the tensors {some(twice)} are in an earlier file too. Fetch the files again.")
        seen |= shard.tensors.keys()
    total = _shard_number(shards[0], "split.tensors.count", len(seen))
    if total != len(seen):
        raise ModelLoadError(f"{shards[0].path}: split.tensors.count is {total}, but the files have {len(seen)}. Fetch the files again.")
    return shards


def _shard_number(file: GgufFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if not isinstance(value, int) or not 0 <= value <= MAX_INTEGER:
        raise ModelLoadError(f"{file.path}: {key} is not a whole number from 0 to {MAX_INTEGER}. Fetch the file again.")
    return value


def _unpermute_all(weights: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    for layer in range(config["num_hidden_layers"]):
        for projection, heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
            for kind in ("weight", "bias"):
                name = f"layers.{layer}.self_attn.{projection}.{kind}"
                if name in weights:
                    weights[name] = _unpermute(weights[name], heads)


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Put a head's rows back from RoPE pairs (0, h/2, 1, h/2 + 1, ...) into halves (0, 1, ..., h/2, h/2 + 1, ...).

    A matrix stays as the file has it until it is packed, a part at a time.
    """
    pairs = np.arange(tensor.shape[0]).reshape(heads, -1, 2)
    ordered = replace(tensor, order=pairs.swapaxes(1, 2).reshape(-1))
    return ordered if len(tensor.shape) > 1 else ordered.in_order()


def some(tensor_names: Iterable[str]) -> str:
    """A list short enough for a message."""
    listed = [repr(name[:80]) for name in tensor_names]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
