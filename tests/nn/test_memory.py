"""Memory of the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FREED_BETWEEN_OTHERS = """
from pathlib import Path
import numpy as np
from pymistral.nn.memory import give_back
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
blocks = [np.ones(12_000, np.uint8) for _ in range(4_000)]
last = blocks.pop()
del blocks
before = resident()
give_back()
print((before - resident()) >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_is_freed_goes_back_to_the_system() -> None:
    result = subprocess.run([sys.executable, "-c", FREED_BETWEEN_OTHERS], check=True, capture_output=True, text=True)
    assert int(result.stdout) > 30
