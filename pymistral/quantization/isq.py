"""The types of in-situ quantisation (ISQ). No NumPy here, so that builders need none."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum

from ..errors import ModelLoadError


class IsqType(str, Enum):
    """What weights are quantised to when they are loaded. ``IsqType("q4k")`` takes the plain value in any case.

    The formats are GGUF's (`Q4_0` to `Q6K`, `MXFP4`), or `F8E4M3` (value ``"fp8"``), E4M3 floats with a scale for each row. The others
    are mistral.rs's; asking for one says which are supported.
    """

    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q8_0 = "q8_0"
    Q8_1 = "q8_1"
    Q2K = "q2k"
    Q3K = "q3k"
    Q4K = "q4k"
    Q5K = "q5k"
    Q6K = "q6k"
    Q8K = "q8k"
    HQQ8 = "hqq8"
    HQQ4 = "hqq4"
    F8E4M3 = "fp8"
    AFQ8 = "afq8"
    AFQ6 = "afq6"
    AFQ4 = "afq4"
    AFQ3 = "afq3"
    AFQ2 = "afq2"
    F8Q8 = "f8q8"
    MXFP4 = "mxfp4"

    @classmethod
    def _missing_(cls, value: object) -> IsqType:
        if isinstance(value, str):
            wanted = value.lower()
            for member in cls:
                if wanted in (member.value, member.name.lower()):
                    return member
        raise ModelLoadError(f"ISQ type {value!r:.80} is not known. Supported: {_supported()}, and the bits 2, 3, 4, 5, 6 and 8.")

    @classmethod
    def of(cls, value: IsqType | IsqBits | str | int) -> IsqType:
        """The type that is meant: itself, its plain value, or the best one of so many bits.

        Raises
        ------
        ModelLoadError
            There is no such type, or it is not supported.
        """
        if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
            return IsqBits(int(value)).type
        type = cls(value)
        if type not in LAYOUTS:
            raise ModelLoadError(f"ISQ type {type.value!r} is not supported on the CPU. Supported: {_supported()}.")
        return type

    def __str__(self) -> str:
        return self.value


class IsqBits(IntEnum):
    """So many bits for a weight; the type that is fast and accurate here is chosen."""

    TWO = 2
    THREE = 3
    FOUR = 4
    FIVE = 5
    SIX = 6
    EIGHT = 8

    @classmethod
    def _missing_(cls, value: object) -> IsqBits:
        raise ModelLoadError(f"ISQ: {value!r:.80} is not one of 2, 3, 4, 5, 6 and 8 bits")

    @property
    def type(self) -> IsqType:
        """The type of this width."""
        return _OF_BITS[self]


# supported type -> tile format
LAYOUTS: Mapping[IsqType, str] = {
    IsqType.Q4_0: "q4_0",
    IsqType.Q4_1: "q4_1",
    IsqType.Q5_0: "q5_0",
    IsqType.Q5_1: "q5_1",
    IsqType.Q8_0: "q8_0",
    IsqType.Q2K: "q2_k",
    IsqType.Q3K: "q3_k",
    IsqType.Q4K: "q4_k",
    IsqType.Q5K: "q5_k",
    IsqType.Q6K: "q6_k",
    IsqType.F8E4M3: "f8e4m3",
    IsqType.MXFP4: "mxfp4",
}
_OF_BITS = {
    IsqBits.TWO: IsqType.Q2K,
    IsqBits.THREE: IsqType.Q3K,
    IsqBits.FOUR: IsqType.Q4K,
    IsqBits.FIVE: IsqType.Q5K,
    IsqBits.SIX: IsqType.Q6K,
    IsqBits.EIGHT: IsqType.Q8_0,
}


def _supported() -> str:
    return ", ".join(type.value.upper() for type in LAYOUTS)
