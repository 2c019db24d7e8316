"""The chat: as a conversation with a scripted keyboard, and on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import make_model
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from pymistral.blocking import BlockingModel
from pymistral.cli.chat import Chat, is_open, make_session, message_of, open_history
from pymistral.requests import SamplingParams

ENTER, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Person:
    """Types; ``chat`` is what comes of it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        session = make_session(InMemoryHistory(), input=pipe, output=DummyOutput())
        self.chat = Chat(BlockingModel(make_model()), "alphabet", SamplingParams(temperature=0.0), "be brief", session)

    def types(self, *keys: str) -> int:
        self.pipe.send_text("".join(keys) + CTRL_D)
        return self.chat.run()

    def said(self) -> list[str]:
        return [message["content"] for message in self.chat.messages if message["role"] == "user"]


@pytest.fixture
def person() -> Iterator[Person]:
    with create_pipe_input() as pipe:
        yield Person(pipe)


def test_a_conversation(person: Person, capsys: pytest.CaptureFixture[str]) -> None:
    assert person.types("Hello", ENTER, "And then?", ENTER) == 0
    assert [message["content"] for message in person.chat.messages] == ["Hello", ALPHABET, "And then?", ALPHABET]
    out = capsys.readouterr().out
    assert out.count(ALPHABET + "\n27 tokens, ") == 2 or out.count(ALPHABET + "\n26 tokens, ") == 2
    assert "tok/s, first token after" in out


def test_multi_line_input(person: Person) -> None:
    person.types("a", ALT_ENTER, "b", ENTER, "c\\", ENTER, "d", ENTER, '"""e', ENTER, ENTER, '/f"""', ENTER, " /g", ENTER)
    assert person.said() == ["a\nb", "c\nd", " e\n\n/f", " /g"]


def test_a_paste_with_newlines_is_one_message(person: Person) -> None:
    person.types("\x1b[200~one\ntwo\x1b[201~", ENTER)
    assert person.said() == ["one\ntwo"]


def test_commands(person: Person, capsys: pytest.CaptureFixture[str]) -> None:
    person.types("Hello", ENTER, "/clear", ENTER, "/system", ENTER, "/system talk like a pirate", ENTER, "/help", ENTER, "/sing", ENTER)
    out = capsys.readouterr().out
    assert person.chat.messages == []
    assert person.chat.system == "talk like a pirate"
    assert "\nbe brief\n" in out
    assert "Alt+Enter" in out
    assert "/sing is not a command" in out
    person.types("/system none", ENTER)
    assert person.chat.system == ""


def test_exit_and_empty_lines(person: Person) -> None:
    assert person.types(ENTER, "   ", ENTER, CTRL_C, "/exit", ENTER, "never read", ENTER) == 0
    assert person.said() == []


def test_ctrl_c_at_the_prompt_clears_the_line(person: Person, capsys: pytest.CaptureFixture[str]) -> None:
    person.types("wrong", CTRL_C, "right", ENTER)
    assert person.said() == ["right"]
    assert "Ctrl-D or /exit leaves" in capsys.readouterr().out


def test_a_failed_exchange_is_not_remembered(person: Person, capsys: pytest.CaptureFixture[str]) -> None:
    person.types("Hello", ENTER, "x" * 2000, ENTER, "Again", ENTER)
    assert person.said() == ["Hello", "Again"]
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "/clear starts afresh" in captured.out


def test_ctrl_c_keeps_what_was_said(person: Person, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(model: Any, messages: Any, sampling: Any, write: Any, think: Any, reply: Any) -> None:
        write("ab")
        reply.text = "ab"
        raise KeyboardInterrupt

    monkeypatch.setattr("pymistral.cli.chat.stream_reply", interrupted)
    person.types("Hello", ENTER)
    assert [message["content"] for message in person.chat.messages] == ["Hello", "ab"]
    assert "ab\nstopped\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "open_", "message"),
    [
        ("hello ", False, "hello"),
        ("hello\\", True, "hello\\"),
        ('"""', True, " "),
        ('"""a\nb"""', False, " a\nb"),
        ('"""\na\n"""', False, " a"),
        (" /not a command", False, " /not a command"),
    ],
)
def test_what_is_meant(text: str, open_: bool, message: str) -> None:
    assert is_open(text) is open_
    assert message_of(text) == message


def test_history_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    open_history().store_string("hello")
    path = tmp_path / "pymistral" / "chat_history"
    assert "hello" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_STATE_HOME", str(path))  # a file: no folder can be made in it
    assert isinstance(open_history(), InMemoryHistory)


# ---- on a terminal --------------------------------------------------------------------------------

CHAT = (
    "import sys\nfrom fake_model import make_model\nfrom pymistral.blocking import BlockingModel\nfrom pymistral.cli import main\n"
    "BlockingModel.from_builder = lambda builder: BlockingModel(make_model(endless='endless' in sys.argv, delay=0.002))\n"
    "sys.exit(main(['run', '-m', 'alphabet']))"
)


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, tmp_path: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHAT, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            preexec_fn=self._own_terminal,
        )
        os.close(slave)
        self.seen = ""

    @staticmethod
    def _own_terminal() -> None:
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def until(self, pattern: str) -> str:
        """Read until the pattern is seen; what was read up to its end."""
        end = time.monotonic() + 30
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                data = os.read(self.master, 4096)
                if b"\x1b[6n" in data:  # where is the cursor?
                    os.write(self.master, b"\x1b[1;1R")
                self.seen += re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])", "", data.decode(errors="replace"))
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def types(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.master)


def test_a_chat_on_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    try:
        terminal.until("alphabet: /help lists the commands")
        terminal.until("> ")
        terminal.types("Hello\r")
        terminal.until(ALPHABET)
        terminal.until(r"tok/s, first token after")
        terminal.until("> ")
        terminal.types(CTRL_D)
        assert terminal.process.wait(timeout=10) == 0
    finally:
        terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "endless")
    try:
        terminal.until("> ")
        terminal.types("Hello\r")
        terminal.until("xyzabc")
        terminal.types(CTRL_C)
        terminal.until("stopped")
        terminal.until("> ")
        terminal.types("/exit\r")
        assert terminal.process.wait(timeout=10) == 0
    finally:
        terminal.close()
