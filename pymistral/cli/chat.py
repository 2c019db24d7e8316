"""The interactive chat."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PymistralError
from .run import Reply, end_line, show_on_terminal, stream_reply
from .terminal import dim, harmless, no_echo

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

    from ..blocking import BlockingModel
    from ..requests import SamplingParams

BLOCK = '"""'
HELP = f"""\
/help            this text
/clear           forget the conversation (the system prompt stays)
/system TEXT     set the system prompt; /system alone shows it, /system none removes it
/exit            leave, as Ctrl-D does

Enter sends. A new line: Alt+Enter, or a backslash at the end of the line, or {BLOCK} before and after the text.
Ctrl-C stops the answer. Up and Down walk through what was typed before, Ctrl-R searches it.
A message that begins with / needs a space before it."""


class Chat:
    """A conversation on the terminal.

    Parameters
    ----------
    model
        The model that answers.
    name
        What to call it.
    sampling
        How its tokens are drawn.
    system
        The system prompt.
    session
        Where lines come from; by default the terminal.
    """

    def __init__(
        self,
        model: BlockingModel,
        name: str,
        sampling: SamplingParams,
        system: str | None = None,
        session: PromptSession[str] | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.sampling = sampling
        self.system = system or ""
        self.messages: list[dict[str, str]] = []
        self.session = session or make_session(open_history())

    def run(self) -> int:
        """Talk until the person leaves."""
        self._note(f"{self.name}: /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                text = message_of(self.session.prompt())
            except KeyboardInterrupt:
                self._note("Ctrl-D or /exit leaves")
                continue
            except EOFError:
                return 0
            if text.startswith("/"):
                if not self._command(text):
                    return 0
            elif text.strip():
                self._answer(text.strip("\n"))

    def _command(self, text: str) -> bool:
        """Do what the line says; False to leave."""
        command, _, argument = text.partition(" ")
        argument = argument.strip()
        if command in ("/exit", "/quit", "/bye"):
            return False
        if command in ("/help", "/?"):
            print(HELP)
        elif command == "/clear":
            self.messages.clear()
            self._note("the conversation is forgotten")
        elif command != "/system":
            self._note(f"{harmless(command)} is not a command; /help lists them, and a message may begin with a space")
        elif not argument:
            print(harmless(self.system) if self.system else dim("there is no system prompt", sys.stdout))
        else:
            self.system = "" if argument.lower() == "none" else argument
            self._note("the system prompt is set" if self.system else "the system prompt is removed")
        return True

    def _answer(self, text: str) -> None:
        """Stream one answer. What was said before Ctrl-C stays in the conversation, a failed exchange does not."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        reply, note = Reply(), ""
        try:
            with no_echo():
                stream_reply(self.model, [*system, *self.messages, question], self.sampling, *show_on_terminal(reply), reply)
            note = reply.summary()
        except KeyboardInterrupt:
            note = "stopped"
        except PymistralError as error:
            end_line(reply)
            print(f"error: {harmless(' '.join(error.problem.split()))}", file=sys.stderr)
            if self.messages:
                self._note("/clear starts afresh")
            return
        end_line(reply)
        self._note(note + "\n")
        if reply.text:
            self.messages += [question, {"role": "assistant", "content": reply.text}]

    def _note(self, text: str) -> None:
        print(dim(text, sys.stdout), flush=True)


# ---- what is typed --------------------------------------------------------------------------------


def message_of(line: str) -> str:
    """What the person means by the text that was typed: without the marks of a block."""
    text = line.strip()
    if text.startswith(BLOCK):
        return " " + text.removeprefix(BLOCK).removesuffix(BLOCK).strip("\n")  # never a command
    return line.rstrip() if line.startswith(" ") else text


def is_open(text: str) -> bool:
    """Whether Enter begins a new line rather than sends: the line ends with a backslash, or a block is not closed."""
    block = text.lstrip()
    if block.startswith(BLOCK):
        return BLOCK not in block[len(BLOCK) :]
    return text.endswith("\\")


def make_session(history: History, **options: Any) -> PromptSession[str]:
    """The line editor."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.formatted_text import FormattedText

    return PromptSession(
        FormattedText([("bold ansigreen", "> ")]),
        multiline=True,
        prompt_continuation=lambda width, number, wrapped: "  ",
        key_bindings=_key_bindings(),
        history=history,
        completer=WordCompleter(["/help", "/clear", "/system", "/exit"], sentence=True),
        complete_while_typing=False,
        enable_history_search=False,
        placeholder=FormattedText([("ansibrightblack", "a message, or /help")]),
        **options,
    )


def _key_bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not is_open(buffer.text):
            buffer.validate_and_handle()
            return
        if not buffer.text.lstrip().startswith(BLOCK):  # the backslash only asked for the new line
            buffer.cursor_position = len(buffer.text)
            buffer.delete_before_cursor()
        buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def open_history() -> History:
    """What was typed in earlier chats, in a file that only its owner can read; without a place for it, this chat's alone."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    shared = os.environ.get("XDG_STATE_HOME", "")
    try:
        path = (Path(shared) if os.path.isabs(shared) else Path.home() / ".local" / "state") / "pymistral" / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return FileHistory(str(path))
