"""The user's cache folder: what takes long to find out or to compile is kept there for the next start."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder(name: str = "kernels") -> Path:
    """``$PYMISTRAL_CACHE/name``, or a folder of the user's cache."""
    root = os.environ.get("PYMISTRAL_CACHE")
    if root:
        return Path(root) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pymistral" / name


def write(path: Path, data: bytes) -> None:
    """Write a file by rename, so that whoever reads it finds all of it or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(data)
            file.flush()  # no fsync: what a crash damages, a checksum finds
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
