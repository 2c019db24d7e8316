"""``pymistral run``: one answer, or a chat."""

from __future__ import annotations

import argparse
import json
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import counted
from ..garbage import rare_collections
from .options import UsageError, add_model_options, add_sampling_options, sampling_for, sampling_overrides, utf8
from .terminal import dim, harmless, status_line

if TYPE_CHECKING:
    from os import stat_result

    from ..blocking import BlockingModel
    from ..requests import SamplingParams
    from ..responses import Usage

DESCRIPTION = """\
With PROMPT, the answer is written to standard output. Without one, a chat begins.

Text that is piped in is the prompt. With PROMPT as well, the prompt is PROMPT, an empty line, and the piped text:

    pymistral run "What is the capital of France?"
    pymistral run "Summarise this:" < notes.txt
    git diff | pymistral run "Write a commit message for this change." --temperature 0
    pymistral run "Name a colour." --json | jq -r .content
"""

# Small models answer far better with a plain instruction than with the one that some templates bring along.
DEFAULT_SYSTEM = "You are a helpful assistant. Give short, correct answers."


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "run", help="ask a model, or chat with it", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", type=utf8, nargs="?", metavar="PROMPT", help="what to ask; without it, a chat begins")
    add_model_options(parser)
    parser.add_argument("-s", "--system", type=utf8, metavar="TEXT", help=f"the system prompt (default: {DEFAULT_SYSTEM!r}; '' for none)")
    add_sampling_options(parser)
    group = parser.add_argument_group("output for programs")
    group.add_argument("--json", action="store_true", help="print one JSON object: model, content, reasoning_content, finish_reason, usage")
    group.add_argument("--stream", action="store_true", help="with --json: one JSON object per line as the answer grows, usage in the last")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Answer the prompt, or chat."""
    if args.stream and not args.json:
        raise UsageError("--stream goes with --json; plain text is streamed anyway")
    prompt = read_prompt(args.prompt)
    if prompt is None and (args.json or not sys.stdout.isatty()):
        raise UsageError("there is no prompt: give PROMPT, or pipe it in")
    overrides = sampling_overrides(args)
    with load(args.model, args.threads, args.pa_cache_type) as model:
        sampling = sampling_for(model.generation_defaults, overrides)
        system = default_system(model) if args.system is None else args.system
        if prompt is None:
            from .chat import Chat

            return Chat(model, args.model, sampling, system).run()
        instruction = [{"role": "system", "content": system}] if system else []
        messages = [*instruction, {"role": "user", "content": prompt}]
        if args.json:
            return _answer_json(model, args.model, messages, sampling, args.stream)
        return _answer_text(model, messages, sampling)


def load(model_id: str, threads: int | None, cache_type: str | None = None) -> BlockingModel:
    """The model, while a line on the terminal says what takes so long."""
    with rare_collections(), status_line():
        from ..blocking import BlockingModel
        from ..builders import ModelBuilder, PagedAttentionMetaBuilder

        cache = PagedAttentionMetaBuilder(gpu_memory=None, paged_cache_type=cache_type or "auto").build()
        return BlockingModel.from_builder(ModelBuilder(model_id, threads=threads, paged_attn=cache))


def default_system(model: BlockingModel) -> str:
    """The default system prompt, unless the model's template refuses one."""
    from ..errors import PymistralError

    try:
        model.tokenize([{"role": "system", "content": DEFAULT_SYSTEM}, {"role": "user", "content": "Hello"}])
    except PymistralError:
        return ""
    return DEFAULT_SYSTEM


def read_prompt(argument: str | None) -> str | None:
    """PROMPT, what is piped in, or both; ``None`` on a terminal where nothing is given."""
    piped = _read_stdin() if _has_piped(argument is not None) else None
    if argument is None and piped is None:
        return None
    parts = [part for part in (argument, piped) if part and part.strip()]
    if not parts:
        raise UsageError("the prompt is empty")
    return "\n\n".join(parts)


def _has_piped(have_prompt: bool) -> bool:
    """Whether standard input is to be read. Beside a PROMPT only a pipe or a file is: a job's idle socket would never end."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return False
    status: stat_result | None = None
    try:
        import os

        status = os.fstat(sys.stdin.fileno())
    except (OSError, ValueError):
        pass
    return not have_prompt or status is None or stat.S_ISFIFO(status.st_mode) or stat.S_ISREG(status.st_mode)


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the piped text is not UTF-8: byte {error.start} cannot be read") from error


@dataclass
class Reply:
    """An answer with what it took."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    first_token_sec: float | None = None

    def summary(self) -> str:
        """``87 tokens, 412 tok/s, first token after 0.12 s``."""
        if self.usage is None:
            return ""
        parts = [counted(self.usage.completion_tokens, "token"), f"{self.usage.avg_compl_tok_per_sec:.0f} tok/s"]
        if self.first_token_sec is not None:
            parts.append(f"first token after {self.first_token_sec:.2f} s")
        if self.finish_reason == "length":
            parts.append("cut at the limit")
        return ", ".join(parts)


def stream_reply(
    model: BlockingModel,
    messages: Sequence[Mapping[str, str]],
    sampling: SamplingParams,
    write: Callable[[str], None],
    think: Callable[[str], None],
    reply: Reply,
) -> Reply:
    """Stream the answer into ``write``, its reasoning into ``think``, and both into ``reply``, which so holds what there is at Ctrl-C."""
    from ..requests import RequestBuilder

    request = RequestBuilder()
    for message in messages:
        request.add_message(message["role"], message["content"])
    start = time.perf_counter()
    with model.stream_chat_request(request.with_sampling(sampling)) as stream:
        for chunk in stream:
            reply.usage = chunk.usage or reply.usage
            for choice in chunk.choices:
                reply.finish_reason = choice.finish_reason or reply.finish_reason
                thought, text = choice.delta.reasoning_content, choice.delta.content
                if (thought or text) and reply.first_token_sec is None:
                    reply.first_token_sec = time.perf_counter() - start
                if thought:
                    reply.reasoning += thought
                    think(thought)
                if text:
                    reply.text += text
                    write(text)
    return reply


def show_on_terminal(reply: Reply) -> tuple[Callable[[str], None], Callable[[str], None]]:
    """What writes an answer, and what writes its reasoning, dimmed and with an empty line behind it."""

    def write(text: str) -> None:
        gap = "\n\n" if reply.reasoning and reply.text == text else ""
        print(gap + harmless(text), end="", flush=True)

    def think(text: str) -> None:
        print(dim(harmless(text), sys.stdout), end="", flush=True)

    return write, think


def end_line(reply: Reply) -> None:
    """End the line that an answer, or the beginning of one, stands on."""
    if (reply.text or reply.reasoning) and not reply.text.endswith("\n"):
        print(flush=True)


def _answer_text(model: BlockingModel, messages: Sequence[Mapping[str, str]], sampling: SamplingParams) -> int:
    reply = Reply()
    if terminal := sys.stdout.isatty():
        write, think = show_on_terminal(reply)
    else:  # what reads it wants the answer alone
        write, think = (lambda text: print(text, end="", flush=True)), (lambda text: None)
    try:
        stream_reply(model, messages, sampling, write, think, reply)
    finally:
        end_line(reply)
    if terminal and sys.stderr.isatty():
        print(dim(reply.summary(), sys.stderr), file=sys.stderr)
    return 0


def _answer_json(model: BlockingModel, model_id: str, messages: Sequence[Mapping[str, str]], sampling: SamplingParams, stream: bool) -> int:
    def emit(**fields: Any) -> None:
        if stream or "finish_reason" in fields:
            print(json.dumps(fields, ensure_ascii=False), flush=True)

    reply = stream_reply(model, messages, sampling, lambda text: emit(delta=text), lambda text: emit(reasoning_delta=text), Reply())
    end = {"finish_reason": reply.finish_reason, "usage": reply.usage.model_dump() if reply.usage else None}
    emit(model=model_id, **({} if stream else {"content": reply.text, "reasoning_content": reply.reasoning or None}), **end)
    return 0
