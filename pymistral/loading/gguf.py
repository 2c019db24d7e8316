"""A reader for GGUF v2 and v3 that trusts nothing in the file and copies none of its data.

The layout (ggml's docs/gguf.md): magic, version, number of tensors, number of metadata keys; the key/value pairs; the tensor
infos (name, dimensions, type, offset); padding up to the alignment; the tensors' bytes. Everything is little endian.

Every number is checked against the file's length before anything is sized by it, so the memory that a file can claim stays on its
own scale.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..quantization.types import BLOCK_SIZES, GgmlType, Tensor, tensor_nbytes
from .string_chains import find_chain, raw_strings, strings_of

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME_BYTES = 65535  # the specification's limit for keys; tensor names are far shorter
MAX_STRING_BYTES = 1 << 26  # the longest strings known, chat templates, have tens of kilobytes
MAX_OBJECTS = 1 << 24  # strings or inner arrays in one array: each becomes a Python object. The largest vocabularies have half a million
MAX_NESTING = 4
REMEDY = "The file is damaged or incomplete: fetch or convert it again."

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: dict[int, struct.Struct] = {
    type: struct.Struct("<" + code)
    for type, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}.items()
}
DTYPES: dict[int, np.dtype[Any]] = {type: np.dtype(form.format) for type, form in SCALARS.items()}
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
SHAPE_TYPE_OFFSET = {dims: struct.Struct(f"<{dims}QIQ") for dims in range(1, MAX_DIMS + 1)}  # of a tensor

PRE_GGUF = "a GGML file from before GGUF: convert the original model again"
OTHER_FORMATS = {
    b"lmgg": PRE_GGUF,
    b"fmgg": PRE_GGUF,
    b"tjgg": PRE_GGUF,
    b"PK\x03\x04": "a zip archive (a PyTorch checkpoint or a wheel?): unpack it first",
    b"vers": "a Git LFS pointer, it seems, not the file itself: fetch it with `git lfs pull`",
    b"<!DO": "a web page, it seems: the download went wrong",
    b"<htm": "a web page, it seems: the download went wrong",
}


class LazyArray(NamedTuple):
    """Where an array lies in the file; it has been walked over once, so its lengths are known to fit."""

    type: int
    length: int
    start: int
    stop: int
    string_starts: NDArray[Any] | None


class Metadata(Mapping[str, object]):
    """The key/value pairs. Arrays are decoded when first asked for: numbers to (read-only) NumPy arrays, others to lists or the like."""

    def __init__(self, reader: _Reader, values: dict[str, object]) -> None:
        self._reader = reader
        self._values = values

    def __getitem__(self, key: str) -> object:
        value = self._values[key]
        if isinstance(value, LazyArray):
            value = self._values[key] = self._reader.array(value, key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def length(self, key: str) -> int | None:
        """Of an array, which is not decoded for that; None if there is none."""
        value = self._values.get(key)
        if isinstance(value, LazyArray):
            return value.length
        return len(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else None

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def forget(self) -> None:
        """Let the system take back the memory of this part of the mapped file; it is read again if need be."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._reader.buffer.madvise(mmap.MADV_DONTNEED, 0, self._reader.position)


class GgufFile:
    """An open GGUF file.

    Attributes
    ----------
    path
        Where it lies.
    version
        2 or 3.
    alignment
        What tensor offsets are multiples of.
    metadata
        Key to value; arrays are decoded lazily.
    tensors
        Name to tensor, in file order. The data are views into the mapped file, which stays open as long as any of them lives.
    """

    def __init__(self, path: Path, version: int, alignment: int, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
        self.path = path
        self.version = version
        self.alignment = alignment
        self.metadata = metadata
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map a file and read its header.

        Raises
        ------
        ModelLoadError
            The file cannot be read, is no GGUF file, or says something impossible.
        """
        path = Path(path)
        reader = _Reader(path, map_file(path))
        version = reader.magic_and_version()
        tensor_count = reader.u64("tensor_count")
        key_count = reader.u64("kv_count")
        # a key takes 13 bytes at least (length, type, one byte of value), a tensor info 33
        reader.check_count("kv_count", key_count, 13)
        reader.check_count("tensor_count", tensor_count, 33)
        metadata = reader.metadata(key_count)
        alignment = reader.alignment(metadata)
        infos = reader.tensor_infos(tensor_count)
        return cls(path, version, alignment, metadata, reader.tensors(infos, alignment))


class _TensorInfo(NamedTuple):
    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading. Raises ModelLoadError if it is missing, empty, or no file."""
    try:
        if not path.exists():
            raise ModelLoadError(f"{path}: no such file. Check the path.")
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise ModelLoadError(f"{path}: not a regular file. Give the path of a model file.")
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise ModelLoadError(f"{path}: the file is empty. {REMEDY}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot read the file: {error}") from error


class _Reader:
    """A cursor over the mapped header."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.buffer = mapped
        self.size = len(mapped)
        self.position = 0

    def fail(self, message: str, remedy: str = REMEDY) -> NoReturn:
        raise ModelLoadError(f"{self.path}: {message}. {remedy}")

    # numbers and strings

    def numbers(self, form: struct.Struct, what: str) -> tuple[Any, ...]:
        if form.size > self.size - self.position:
            self.fail(f"the file ends at byte {self.size}, within {what}")
        values = form.unpack_from(self.buffer, self.position)
        self.position += form.size
        return values

    def number(self, form: struct.Struct, what: str) -> Any:
        return self.numbers(form, what)[0]

    def u32(self, what: str) -> int:
        return int(self.number(U32, what))

    def u64(self, what: str) -> int:
        return int(self.number(U64, what))

    def check_count(self, what: str, count: int, least_bytes: int) -> None:
        if count > (self.size - self.position) // least_bytes:
            self.fail(f"{what} is {count}, more than the {self.size} bytes of the file can hold")

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.u64(f"the length of {what}")
        if length > min(limit, self.size - self.position):
            self.fail(f"{what} has a length of {length} bytes, beyond the end of the file or the limit of {limit}")
        start, self.position = self.position, self.position + length
        try:
            return self.buffer[start : self.position].decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} at byte {start} is not valid UTF-8 ({error.reason})")

    # the head

    def magic_and_version(self) -> int:
        magic = self.buffer[:4]
        if magic != MAGIC:
            found = OTHER_FORMATS.get(magic)
            remedy = f"It is {found}." if found else "Give the path of a .gguf file."
            self.fail(f"not a GGUF file: it starts with {magic!r}, not {MAGIC!r}", remedy)
        self.position = 4
        version = self.u32("the version")
        if version & 0xFFFF == 0 and version:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            self.fail(f"this is a big-endian GGUF v{swapped} file", "Convert it to little endian (`gguf-convert-endian FILE little`).")
        if version == 1:
            self.fail("this is a GGUF v1 file, which is no longer supported", "Convert the model again; current tools write v3.")
        if version not in (2, 3):
            self.fail(f"GGUF version {version} is unknown; 2 and 3 are supported", "Is the file damaged, or newer than this program?")
        return version

    def alignment(self, metadata: Metadata) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or value < 8 or value & (value - 1):
            shown = f"an {type(value).__name__}" if isinstance(value, np.ndarray | Sequence) and not isinstance(value, str) else repr(value)
            self.fail(f"general.alignment is {shown}, not a power of two of at least 8")
        return value

    # metadata

    def metadata(self, count: int) -> Metadata:
        values: dict[str, object] = {}
        for index in range(count):
            key = self.string(f"metadata key {index}", MAX_NAME_BYTES)
            if not key or key in values:
                self.fail(f"metadata key {index} is a duplicate of {key!r}" if key else f"metadata key {index} is empty")
            values[key] = self.value(self.u32(f"the type of {key!r}"), key)
        return Metadata(self, values)

    def value(self, type: int, key: str) -> object:
        if type == STRING:
            return self.string(f"the value of {key!r}")
        if type == ARRAY:
            return self.skip_array(key, MAX_NESTING)
        if type not in SCALARS:
            self.fail(f"the metadata key {key!r} has the unknown type {type}")
        value = self.number(SCALARS[type], f"the value of {key!r}")
        return bool(value) if type == BOOL else value

    def skip_array(self, key: str, nesting: int) -> LazyArray:
        """Step over an array, checking that all of it lies in the file."""
        type = self.u32(f"the element type of the array {key!r}")
        count = self.u64(f"the length of the array {key!r}")
        start = self.position
        string_starts = None
        what = f"the length of the array {key!r}"
        if type in SCALARS:
            self.check_count(what, count, SCALARS[type].size)
            self.position += count * SCALARS[type].size
        elif type in (STRING, ARRAY):
            self.check_count(what, count, 8 if type == STRING else 12)
            if count > MAX_OBJECTS:
                self.fail(f"{what} is {count}, above the limit of {MAX_OBJECTS}")
            if type == STRING:
                string_starts = self.skip_strings(key, count)
            elif nesting == 1:
                self.fail(f"the array {key!r} nests arrays more than {MAX_NESTING} deep")
            else:
                for _ in range(count):
                    self.skip_array(key, nesting - 1)
        else:
            self.fail(f"the array {key!r} has the unknown element type {type}")
        return LazyArray(type, count, start, self.position, string_starts)

    def skip_strings(self, key: str, count: int) -> NDArray[Any] | None:
        position, starts = find_chain(self.buffer, self.position, count)
        if position > self.size:
            self.fail(f"the strings of the array {key!r} run beyond the end of the file at byte {self.size}")
        self.position = position
        return starts

    def array(self, array: LazyArray, key: str) -> NDArray[Any] | Sequence[Any]:
        if array.type in DTYPES:
            if not array.length:  # which np.frombuffer refuses at the end of a buffer
                return np.empty(0, bool if array.type == BOOL else DTYPES[array.type])
            numbers = np.frombuffer(self.buffer, DTYPES[array.type], array.length, array.start)
            return numbers != 0 if array.type == BOOL else numbers
        if array.type == STRING:
            return self.strings(array, key)
        self.position = array.start
        return [self.array(self.skip_array(key, MAX_NESTING), key) for _ in range(array.length)]

    def strings(self, array: LazyArray, key: str) -> Sequence[str]:
        data = self.buffer[array.start : array.stop]
        try:
            return strings_of(data, array.length, array.string_starts)
        except UnicodeDecodeError:
            strings = raw_strings(data, array.length)
            index = next(i for i, string in enumerate(strings) if string != string.decode(errors="ignore").encode())
            self.fail(f"element {index} of the array {key!r} is not valid UTF-8: {strings[index][:40]!r}")

    # tensors

    def tensor_infos(self, count: int) -> list[_TensorInfo]:
        infos: dict[str, _TensorInfo] = {}
        for index in range(count):
            name = self.string(f"the name of tensor {index}", MAX_NAME_BYTES)
            if not name or name in infos:
                self.fail(f"tensor {index} is a duplicate of {name!r}" if name else f"tensor {index} has no name")
            infos[name] = self.tensor_info(name)
        return list(infos.values())

    def tensor_info(self, name: str) -> _TensorInfo:
        dims = self.u32(f"the number of dimensions of tensor {name!r}")
        if not 1 <= dims <= MAX_DIMS:
            self.fail(f"tensor {name!r} has {dims} dimensions, not 1 to {MAX_DIMS}")
        *sizes, number, offset = self.numbers(SHAPE_TYPE_OFFSET[dims], f"the shape, type and offset of tensor {name!r}")
        shape = tuple(sizes[::-1])  # the file has the contiguous dimension first
        try:
            type = GgmlType(number)
        except ValueError:
            known = ", ".join(type.name for type in GgmlType)
            self.fail(f"tensor {name!r} has the unknown type {number}", f"Known types: {known}. Quantize the model to one of them.")
        if min(shape) < 1 or prod(shape) >= 1 << 63:
            self.fail(f"tensor {name!r} has the impossible shape {shape}")
        block = BLOCK_SIZES[type][0]
        if shape[-1] % block:
            self.fail(f"tensor {name!r} has rows of {shape[-1]} elements, not a multiple of {type.name}'s blocks of {block}")
        return _TensorInfo(name, type, shape, offset, tensor_nbytes(type, shape))

    def tensors(self, infos: list[_TensorInfo], alignment: int) -> dict[str, Tensor]:
        data_start = -(-self.position // alignment) * alignment
        data_size = max(0, self.size - data_start)
        for info in infos:
            if info.offset % alignment:
                self.fail(f"tensor {info.name!r} has the offset {info.offset}, not a multiple of the alignment {alignment}")
            if info.offset + info.nbytes > data_size:
                self.fail(
                    f"tensor {info.name!r} ({info.type.name} {info.shape}) takes bytes {info.offset} to {info.offset + info.nbytes} "
                    f"of the tensor data, of which the file has {data_size}"
                )
        self.check_layout(sorted(infos, key=lambda info: info.offset), alignment)
        data = np.frombuffer(self.buffer, np.uint8)
        return {
            info.name: Tensor(info.name, info.type, info.shape, data[data_start + info.offset : data_start + info.offset + info.nbytes])
            for info in infos
        }

    def check_layout(self, infos: list[_TensorInfo], alignment: int) -> None:
        """Tensors follow each other without a gap, which is how a wrong shape or type shows that fits into the file."""
        expected, last = 0, "the start of the tensor data"
        for info in infos:
            if info.offset < expected:
                self.fail(f"tensor {info.name!r} at offset {info.offset} overlaps {last}")
            if info.offset > -(-expected // alignment) * alignment:
                self.fail(f"tensor {info.name!r} has the offset {info.offset}, but {last} ends at {expected}")
            expected, last = info.offset + info.nbytes, f"tensor {info.name!r}"
