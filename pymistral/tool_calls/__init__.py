"""Tool calls and reasoning in each model family's own syntax: the text of an answer in, its parts out; and the grammars of calls."""

from __future__ import annotations

from collections.abc import Callable

from .deepseek import BEGIN as DEEPSEEK_CALL
from .deepseek import DeepSeek
from .dialect import CallTrigger, Dialect, quoted
from .gemma import MARKUPS as GEMMA_MARKUPS
from .gemma import Gemma
from .harmony import Harmony
from .hermes import Hermes
from .llama import Llama
from .mistral import Mistral, MistralNamed
from .phi4 import Phi4
from .plain_json import PlainJson
from .pythonic import ASKED_FOR as PYTHONIC_CALL
from .pythonic import Pythonic
from .qwen_coder import FUNCTION as QWEN_CODER_FUNCTION
from .qwen_coder import QwenCoder
from .reading import CallArguments, CallStart, Content, MessageReader, Piece, Reasoning, plain_reader

__all__ = [
    "CallArguments",
    "CallStart",
    "CallTrigger",
    "Content",
    "Dialect",
    "MessageReader",
    "Piece",
    "Reasoning",
    "dialect_for",
    "family_of",
    "plain_reader",
]


def dialect_for(source: str, special_token: Callable[[str], int | None]) -> Dialect:
    """The dialect of a model, by the markup in its chat template.

    Parameters
    ----------
    source
        The chat template.
    special_token
        The id of a special token by its name; None if the vocabulary has no such special token.
    """

    def mark(text: str) -> str:
        token = special_token(text)
        return quoted(text) if token is None else f"<[{token}]>"

    return family_of(source, special_token)(source, mark)


def family_of(source: str, special_token: Callable[[str], int | None]) -> type[Dialect]:
    """The family that a chat template belongs to."""
    if "<|channel|>" in source and "<|message|>" in source:
        return Harmony
    if any(markup.begin in source for markup in GEMMA_MARKUPS):
        return Gemma
    if DEEPSEEK_CALL in source:
        return DeepSeek
    if "[TOOL_CALLS]" in source:
        return MistralNamed if "[ARGS]" in source else Mistral
    if "<|tool_call|>" in source or "functools" in source or "<|/tool|>" in source:
        return Phi4
    if "<tool_call>" in source:
        return QwenCoder if QWEN_CODER_FUNCTION in source else Hermes
    if "<|header_start|>" in source or PYTHONIC_CALL.search(source):
        return Pythonic
    if "<|python_tag|>" in source or ("ipython" in source and '"parameters": ' in source):
        return Llama
    return PlainJson
