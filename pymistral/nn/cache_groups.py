"""Which layers share blocks of the KV cache.

Layers that see all positions keep all of them; those with a window need the latest only. So that blocks of one pool serve both, layers form
groups of the same number of layers and with one window each: a block holds some positions for the layers of one group, and a sequence has a
block table for each group. What a window has left behind goes back to the pool (as in vLLM's hybrid cache).
"""

from __future__ import annotations

from typing import NamedTuple

from .graph import Graph

_MOST_GROUPS = 8  # or so: each costs every sequence a block table in every step


class CacheGroups(NamedTuple):
    """How the layers of a model are grouped.

    Attributes
    ----------
    windows
        How many of the latest positions the layers of each group see; None: all.
    places
        The group of each layer, and which of its group's layers it is.
    """

    windows: tuple[int | None, ...]
    places: tuple[tuple[int, int], ...]


def cache_groups(graph: Graph) -> CacheGroups:
    """The groups of a model's layers; those that see everything come first."""
    layers = [node for node in graph.nodes if node.op == "attention"]
    of_window: dict[int | None, list[int]] = {}
    for layer, node in enumerate(layers):
        of_window.setdefault(node.attributes["window"], []).append(layer)
    shapes = {(node.inputs[1].columns, node.attributes["head_dim"]) for node in layers}
    if len(of_window) < 2 or len(shapes) > 1:
        widest = None if None in of_window else max((window for window in of_window if window), default=None)
        return CacheGroups((widest,), tuple((0, layer) for layer in range(len(layers))))
    size = max(min(map(len, of_window.values())), -(-len(layers) // _MOST_GROUPS))
    windows: list[int | None] = []
    places: dict[int, tuple[int, int]] = {}
    for window, members in sorted(of_window.items(), key=lambda item: item[0] or 0):
        for start in range(0, len(members), size):
            for place, layer in enumerate(members[start : start + size]):
                places[layer] = len(windows), place
            windows.append(window)
    return CacheGroups(tuple(windows), tuple(places[layer] for layer in range(len(layers))))
