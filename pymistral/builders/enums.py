"""Enums of the builders' options, which also take their plain value."""

from __future__ import annotations

from enum import Enum

from ..errors import ModelLoadError


class OptionEnum(str, Enum):
    """``E("value")`` works in any case; a bad value is answered with the good ones."""

    @classmethod
    def _called(cls) -> str:
        """What an error calls the option."""
        return cls.__name__

    @classmethod
    def _missing_(cls, value: object) -> OptionEnum:
        for member in cls:
            if isinstance(value, str) and value.lower() == member.value:
                return member
        known = ", ".join(repr(member.value) for member in cls)
        raise ModelLoadError(f"{cls._called()} must be one of {known}, got {value!r}")
