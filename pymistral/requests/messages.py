"""Conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..errors import RequestValidationError
from .enums import PlainEnum

if TYPE_CHECKING:
    from typing_extensions import Self

Message = dict[str, Any]
"""One message as chat templates read it: ``{"role": ..., "content": ...}`` and what else the template knows."""


class CustomRole(str):
    """A role that only some chat templates know; made by `TextMessageRole.custom`."""

    __slots__ = ()


class TextMessageRole(PlainEnum):
    """Who speaks. The plain values (``"user"`` ...) work wherever a role is asked for."""

    USER = "user"
    ASSISTANT = "assistant"
    SYSTEM = "system"
    TOOL = "tool"

    @staticmethod
    def custom(role: str) -> CustomRole:
        """A role by any name, for chat templates that know more than the four (``"developer"``, ``"context"`` ...)."""
        if not isinstance(role, str) or not role:
            raise RequestValidationError(f"a custom role is a non-empty string, got {role!r}")
        return CustomRole(role)


class TextMessages:
    """Plain text messages, sampled greedily. `RequestBuilder` does more.

    Examples
    --------
    >>> TextMessages().add_message(TextMessageRole.SYSTEM, "Be brief.").add_message("user", "Hello!")
    TextMessages(2 messages)
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.thinking: bool | None = None

    def add_message(self, role: TextMessageRole | CustomRole | str, text: str) -> Self:
        """Append a message."""
        self.messages.append({"role": role_name(role), "content": checked_text(text)})
        return self

    def clear(self) -> Self:
        """Remove all messages."""
        self.messages.clear()
        return self

    def enable_thinking(self, enable_thinking: bool = True) -> Self:
        """Switch the model's thinking on or off, if its chat template knows such a switch."""
        self.thinking = checked_flag("enable_thinking", enable_thinking)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.messages)} message{'s' * (len(self.messages) != 1)})"


TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")
"""What templates join to other text, besides the content."""


def messages_from_dicts(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Checked copies of OpenAI-style message dicts."""
    return [_message_from_dict(index, message) for index, message in enumerate(messages)]


def _message_from_dict(index: int, message: Mapping[str, Any]) -> Message:
    if not isinstance(message, Mapping):
        raise RequestValidationError(f'messages[{index}] must be a dict like {{"role": "user", "content": "Hello"}}, got {message!r}')
    if "role" not in message:
        raise RequestValidationError(f"messages[{index}] has no 'role', only {sorted(map(str, message))}")
    if "content" not in message and not message.get("tool_calls"):
        raise RequestValidationError(f"messages[{index}] has no 'content', only {sorted(map(str, message))}")
    content, calls = message.get("content"), message.get("tool_calls")
    for field in TEXT_FIELDS:
        if message.get(field) is not None and not isinstance(message[field], str):
            raise RequestValidationError(f"messages[{index}]: {field!r} must be a string, got {message[field]!r}")
    # What is null, as in the message of a response, is left out: templates ask whether it is there, not whether it is null.
    checked = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
    checked |= {"role": role_name(message["role"]), "content": "" if content is None else _content_text(index, content)}
    return {**checked, "tool_calls": checked_calls(calls)} if calls else checked


def _content_text(index: int, content: object) -> str:
    """The text of a message's content, which OpenAI's clients may send as a list of parts."""
    if not isinstance(content, list):
        return checked_text(content)
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RequestValidationError(f"messages[{index}]: only text parts can be read, got {part!r}")
    return "".join(checked_text(part.get("text")) for part in content)


def checked_calls(calls: object) -> list[dict[str, Any]]:
    """Copies of tool calls in OpenAI's form, which chat templates and dialects go through unasked."""
    if not isinstance(calls, Iterable) or isinstance(calls, Mapping | str | bytes):
        raise RequestValidationError(f"tool_calls must be a list of calls, got {calls!r}")
    return [_checked_call(call) for call in calls]


def _checked_call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if (
        not isinstance(call, Mapping)
        or not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not isinstance(function.get("arguments"), str | Mapping)
    ):
        raise RequestValidationError(f'a tool call is {{"id": ..., "function": {{"name": ..., "arguments": "JSON text"}}}}, got {call!r}')
    try:
        json.dumps(function["arguments"])
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestValidationError(f"the arguments of a call of {function['name']!r} must have a JSON form: {error}") from error
    return {**call, "type": call.get("type") or "function"}  # some templates ask for the type, of which there is only one


def role_name(role: object) -> str:
    """The name that templates use for a role, checked."""
    if isinstance(role, CustomRole):
        return str(role)
    try:
        return str(TextMessageRole(role))
    except RequestValidationError as error:
        raise RequestValidationError(f"{error}; TextMessageRole.custom(...) makes any other") from None


def checked_flag(name: str, value: object) -> bool:
    """`value` if it is True or False: a text such as ``"no"`` would count as true."""
    if not isinstance(value, bool):
        raise RequestValidationError(f"{name} must be True or False, got {value!r}")
    return value


def checked_tokens(tokens: object) -> list[int]:
    """Token ids as Python's whole numbers."""
    if not isinstance(tokens, Iterable) or isinstance(tokens, str | bytes):
        raise RequestValidationError(f"tokens must be a list of token ids, got {tokens!r}")
    ids = list(tokens)
    for token in ids:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise RequestValidationError(f"a token id is a whole number, got {token!r}")
    return [int(token) for token in ids]


def checked_text(text: object) -> str:
    """`text` if it is a string that has a UTF-8 form, which tokenizers need."""
    if not isinstance(text, str):
        raise RequestValidationError(f"a message's text must be a string, got {type(text).__name__}: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestValidationError(
            f"a message's text has half a surrogate pair ({text[error.start]!a}) at character {error.start}; replace it or drop it"
        ) from None
    return text
