"""Load one GGUF file of a repository on Hugging Face.

python examples/getting_started/gguf.py [REPOSITORY FILE]
"""

import asyncio
import sys

from pymistral import GgufModelBuilder, RequestBuilder

REPOSITORY, FILE = sys.argv[1:3] if len(sys.argv) > 2 else ("bartowski/SmolLM2-1.7B-Instruct-GGUF", "SmolLM2-1.7B-Instruct-Q4_K_M.gguf")


async def main() -> None:
    async with await GgufModelBuilder(REPOSITORY, [FILE]).build() as model:
        request = RequestBuilder().add_message("user", "Write one sentence about the sea.").set_sampler_max_len(60)
        response = await model.send_chat_request(request)
        print(response.choices[0].message.content)


asyncio.run(main())
