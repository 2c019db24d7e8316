"""Tiny random checkpoints: their values come from their names, so that tests need no stored weights. NumPy alone."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Values = Mapping[str, NDArray[np.float32]]


def tiny_values(shapes: Mapping[str, list[int]], gemma: bool) -> dict[str, NDArray[np.float32]]:
    """A value for each tensor; large enough that heads, experts, windows and caps all matter to the logits."""
    return {name: _values(name, shape, gemma) for name, shape in shapes.items()}


def _values(name: str, shape: list[int], gemma: bool) -> NDArray[np.float32]:
    random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = random.standard_normal(shape)
    if "norm" in name:  # Gemma's count from 1
        values = 0.2 * values + (0.0 if gemma else 1.0)
    elif name.endswith(".bias"):
        values = 0.3 * values
    elif "embed_tokens" in name:
        values = 0.12 * values
    else:
        gain = 3.0 if name.endswith((".gate.weight", "expert_gate.weight")) else 1.5 if "q_proj" in name or "k_proj" in name else 0.7
        values *= gain / shape[-1] ** 0.5
    return values.astype(np.float32)


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.generic]], dtypes: Mapping[str, str] | None = None) -> None:
    """A safetensors file. ``dtypes`` names what NumPy has no type for: such a tensor is given as uint8 or uint16."""
    names = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}
    header, position = {}, 0
    for name, values in tensors.items():
        end = position + values.nbytes
        dtype = (dtypes or {}).get(name) or names[values.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


def write_folder(folder: Path, config: Mapping[str, object], tensors: Mapping[str, NDArray[np.generic]], **dtypes: str) -> Path:
    """A folder of Hugging Face's form, with a tokenizer of the 256 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": BYTES[0], "chat_template": "{{ messages[0].content }}"}))
    write_safetensors(folder / "model.safetensors", tensors, dtypes)
    return folder


def _byte_characters() -> list[str]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


BYTES = _byte_characters()


def byte_tokenizer() -> dict[str, object]:
    """``tokenizer.json`` of byte-level BPE without merges; the byte 0 ends a text."""
    end = {"id": 0, "content": BYTES[0], "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = {character: byte for byte, character in enumerate(BYTES)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False, "fuse_unk": False},
    }
