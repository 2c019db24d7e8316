"""What Linux says of a process's memory."""

from __future__ import annotations

from pathlib import Path


def resident(path: Path) -> int:
    """KiB of a mapped file that are in this process's memory."""
    total, own = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            own = line.endswith(str(path.resolve()))
        elif own and name == "Rss:":
            total += int(values[0])
    return total
