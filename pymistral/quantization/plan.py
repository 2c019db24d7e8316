"""Which of a model's weights become what when they are quantised."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace

from .isq import LAYOUTS, IsqType
from .topology import Topology
from .types import Tensor, block_size

logger = logging.getLogger("pymistral")

# where rows are no whole number of blocks of 256: one of blocks of 32, with as many bits at least
_FALLBACKS = {
    IsqType.Q2K: IsqType.Q4_0,
    IsqType.Q3K: IsqType.Q4_0,
    IsqType.Q4K: IsqType.Q4_1,
    IsqType.Q5K: IsqType.Q5_1,
    IsqType.Q6K: IsqType.Q8_0,
}
# what the embedding and the output matrix become, which every token depends on (mistral.rs's rule)
_PROMOTED = {
    **dict.fromkeys((IsqType.Q2K, IsqType.Q3K, IsqType.Q4K, IsqType.Q4_0, IsqType.Q4_1), IsqType.Q6K),
    **dict.fromkeys((IsqType.Q5K, IsqType.Q6K, IsqType.Q5_0, IsqType.Q5_1, IsqType.Q8_0), IsqType.Q8_0),
}
_SENSITIVE = ("embed_tokens.weight", "lm_head.weight")
# A mixture's router decides by small differences, and is small.
_KEPT = re.compile(r"\.mlp\.(gate|shared_expert_gate)\.weight$")
LAYER = re.compile(r"^layers\.(\d+)\.")


def apply_isq(weights: Mapping[str, Tensor], isq: IsqType | None, topology: Topology | None = None) -> dict[str, Tensor]:
    """The weights, each marked with what it becomes when it is packed; nothing is computed yet.

    Matrices of the layers become ``isq``. The embedding and the output matrix become the next better type: Q6K for what has 2 to 4 bits,
    Q8_0 for 5 to 8. Norms, biases and routers stay as they are. What a topology says about a weight goes before all that.

    Raises
    ------
    ModelLoadError
        The topology names layers that the model does not have.
    """
    layers = {int(match[1]) for name in weights if (match := LAYER.match(name))}
    if topology is not None:
        topology.check(len(layers))
    result = {}
    kept = []
    for name, tensor in weights.items():
        type = _type_for(name, tensor, isq, topology)
        if type is not None:
            columns = tensor.shape[-1]
            type = _fitting(type, columns)
            if type is None:
                kept.append(name)
        result[name] = tensor if type is None else replace(tensor, isq=_layout_for(tensor, type))
    if kept:
        logger.warning("ISQ: %s stays as it is: its rows are no whole number of blocks", ", ".join(kept[:3]) + (" ..." if kept[3:] else ""))
    return result


def _type_for(name: str, tensor: Tensor, isq: IsqType | None, topology: Topology | None) -> IsqType | None:
    if len(tensor.shape) < 2 or not name.endswith(".weight"):
        return None
    default = None if isq is None else _PROMOTED.get(isq, isq) if name in _SENSITIVE else isq
    match = LAYER.match(name)
    if topology is not None:
        found = topology.match(full_name(name), int(match[1]) if match else None)
        if found is not None:
            return found.isq or (None if _KEPT.search(name) else default)
    if _KEPT.search(name) or (match is None and name not in _SENSITIVE):
        return None
    return default


def _fitting(type: IsqType, columns: int) -> IsqType | None:
    """The type, or a similar one with smaller blocks, that rows of so many columns are whole blocks of."""
    size = block_size(LAYOUTS[type])
    if columns % (16 if size is None else size[0]) == 0:
        return type
    return _fitting(_FALLBACKS[type], columns) if type in _FALLBACKS else None


def _layout_for(tensor: Tensor, type: IsqType) -> str | None:
    """None if the file has the weight in that type already."""
    return None if tensor.type.name.lower() == LAYOUTS[type] else LAYOUTS[type]


def full_name(name: str) -> str:
    """Hugging Face's name of a weight."""
    return name if name.startswith("lm_head") else f"model.{name}"
