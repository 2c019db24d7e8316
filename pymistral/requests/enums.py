"""Enums that also take their plain value."""

from __future__ import annotations

from enum import Enum

from ..errors import RequestValidationError


class PlainEnum(str, Enum):
    """A string enum: ``E("value")`` works in any case, a bad value is answered with the good ones, and ``str`` gives the value."""

    @classmethod
    def _missing_(cls, value: object) -> PlainEnum:
        for member in cls:
            if isinstance(value, str) and value.lower() == member.value:
                return member
        valid = ", ".join(repr(member.value) for member in cls)
        raise RequestValidationError(f"{cls.__name__}: {value!r} is not one of {valid}")

    def __str__(self) -> str:
        return str(self.value)
