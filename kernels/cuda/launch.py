"""What a kernel is, and what a launch of one is: the seam between operations and whatever runs them, a GPU or a simulator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Kernel:
    """One compiled function.

    Attributes
    ----------
    name
        Of the entry point.
    source
        File in this folder.
    arguments
        A letter for each: ``p`` a pointer, ``i`` an int32, ``l`` an int64, ``f`` a float32.
    macros
        What the source is specialised by.
    min_arch
        The first compute capability that has the instructions, times ten.
    only_there
        No later one has them: the kernel is compiled for an "architecture-specific" target, sm_90a.
    """

    name: str
    source: str
    arguments: str
    macros: tuple[tuple[str, str], ...] = ()
    min_arch: int = 70
    only_there: bool = False

    def runs_on(self, arch: int) -> bool:
        """Whether a GPU of this compute capability, times ten, has the instructions."""
        return arch == self.min_arch if self.only_there else arch >= self.min_arch

    @property
    def options(self) -> tuple[str, ...]:
        """For NVRTC, nvcc and host compilers alike."""
        return tuple(f"-D{name}={value}" for name, value in self.macros)


class Launch(NamedTuple):
    """A kernel on a grid. Pointers are addresses; `shared` is bytes of dynamic shared memory."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    shared: int
    arguments: tuple[int | float, ...]


class Launcher(Protocol):
    """What runs launches: `device.Device`, or a simulator."""

    def launch(self, launch: Launch) -> None: ...


@cache
def source_text(name: str) -> str:
    """A source with the files that it includes, each once: a compiler needs no path, and a cache sees every change."""
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        lines = []
        for number, line in enumerate((_FOLDER / name).read_text().splitlines(), 1):
            if line.startswith('#include "'):
                lines += [text(line.split('"')[1]), f'#line {number + 1} "{name}"']
            elif line != "#pragma once":
                lines.append(line)
        return "\n".join([f'#line 1 "{name}"', *lines])

    return text(name) + "\n"
