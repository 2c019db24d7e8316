"""Write tests/data/rope_goldens.json: inverse frequencies and attention factors that transformers computes for configurations of all kinds.

    python make_rope_goldens.py

Needs torch and transformers; the tests need neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

OUTPUT = Path(__file__).parent.parent / "data" / "rope_goldens.json"

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}

# name -> (head_dim, rope_theta, partial_rotary_factor, max_position_embeddings, scaling)
CASES: dict[str, tuple[int, float, float, int, dict[str, Any]]] = {
    "plain": (64, 10000.0, 1.0, 2048, {}),
    "plain, large base": (128, 1e6, 1.0, 32768, {}),
    "plain, partial": (80, 10000.0, 0.4, 2048, {}),
    "plain, partial, odd": (100, 10000.0, 0.25, 2048, {}),
    "linear": (64, 10000.0, 1.0, 8192, {"rope_type": "linear", "factor": 4.0}),
    "linear, partial": (64, 500000.0, 0.5, 8192, {"rope_type": "linear", "factor": 2.5}),
    "llama 3.1": (128, 500000.0, 1.0, 131072, LLAMA3),
    "llama 3.2": (64, 500000.0, 1.0, 131072, {**LLAMA3, "factor": 32.0}),
    "llama 3, other factors": (64, 10000.0, 1.0, 65536, {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 3.0}),
    "yarn": (128, 10000.0, 1.0, 16384, YARN),
    "yarn, betas": (64, 1e6, 1.0, 16384, {**YARN, "beta_fast": 64.0, "beta_slow": 2.0}),
    "yarn, attention factor": (64, 10000.0, 1.0, 16384, {**YARN, "attention_factor": 0.7}),
    "yarn, mscale": (64, 10000.0, 1.0, 163840, {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.3}),
    "yarn, not truncated": (64, 150000.0, 1.0, 131072, {**YARN, "factor": 32.0, "truncate": False}),
    "yarn, partial": (128, 10000.0, 0.5, 16384, YARN),
    "yarn, a short original context": (64, 10000.0, 1.0, 256, {**YARN, "original_max_position_embeddings": 64}),
    "dynamic": (64, 10000.0, 1.0, 4096, {"rope_type": "dynamic", "factor": 4.0}),
    "longrope": (
        32,
        10000.0,
        1.0,
        131072,
        {**LONG, "short_factor": [1.0 + i / 10 for i in range(16)], "long_factor": [1.5 + i for i in range(16)]},
    ),
}


def computed(head_dim: int, theta: float, partial: float, length: int, scaling: dict[str, Any]) -> dict[str, Any]:
    parameters = {"rope_theta": theta, "rope_type": "default", **scaling}
    if partial != 1.0:
        parameters["partial_rotary_factor"] = partial
    config = LlamaConfig(
        head_dim=head_dim, hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=length, rope_parameters=parameters
    )
    kind = parameters["rope_type"]
    if kind == "default" and partial != 1.0:
        dims = int(head_dim * partial)  # as every model with a partial rotation has it
        inverse, factor = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims), 1.0
    elif kind == "default":
        inverse, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    settings = {"head_dim": head_dim, "rope_theta": theta, "partial_rotary_factor": partial, "max_position_embeddings": length}
    return {**settings, "rope_scaling": scaling or None, "inverse_frequencies": inverse.tolist(), "factor": float(factor)}


if __name__ == "__main__":
    OUTPUT.write_text(json.dumps({name: computed(*case) for name, case in CASES.items()}, indent=1) + "\n")
