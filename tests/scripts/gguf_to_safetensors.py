"""A GGUF model as a folder of Hugging Face's form, its weights dequantised: the same numbers by another way.

    python tests/scripts/gguf_to_safetensors.py MODEL.gguf FOLDER [F16|F32]

The tokenizer is written for byte-level vocabularies whose words are split as SmolLM's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny import write_safetensors

from pymistral.loading.checkpoint import GgufLoader
from pymistral.quantization.types import Tensor


def convert(source: Path, folder: Path, dtype: type[np.floating[Any]] = np.float16) -> Path:
    loader = GgufLoader(source)
    config, weights = loader.config_and_weights()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {hugging_face_name(name): values(weights[name]).astype(dtype) for name in weights})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(loader)))
    names = {key: loader.metadata["tokenizer.ggml.tokens"][config[f"{key}_id"]] for key in ("bos_token", "eos_token")}  # type: ignore[index]
    template = {"chat_template": loader.metadata.get("tokenizer.chat_template")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **template}))
    return folder


def hugging_face_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def values(tensor: Tensor) -> NDArray[np.float32]:
    """Dequantised by the `gguf` package."""
    rows = tensor.in_order().data.reshape(*tensor.shape[:-1], -1)
    return quants.dequantize(rows, GGMLQuantizationType(tensor.type)).reshape(tensor.shape)


def tokenizer(loader: GgufLoader) -> dict[str, Any]:
    tokens: Any = loader.metadata["tokenizer.ggml.tokens"]
    types: Any = loader.metadata["tokenizer.ggml.token_type"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, "special": True, **flags} for i, token in enumerate(tokens) if types[i] == 3],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": list(loader.metadata["tokenizer.ggml.merges"]),
        },
    }


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), np.float32 if sys.argv[3:] == ["F32"] else np.float16)
