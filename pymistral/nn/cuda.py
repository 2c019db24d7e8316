"""A recorded model on an NVIDIA GPU: the weights, caches, state and memory that programs for steps of every size share."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import ModelLoadError
from ..kernels.cpu.compiler import Progress
from ..kernels.cuda import attention
from ..kernels.cuda.attention import Heads
from .cuda_gpu import GpuLike
from .cuda_weights import GpuWeights
from .graph import Graph, Node
from .memory import address
from .rope import Rope
from .state import Limits, State

_ARENA_BYTES = 64 << 20  # taken from the device at a time


def stride_of(columns: int) -> int:
    """Columns from one row to the next."""
    return -(-columns // 32) * 32


class Size(NamedTuple):
    """What a program is made for: rows at most, and whether tokens of one sequence share the work of attention."""

    tokens: int
    outputs: int
    prefill: bool


class CudaModel:
    """A recorded model on a GPU: what its programs share.

    Attributes
    ----------
    state
        What changes between steps, in pinned memory; fill it, `copy_state`, and run a program.
    query_tile
        Tokens in an item of attention, at most.
    """

    def __init__(self, graph: Graph, limits: Limits, gpu: GpuLike, progress: Progress | None = None) -> None:
        self.graph, self.limits, self.gpu = graph, limits, gpu
        self.weights = GpuWeights(gpu, progress)
        self.state = State(limits, gpu.pinned, item_words=3)
        self._state_address = gpu.allocate(self.state.memory.nbytes)
        self.arena = Arena(gpu)
        self.rotations: dict[Rope, int] = {}
        self._uploaded: dict[Rope, int] = {}
        self.heads = {id(node): self._cache(node) for node in graph.nodes if node.op == "attention"}
        self.can_prefill = all(attention.can_prefill(heads, gpu.arch) for heads in self.heads.values())
        self.query_tile = min((attention.query_tile_tokens(heads) for heads in self.heads.values()), default=1) if self.can_prefill else 1
        self.arrived = gpu.allocate(4 * limits.max_tokens * max((heads.heads for heads in self.heads.values()), default=0))

    def _cache(self, node: Node) -> Heads:
        q, k, _ = node.inputs
        head_dim = node.attributes["head_dim"]
        if head_dim % 16 or head_dim > 256:
            raise ModelLoadError(f"heads of {head_dim} dimensions are not supported on a GPU: they must be a multiple of 16, up to 256")
        limits = self.limits
        cache_type = self.graph.cache_type(limits.cache_type)
        if cache_type not in attention.CACHE_ITEM_BYTES:
            known = " and ".join(attention.CACHE_ITEM_BYTES)
            raise ModelLoadError(f"a KV cache of {cache_type} is there on the CPU only; on a GPU there are {known}")
        nbytes = limits.num_blocks * limits.block_size * k.columns * attention.CACHE_ITEM_BYTES[cache_type]
        keys, values = self.gpu.allocate(nbytes), self.gpu.allocate(nbytes)
        rope: Rope | None = node.attributes["rope"]
        if rope is not None and rope not in self.rotations:
            self.rotations[rope] = self.gpu.allocate(rope.table.nbytes)
            self._uploaded[rope] = 0
            self.state.ropes.append(rope)
        return Heads(q.columns // head_dim, k.columns // head_dim, head_dim, keys, values, limits.block_size, cache_type == "f32")

    def place(self, array: Any) -> int:
        """Where the device has one of the state's arrays."""
        return self._state_address + address(array) - address(self.state.memory)

    def count(self, name: str) -> int:
        return self._state_address + self.state.count_address(name) - address(self.state.memory)

    def copy_state(self, sequences: int) -> None:
        """Bring the state of so many sequences to the device, and rotations that are new."""
        self.gpu.copy_in(self._state_address, self.state.memory[: self.state.used_bytes(sequences)])
        for rope, done in self._uploaded.items():
            if rope.ready > done:
                row = rope.table[0].nbytes
                self.gpu.copy_in(self.rotations[rope] + done * row, rope.table[done : rope.ready])
                self._uploaded[rope] = rope.ready


class Arena:
    """Memory for what lives during one step only: all programs have the same."""

    def __init__(self, gpu: GpuLike) -> None:
        self.gpu = gpu
        self._blocks: list[tuple[int, int]] = []  # address, bytes
        self.reset()

    def reset(self) -> None:
        """Begin anew, for another program."""
        self._left = list(self._blocks)

    def take(self, nbytes: int) -> int:
        """An address that is a multiple of 256."""
        nbytes = -(-nbytes // 256) * 256
        for index, (start, left) in enumerate(self._left):
            if nbytes <= left:
                self._left[index] = (start + nbytes, left - nbytes)
                return start
        size = max(nbytes, _ARENA_BYTES)
        start = self.gpu.allocate(size)
        self._blocks.append((start, size))
        self._left.append((start + nbytes, size - nbytes))
        return start
