"""What llama.cpp's quantiser makes of a few tensors: root mean square errors, for ``tests/quantization/test_isq_error.py``.

    python tests/scripts/make_isq_goldens.py FOLDER-OF-LLAMA_CPP/lib/libggml-base.so

``ggml_quantize_chunk`` is what ``llama_model_quantize`` calls for each tensor. Needs numpy and gguf, and llama-cpp-python 0.3.36's
library.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "quantization"))
from isq_tensors import TENSORS, TYPES

GOLDEN = Path(__file__).parents[1] / "quantization" / "isq_errors.npz"


def error(library: ctypes.CDLL, values: NDArray[np.float32], name: str) -> float:
    kind = gguf.GGMLQuantizationType[name]
    rows, columns = values.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros((rows, columns // block * size), np.uint8)
    written = library.ggml_quantize_chunk(
        ctypes.c_int(kind.value),
        values.ctypes.data_as(ctypes.c_void_p),
        blocks.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None,
    )
    assert written == blocks.size
    difference = gguf.quants.dequantize(blocks, kind).astype(np.float64) - values
    return float(np.sqrt((difference**2).mean()))


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    errors = {f"{tensor} {kind}": error(library, make(), kind) for tensor, make in TENSORS.items() for kind in TYPES}
    np.savez(GOLDEN, names=np.array(list(errors)), errors=np.array(list(errors.values())))


if __name__ == "__main__":
    main()
