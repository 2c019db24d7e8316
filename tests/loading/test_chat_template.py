import json
import time
from pathlib import Path

import pytest

from pymistral.errors import ModelLoadError, RequestValidationError
from pymistral.loading import chat_template, template_budget
from pymistral.loading.chat_template import ChatTemplate

DATA = Path(__file__).parent.parent / "data"
GOLDENS = json.loads((DATA / "chat_template_goldens.json").read_text())
HELLO = [{"role": "user", "content": "Hello!"}]


def template(name: str) -> ChatTemplate:
    return ChatTemplate((DATA / "chat_templates" / f"{name}.jinja").read_text(), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", GOLDENS["renders"])
@pytest.mark.parametrize("case", GOLDENS["cases"])
def test_renders_as_transformers_does(name, case):
    options = {"add_generation_prompt": True, **GOLDENS["cases"][case]}
    messages = options.pop("messages")
    expected = GOLDENS["renders"][name][case]
    if expected is None:
        with pytest.raises(RequestValidationError, match=r"refuses these messages: .*roles must alternate"):
            template(name).render(messages, **options)
    else:
        assert template(name).render(messages, **options) == expected


def test_chatml_without_a_template(caplog):
    with caplog.at_level("INFO"):
        rendered = ChatTemplate(None).render(HELLO)
    assert rendered == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    assert "no chat template" in caplog.text


def test_strftime_now():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(HELLO) == time.strftime("%Y")


def test_enable_thinking_is_undefined_unless_given():
    source = ChatTemplate("{{ enable_thinking is defined }} {{ enable_thinking }}")
    assert source.render(HELLO) == "False "
    assert source.render(HELLO, enable_thinking=False) == "True False"


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "qwen3", "llama3", "mistral", "phi3", "hermes"])
def test_text_parts_become_text_for_templates_that_take_text(name):
    assert template(name).render([{"role": "user", "content": PARTS}]) == template(name).render([{"role": "user", "content": "a\nb"}])


def test_other_parts_are_refused_by_templates_that_take_text():
    with pytest.raises(RequestValidationError, match="a part of type 'image_url'"):
        template("chatml").render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_parts_reach_templates_that_take_them():
    assert "ab<end_of_turn>" in template("gemma3").render([{"role": "user", "content": PARTS}])
    image = [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert template("parts-only").render([{"role": "user", "content": image}]) == "USER: <image>\nwhat? ASSISTANT:"


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3", "mistral", "deepseek-r1", "hermes"])
def test_arguments_of_a_call_may_be_an_object_or_json(name):
    def render(arguments):
        call = {"id": "abc123def", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return template(name).render([*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}])

    assert render({"x": 1, "y": "é"}) == render('{"x": 1, "y": "é"}')
    assert '{"x": 1, "y": "é"}' in render({"x": 1, "y": "é"})


def test_arguments_that_are_nested_too_deeply():
    def render(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return template("qwen2.5").render([*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}])

    assert "[" * 100_000 in render("[" * 100_000)  # as a model may write them
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestValidationError, match="nested"):
        render({"x": deep})


def test_the_callers_messages_are_left_alone():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    template("chatml").render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% for %}", "error in line 2"),
        ("{% if x %}", "error in line 1"),
        ("{{ x | nonsense }}", "No filter named 'nonsense'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled"),
        ("{% if 1 %}" * 500 + "{% endif %}" * 500, "cannot be compiled"),
        ("x" * (1 << 21), "2097152 characters"),
        ("{{a}}" * 50_000, "250000 characters, .* pass another"),
    ],
)
def test_templates_that_are_none(source, message):
    with pytest.raises(ModelLoadError, match=message):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ missing.x }}", "'missing' is undefined"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "failed on these messages"),
        ("{{ ''.__class__.__mro__ }}", "not allowed"),
        ("{{ messages.append(1) }}", "not allowed"),
        ("{{ messages[0].update(a=1) }}", "not allowed"),
        ("{{ cycler.__init__.__globals__ }}", "not allowed"),
        ("{{ namespace(__class__=1) }}", "not allowed"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "not allowed"),
        ("{{ lipsum() }}", "undefined"),
    ],
)
def test_failures_are_named(source, message):
    with pytest.raises(RequestValidationError, match=message):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
    ],
)
def test_nothing_private_is_seen(source):
    assert ChatTemplate(source).render(HELLO) == ""


def grow(start: str, step: str) -> str:
    return "{% set ns = namespace(s=" + start + ") %}{% for i in range(60) %}{% set ns.s = " + step + " %}{% endfor %}{{ ns.s }}"


HUGE = 999_999_999
BOMBS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) if range(99999) | list | length == 3 %}{% endfor %}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "{% macro f() %}{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}{% endmacro %}{% set a = f() %}",
    "{% set a %}{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}{% endset %}",
    f"{{{{ 'x' * {HUGE} }}}}",
    f"{{{{ {HUGE} * 'x' }}}}",
    f"{{{{ [1] * {HUGE} }}}}",
    f"{{{{ (9 ** {HUGE}) % 7 }}}}",
    f"{{{{ range({HUGE}) | list }}}}",
    f"{{{{ '%{HUGE}d' % 1 }}}}",
    f"{{{{ '%*d' % ({HUGE}, 1) }}}}",
    f"{{{{ '%{HUGE}d' | format(1) }}}}",
    *(f"{{{{ '%({name}){flags}{HUGE}d' % {{'{name}': 1}} }}}}" for name in ("a", "(a)b", "a%(b)") for flags in ("", " 0", "-.")),
    "{{ '%(a)*d' % {'a': 1} }}",
    f"{{{{ '{{a[}}]:{HUGE}}}'.format(a={{'}}': 1}}) }}}}",
    f"{{{{ '{{a[}}]:{{b}}}}'.format(a={{'}}': 1}}, b={HUGE}) }}}}",
    f"{{{{ '{{:{HUGE}}}{{'.format(1) }}}}",
    f"{{{{ '{{:{HUGE}}}'.format(1) }}}}",
    f"{{{{ '{{:{{}}}}'.format(1, {HUGE}) }}}}",
    f"{{{{ '{{a:{HUGE}}}'.format_map(dict(a=1)) }}}}",
    *(f"{{{{ 'x'.{name}({HUGE}) }}}}" for name in ("center", "ljust", "rjust", "zfill")),
    f"{{{{ '\t'.expandtabs({HUGE}) }}}}",
    *(
        f"{{{{ 'a\nb' | {call} }}}}"
        for call in (f"center({HUGE})", f"indent({HUGE})", f"batch({HUGE}, 'x') | list", f"slice({HUGE}) | list")
    ),
    f"{{{{ [1, 2] | tojson(indent={HUGE}) }}}}",
    f"{{{{ (1).to_bytes({HUGE}) }}}}",
    "{{ ('x' * 9999999).translate({120: 'y' * 1000}) }}",
    grow("'x' * 1000", "ns.s ~ ns.s"),
    grow("'x' * 1000", "ns.s + ns.s"),
    grow("['x']", "ns.s + ns.s"),
    grow("['x']", "[ns.s, ns.s]"),
    grow("('x',)", "(ns.s, ns.s)"),
    grow("'x'", "{'a': ns.s, 'b': ns.s}"),
    grow("'x'", "dict(a=ns.s, b=ns.s)"),
    grow("['x']", "[ns.s] | batch(2, ns.s) | list"),
    grow("'xx'", "ns.s | replace('x', ns.s)"),
    grow("'xx'", "ns.s.replace('x', ns.s)"),
    grow("'xx'", "ns.s | join(ns.s)"),
    grow("'xx'", "ns.s.join(ns.s)"),
    grow("'xx'", "range(1000) | map('string') | join(ns.s)"),
    grow("'xx'", "'%s%s' % (ns.s, ns.s)"),
    grow("'xx'", "'{0}{0}'.format(ns.s)"),
    grow("3", "ns.s * ns.s"),
]


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_bombs_are_stopped(source, monkeypatch):
    monkeypatch.setattr(template_budget, "MAX_SECONDS", 0.2)
    bomb = ChatTemplate(source)
    start = time.thread_time()
    with pytest.raises(RequestValidationError, match=r"stopped|Range too big"):
        bomb.render(HELLO)
    assert time.thread_time() - start < 3


def test_a_long_conversation_is_within_the_budget():
    messages = [{"role": role, "content": "word " * 200} for _ in range(2000) for role in ("user", "assistant")]
    for name in ("chatml", "llama3", "mistral", "gemma3"):
        assert len(template(name).render(messages)) > 4_000_000


def test_a_long_text_can_be_cut_and_padded():
    long = [{"role": "user", "content": "word " * 20_000}]
    assert ChatTemplate("{{ messages[0].content | truncate(1000, true, '') }}").render(long) == "word " * 200
    assert ChatTemplate("{{ messages[0].content.ljust(1000) }}").render(long) == "word " * 20_000


@pytest.mark.parametrize(
    "value",
    [
        "'No. 12345 of %s' % 'x'",
        "'No. 12345 of {}'.format('x')",
        "'No. 12345 of %s' | format('x')",
        "'No. {b[12345]} of {a}'.format(a='x', b={12345: 12345})",
    ],
)
def test_digits_that_are_no_width(value):
    assert ChatTemplate("{{ " + value + " }}").render(HELLO) == "No. 12345 of x"


def test_a_template_survives_a_stopped_render(monkeypatch):
    monkeypatch.setattr(template_budget, "MAX_SECONDS", 0.1)
    source = ChatTemplate("{% if go %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok")
    with pytest.raises(RequestValidationError, match="runs for more than"):
        source.render(HELLO, go=True)
    assert source.render(HELLO) == "ok"


def test_only_plain_values_reach_a_template():
    class Secret(str):
        def reveal(self):
            return "secret"

    assert ChatTemplate("{{ messages[0].content.reveal is defined }} {{ messages[0].other }}").render(
        [{"role": "user", "content": Secret("x"), "other": object()}]
    ) == ("False <object>")


@pytest.mark.parametrize("unit", ["x", "a.", "[", "content", "arguments", "{{ a", "for x in ", " "])
def test_long_sources_are_looked_at_once(unit):
    """A pattern that tries every character of a long name as its start would take hours for what a file may hold."""
    start = time.thread_time()
    chat_template.MessageStyle.of(unit * (chat_template.MAX_SOURCE // len(unit)))
    assert time.thread_time() - start < 3
