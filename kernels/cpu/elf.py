"""Loads object files that LLVM made for this x86-64 Linux: a start that finds its kernels in the cache needs no LLVM.

Numba compiles for LLVM's large code model, whose object files are simple: whatever one place says of another is the other's 64-bit address.
So sections are copied, those addresses are written, and pages become executable once they can no longer be written. Whatever an object
file holds beyond that is `Unsupported`, and so is one that contradicts itself: LLVM loads it then. Unwind tables are left out: nothing is
thrown through a kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

# See the System V ABI, "Object Files", and its AMD64 supplement.
_HEADER = struct.Struct("<4s5B7x HHI 3Q I 6H")
_SECTION = struct.Struct("<2I 4Q 2I 2Q")
_SYMBOL = struct.Struct("<I 2B H 2Q")
_RELOCATION = struct.Struct("<2Q q")
_ADDRESS = struct.Struct("<Q")

_PROGBITS, _SYMTAB, _STRTAB, _RELA, _NOBITS, _REL, _SYMTAB_SHNDX, _UNWIND = 1, 2, 3, 4, 8, 9, 18, 0x70000001
_WRITE, _ALLOC, _EXECUTE, _MERGE, _STRINGS, _LARGE = 1, 2, 4, 0x10, 0x20, 0x10000000
_UNDEFINED, _COMMON, _FIRST_RESERVED = 0, 0xFFF2, 0xFF00
_NOTYPE, _OBJECT, _FUNCTION, _SECTION_SYMBOL = range(4)
_R_X86_64_64 = 1

_PAGE = mmap.PAGESIZE
_MAX_BYTES = 1 << 26


class Unsupported(ValueError):
    """An object file that is not one of the simple ones."""


class Access(Enum):
    """What a program may do with a section."""

    EXECUTE = mmap.PROT_READ | mmap.PROT_EXEC
    READ = mmap.PROT_READ
    WRITE = mmap.PROT_READ | mmap.PROT_WRITE


@dataclass(frozen=True, eq=False)
class Section:
    access: Access
    alignment: int
    size: int
    content: bytes
    """The first bytes; the rest are zeros."""


@dataclass(frozen=True)
class Place:
    """So many bytes into a section; with no section, an address."""

    section: Section | None
    offset: int


@dataclass(frozen=True)
class ObjectFile:
    sections: Sequence[Section]
    relocations: Sequence[tuple[Place, Place]]
    """Where an address is to be written, and of what."""
    entry: Place


def read(code: bytes, symbol: str) -> ObjectFile:
    """An object file and its function ``symbol``.

    Raises
    ------
    Unsupported
        It has to be left to LLVM.
    """
    if not sys.platform.startswith("linux"):
        raise Unsupported(f"object files on {sys.platform}")
    return _Reader(code).object_file(symbol)


def load(objects: Sequence[ObjectFile]) -> list[int]:
    """Addresses of the functions. Raises OSError if the system does not give executable memory."""
    offsets: dict[Section, int] = {}
    ends: dict[Access, int] = {}
    size = 0
    for access in Access:
        for section in (section for file in objects for section in file.sections if section.access is access):
            offsets[section] = size = -(-size // section.alignment) * section.alignment
            size += section.size
        ends[access] = size = -(-size // _PAGE) * _PAGE

    base = _map(size)

    def address(place: Place) -> int:
        return place.offset + (0 if place.section is None else base + offsets[place.section])

    for file in objects:
        for section in file.sections:
            ctypes.memmove(base + offsets[section], section.content, len(section.content))
        for where, what in file.relocations:
            ctypes.memmove(address(where), _ADDRESS.pack(address(what) % (1 << 64)), _ADDRESS.size)
    start = 0
    for access, end in ends.items():
        _protect(base + start, end - start, access)
        start = end
    return [address(file.entry) for file in objects]


class _Header(NamedTuple):
    """What a file says of a section."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    each: int


class _Reader:
    def __init__(self, code: bytes) -> None:
        self._code = code
        if len(code) < _HEADER.size:
            raise Unsupported("no whole header")
        magic, bits, order, version, _, _, kind, machine, _, _, _, table, _, _, _, _, size, count, _ = _HEADER.unpack_from(code)
        if (magic, bits, order, version, kind, machine, size) != (b"\x7fELF", 2, 1, 1, 1, 62, _SECTION.size):
            raise Unsupported("no relocatable file for x86-64")
        self._headers = [_Header(*fields) for fields in _SECTION.iter_unpack(self._slice(table, count * _SECTION.size))]
        self._sections = [self._section(header) for header in self._headers]
        self._commons: list[Section] = []
        tables = [header for header in self._headers if header.kind == _SYMTAB]
        if len(tables) != 1:
            raise Unsupported(f"{len(tables)} symbol tables")
        self._symbols = list(_SYMBOL.iter_unpack(self._entries(tables[0], _SYMBOL.size)))
        self._names = self._strings(tables[0].link)
        self._places: dict[int, Place] = {}

    def object_file(self, symbol: str) -> ObjectFile:
        relocations = list(self._relocations())
        entry = self._place_of(self._find(symbol))
        if entry.section is None or entry.section.access is not Access.EXECUTE or entry.offset >= entry.section.size:
            raise Unsupported(f"{symbol} is no function")
        sections = [section for section in self._sections if section is not None] + self._commons
        if sum(section.size + section.alignment for section in sections) > _MAX_BYTES:
            raise Unsupported("too large")
        return ObjectFile(sections, relocations, entry)

    def _slice(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._code):
            raise Unsupported(f"the file ends at byte {len(self._code)}, not {offset + size}")
        return self._code[offset : offset + size]

    def _entries(self, table: _Header, each: int) -> bytes:
        if table.each != each or table.size % each:
            raise Unsupported(f"a table of {table.size} bytes with entries of {table.each}")
        return self._slice(table.offset, table.size)

    def _strings(self, index: int) -> bytes:
        if index >= len(self._headers) or self._headers[index].kind != _STRTAB:
            raise Unsupported(f"section {index} holds no names")
        return self._slice(self._headers[index].offset, self._headers[index].size)

    def _section(self, header: _Header) -> Section | None:
        kind, flags = header.kind, header.flags
        if kind in (_REL, _SYMTAB_SHNDX):
            raise Unsupported(f"a section of type {kind}")
        if not flags & _ALLOC or kind == _UNWIND:
            return None
        if kind not in (_PROGBITS, _NOBITS) or flags & ~(_WRITE | _ALLOC | _EXECUTE | _MERGE | _STRINGS | _LARGE):
            raise Unsupported(f"a section of type {kind:#x} with the flags {flags:#x}")
        if flags & _WRITE and flags & _EXECUTE:
            raise Unsupported("a section that is both written and executed")
        access = Access.EXECUTE if flags & _EXECUTE else Access.WRITE if flags & _WRITE else Access.READ
        content = b"" if kind == _NOBITS else self._slice(header.offset, header.size)
        return _checked(Section(access, max(1, header.alignment), header.size, content))

    def _relocations(self) -> Iterator[tuple[Place, Place]]:
        for table in self._headers:
            if table.kind != _RELA:
                continue
            if table.info >= len(self._sections):
                raise Unsupported(f"addresses for section {table.info}")
            section = self._sections[table.info]
            if section is None:  # unwind tables
                continue
            for where, info, addend in _RELOCATION.iter_unpack(self._entries(table, _RELOCATION.size)):
                if info & 0xFFFFFFFF != _R_X86_64_64:
                    raise Unsupported(f"a relocation of type {info & 0xFFFFFFFF}")
                if where + _ADDRESS.size > len(section.content):
                    raise Unsupported(f"an address at {where} of {len(section.content)} bytes")
                what = self._place_of(info >> 32)
                yield Place(section, where), Place(what.section, what.offset + addend)

    def _place_of(self, index: int) -> Place:
        if index not in self._places:
            self._places[index] = self._symbol(index)
        return self._places[index]

    def _symbol(self, index: int) -> Place:
        if not 0 < index < len(self._symbols):
            raise Unsupported(f"symbol {index} of {len(self._symbols)}")
        name, info, _, section_index, value, size = self._symbols[index]
        if info & 15 not in (_NOTYPE, _OBJECT, _FUNCTION, _SECTION_SYMBOL):
            raise Unsupported(f"a symbol of type {info & 15}")
        if section_index == _UNDEFINED:
            return Place(None, _external(self._name(name)))
        if section_index == _COMMON:  # zeros that nothing else defines; the value is the alignment
            section = _checked(Section(Access.WRITE, max(1, value), size, b""))
            self._commons.append(section)
            return Place(section, 0)
        if section_index >= min(len(self._sections), _FIRST_RESERVED):
            raise Unsupported(f"a symbol in section {section_index:#x}")
        defined = self._sections[section_index]
        if defined is None or value > defined.size:
            raise Unsupported(f"a symbol at {value} of section {section_index}")
        return Place(defined, value)

    def _name(self, offset: int) -> str:
        end = self._names.find(b"\0", offset)
        if end < 0:
            raise Unsupported("a name without an end")
        return self._names[offset:end].decode("ascii", "replace")

    def _find(self, name: str) -> int:
        for index, (offset, info, _, section, _, _) in enumerate(self._symbols):
            if info & 15 == _FUNCTION and section != _UNDEFINED and self._name(offset) == name:
                return index
        raise Unsupported(f"it lacks {name}")


def _checked(section: Section) -> Section:
    if section.alignment & (section.alignment - 1) or section.alignment > _PAGE or section.size > _MAX_BYTES:
        raise Unsupported(f"{section.size} bytes on a multiple of {section.alignment}")
    return section


def _external(name: str) -> int:
    """The address of a function of the C library. (glibc keeps mathematics apart, and a Python need not have loaded it.)"""
    for library in (None, "libm.so.6"):
        with contextlib.suppress(AttributeError, OSError):
            return ctypes.cast(ctypes.CDLL(library)[name], ctypes.c_void_p).value or 0
    raise Unsupported(f"no library has {name}")


def _map(size: int) -> int:
    """New pages, which stay for as long as the process: threads may be in a kernel to its end, so no Python object owns them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc("mmap", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_ssize_t)(
        None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0
    )
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"no {size} bytes for machine code")
    return int(address)


def _protect(address: int, size: int, access: Access) -> None:
    if size and _libc("mprotect", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(address, size, access.value):
        raise OSError(ctypes.get_errno(), f"no {access.name.lower()} access to {size} bytes of machine code")


def _libc(name: str, result: type, *arguments: type) -> Callable[..., int | None]:
    function = ctypes.CDLL(None, use_errno=True)[name]
    function.restype, function.argtypes = result, arguments
    return function
