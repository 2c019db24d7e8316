"""The tokenizer of a folder of Hugging Face's form: ``tokenizer.json``, run by the `tokenizers` package, and ``tokenizer_config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ModelLoadError
from .safetensors import read_json
from .tokenizer import BYTE_OF_CHARACTER, SPACE, Tokenizer, TokenType

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENS = 1 << 24
BEFORE = "\x02"
"""A character that merges with no other: what comes behind it gets no space."""


class JsonTokenizer(Tokenizer):
    """Encodes as the `tokenizers` package does; decodes, streams and tells bytes as every `Tokenizer` does."""

    def __init__(
        self, backend: tokenizers.Tokenizer, tokens: Sequence[str], ids: Mapping[str, int], types: Sequence[int], **options: Any
    ) -> None:
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        pieces = Pieces(backend, byte_level=_holds(decoder, "ByteLevel"))
        prefixed = _holds(decoder, "Strip") or (_holds(decoder, "Metaspace") and not _holds(decoder, "never", "prepend_scheme"))
        self._backend = backend
        super().__init__(tokens, ids, np.asarray(types), pieces, space_prefix=prefixed, **options)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens:
            ids = [*self._prefix, *ids] if ids[: len(self._prefix)] != self._prefix else ids
            ids = [*ids, *self._suffix] if self._suffix and ids[-1:] != self._suffix else ids
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """As of every `Tokenizer`; the package finds the tokens that are text by itself."""
        special = any(token in self.special_token_ids for _, _, token in self._find_special(text))
        encode = (self._unspecial if special else self._backend).encode
        ids: list[int] = encode(text, add_special_tokens=False).ids
        if not (self._space_prefix and ids):
            return ids
        before: list[int] = encode(BEFORE, add_special_tokens=False).ids
        behind: list[int] = encode(BEFORE + text, add_special_tokens=False).ids
        return behind[len(before) :] if behind[: len(before)] == before else ids

    @cached_property
    def _unspecial(self) -> tokenizers.Tokenizer:
        """A copy that takes special tokens for text: the original is in use by other threads, and few texts need this."""
        copy = type(self._backend).from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        return copy


class Pieces:
    """The bytes of ordinary tokens, by the kind of decoder that the file names."""

    def __init__(self, backend: tokenizers.Tokenizer, byte_level: bool) -> None:
        self._backend = backend
        self._byte_level = byte_level

    def to_bytes(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes([BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:  # a token that was added as plain text
                return token.encode("utf-8", "replace")
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.replace(SPACE, " ").encode("utf-8", "replace")

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def tokenizer_from_json(path: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, with what files beside it say of special tokens.

    Raises
    ------
    ModelLoadError
        The file is missing, damaged, or of a form that the `tokenizers` package does not know.
    """
    import tokenizers

    folder = path.parent
    if not path.is_file():
        older = next((name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()), None)
        hint = f"It has {older}: convert that with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        raise ModelLoadError(f"{folder} holds no tokenizer.json. {hint if older else 'Fetch the folder again.'}")
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        backend.no_truncation()
        backend.no_padding()
    except BaseException as error:  # the package panics on some damaged files, which is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ModelLoadError(f"{path}: not a tokenizer that the tokenizers package {tokenizers.__version__} knows: {error}") from error
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    if not vocabulary or max(vocabulary.values()) >= MAX_TOKENS:
        raise ModelLoadError(f"{path}: the vocabulary is empty, or has ids of {MAX_TOKENS} and above")
    tokens = [""] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        tokens[id] = token
    types = [TokenType.NORMAL] * len(tokens)
    for id, added in backend.get_added_tokens_decoder().items():
        types[id] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    bos, eos = (_special(folder, config, name, vocabulary) for name in ("bos_token", "eos_token"))
    return JsonTokenizer(
        backend,
        tokens,
        vocabulary,
        types,
        bos_token_id=bos,
        eos_token_id=eos,
        add_bos=config.get("add_bos_token") is True,
        add_eos=config.get("add_eos_token") is True,
    )


def _special(folder: Path, config: Mapping[str, Any], name: str, vocabulary: Mapping[str, int]) -> int | None:
    """The id of a token that ``tokenizer_config.json`` or ``special_tokens_map.json`` names, as a string or an object."""
    value = config.get(name)
    if value is None and (folder / "special_tokens_map.json").is_file():
        value = read_json(folder / "special_tokens_map.json").get(name)
    text = value.get("content") if isinstance(value, dict) else value
    return vocabulary.get(text) if isinstance(text, str) else None


def _holds(decoder: object, kind: str, key: str = "type") -> bool:
    """Whether a decoder, or one of a sequence of them, is of this kind."""
    if not isinstance(decoder, dict):
        return False
    return decoder.get(key) == kind or any(_holds(part, kind, key) for part in decoder.get("decoders") or ())
