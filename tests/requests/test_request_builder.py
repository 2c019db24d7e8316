from __future__ import annotations

from types import SimpleNamespace

import pytest

from pymistral import Function, RequestBuilder, SamplingParams, TextMessageRole, TextMessages, Tool, ToolChoice, ToolType
from pymistral.errors import RequestValidationError
from pymistral.requests.constraint import Constraint
from pymistral.requests.request import ChatRequest
from pymistral.responses import CalledFunction, ResponseMessage, ToolCallResponse

CALLS_THAT_ARE_NONE = (5, {}, {"function": "f"}, {"function": {"name": "f"}}, {"function": {"name": 5, "arguments": "{}"}})


def messages_of(request: ChatRequest) -> list[dict[str, object]]:
    return RequestBuilder.of(request).messages


def test_text_messages_are_fluent() -> None:
    messages = TextMessages()
    assert messages.add_message(TextMessageRole.SYSTEM, "Be brief.").add_message("user", "Hi").enable_thinking(False) is messages
    assert messages.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert messages.thinking is False
    assert repr(messages) == "TextMessages(2 messages)"
    assert messages.clear().messages == []


def test_everything_that_can_be_a_request() -> None:
    expected = [{"role": "user", "content": "Hi"}]
    assert messages_of("Hi") == expected
    assert messages_of(TextMessages().add_message("user", "Hi")) == expected
    assert messages_of(RequestBuilder().add_message("user", "Hi")) == expected
    assert messages_of([{"role": "user", "content": "Hi"}]) == expected
    assert messages_of(({"role": "USER", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},)) == expected


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (None, "NoneType"),
        (7, "int"),
        (b"Hi", "bytes"),
        ({"role": "user", "content": "Hi"}, "dict"),
        ([], "no message"),
        (TextMessages(), "no message"),
        (["Hi"], r"messages\[0\]"),
        ([{"content": "Hi"}], "no 'role'"),
        ([{"role": "user"}], "no 'content'"),
        ([{"role": "usr", "content": "Hi"}], "'usr' is not one of 'user', 'assistant', 'system', 'tool'"),
        ([{"role": "user", "content": 7}], "int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only text parts"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "tool", "content": "Yes.", "tool_call_id": 5}], r"messages\[0\]: 'tool_call_id' must be a string, got 5"),
        ([{"role": "assistant", "content": "Hi", "reasoning_content": ["Hm."]}], r"messages\[0\]: 'reasoning_content' must be a string"),
        *(([{"role": "assistant", "tool_calls": calls}], "tool_calls must be a list") for calls in (5, "call", {"function": {}})),
        *(([{"role": "assistant", "tool_calls": [call]}], "a tool call is") for call in CALLS_THAT_ARE_NONE),
    ],
)
def test_what_cannot_be_a_request(request_: object, message: str) -> None:
    with pytest.raises(RequestValidationError, match=message):
        RequestBuilder.of(request_)  # type: ignore[arg-type]


def test_a_message_of_a_response_goes_back_without_what_is_null() -> None:
    answer = {"role": "assistant", "content": "Hello"}
    assert messages_of([ResponseMessage(content="Hello").model_dump()]) == [answer]
    assert messages_of([{**answer, "tool_calls": [], "name": None}]) == [answer]
    call = ToolCallResponse(id="call-1", function=CalledFunction(name="f", arguments="{}"))
    (message,) = messages_of([ResponseMessage(tool_calls=[call]).model_dump()])
    assert message == {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]}


def test_calls_that_are_none() -> None:
    for call in CALLS_THAT_ARE_NONE:
        with pytest.raises(RequestValidationError, match="a tool call is"):
            RequestBuilder().add_message_with_tool_call("assistant", "", [call])  # type: ignore[list-item]
    with pytest.raises(RequestValidationError, match="the arguments of a call of 'f' must have a JSON form"):
        RequestBuilder().add_message_with_tool_call("assistant", "", [{"function": {"name": "f", "arguments": {"x": object()}}}])
    with pytest.raises(RequestValidationError, match="tool_calls must be a list"):
        RequestBuilder().add_message_with_tool_call("assistant", "", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "message"),
    [({"name": "\ud800"}, "surrogate"), ({"name": "f", "parameters": {"x": object()}}, "'f': parameters must have a JSON form")],
)
def test_functions_that_no_template_can_show(function: dict[str, object], message: str) -> None:
    with pytest.raises(RequestValidationError, match=message):
        RequestBuilder().set_tools([{"function": function}])


def test_roles() -> None:
    assert TextMessageRole("user") is TextMessageRole.USER
    assert TextMessageRole("User") is TextMessageRole.USER
    assert str(TextMessageRole.TOOL) == f"{TextMessageRole.TOOL}" == "tool"
    messages = TextMessages().add_message(TextMessageRole.custom("developer"), "Hi")
    assert messages.messages[0]["role"] == "developer"
    assert type(messages.messages[0]["role"]) is str
    with pytest.raises(RequestValidationError, match=r"TextMessageRole\.custom"):
        TextMessages().add_message("developer", "Hi")
    with pytest.raises(RequestValidationError, match="non-empty"):
        TextMessageRole.custom("")


def test_a_fresh_builder_is_greedy() -> None:
    assert RequestBuilder().sampling == SamplingParams.deterministic()
    assert RequestBuilder.of("Hi").sampling == SamplingParams.deterministic()


def test_each_setter_sets_its_parameter() -> None:
    values = {
        "temperature": ("temperature", 0.5),
        "topk": ("top_k", 3),
        "topp": ("top_p", 0.5),
        "minp": ("min_p", 0.5),
        "topn_logprobs": ("top_n_logprobs", 4),
        "frequency_penalty": ("frequency_penalty", 0.5),
        "presence_penalty": ("presence_penalty", 0.5),
        "stop_toks": ("stop_toks", ("x", 5)),
        "max_len": ("max_len", 9),
        "logits_bias": ("logits_bias", {1: 2.0}),
        "n_choices": ("n_choices", 2),
    }
    builder = RequestBuilder()
    for setter, (_, value) in values.items():
        assert getattr(builder, f"set_sampler_{setter}")(value) is builder
    assert {field: getattr(builder.sampling, field) for field, _ in values.values()} == dict(values.values())
    assert builder.set_deterministic_sampler().sampling == SamplingParams.deterministic()
    with pytest.raises(RequestValidationError, match="temperature"):
        builder.set_sampler_temperature(float("nan"))
    with pytest.raises(RequestValidationError, match="with_sampling"):
        builder.with_sampling({"temperature": 1})  # type: ignore[arg-type]


def test_of_copies() -> None:
    builder = RequestBuilder().add_message("user", "Hi")
    copy = RequestBuilder.of(builder)
    builder.add_message("assistant", "Hello").add_logits_processor(lambda logits, tokens: logits).set_sampler_max_len(3)
    assert len(copy.messages) == 1
    assert copy.logits_processors == []
    assert copy.sampling.max_len is None


def test_tools() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    as_dict = {"type": "function", "function": {"name": "weather", "description": "It rains.", "parameters": schema, "strict": True}}
    tool = Tool(type=ToolType.FUNCTION, function=Function(name="weather", description="It rains.", parameters=schema, strict=True))
    assert tool.to_dict() == as_dict
    assert Tool.from_dict(as_dict) == tool
    assert Tool(function=Function(name="f")).to_dict() == {"type": "function", "function": {"name": "f"}}
    assert RequestBuilder().set_tools([as_dict]).template_tools() == [as_dict]
    request = RequestBuilder().set_tools([tool])
    assert request.template_tools() == [as_dict]
    with pytest.raises(RequestValidationError, match="two tools are named 'weather'"):
        RequestBuilder().set_tools([tool, as_dict]).template_tools()
    assert request.set_tool_choice(ToolChoice.NONE).template_tools() is None
    assert RequestBuilder().template_tools() is None


def test_tool_choice() -> None:
    tools = [Tool(function=Function(name=name)) for name in ("a", "b")]
    request = RequestBuilder().add_message("user", "Hi").set_tools(tools)
    assert request.demanded_tools() == []
    assert request.set_tool_choice("required").demanded_tools() == tools
    for choice in (ToolChoice.tool("b"), tools[1], {"type": "function", "function": {"name": "b"}}, {"type": "function", "name": "b"}):
        assert request.set_tool_choice(choice).demanded_tools() == tools[1:]
        assert len(request.offered_tools()) == 2
    with pytest.raises(RequestValidationError, match=r"demands 'c', but the tools are \['a', 'b'\]"):
        request.set_tool_choice(ToolChoice.tool("c")).offered_tools()
    with pytest.raises(RequestValidationError, match="there are no tools"):
        RequestBuilder().set_tool_choice("required").offered_tools()
    with pytest.raises(RequestValidationError, match=r"'sometimes' is not one of .*ToolChoice.tool"):
        request.set_tool_choice("sometimes")
    with pytest.raises(RequestValidationError, match="name"):
        request.set_tool_choice({"type": "function"})
    with pytest.raises(RequestValidationError, match="constraint and call tools"):
        request.set_tool_choice("auto").set_constraint(Constraint.regex("a")).offered_tools()
    assert request.set_tool_choice("none").offered_tools() == []


def test_bad_tools() -> None:
    with pytest.raises(RequestValidationError, match="'function'"):
        Tool.from_dict({"name": "f"})
    with pytest.raises(RequestValidationError, match=r"must have a 'function'.* got None"):
        Tool.from_dict(None)  # type: ignore[arg-type]
    with pytest.raises(RequestValidationError, match="name"):
        Tool.from_dict({"function": {}})
    with pytest.raises(RequestValidationError, match="'f': description must be a string, got 5"):
        Function(name="f", description=5)  # type: ignore[arg-type]
    with pytest.raises(RequestValidationError, match="'f': strict must be True, False or None, got 'no'"):
        Function(name="f", strict="no")  # type: ignore[arg-type]
    with pytest.raises(RequestValidationError, match="ToolType: 'x' is not one of 'function'"):
        Tool(type="x", function=Function(name="f"))
    with pytest.raises(RequestValidationError, match="schema"):
        Function(name="f", parameters="{}")  # type: ignore[arg-type]
    with pytest.raises(RequestValidationError, match="set_tools"):
        RequestBuilder().set_tools([print])  # type: ignore[list-item]
    with pytest.raises(RequestValidationError, match="set_tools takes a list"):
        RequestBuilder().set_tools(Tool(function=Function(name="f")))  # type: ignore[arg-type]
    with pytest.raises(RequestValidationError, match="give its attribute 'tool'"):
        RequestBuilder().set_tools([SimpleNamespace(tool=Tool(function=Function(name="f")))])  # type: ignore[list-item]
    with pytest.raises(RequestValidationError, match="'auto', 'none'"):
        RequestBuilder().set_tool_choice("sometimes")
    with pytest.raises(RequestValidationError, match="processor"):
        RequestBuilder().add_logits_processor(7)  # type: ignore[arg-type]


def test_flags_are_true_or_false() -> None:
    for method in ("enable_thinking", "return_logprobs", "with_truncate_sequence"):
        for wrong in ("no", None, 1):
            with pytest.raises(RequestValidationError, match=rf"must be True or False, got {wrong!r}"):
                getattr(RequestBuilder(), method)(wrong)


def test_what_a_result_answers_is_the_id_of_a_call() -> None:
    for wrong in (None, 5):
        with pytest.raises(RequestValidationError, match=rf"the id of the call that was answered, a string, got {wrong!r}"):
            RequestBuilder().add_tool_message("Yes.", wrong)  # type: ignore[arg-type]


def test_tool_calls_reach_templates_with_parsed_arguments() -> None:
    call = ToolCallResponse(id="call-1", function=CalledFunction(name="weather", arguments='{"city": "Oslo"}'))
    request = (
        RequestBuilder().add_message("user", "Rain?").add_message_with_tool_call("assistant", "", [call]).add_tool_message("Yes.", call.id)
    )
    assistant, tool = request.template_messages()[1:]
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert tool == {"role": "tool", "content": "Yes.", "tool_call_id": "call-1"}
    assert request.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    for unreadable in ("{", "[" * 100_000):
        broken = {"id": "1", "type": "function", "function": {"name": "f", "arguments": unreadable}}
        assert RequestBuilder().add_message_with_tool_call("assistant", "", [broken]).template_messages()[0]["tool_calls"] == [broken]
    openai = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}]}]
    assert RequestBuilder.of(openai).template_messages()[0]["tool_calls"][0]["function"]["arguments"] == []
