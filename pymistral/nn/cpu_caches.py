"""Where keys and values lie in memory on the CPU."""

from __future__ import annotations

import numpy as np

from ..kernels.cpu import geometry
from .cache_groups import cache_groups
from .graph import Graph
from .lowering import Buffer
from .memory import address, zeros
from .state import Limits


class Caches:
    """Keys and values of all layers.

    A block of the pool is one piece of memory, with the keys and the values of each layer of a group as its parts. So the memory can be of
    huge pages, and sequences take no more of them than they fill. Kernels know one layer's blocks of one part each, whose numbers are
    those of the pool times `parts`.

    Attributes
    ----------
    layout
        How keys and values are stored (see `geometry.cache_layout`).
    parts
        Parts of a block; 1 if each layer's keys, and values, are an array of their own: layers differ, or numbers would be too large.
    """

    def __init__(self, graph: Graph, limits: Limits) -> None:
        self.layout: str = geometry.cache_layout(graph.cache_type(limits.cache_type, geometry.usual_cache_type()))
        layers = [node for node in graph.nodes if node.op == "attention"]
        self._places = cache_groups(graph).places if limits.groups > 1 else tuple((0, layer) for layer in range(len(layers)))
        shapes = {}  # of a block, at each place of a group
        for (_, place), node in zip(self._places, layers, strict=True):
            head_dim = node.attributes["head_dim"]
            shapes[place] = node.inputs[1].columns // head_dim, limits.block_size * geometry.cache_row_bytes(self.layout, head_dim)
        self.parts = 2 * len(shapes)
        if len(set(shapes.values())) == 1 and limits.num_blocks * self.parts * limits.block_size < 1 << 31:
            memory = zeros((limits.num_blocks, self.parts, *shapes[0]), np.uint8, huge_pages=True)
            arrays = [memory[:, part] for part in range(self.parts)]
        else:
            self.parts = 1
            arrays = [zeros((limits.num_blocks, *shape), np.uint8) for shape in shapes.values() for _ in range(2)]
        buffers = [Buffer(array, address(array)) for array in arrays]
        self._buffers = dict(zip(shapes, zip(buffers[::2], buffers[1::2], strict=True), strict=True))

    def of_layer(self, layer: int) -> tuple[int, Buffer, Buffer]:
        """Its group, keys and values."""
        group, place = self._places[layer]
        return group, *self._buffers[place]
