"""Tools as a request describes them to the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RequestValidationError
from .enums import PlainEnum


class ToolType(PlainEnum):
    """What kind of tool it is."""

    FUNCTION = "function"


@dataclass(frozen=True)
class NamedToolChoice:
    """This tool must be called; made by `ToolChoice.tool`."""

    name: str


class ToolChoice(PlainEnum):
    """Whether the model may, must or must not call tools; `ToolChoice.tool` demands one by name."""

    AUTO = "auto"
    """The model decides."""
    NONE = "none"
    """The tools are kept out of the prompt, and calls are not looked for."""
    REQUIRED = "required"
    """The answer is one call or more."""

    @staticmethod
    def tool(tool: Tool | str) -> NamedToolChoice:
        """The answer is a call of this tool."""
        name = tool.function.name if isinstance(tool, Tool) else tool
        if not isinstance(name, str) or not name:
            raise RequestValidationError(f"ToolChoice.tool takes a Tool or its name, got {tool!r}")
        return NamedToolChoice(name)


def checked_tool_choice(choice: object) -> ToolChoice | NamedToolChoice:
    """A tool choice from itself, its plain value, a tool, or OpenAI's ``{"type": "function", "function": {"name": ...}}``."""
    if isinstance(choice, ToolChoice | NamedToolChoice):
        return choice
    if isinstance(choice, Tool):
        return ToolChoice.tool(choice)
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise RequestValidationError(f'a tool choice as a dict is {{"type": "function", "function": {{"name": ...}}}}, got {choice!r}')
        return ToolChoice.tool(name)
    try:
        return ToolChoice(choice)
    except RequestValidationError as error:
        raise RequestValidationError(f"{error}; ToolChoice.tool(name) demands a tool by name") from None


@dataclass(kw_only=True)
class Function:
    """A function that the model may ask to call.

    Parameters
    ----------
    name
        The name the model calls it by.
    description
        What it does, for the model to read.
    parameters
        JSON schema of its arguments.
    strict
        True: the arguments follow the schema exactly, and a schema that cannot be enforced is refused. None: they follow it if it can be
        enforced. False: they are any JSON object.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise RequestValidationError(f"a function's name must be a non-empty string, got {self.name!r}")
        if self.name.encode(errors="ignore").decode() != self.name:
            raise RequestValidationError(f"the function name {self.name!r} has half a surrogate pair, which no tokenizer takes")
        if self.parameters is not None and not isinstance(self.parameters, Mapping):
            raise RequestValidationError(f"function {self.name!r}: parameters must be a JSON schema as a dict, got {self.parameters!r}")
        if self.description is not None and not isinstance(self.description, str):
            raise RequestValidationError(f"function {self.name!r}: description must be a string, got {self.description!r}")
        if self.strict is not None and not isinstance(self.strict, bool):
            raise RequestValidationError(f"function {self.name!r}: strict must be True, False or None, got {self.strict!r}")
        try:
            json.dumps(self.parameters)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestValidationError(f"function {self.name!r}: parameters must have a JSON form: {error}") from error


@dataclass(kw_only=True)
class Tool:
    """A tool the model may use.

    Parameters
    ----------
    function
        The function behind it.
    type
        Its kind; there is only one.
    """

    function: Function
    type: ToolType | str = ToolType.FUNCTION

    def __post_init__(self) -> None:
        self.type = ToolType(self.type)
        if not isinstance(self.function, Function):
            raise RequestValidationError(f"a tool's function must be a Function, got {self.function!r}")

    @classmethod
    def from_dict(cls, tool: Mapping[str, Any]) -> Tool:
        """A tool from OpenAI's JSON form."""
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or not isinstance(function, Mapping):
            raise RequestValidationError(f"a tool must have a 'function' with at least a 'name', got {tool!r}")
        known = {key: function[key] for key in ("name", "description", "parameters", "strict") if key in function}
        return cls(type=tool.get("type", "function"), function=Function(**{"name": "", **known}))

    def to_dict(self) -> dict[str, Any]:
        """The tool in OpenAI's JSON form, which chat templates read."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        if self.function.parameters is not None:
            function["parameters"] = dict(self.function.parameters)
        if self.function.strict is not None:
            function["strict"] = self.function.strict
        return {"type": str(self.type), "function": function}
