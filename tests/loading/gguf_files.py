"""Writes GGUF files field by field, so that tests can get any field wrong, and finds the fields of existing ones."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def entry(key: str | bytes, type: int, value: bytes) -> bytes:
    return text(key) + u32(type) + value


def tensor(name: str, shape: Iterable[int], type: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
    """A tensor info; `shape` in the file's order, contiguous dimension first."""
    shape = list(shape)
    return text(name) + u32(len(shape) if dims is None else dims) + b"".join(map(u64, shape)) + u32(type) + u64(offset)


def gguf(
    entries: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    entry_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    entries, tensors = list(entries), list(tensors)
    head = b"GGUF" + u32(version)
    head += u64(len(tensors) if tensor_count is None else tensor_count) + u64(len(entries) if entry_count is None else entry_count)
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


@dataclass(frozen=True)
class Field:
    start: int
    size: int
    kind: str


class Header:
    """The fields of a well-formed file's header, by a walk of its own, and the header again with its arrays cut short."""

    def __init__(self, data: bytes, longest_array: int | None = None) -> None:
        self.data = data
        self.longest_array = longest_array
        self.fields: list[Field] = []
        self.bytes = bytearray()
        self.position = 0
        self.take(4, "magic")
        self.number(4, "version")
        tensors, entries = self.number(8, "count"), self.number(8, "count")
        for _ in range(entries):
            self.string("key")
            self.value(self.number(4, "type"))
        for _ in range(tensors):
            self.string("name")
            for _ in range(self.number(4, "count")):
                self.number(8, "dimension")
            self.number(4, "type")
            self.number(8, "offset")
        self.end = self.position

    def take(self, size: int, kind: str) -> bytes:
        piece = self.data[self.position : self.position + size]
        assert len(piece) == size
        self.fields.append(Field(len(self.bytes), size, kind))
        self.bytes += piece
        self.position += size
        return piece

    def number(self, size: int, kind: str) -> int:
        return int.from_bytes(self.take(size, kind), "little")

    def string(self, kind: str) -> None:
        self.take(self.number(8, "length"), kind)

    def value(self, type: int) -> None:
        if type == 8:
            self.string("text")
        elif type != 9:
            self.take(SIZES[type], "value")
        else:
            element, length = self.number(4, "type"), self.number(8, "count")
            kept = length if self.longest_array is None else min(length, self.longest_array)
            self.bytes[-8:] = u64(kept)
            if element != 8:
                self.take(kept * SIZES[element], "value")
                self.position += (length - kept) * SIZES[element]
                return
            for index in range(length):
                if index < kept:
                    self.string("text")
                else:
                    (size,) = struct.unpack_from("<Q", self.data, self.position)
                    self.position += 8 + size


def write_gguf(path: Any, architecture: str, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write a file with the `gguf` package; a tensor is an array, or ``(bytes as uint8 [rows, bytes per row], type)``."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, tuple):
            writer.add_key_value(key, value[0], *value[1:])
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in tensors.items():
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=array[1])
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
