"""The command line with a model small enough to know by heart in place of a real one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model import make_model

from pymistral.blocking import BlockingModel
from pymistral.cli import main
from pymistral.errors import ModelLoadError

Cli = Callable[..., "Outcome"]


class Outcome:
    """What a command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let builders make the fake model; the builders that were used."""
    used: list[Any] = []

    def from_builder(builder: Any) -> BlockingModel:
        used.append(builder)
        if "broken" in str(builder.model_id):
            raise ModelLoadError("broken.gguf: the magic is b'XXXX',\n  not b'GGUF'")
        return BlockingModel(make_model(endless="endless" in str(builder.model_id), generation_config={"temperature": 0.2}))

    monkeypatch.setattr(BlockingModel, "from_builder", from_builder)
    return used


@pytest.fixture
def cli(builders: list[Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run a command in this process, with ``piped`` as its standard input."""

    def run(*arguments: str, piped: bytes = b"") -> Outcome:
        path = tmp_path / "stdin"
        path.write_bytes(piped)
        with path.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code = main(arguments)
        return Outcome(code, *capfd.readouterr())

    return run
