"""Write tests/data/tool_call_goldens.json: answers with tool calls and reasoning, as each family's chat template renders them.

python make_tool_call_goldens.py DIR      (needs transformers)

The templates of tests/data imitate the forms of public models. DIR has the chat templates of such models themselves (`PUBLIC` says which;
llama.cpp's models/templates and vLLM's examples collect them); what they render must be read as well.

Messages are given to transformers in the form that each template takes. What an answer adds to the prompt, without the tokens that end it,
is what the model would generate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

DATA = Path(__file__).parent.parent / "data"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "anything-2", "description": "Any", "parameters": {"type": "object", "properties": {}}}},
]
WEATHER = ("get_weather", {"city": "Zürich", "days": 2})
TRICKY = (
    "anything-2",
    {
        "quote": 'say "hi" \\ {not} [an] object, </tool_cal>',
        "lines": "a\n\tb",
        "other": "日本 🎉",
        "nested": {"list": [1, -2.5, True, False, None, "x,y:z", []], "object": {}},
    },
)
EMPTY = ("anything-2", {})
CASES: dict[str, dict[str, Any]] = {
    "one": {"calls": [WEATHER]},
    "tricky": {"calls": [TRICKY]},
    "empty": {"calls": [EMPTY]},
    "two": {"calls": [WEATHER, TRICKY]},
    "three": {"calls": [WEATHER, EMPTY, WEATHER]},
    "content": {"content": 'It is 21° there. {"name": 3} <b>[x]</b>\n\nBye!', "calls": []},
    "content and call": {"content": "Let me look:", "calls": [WEATHER]},
    "reasoning": {"content": "Because.", "reasoning": "Hm.\n\nOr <not>?", "calls": []},
    "reasoning and call": {"content": "", "reasoning": "I should look.", "calls": [WEATHER]},
}
PUBLIC = {
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "qwen2.5",
    "Qwen-QwQ-32B": "qwen3",
    "Qwen-Qwen3-0.6B": "qwen3",
    "Qwen3-Coder": "qwen3-coder",
    "Qwen3.5-4B": "qwen3.5",
    "ibm-granite-granite-4.0": "qwen2.5",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3",
    "tool_chat_template_llama4_json": "llama4",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "tool_chat_template_mistral3": "mistral",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral-call-id",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral-named",
    "unsloth-mistral-Devstral-Small-2507": "mistral-named",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek-r1-distill",
    "deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1",
    "google-gemma-4-31B-it": "gemma4",
    "openai-gpt-oss-120b": "gpt-oss",
}
SINGLE = {"llama3", "gpt-oss"}  # one call in an answer
REASONING = {"qwen3", "qwen3.5", "gemma4", "gpt-oss"}
TEXT_ARGUMENTS = {"deepseek-r1", "deepseek-r1-distill", "deepseek-v3.1"}
CALLS_OR_TEXT = {"deepseek-r1-distill"}
UNLIKE_THE_MODEL = {
    ("llama4_json", "content and call"),  # it writes text right before a bare call; Llama's own sets it apart
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "three"),  # it ends the turn after the second call, and again after the third
    ("openai-gpt-oss-120b", "content and call"),  # it makes the text to reasoning
}
ENDS = (
    *("<|im_end|>\n", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "</s>", "<｜end▁of▁sentence｜>", "<|end|>", "<end_of_turn>\n", "<turn|>\n"),
    *("<|call|>", "<|return|>", "<|end_of_text|>\n", "<|tool_response>", "\n"),
)
USER = {"role": "user", "content": "Weather?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def assistant(name: str, case: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": case.get("content", "")}
    if "reasoning" in case:
        message |= {"reasoning_content": case["reasoning"], "thinking": case["reasoning"]}
    as_json = [json.dumps({"name": tool, "arguments": arguments}, ensure_ascii=False) for tool, arguments in case["calls"]]
    if name == "phi4" and as_json:
        message["content"] += f"<|tool_call|>[{', '.join(as_json)}]<|/tool_call|>"
    elif name in ("chatml", "gemma3") and as_json:
        message["content"] = "\n".join(as_json)
    elif as_json:
        message["content"] = None if name in CALLS_OR_TEXT else message["content"]
        message["tool_calls"] = [
            {
                "id": f"call0000{index}",
                "type": "function",
                "function": {"name": tool, "arguments": json.dumps(arguments, ensure_ascii=False) if name in TEXT_ARGUMENTS else arguments},
            }
            for index, (tool, arguments) in enumerate(case["calls"])
        ]
    return message


def render(source: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    options = {"bos_token": "<s>", "eos_token": "</s>", "tools": TOOLS, "add_generation_prompt": add_generation_prompt}
    return str(render_jinja_template([messages], chat_template=source, **options)[0][0])


def golden(name: str, source: str, label: str, case: dict[str, Any], model: str = "") -> dict[str, Any] | None:
    if (name in SINGLE and len(case["calls"]) > 1) or ("reasoning" in case and name not in REASONING):
        return None
    if (model, label) in UNLIKE_THE_MODEL or (name in CALLS_OR_TEXT and case["calls"] and case.get("content")):
        return None
    messages = [USER] if name.startswith(("mistral", "gemma")) else [SYSTEM, USER]
    prompt = render(source, messages, True)
    for reasoning in ("<think>\n", "<think>\n\n</think>\n\n", "<|channel>thought\n<channel|>"):  # which the answer has again
        prompt = prompt.removesuffix(reasoning)
    whole = render(source, [*messages, assistant(name, case)], False)
    # Some templates print a line end behind the role only when there is content.
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    opening = prompt[start:].lstrip("\n")
    answer = whole[start:].lstrip("\n") if opening else whole[start:]
    assert answer.startswith(opening), (name, model, label, prompt[start:], whole[start:])
    answer = answer.removeprefix(opening).removeprefix(" " if name == "mistral" and not model else "")  # which belongs to the template
    while end := next((end for end in ENDS if answer.endswith(end)), None):
        answer = answer.removesuffix(end)
    content = case.get("content", "")
    if name in ("chatml", "gemma3") and case["calls"]:
        content = ""
    return {
        "template": name,
        "models": [model] if model else [],
        "case": label,
        "answer": answer,
        "content": content if content in answer else "",
        "reasoning": case.get("reasoning", "") if case.get("reasoning", "") in answer else "",
        "calls": case["calls"],
    }


def without_repetitions(goldens: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """One of those with the same answer, with all the models that give it."""
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    for golden in filter(None, goldens):
        kept.setdefault((golden["template"], golden["answer"]), {**golden, "models": []})["models"] += golden["models"]
    return list(kept.values())


def main() -> None:
    files = [*(DATA / "tool_templates").glob("*.jinja")]
    files += [
        DATA / "chat_templates" / f"{name}.jinja"
        for name in ("hermes", "qwen2.5", "qwen3", "llama3", "mistral", "deepseek-r1", "chatml", "gemma3")
    ]
    goldens = []
    for file in sorted(files, key=lambda file: file.stem):
        goldens += [golden(file.stem, file.read_text(), label, case) for label, case in CASES.items()]
    for model, name in PUBLIC.items():
        source = (Path(sys.argv[1]) / f"{model}.jinja").read_text()
        goldens += [golden(name, source, label, case, model.removeprefix("tool_chat_template_")) for label, case in CASES.items()]
    lines = ",\n ".join(json.dumps(golden, ensure_ascii=False) for golden in without_repetitions(goldens))
    (DATA / "tool_call_goldens.json").write_text(f'{{"tools": {json.dumps(TOOLS)},\n "goldens": [\n {lines}\n ]}}\n')


if __name__ == "__main__":
    main()
