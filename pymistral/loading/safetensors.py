"""A reader for safetensors files that trusts nothing in them and copies none of their data.

The layout (the format's README): eight bytes with the length of the header, the header as JSON (tensor name to dtype, shape and where its
bytes begin and end), then the bytes of all tensors without gaps. Everything is little endian.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from .gguf import MAGIC, OTHER_FORMATS, map_file
from .pickles import refuse_pickle

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_JSON_BYTES = 100_000_000  # of an index
MAX_DIMS = 8
REMEDY = "The file is damaged or incomplete: fetch it again."

FOREIGN = {**OTHER_FORMATS, MAGIC: "a GGUF file: name it .gguf"}

# bits of one element
DTYPES: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class StoredTensor(NamedTuple):
    """A tensor as a safetensors file holds it: ``data`` are its bytes, a view into the mapped file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


class SafetensorsFile:
    """An open safetensors file.

    Attributes
    ----------
    path
        Where it lies.
    metadata
        The free text entries of its header.
    tensors
        Name to tensor, in the header's order. The file stays mapped as long as any of them lives.
    """

    def __init__(self, path: Path, metadata: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsFile:
        """Map a file and check its header against its length.

        Raises
        ------
        ModelLoadError
            The file cannot be read, is no safetensors file, or contradicts itself.
        """
        path = Path(path)
        refuse_pickle(path)
        mapped = map_file(path)
        return _Header(path, np.frombuffer(mapped, np.uint8)).read()


class _Header:
    def __init__(self, path: Path, content: NDArray[np.uint8]) -> None:
        self.path = path
        self.content = content

    def fail(self, message: str, remedy: str = REMEDY) -> NoReturn:
        raise ModelLoadError(f"{self.path}: {message}. {remedy}")

    def read(self) -> SafetensorsFile:
        entries, data = self.split()
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self.fail("__metadata__ in the header is not an object of strings")
        tensors = {name: self.tensor(name, entry, data) for name, entry in entries.items()}
        self.check_layout(entries, data.size)
        return SafetensorsFile(self.path, metadata, tensors)

    def split(self) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """The parsed header, and the bytes behind it."""
        size = self.content.size
        start = self.content[:8].tobytes()
        length = int.from_bytes(start, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            if found := FOREIGN.get(start[:4]):
                self.fail(f"not a safetensors file: it starts with {start[:4]!r}", f"It is {found}.")
            self.fail(f"the header has a length of {length} bytes, beyond the end of the file at {size} or the limit of {MAX_HEADER_BYTES}")
        entries = parse_json(self.content[8 : 8 + length].tobytes(), f"{self.path}: the header", REMEDY)
        return entries, self.content[8 + length :]

    def tensor(self, name: str, entry: object, data: NDArray[np.uint8]) -> StoredTensor:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            self.fail(f"tensor {name[:80]!r} is {entry!r:.80} in the header, not an object of dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self.fail(f"tensor {name[:80]!r} has the unknown dtype {dtype!r:.40}", f"Known: {', '.join(DTYPES)}.")
        if not _whole_numbers(shape) or len(shape) > MAX_DIMS or prod(shape) >= 1 << 60:
            self.fail(f"tensor {name[:80]!r} has the impossible shape {shape!r:.80}")
        if not _whole_numbers(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data.size:
            self.fail(f"tensor {name[:80]!r} has the data_offsets {offsets!r:.80}; the file has {data.size} bytes of data")
        begin, end = offsets
        bits = prod(shape) * DTYPES[dtype]
        if bits % 8 or end - begin != bits // 8:
            self.fail(f"tensor {name[:80]!r} ({dtype} {tuple(shape)}) takes {bits / 8:g} bytes, but its data_offsets hold {end - begin}")
        return StoredTensor(self.path, name, dtype, tuple(shape), data[begin:end])

    def check_layout(self, entries: Mapping[str, Any], size: int) -> None:
        """Tensors follow each other without a gap, and fill the file."""
        expected, last = 0, "the start of the data"
        for (begin, end), name in sorted((entry["data_offsets"], name) for name, entry in entries.items()):
            if begin != expected:
                problem = "overlaps" if begin < expected else "leaves a gap behind"
                self.fail(f"tensor {name[:80]!r} at byte {begin} {problem} {last}, which ends at {expected}")
            expected, last = end, f"tensor {name[:80]!r}"
        if expected != size:
            self.fail(f"the file has {size} bytes of data, but its tensors end at {expected}")


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder: of ``model.safetensors``, else of the shards in ``model.safetensors.index.json``, else of the only file.

    Raises
    ------
    ModelLoadError
        There are no safetensors, or several and no index; a file is missing or damaged; the index contradicts the files.
    """
    if (folder / "model.safetensors").is_file():
        return SafetensorsFile.open(folder / "model.safetensors").tensors
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _read_shards(folder, index)
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith(("adapter", "consolidated")))
    if len(files) == 1:
        return SafetensorsFile.open(files[0]).tensors
    if files:
        raise ModelLoadError(f"{folder} holds {len(files)} safetensors files but no {index.name}. Fetch the folder again.")
    for file in sorted(folder.iterdir()):
        refuse_pickle(file)
    raise ModelLoadError(f"{folder} holds no safetensors: it is not a model that can be loaded")


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index}: it has no weight_map. {REMEDY}")
    shards: dict[str, SafetensorsFile] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise ModelLoadError(f"{index}: tensor {name[:80]!r} is said to be in {file!r:.80}, no safetensors file of this folder")
        if file not in shards:
            if not (folder / file).is_file():
                raise ModelLoadError(f"{index}: it lists the file {file}, which is not there. Fetch the folder again.")
            shards[file] = SafetensorsFile.open(folder / file)
        if name not in shards[file].tensors:
            raise ModelLoadError(f"{index}: tensor {name[:80]!r} is said to be in {file}, which does not hold it. Fetch the folder again.")
        tensors[name] = shards[file].tensors[name]
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError if it cannot be read, or is something else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelLoadError(f"{path}: it has {path.stat().st_size} bytes, above the limit of {MAX_JSON_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot read the file: {error.strerror or error}") from error
    return parse_json(content, f"{path}: the file", "Fetch it again.")


def parse_json(content: bytes, what: str, remedy: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice[:80]!r} is there twice")
        return entries

    try:
        value = json.loads(content.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{what} is not valid JSON: {str(error)[:200]}. {remedy}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{what} is not a JSON object. {remedy}")
    return value


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 60 for item in value)
