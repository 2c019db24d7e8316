"""llama.cpp through llama-cpp-python, by its C interface, as llama-bench does. Arguments: model file, threads, context."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.workers.protocol import prompt, quiet, serve, timed  # noqa: E402


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    quiet()
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        path, n_ctx=context, n_batch=2048, n_ubatch=512, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False
    )
    handle = model._ctx.ctx
    vocab_size = model.n_vocab()

    def clear() -> None:
        if hasattr(llama_cpp, "llama_memory_clear"):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle), True)
        else:
            llama_cpp.llama_kv_self_clear(handle)

    def evaluate(tokens: list[int]) -> None:
        for start in range(0, len(tokens), 2048):
            part = tokens[start : start + 2048]
            ids: Any = (llama_cpp.llama_token * len(part))(*part)
            if llama_cpp.llama_decode(handle, llama_cpp.llama_batch_get_one(ids, len(part))):
                raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(handle)

    def generate(tokens: int) -> None:
        token = 1
        for _ in range(tokens):
            evaluate([token])
            token = int(np.ctypeslib.as_array(llama_cpp.llama_get_logits(handle), shape=(vocab_size,)).argmax())

    def prefill(tokens: int) -> float:
        clear()
        ids = prompt(tokens, vocab_size)
        return timed(lambda: evaluate(ids))

    def decode(tokens: int, context: int) -> float:
        clear()
        evaluate(prompt(context, vocab_size))
        return timed(lambda: generate(tokens))

    def first_token(tokens: int, context: int) -> float:
        """Of a prompt that shares ``context`` tokens with the one before: these stay in the cache, as `Llama.generate` leaves them."""
        ids = prompt(tokens, vocab_size)
        clear()
        if context:
            evaluate([*ids[:context], *ids[:-context:-1]][:tokens])
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(handle), 0, context, -1)
        return timed(lambda: evaluate(ids[context:]))

    serve(llama_cpp.__version__, prefill, decode, first_token=first_token)


main()
