"""Eager mode: a function of NumPy arrays is a program of its own, recorded, run once and forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cpu import compile_for_prompts, compile_graph
from .graph import TOKENS, Array, emit, recording
from .pool import available_threads
from .state import Limits

_BLOCK_SIZE = 32


def evaluate(
    function: Callable[..., Array],
    *arrays: NDArray[np.float32],
    tokens: NDArray[np.integer[Any]] | None = None,
    threads: int | None = None,
    as_prompt: bool = False,
) -> NDArray[np.float32]:
    """``function(*arrays)``, computed by the kernels that a recorded model would use, with the same fusions.

    Parameters
    ----------
    function
        Takes as many symbols as there are arrays, and returns one.
    arrays
        float32 ``[rows, columns]``. The rows of all are the tokens of one sequence, from its first position on.
    tokens
        The token ids, for an embedding.
    threads
        None: the cores that this process may use.
    as_prompt
        With the kernels that compute prompts, where those are others.
    """
    count = len(arrays[0]) if tokens is None else len(tokens)
    if any(array.ndim != 2 or len(array) != count for array in arrays):
        raise ValueError(f"expected arrays of {count} rows, got the shapes {[array.shape for array in arrays]}")
    no_inputs: tuple[Array, ...] = ()
    with recording() as graph:
        output = function(*(emit("input", no_inputs, columns=array.shape[1], rows=TOKENS, values=array) for array in arrays))
    if not graph.nodes or graph.nodes[-1].output is not output:
        raise ValueError("the function must return what it computed last")
    rows = max(1, count)
    blocks = -(-rows // _BLOCK_SIZE)
    limits = Limits(max_tokens=rows, max_outputs=rows, max_sequences=1, block_size=_BLOCK_SIZE, num_blocks=blocks, max_blocks=blocks)
    threads = threads or available_threads()
    program = compile_for_prompts(graph, limits, threads=threads)[0] if as_prompt else compile_graph(graph, limits, threads=threads)
    state = program.state
    if tokens is not None:
        limit = min(node.attributes["weight"].shape[0] for node in graph.nodes if node.op == "embedding")
        if count and not 0 <= np.min(tokens) <= np.max(tokens) < limit:
            raise ValueError(f"token ids must be 0 to {limit - 1}")
        state.tokens[:count] = tokens
    positions = np.arange(count)
    for array in (state.positions, state.output_rows):
        array[:count] = positions
    state.write_table(0, 0, range(blocks))
    state.cache_slots[0, :count] = state.slots(0, positions)[0]
    tiles = range(0, count, state.query_tile)
    for item, first in enumerate(tiles):
        state.items[item] = (first, min(state.query_tile, count - first), 0, -1, 0)
    state.counts[:5] = (count, count, len(tiles), 0, len(tiles))
    for rope in state.ropes:
        rope.prepare(count)
    program.run()
    result: NDArray[np.float32] = program.logits[:count].copy()
    return result
