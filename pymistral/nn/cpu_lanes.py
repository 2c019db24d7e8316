"""Steps in which each thread takes streams of its own from one end of a model to the other: its lane.

By default all threads share each launch, so that each launch has to wait for the one before, and activations go from core to core and back:
2,500 lines of the cache for each layer and core, with 16 tokens of a small model (SmolLM2). Where cores have no cache in common that takes
a fifth of all the time. But as long as every token is a sequence of its own, nothing that is computed for it depends on the others. Each
thread then reads all weights, which whole panels of tokens hide.

They do where the memory has enough to give (AMD's). Where it has not (Intel's, `Isa.far_cache`), threads share the large products of
quants, which two panels then meet at once, and have lanes of their own in between.

The rows of two lanes lie a panel apart. Next to each other a core's own prefetching would run on into rows that the other core is writing,
which costs as much as was to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.cpu.executor_layout import NEEDS_ALL, NEEDS_SHARE
from ..kernels.cpu.geometry import most_read_twice, panel_tokens, panels_at_once
from .graph import OUTPUTS, TOKENS
from .memory import address
from .state import State

if TYPE_CHECKING:
    from .cpu_launches import Launch

_SMALL = 2 << 20  # bytes: of a model with no larger matrix, activations take about as long as unpacking
_BY_SEQUENCE = (OUTPUTS, "items", "output_items")  # counts of one for each sequence


def lanes_of(threads: int) -> int:
    """How many lanes there are: two for two threads, else none. Each thread more would read all weights once more."""
    return threads if threads == 2 else 0


class Rows(NamedTuple):
    """How a product, whose units are tiles of weights, is made to take some rows of its input alone: by other arguments."""

    strides: dict[int, int]  # slots that hold addresses of rows, and bytes from one row to the next
    count_slot: int  # of the address of the number of rows
    blocks_slot: int | None = None  # of the address of the blocks of the cache that it asks for, if it does; see `matmul.gated_matmul`
    lane_slot: int | None = None  # of the panels of a lane, if it can take the rows of all lanes


def in_lanes(
    launches: Sequence[Launch],
    records: Sequence[Sequence[int]],
    logits: int,
    state: State,
    kernels: tuple[int, int],
    panels: int,
    alive: list[Any],
) -> list[list[int]]:
    """The records of a program with lanes of so many panels. Launches before number ``logits`` become one of the first of the ``kernels``
    (`executor.lane`), or several if there are such between them as threads share. If there are none, that one becomes one of the other
    (`executor.by_lane`), so that who is done first need not wait.

    Nothing if a launch that is for tokens cannot be divided by them, or if it is not worth it: panels of two lanes do not share what is
    unpacked, as two panels in one do. What the records refer to is appended to ``alive``.
    """
    few = panels < panels_at_once()
    shared = [_is_shared(launch) for launch in launches[:logits]]
    alone = [launch.weights[1] for launch, is_shared in zip(launches, shared, strict=False) if not is_shared]
    if few and max(alone, default=0) > _SMALL:
        return []
    end = next((index for index, launch in enumerate(launches[:logits]) if not _by_token(launch)), logits)
    if any(launch.for_tokens for launch in launches[end:]) or not any(launch.product_rows for launch in launches[:end]):
        return []
    lane, by_lane = kernels
    one, count = state.count_address("one"), len(state.lanes)
    result: list[list[int]] = []
    for is_shared, run in groupby(range(end), shared.__getitem__):
        some, rows = zip(*((launches[index], records[index]) for index in run), strict=True)
        if is_shared:
            result += [_shared(*both, state, panels, alive) for both in zip(some, rows, strict=True)]
            continue
        table = _table(some, np.array(rows, np.int64), state, panels, alive)
        slots = np.array([address(table), len(some)], np.int64)
        alive += [table, slots]
        result.append([lane, address(slots), one, count, 1, NEEDS_ALL if result else 0, *rows[0][6:]])
    if end == logits < len(launches) and launches[end].product_rows is not None and not (any(shared) or _is_shared(launches[end])):
        kernel, _, _, units, chunk, _, *weights = records[end]
        arguments = _arguments(launches[end], state, panels)
        slots = np.array([kernel, address(arguments), arguments.strides[0], units], np.int64)
        alive += [arguments, slots]
        result.append([by_lane, address(slots), one, count * units, chunk, NEEDS_SHARE, *weights])
        end += 1
    return result + [[*record[:5], NEEDS_ALL, *record[6:]] for record in records[end:]]


def _is_shared(launch: Launch) -> bool:
    """Whether a product has more weights (a gated one: in each of its two matrices) than it is worth that each thread reads them, and can
    take the rows of all lanes."""
    rows = launch.product_rows
    return rows is not None and rows.lane_slot is not None and launch.weights[1] > most_read_twice()


def _shared(launch: Launch, record: Sequence[int], state: State, panels: int, alive: list[Any]) -> list[int]:
    """The record of a product whose units any thread takes, for the rows of all lanes."""
    rows = launch.product_rows
    assert rows is not None
    assert rows.lane_slot is not None
    kernel, _, one, units, chunk, _, *weights = record
    if launch.slots[rows.count_slot] != state.count_address(TOKENS):
        return [*record[:5], NEEDS_ALL, *weights]  # of rows that lie together
    lanes = len(state.lanes)
    slots, tokens = np.array(launch.slots, np.int64), np.array([lanes * panels * panel_tokens()], np.int64)
    slots[[rows.count_slot, rows.lane_slot]] = address(tokens), panels
    if rows.blocks_slot is not None and slots[rows.blocks_slot]:
        of_lane = state.read_blocks.strides[0]
        slots[rows.blocks_slot] += of_lane
        slots[rows.lane_slot + 1 : rows.lane_slot + 3] = lanes, of_lane
    alive += [slots, tokens]
    return [kernel, address(slots), one, units, chunk, NEEDS_ALL, *weights]


def _by_token(launch: Launch) -> bool:
    return launch.product_rows is not None or launch.rows in (TOKENS, "merges", *_BY_SEQUENCE)


def _table(launches: Sequence[Launch], records: NDArray[np.int64], state: State, panels: int, alive: list[Any]) -> NDArray[np.int64]:
    """The launches of each lane, int64 ``[lanes][launches][8]``, as `executor.lane` takes them."""
    lanes = range(len(state.lanes))
    table = np.repeat(records[None], len(lanes), axis=0)
    everything, nothing = (np.array(bounds, np.int64) for bounds in ((0, 1), (0, 0)))
    alive += [everything, nothing]
    for index, launch in enumerate(launches):
        rows = launch.product_rows
        if rows is None:
            by_sequence = int(launch.rows in _BY_SEQUENCE)
            table[:, index, 2] = address(nothing) if launch.rows == "merges" else [address(state.lanes[i, by_sequence]) for i in lanes]
            continue
        slots = _arguments(launch, state, panels)
        alive.append(slots)
        table[:, index, 1] = [address(slots[lane]) for lane in lanes]
        table[:, index, 2] = address(everything)
    return table


def _arguments(launch: Launch, state: State, panels: int) -> NDArray[np.int64]:
    """The slots of a product for each lane, int64 ``[lanes][slots]``."""
    rows, lanes = launch.product_rows, range(len(state.lanes))
    assert rows is not None
    by_sequence = int(launch.slots[rows.count_slot] != state.count_address(TOKENS))
    apart = (panels if by_sequence else panels + 1) * panel_tokens()
    slots = np.repeat(np.array([launch.slots], np.int64), len(lanes), axis=0)
    for slot, stride in rows.strides.items():
        slots[:, slot] += [lane * apart * stride for lane in lanes]
    slots[:, rows.count_slot] = [address(state.lanes[lane, by_sequence, 2:]) for lane in lanes]
    if rows.blocks_slot is not None and launch.slots[rows.blocks_slot]:
        slots[:, rows.blocks_slot] += [(1 + lane) * state.read_blocks.strides[0] for lane in lanes]
    return slots
