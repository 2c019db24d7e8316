"""Architectures by Hugging Face ``model_type``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from ..errors import ModelLoadError
from ..nn import Array, Batch, Weights
from ..quantization.types import Tensor

Model = Callable[[Batch], Array]
Factory = Callable[[Mapping[str, Any], Weights], Model]
F = TypeVar("F", bound=Factory)

_FILES = (
    "gemma",
    "gemma2",
    "gemma3",
    "granite",
    "llama",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
_factories: dict[str, Factory] = {}


def register(*model_types: str) -> Callable[[F], F]:
    """Class decorator: this class builds the models of these types."""

    def add(factory: F) -> F:
        _factories.update(dict.fromkeys(model_types, factory))
        return factory

    return add


def supported_model_types() -> list[str]:
    for name in _FILES:
        import_module(f".{name}", __package__)
    return sorted(_factories)


def build_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    """The model that a checkpoint describes.

    Raises
    ------
    ModelLoadError
        The architecture is not there, or a tensor or a key of the configuration is missing.
    """
    model_type = config.get("model_type")
    if model_type not in supported_model_types():
        raise ModelLoadError(f"architecture {model_type!r} is not supported; these are: {', '.join(supported_model_types())}")
    try:
        return _factories[str(model_type)](config, Weights(tensors))
    except KeyError as error:
        raise ModelLoadError(f"the configuration of this {model_type} model lacks {error.args[0]!r}") from error
