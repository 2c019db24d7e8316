"""Chat templates: Jinja programs that come with a model and turn messages into the text it was trained on.

They render as transformers renders them, in Jinja's immutable sandbox. The sandbox keeps a template from Python's internals, not from
burning time and memory; a model file is as little to be trusted as any download, so a render also has a budget: of CPU time, counted in
every block and call, and of characters, checked before each operation that can make much out of little.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..errors import ModelLoadError, RequestValidationError
from .template_budget import AMPLIFIERS, Budget, BudgetExceeded, check_amplifier, check_format, extent

logger = logging.getLogger(__name__)

MAX_BITS = 1 << 14  # of an integer
MAX_SOURCE = 1 << 17  # characters, which Jinja may take 3 s to compile; models' own templates have up to about 20,000

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class ChatTemplate:
    """A model's chat template, ready to render.

    Parameters
    ----------
    source
        The Jinja source; `None` stands for ChatML, the most common format, as a model without a template gets it.
    bos_token, eos_token
        The text of the special tokens, for the template's use.
    variables
        Other variables that every render sees.

    Raises
    ------
    ModelLoadError
        If the source is no valid template.
    """

    def __init__(self, source: str | None, *, bos_token: str | None = None, eos_token: str | None = None, **variables: Any) -> None:
        if source is None:
            logger.info("the model has no chat template: using ChatML")
            source = CHATML
        if len(source) > MAX_SOURCE:
            raise ModelLoadError(
                f"the chat template has {len(source)} characters, and more than {MAX_SOURCE} are no template; pass another"
            )
        self.source = source
        self._variables = {"bos_token": bos_token or "", "eos_token": eos_token or "", **variables}
        self._style = MessageStyle.of(source)
        self._budget = Budget()
        try:
            self._template = _Environment(self._budget).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelLoadError(f"the chat template has an error in line {error.lineno}: {error.message}") from error
        except Exception as error:  # hostile nesting overflows the compiler in more than one way
            raise ModelLoadError(f"the chat template cannot be compiled: {type(error).__name__}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Parameters
        ----------
        messages
            Each with `role`, `content` (a string or a list of parts) and what else the template knows: `tool_calls`, `name` ...
        tools
            JSON schemas of the functions that the model may call.
        add_generation_prompt
            End with the beginning of an answer.
        enable_thinking
            Passed on if it is not `None`, for templates that can switch reasoning on and off.
        documents, variables
            Passed on to the template.

        Raises
        ------
        RequestValidationError
            If the template refuses the messages (with its own words), fails, or exceeds its budget.
        """
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        try:
            values = {
                **self._variables,
                "messages": [self._style.adapt(_plain(message)) for message in messages],
                "tools": _plain(tools),
                "documents": _plain(documents),
                "add_generation_prompt": add_generation_prompt,
                **variables,
            }
            self._budget.begin()
            return self._template.render(values)
        except RequestValidationError:
            raise
        except TemplateRefusal as error:
            raise RequestValidationError(f"the chat template refuses these messages: {error}") from error
        except BudgetExceeded as error:
            raise RequestValidationError(f"the chat template was stopped: {error}") from error
        except SecurityError as error:
            raise RequestValidationError(f"the chat template tried something that is not allowed: {error}") from error
        except RecursionError as error:
            raise RequestValidationError("the chat template was stopped: it recurses too deeply, or the messages are nested so") from error
        except Exception as error:  # templates are programs: whatever they raise is theirs
            raise RequestValidationError(f"the chat template failed on these messages: {type(error).__name__}: {error}") from error


class TemplateRefusal(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _Generator(CodeGenerator):
    """Compiles templates whose every block ticks, and whose long-making operations ask first."""

    def blockvisit(self, block: Iterable[nodes.Node], frame: Frame) -> None:
        block = list(block)
        outputs = [node for node in block if isinstance(node, nodes.Output)]
        literal = sum(len(part.data) for node in outputs for part in node.nodes if isinstance(part, nodes.TemplateData))
        self.writeline(f"environment.budget.tick({literal})")
        super().blockvisit(block, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.literal(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.literal(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.literal(")
        super().visit_Dict(node, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' Jinja environment, on a budget."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: Budget) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols], finalize=self._write)
        self.budget = budget
        self.optimized = False  # constants are computed at render time, within the budget
        self.filters["tojson"] = tojson
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
        }

    @jinja2.pass_context  # which also keeps Jinja from computing constants while it compiles
    def _write(self, context: Context, value: Any) -> Any:
        self.budget.tick(extent(value))
        return value

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            if name in AMPLIFIERS:
                value, *others = args[skipped:]
                if name == "join" and not isinstance(value, str | Mapping | Sequence):
                    value = list(value)
                    args = (*args[:skipped], value, *others)
                check_amplifier(self.budget, name, value, [*others, *kwargs.values()])
            return function(*args, **kwargs)

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.budget.tick()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes | int) and name in AMPLIFIERS:
            if name == "join" and args and not isinstance(args[0], str | Mapping | Sequence):
                args = (list(args[0]), *args[1:])
            check_amplifier(__self.budget, name, owner, [*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            check_format(self.budget, str(value.__self__), [*args, *kwargs.values()])
            return safe(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.tick()
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(right, 0) > MAX_BITS:
                raise BudgetExceeded("it computes a number that is too large")
        elif operator == "%" and isinstance(left, str | bytes):
            check_format(self.budget, str(left), right if isinstance(right, tuple) else [right])
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(sequence, int | float):
                    self.budget.allow(extent(sequence) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
                raise BudgetExceeded("it computes a number that is too large")
        elif operator == "+" and not isinstance(left, int | float):
            self.budget.allow(extent(left) + extent(right))
        return super().call_binop(context, operator, left, right)

    def concatenate(self, parts: tuple[Any, ...]) -> str:
        self.budget.tick()
        self.budget.allow(sum(map(extent, parts)))
        return "".join(map(str, parts))

    def literal(self, value: Any) -> Any:
        self.budget.tick()
        self.budget.allow(extent(value))
        return value


class GenerationTag(Extension):
    """`{% generation %}`: marks what the assistant says, for training; here its body simply renders."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body).set_lineno(line)]


class TemplateDict:
    """`dict(...)` in a template, without the type's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class TemplateNamespace(Namespace):
    """`namespace(...)` in a template, without names that Python gives a meaning."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            TemplateNamespace._check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        TemplateNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no place for {name!r}: names must not begin with an underscore")


def raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as models were trained on it: no HTML escapes, other alphabets as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Any) -> Any:
    """Only JSON's own types reach a template: an object would bring methods of which the sandbox knows nothing."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item) for item in value]
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


# The names under which callers pass what a model thought; templates read the first, gpt-oss's the second.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class MessageStyle:
    """What a template's source says about the form of the messages it takes.

    Templates disagree on two points: whether `content` is a string or a list of parts, and whether the arguments of a tool call are an
    object or JSON text. Messages are given to each in the form that it can use.
    """

    CONTENT = r"""\bcontent\b['"\]]*"""
    PATH = r"""[\w.\[\]'"]*"""  # what leads to it; only behind a word, or each character of a long name would be a place to start
    ARGUMENTS = r"""arguments['"\]]*\s*"""

    def __init__(self, *, parts: bool, text: bool, parsed_arguments: bool, written_arguments: bool, items: bool) -> None:
        self.parts, self.text = parts, text
        self.parsed_arguments, self.written_arguments, self.items = parsed_arguments, written_arguments, items

    @classmethod
    def of(cls, source: str) -> MessageStyle:
        def says(pattern: str) -> bool:
            return re.search(pattern, source) is not None

        loops = says(rf"for\s+\w+\s+in\s+{cls.PATH}{cls.CONTENT}")
        asks = says(rf"{cls.CONTENT}\s+is\s+(?:not\s+)?(?:string|iterable|sequence|mapping)")
        asks_arguments = says(rf"{cls.ARGUMENTS}is\s+(?:not\s+)?(?:string|mapping)")
        items = says(rf"{cls.ARGUMENTS}(?:\|\s*(?:items|dictsort)|\.(?:items|keys|get)\b)")
        dumps = items or says(rf"{cls.ARGUMENTS}\|\s*tojson")
        dumps_call = says(r"\b(?:function|tool_calls?|call)\s*\|\s*tojson")
        adds = says(rf"[+~][^%}}+~]*{cls.ARGUMENTS}|{cls.ARGUMENTS}[+~]|\{{\{{-?\s*[\w.\[\]'\"]*{cls.ARGUMENTS}-?\}}\}}")
        return cls(
            parts=loops,
            text=asks or not loops,
            parsed_arguments=not asks_arguments and (dumps or (dumps_call and not adds)),
            written_arguments=not asks_arguments and adds and not dumps,
            items=items and not asks_arguments,
        )

    def adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        content = message.get("content")
        if isinstance(content, list) and not self.parts:
            message["content"] = "\n".join(self._text_of(part) for part in content)
        elif isinstance(content, str) and not self.text:
            message["content"] = [{"type": "text", "text": content}]
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            if "arguments" in function:
                function["arguments"] = self._arguments(function["arguments"])
        return message

    @staticmethod
    def _text_of(part: Any) -> str:
        if isinstance(part, str):
            return part
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return str(part["text"])
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise RequestValidationError(f"this model's chat template takes text only, but a message has a part of type {kind!r}")

    def _arguments(self, arguments: Any) -> Any:
        if self.parsed_arguments and isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if self.items and not isinstance(arguments, dict):  # as a model may have written them: it is shown what it did
            return {} if arguments is None else {"arguments": arguments}
        if self.written_arguments and not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False)
        return arguments
