"""Where a model computes, and in which floats."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ModelLoadError
from .enums import OptionEnum


@dataclass(frozen=True)
class Device:
    """Where a model computes: `Device.cpu()`, or `Device.cuda(0)`. The strings ``"cpu"``, ``"cuda"`` and ``"cuda:1"`` say the same."""

    kind: str
    index: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "cuda") or not isinstance(self.index, int) or isinstance(self.index, bool) or self.index < 0:
            raise ModelLoadError(f"a device is Device.cpu() or Device.cuda(0), Device.cuda(1), ...; got {self.kind!r}, {self.index!r}")

    @classmethod
    def cpu(cls) -> Device:
        """The processor."""
        return cls("cpu")

    @classmethod
    def cuda(cls, index: int = 0) -> Device:
        """An NVIDIA GPU, by its number among those that CUDA shows."""
        return cls("cuda", index)

    @classmethod
    def parse(cls, value: Device | str) -> Device:
        """A device, or the string that names one. Raises ModelLoadError if it names none."""
        if isinstance(value, Device):
            return value
        found = re.fullmatch(r"(cpu|cuda)(?::(\d{1,4}))?", value) if isinstance(value, str) else None
        if found is None or (found[1] == "cpu" and found[2]):
            raise ModelLoadError(f"device must be Device.cpu(), Device.cuda(0), 'cpu' or 'cuda:0', got {value!r}")
        return cls(found[1], int(found[2] or 0))

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


class ModelDType(OptionEnum):
    """The floats that weights which are not quantised are kept and multiplied in. AUTO: those of the checkpoint."""

    AUTO = "auto"
    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"

    @classmethod
    def _called(cls) -> str:
        return "dtype"
