"""The families' answers, and a vocabulary in which their markup are special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from pymistral.engine.constraint import GrammarCompiler
from pymistral.tool_calls import Dialect, Piece, dialect_for
from pymistral.tool_calls.reading import CallArguments, CallStart, Content, Reasoning

DATA = Path(__file__).parents[1] / "data"
RECORDED = json.loads((DATA / "tool_call_goldens.json").read_text())
GOLDENS: list[dict[str, Any]] = RECORDED["goldens"]
TOOLS: list[dict[str, Any]] = RECORDED["tools"]
SCHEMAS: dict[str, Any] = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
FAMILIES = sorted({golden["template"] for golden in GOLDENS})


@lru_cache
def template(name: str) -> str:
    folder = "tool_templates" if (DATA / "tool_templates" / f"{name}.jinja").exists() else "chat_templates"
    return (DATA / folder / f"{name}.jinja").read_text()


class ByteVocabulary:
    """Bytes, some special tokens, and the end of the text."""

    bos_token_id = None

    def __init__(self, specials: Sequence[str]) -> None:
        self.specials = list(dict.fromkeys(specials))
        self.vocab_size = 257 + len(self.specials)
        self.special_token_ids = frozenset(range(256, self.vocab_size))

    def id_to_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b"<eos>" if token == 256 else self.specials[token - 257].encode()

    def token_to_id(self, name: str) -> int | None:
        return 257 + self.specials.index(name) if name in self.specials else None

    def encode_continuation(self, text: str) -> list[int]:
        return list(text.encode())

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        while text:
            special = next((name for name in self.specials if text.startswith(name)), None)
            tokens += [self.token_to_id(special)] if special else list(text[0].encode())  # type: ignore[list-item]
            text = text[len(special or "x") :]
        return tokens

    def compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self, self.vocab_size, [256])


def dialect(name: str, special: bool = True) -> tuple[Dialect, ByteVocabulary]:
    """A family's dialect, its markup being special tokens or plain text."""
    names = dialect_for(template(name), lambda text: None).keep(True)
    vocabulary = ByteVocabulary(names if special else ())
    return dialect_for(template(name), vocabulary.token_to_id), vocabulary


def joined(pieces: Sequence[Piece]) -> dict[str, Any]:
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            calls[-1][1] += piece.text
    return {
        "content": "".join(piece.text for piece in pieces if isinstance(piece, Content)),
        "reasoning": "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)),
        "calls": calls,
    }


def read(name: str, parts: Sequence[str], *, tools: Mapping[str, Any] = SCHEMAS, reasons: bool = False) -> dict[str, Any]:
    reader = dialect(name)[0].reader(tools, reasons=reasons)
    pieces = [piece for part in parts for piece in reader.push(part)]
    return joined([*pieces, *reader.finish()])


def golden_id(golden: dict[str, Any]) -> str:
    return "-".join([golden["template"], *golden["models"], golden["case"]]).replace(" ", "-")


@pytest.fixture(params=GOLDENS, ids=golden_id)
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param  # type: ignore[no-any-return]
