"""The tokenizer of a GGUF file: what its metadata says under ``tokenizer.ggml``, checked."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from .pre_tokenizers import KINDS
from .string_chains import JoinedStrings
from .string_index import index_of
from .tokenizer import ByteLevelBPE, SentencePieceBPE, TextEncoder, Tokenizer, TokenType

logger = logging.getLogger(__name__)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes under `tokenizer.ggml`.

    Raises
    ------
    ModelLoadError
        If a field is missing, of a wrong type or length, or names a kind of vocabulary that is not supported.
    """
    model = _field(metadata, "model", str)
    if model not in ("gpt2", "llama"):
        raise ModelLoadError(f"tokenizer.ggml.model is {model!r}: supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)")
    tokens = _strings(metadata, "tokens")
    if not tokens:
        raise ModelLoadError("tokenizer.ggml.tokens is empty")
    types: NDArray[Any] = np.full(len(tokens), TokenType.NORMAL)
    if "tokenizer.ggml.token_type" in metadata:
        types = _numbers(metadata, "token_type", len(tokens))
    llama = model == "llama"
    space_prefix = _field(metadata, "add_space_prefix", bool, default=llama) and llama
    ids = index_of(tokens)
    encoder: TextEncoder
    if llama:
        unknown = _token_id(metadata, "unknown", len(tokens), default=0)
        encoder = SentencePieceBPE(tokens, ids, _numbers(metadata, "scores", len(tokens)), unknown=unknown, space_prefix=space_prefix)
        add_bos = True
    else:
        pre = _field(metadata, "pre", str, default="default")
        if pre not in KINDS:
            raise ModelLoadError(f"tokenizer.ggml.pre is {pre!r}, which is not supported; known kinds: {', '.join(sorted(KINDS))}")
        if "tokenizer.ggml.pre" not in metadata:
            logger.warning("the file does not say how to split words (tokenizer.ggml.pre): using 'default', answers may be worse")
        encoder = ByteLevelBPE(tokens, ids, _strings(metadata, "merges"), pre)
        add_bos = KINDS[pre].add_bos
    return Tokenizer(
        tokens,
        ids,
        types,
        encoder,
        bos_token_id=_token_id(metadata, "bos", len(tokens), default=1 if llama else None),
        eos_token_id=_token_id(metadata, "eos", len(tokens), default=2 if llama else None),
        add_bos=_field(metadata, "add_bos_token", bool, default=add_bos),
        add_eos=_field(metadata, "add_eos_token", bool, default=False),
        space_prefix=space_prefix,
        strip_after_special=bool(re.search("phi-?3", str(metadata.get("general.name", "")).lower())),
    )


def _field(metadata: Mapping[str, Any], name: str, kind: type, *, default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if value is None:
        raise ModelLoadError(f"tokenizer.ggml.{name} is missing: the file has no usable tokenizer")
    if not isinstance(value, kind):
        raise ModelLoadError(f"tokenizer.ggml.{name} must be {kind.__name__}, not {type(value).__name__}")
    return value


def _strings(metadata: Mapping[str, Any], name: str) -> Sequence[str]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if isinstance(value, JoinedStrings):
        return value
    if value is None or isinstance(value, str):
        raise ModelLoadError(f"tokenizer.ggml.{name} is missing or no array: the file has no usable tokenizer")
    try:
        strings = list(value)
        "".join(strings)  # every item is a string, checked at the speed of C
    except TypeError as error:
        raise ModelLoadError(f"tokenizer.ggml.{name} must be an array of strings") from error
    return strings


def _numbers(metadata: Mapping[str, Any], name: str, count: int) -> NDArray[Any]:
    try:
        values = np.asarray(metadata[f"tokenizer.ggml.{name}"])
    except (KeyError, ValueError) as error:
        raise ModelLoadError(f"tokenizer.ggml.{name} is missing or no array of numbers: the file has no usable tokenizer") from error
    if values.ndim != 1 or values.dtype.kind not in "iuf" or len(values) < count:
        raise ModelLoadError(
            f"tokenizer.ggml.{name} must hold a number for each of the {count} tokens, but is {values.dtype}{list(values.shape)}"
        )
    return values[:count]


def _token_id(metadata: Mapping[str, Any], name: str, count: int, *, default: int | None) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ModelLoadError(f"tokenizer.ggml.{name}_token_id must be an integer, not {type(value).__name__}")
    if not 0 <= value < count:
        logger.warning("tokenizer.ggml.%s_token_id is %d, outside the vocabulary of %d tokens: ignored", name, value, count)
        return None
    return int(value)
