"""A recorded model on the CPU: lowered, its kernels compiled, its weights packed."""

from __future__ import annotations

from ..kernels.cpu.compiler import Progress, kernels_to_compile, load_kernels
from ..kernels.cpu.isa import current_isa
from .cpu_lowering import CpuLowering
from .cpu_program import CpuProgram
from .cpu_weights import TiledWeights
from .graph import Graph
from .output_rows import take_rows_early
from .state import Limits


def compile_graph(graph: Graph, limits: Limits, *, threads: int, progress: Progress | None = None) -> CpuProgram:
    """Lower a graph, compile what kernels are missing, begin to pack the weights, and return the program.

    Raises ModelLoadError if a weight's type or shape cannot be used.
    """
    return CpuLowering(take_rows_early(graph), limits, threads, _begin_packing(graph, threads)).finish(progress)


def compile_for_prompts(graph: Graph, limits: Limits, *, threads: int, progress: Progress | None = None) -> tuple[CpuProgram, CpuProgram]:
    """Two programs over the same weights and caches: for the tokens of prompts, and for those that are generated.

    It is one program unless the CPU multiplies tiles (`Isa.has_amx`): prompts, where many tokens go through each weight, are then
    multiplied in bfloat16, what is generated in int8 as everywhere.
    """
    weights = _begin_packing(graph, threads)
    graph = take_rows_early(graph)
    generated = CpuLowering(graph, limits, threads, weights)
    if graph.exact or not current_isa().has_amx:
        program = generated.finish(progress)
        return program, program
    prompts = CpuLowering(graph, limits, threads, weights, generated)
    load_kernels([*prompts.kernels(), *generated.kernels()], progress)  # those that are missing are compiled side by side
    program = generated.finish(progress)
    return prompts.finish(progress), program


def _begin_packing(graph: Graph, threads: int) -> TiledWeights:
    """The weights, which are packed while the graph is lowered if that takes no compiling."""
    weights = TiledWeights(graph.matrices)
    if not kernels_to_compile(weights.packers):
        weights.begin(threads)
    return weights
