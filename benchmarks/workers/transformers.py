"""transformers on PyTorch, with the file's weights dequantised to float32. Arguments: model file, threads, context."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.workers.protocol import prompt, quiet, serve, timed  # noqa: E402


def main() -> None:
    path, threads = Path(sys.argv[1]), int(sys.argv[2])
    quiet()
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    vocab_size = model.config.vocab_size

    def run(ids: list[int], cache: transformers.DynamicCache) -> int:
        logits = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def prefill(tokens: int) -> float:
        ids, cache = prompt(tokens, vocab_size), transformers.DynamicCache()
        return timed(lambda: run(ids, cache))

    def decode(tokens: int, context: int) -> float:
        cache = transformers.DynamicCache()
        if context:
            run(prompt(context, vocab_size), cache)

        def generate() -> None:
            token = 1
            for _ in range(tokens):
                token = run([token], cache)

        return timed(generate)

    serve(f"{transformers.__version__}, torch {torch.__version__}", prefill, decode, "float32 weights")


main()
