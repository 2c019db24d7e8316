"""Pickled weights, which are never loaded: unpickling runs code."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelLoadError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_pickle(name: str) -> bool:
    """Whether a file is of a kind that runs code when it is loaded, by its name."""
    return name.lower().endswith(SUFFIXES)


def refuse_pickle(path: Path) -> None:
    """Raises ModelLoadError if the file is one."""
    if is_pickle(path.name):
        raise ModelLoadError(
            f"{path}: pickled weights are refused, because loading a pickle runs whatever code it holds. "
            "Use the model's safetensors, or convert it where you trust it: save_pretrained writes safetensors."
        )
