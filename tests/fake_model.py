"""A model small enough to know by heart, on the real engine: after a prompt it says the alphabet, and stops after ``z``."""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pymistral.engine import Engine, Segment
from pymistral.errors import RequestValidationError
from pymistral.model import Model
from pymistral.nn.sampling import SamplingProgram

EOS, BOS = 256, 257
VOCAB_SIZE = 258
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{% for tool in tools %}{{ tool.function.name }} {% endfor %}]{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is not none %}thinking={{ enable_thinking }}\n{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class ByteTokenizer:
    vocab_size, bos_token_id, eos_token_id = VOCAB_SIZE, BOS, EOS
    special_token_ids = frozenset({EOS, BOS})

    def encode_continuation(self, text: str) -> list[int]:
        return list(text.encode())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        parts = text.split("<bos>")
        tokens = list(parts[0].encode())
        for part in parts[1:]:
            tokens += [BOS, *part.encode()]
        return [BOS, *tokens] if add_special_tokens else tokens

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if bad := [token for token in tokens if not 0 <= token < VOCAB_SIZE]:
            raise RequestValidationError(f"there is no token {bad[0]}")
        special = {EOS: b"", BOS: b""} if skip_special_tokens else {EOS: b"<eos>", BOS: b"<bos>"}
        return b"".join(special.get(token, bytes([token & 255])) for token in tokens).decode(errors="replace")

    def token_to_id(self, token: str) -> int | None:
        return {"<eos>": EOS, "<bos>": BOS}.get(token)

    def id_to_bytes(self, token: int) -> bytes:
        return {EOS: b"<eos>", BOS: b"<bos>"}.get(token, bytes([token & 255]))

    def decode_stream(self, *, skip_special_tokens: bool = True, keep: Sequence[str] = ()) -> ByteDecodeStream:
        return ByteDecodeStream()


class ByteDecodeStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if token < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class AlphabetRunner:
    """Each letter makes the next one likely, ``z`` the end (or ``a``, if endless), and anything else ``a``."""

    vocab_size, max_num_seqs, max_batch_tokens, max_output_rows = VOCAB_SIZE, 8, 256, 64
    block_size, num_blocks, max_sequence_length = 16, 256, 1024

    prompts_apart = False
    prompt_pass = None
    panel_tokens = 1
    windows: Sequence[int | None] = (None,)

    def __init__(self, *, endless: bool = False, delay: float = 0.0) -> None:
        self.endless, self.delay = endless, delay
        self.steps = 0
        self.sample = SamplingProgram(VOCAB_SIZE, threads=1).run

    def read_logits(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits

    def forward(self, segments: Sequence[Segment], meanwhile: Callable[[], object] | None = None) -> NDArray[np.float32]:
        if meanwhile is not None:
            meanwhile()
        self.steps += 1
        time.sleep(self.delay)
        rows = [token for segment in segments if segment.outputs for token in list(segment.tokens)[-segment.outputs :]]
        logits = np.zeros((len(rows), VOCAB_SIZE), np.float32)
        for row, token in enumerate(rows):
            logits[row, self.after(token)] = 20.0
        return logits

    def after(self, token: int) -> int:
        if token == ord("z"):
            return ord("a") if self.endless else EOS
        return token + 1 if chr(token).islower() and token < 128 else ord("a")


def make_model(*, endless: bool = False, delay: float = 0.0, chat_template: str | None = TEMPLATE, **more: object) -> Model:
    runner = AlphabetRunner(endless=endless, delay=delay)
    engine = Engine(runner, ByteTokenizer(), eos_token_ids=(EOS,), name="alphabet")
    options = {"model_id": "alphabet", "config": {"model_type": "fake", "rope_scaling": {"factor": 2.0}}, "generation_config": {}, **more}
    return Model(engine, ByteTokenizer(), chat_template=chat_template, **options)  # type: ignore[arg-type]


def wait_until_idle(model: Model, seconds: float = 5.0) -> None:
    """Wait until no request is left in the engine; fail if that takes too long."""
    end = time.monotonic() + seconds
    while (stats := model._engine.stats()).running or stats.waiting:
        assert time.monotonic() < end, f"the engine is still busy: {stats}"
        time.sleep(0.002)


SCRIPT_TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\x01{% endif %}"
)


class ScriptedRunner(AlphabetRunner):
    """Says the next of its replies after each prompt, letter by letter; prompts end with ``\\x01``. Serves one request at a time."""

    max_sequence_length = 4096

    def __init__(self, replies: Sequence[str], *, delay: float = 0.0) -> None:
        super().__init__(delay=delay)
        self.replies = [list(reply.encode()) for reply in replies]
        self._begin = 0
        self._reply: list[int] = []

    def forward(self, segments: Sequence[Segment], meanwhile: Callable[[], object] | None = None) -> NDArray[np.float32]:
        if meanwhile is not None:
            meanwhile()
        time.sleep(self.delay)
        logits = np.zeros((sum(segment.outputs for segment in segments), VOCAB_SIZE), np.float32)
        for segment in segments:
            if segment.outputs:
                end = segment.start + len(segment.tokens)
                if list(segment.tokens)[-1] == 1:
                    self._begin, self._reply = end, self.replies.pop(0)
                said = end - self._begin
                logits[:, self._reply[said] if said < len(self._reply) else EOS] = 20.0
        return logits


def scripted_model(*replies: str, delay: float = 0.0, **more: object) -> Model:
    """A model that says these replies, one for each prompt. It calls tools as Hermes does; `call` writes such a call."""
    engine = Engine(ScriptedRunner(replies, delay=delay), ByteTokenizer(), eos_token_ids=(EOS,), name="scripted")
    return Model(engine, ByteTokenizer(), model_id="scripted", config={}, chat_template=SCRIPT_TEMPLATE, **more)  # type: ignore[arg-type]


def call(name: str, **arguments: object) -> str:
    """How the scripted model calls a tool."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
