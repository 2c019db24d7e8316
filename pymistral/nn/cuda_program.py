"""Programs of a model on an NVIDIA GPU: one for each size of step, each a captured graph of launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..kernels.cuda.launch import Launch
from .cuda import CudaModel, Size, stride_of
from .cuda_lowering import CudaLowering


@dataclass
class CudaProgram:
    """A captured graph of launches.

    Attributes
    ----------
    logits, stride
        Address of the first row of logits, float32, and floats from one row to the next.
    """

    launches: list[Launch]
    logits: int
    stride: int
    run: Callable[[], None]


class CudaPrograms:
    """The programs of a model, lowered and captured when a step of their size first comes."""

    def __init__(self, model: CudaModel) -> None:
        self.model = model
        self._programs: dict[Size, CudaProgram] = {}
        # The largest at once, so that memory that is too small shows when the model is built. With it come all weights.
        self.of(Size(model.limits.max_tokens, model.limits.max_outputs, model.can_prefill))

    def __contains__(self, size: Size) -> bool:
        return size in self._programs

    def of(self, size: Size) -> CudaProgram:
        """The one for steps up to a size."""
        known = self._programs.get(size)
        if known is None:
            self.model.arena.reset()
            lowering = CudaLowering(self.model, size)
            logits = self.model.graph.nodes[-1].output
            run = self.model.gpu.capture(lowering.launches)
            known = CudaProgram(lowering.launches, lowering.rows_of[logits].address, stride_of(logits.columns), run)
            self._programs[size] = known
        return known
