"""Models of Llama 3's shapes with random weights: as fast as the real ones, and nothing to download."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymistral.models.registry import build_model
from pymistral.nn import record
from pymistral.nn.graph import Graph
from pymistral.quantization.types import BLOCK_SIZES, GgmlType, Tensor, tensor_nbytes

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def random_tensor(name: str, type: GgmlType, shape: tuple[int, ...], made: dict[Any, NDArray[np.uint8]]) -> Tensor:
    """Random blocks with scales that keep the numbers finite. Tensors of one type and shape share their bytes here, not on the GPU."""
    data = made.get((type, shape))
    if data is None:
        random = np.random.default_rng(0)
        if type == GgmlType.BF16:
            values = random.standard_normal(shape[0] * shape[1], np.float32) * np.float32(0.02)
            data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            size = BLOCK_SIZES[type][1]
            blocks = random.integers(0, 256, (tensor_nbytes(type, shape) // size, size), np.uint8)
            scales = {GgmlType.Q8_0: (0.0002,), GgmlType.Q4_K: (0.00005, 0.0004)}[type]  # at the start of a block
            blocks[:, : 2 * len(scales)] = np.array(scales, np.float16).view(np.uint8)
            data = blocks.reshape(-1)
        made[type, shape] = data
    return Tensor(name, type, shape, data)


def random_llama(config: dict[str, Any], type: GgmlType) -> Graph:
    """A Llama of these shapes, recorded."""
    made: dict[Any, NDArray[np.uint8]] = {}
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_values = config["num_key_value_heads"] * config["head_dim"]
    queries = config["num_attention_heads"] * config["head_dim"]
    shapes = {"embed_tokens": (vocab, hidden), "norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        shapes |= {prefix + name: (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {
            prefix + f"self_attn.{name}_proj": (rows, hidden) for name, rows in (("q", queries), ("k", key_values), ("v", key_values))
        }
        shapes |= {prefix + "self_attn.o_proj": (hidden, queries), prefix + "mlp.down_proj": (hidden, ffn)}
        shapes |= {prefix + f"mlp.{name}_proj": (ffn, hidden) for name in ("gate", "up")}
    ones = np.ones(hidden, np.float32).view(np.uint8)
    weights = {
        f"{name}.weight": random_tensor(name, type, shape, made) if len(shape) == 2 else Tensor(name, GgmlType.F32, shape, ones)
        for name, shape in shapes.items()
    }
    return record(build_model(config, weights))


def multiplied(graph: Graph, rows: set[str]) -> Graph:
    """The products with arrays of these rows: not the embeddings, of which a token reads one row."""
    return Graph([node for node in graph.nodes if node.op != "embedding" and node.output.rows in rows])
