"""Expected logits of a tiny checkpoint of every architecture: tests/models/goldens/NAME.npz.

Run with torch==2.13.0, transformers==5.23.0, safetensors==0.8.0, numpy==2.4.6 (CPU, float32, eager attention):

    python tests/scripts/make_model_goldens.py [NAME ...]

Each file holds ``config`` (config.json as transformers writes it), ``shapes`` (of the tensors that it writes), ``tokens``, and ``logits``
(float32 [tokens, every fourth of the vocabulary]). Values of the tensors come from tests/models/tiny.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny import tiny_values, write_safetensors

GOLDENS = Path(__file__).parents[1] / "models" / "goldens"
BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LONG, SHORT = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
LONGROPE = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
TOKENS = 64
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_theta": 500.0, **LLAMA3}, "attention_bias": True, "mlp_bias": True},
    "llama-linear": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 3.0}, "tie_word_embeddings": True},
    "llama-dynamic": {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0},
        "num_key_value_heads": 4,
        "max_position_embeddings": TOKENS // 2,
    },
    "mistral": {"sliding_window": 24, "head_dim": 32},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [1],
    },
    "qwen3": {"head_dim": 32, "rope_parameters": YARN},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "gemma": {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 32,
        "num_hidden_layers": 4,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "tie_word_embeddings": True,
    },
    "phi3": {"hidden_size": 128, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "phi3-short": {"hidden_size": 128, "rope_parameters": LONGROPE, "original_max_position_embeddings": 256, "sliding_window": 30},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.15,
        "logits_scaling": 4.0,
        "tie_word_embeddings": True,
    },
}


def main(names: list[str]) -> None:
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name in names or MODELS:
        make(name, MODELS[name])


def make(name: str, options: dict[str, Any]) -> None:
    model_type = name.partition("-")[0]
    config = AutoConfig.for_model(model_type, **{**BASE, **options})
    config.architectures = None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "np") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
        write_safetensors(folder / "model.safetensors", tiny_values(shapes, model_type.startswith("gemma")))
        text = (folder / "config.json").read_text()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.random.default_rng(1).integers(1, 256, TOKENS)
    with torch.no_grad():
        logits = model(torch.tensor(tokens)[None]).logits[0].numpy()
    kept = {key: value for key, value in json.loads(text).items() if key not in ("transformers_version", "dtype")}
    if name == "llama-dynamic":  # stretched by the text at hand there, by the longest text here: let this be it
        kept["rope_parameters"]["original_max_position_embeddings"] = kept["max_position_embeddings"]
        kept["max_position_embeddings"] = TOKENS
    np.savez_compressed(
        GOLDENS / f"{name}.npz", config=json.dumps(kept), shapes=json.dumps(shapes), tokens=tokens.astype(np.int32), logits=logits[:, ::4]
    )
    print(f"{name}: {len(shapes)} tensors, logits of {logits.std():.2f}, at most {abs(logits).max():.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
