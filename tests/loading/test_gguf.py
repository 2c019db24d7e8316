"""The GGUF reader against the `gguf` package, and against files that lie."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
from gguf_files import Header, entry, gguf, tensor, text, u32, u64, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pymistral.errors import ModelLoadError
from pymistral.loading.checkpoint import GgufLoader
from pymistral.loading.gguf import GgufFile
from pymistral.loading.string_chains import JoinedStrings
from pymistral.quantization.types import GgmlType


def open_bytes(folder: Path, data: bytes, size: int | None = None) -> GgufFile:
    """Open a file with this content, made `size` bytes long with zeros that take no room on the disk."""
    path = folder / "file.gguf"
    path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
    with path.open("wb") as file:
        file.write(data)
        if size is not None:
            file.truncate(size)
    return GgufFile.open(path)


def assert_agrees_with_oracle(path: Path) -> None:
    ours, theirs = GgufFile.open(path), oracle.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, field in fields.items():
        expected, found = field.contents(), ours.metadata[name]
        if isinstance(found, np.ndarray):
            np.testing.assert_array_equal(found, np.asarray(expected, found.dtype), err_msg=name)
        else:
            assert found == expected or found != found, name
            assert type(found) in (type(expected), JoinedStrings), name
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    assert ours.alignment == theirs.alignment
    for theirs_tensor in theirs.tensors:
        found = ours.tensors[theirs_tensor.name]
        assert found.type == int(theirs_tensor.tensor_type)
        assert found.shape == tuple(theirs_tensor.shape.tolist())[::-1]
        np.testing.assert_array_equal(found.data, theirs_tensor.data.view(np.uint8).reshape(-1))


# agreement


def test_agrees_with_the_gguf_package_on_smollm2(smollm2_path: Path) -> None:
    assert_agrees_with_oracle(smollm2_path)


def test_agrees_with_the_gguf_package_on_gemma3(gemma3_path: Path) -> None:
    assert_agrees_with_oracle(gemma3_path)


V = oracle.GGUFValueType
INTEGER_RANGES = {
    V.UINT8: (0, 2**8 - 1),
    V.INT8: (-(2**7), 2**7 - 1),
    V.UINT16: (0, 2**16 - 1),
    V.INT16: (-(2**15), 2**15 - 1),
    V.UINT32: (0, 2**32 - 1),
    V.INT32: (-(2**31), 2**31 - 1),
    V.UINT64: (0, 2**64 - 1),
    V.INT64: (-(2**63), 2**63 - 1),
}
ELEMENTS = {type: st.integers(*limits) for type, limits in INTEGER_RANGES.items()} | {
    V.FLOAT32: st.floats(width=32, allow_nan=False),
    V.FLOAT64: st.floats(allow_nan=False),
    V.BOOL: st.booleans(),
    V.STRING: st.text(max_size=300) | st.text("a\0", max_size=20),
}
scalars = st.sampled_from(list(ELEMENTS)).flatmap(lambda type: ELEMENTS[type].map(lambda value: (value, type)))
arrays = st.sampled_from(list(ELEMENTS)).flatmap(
    lambda type: st.lists(ELEMENTS[type], min_size=1, max_size=40).map(lambda value: (value, V.ARRAY, type))
)
keys = st.text(min_size=1, max_size=20).filter(lambda key: not key.startswith(("GGUF", "general.")))
quantized = st.sampled_from([type for type in GgmlType if type != GgmlType.Q8_1])  # whose size the gguf package has wrong


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    metadata=st.dictionaries(keys, scalars | arrays, max_size=8),
    types=st.lists(quantized, max_size=6),
    alignment=st.sampled_from([None, 8, 32, 64, 4096]),
    seed=st.integers(0, 2**32 - 1),
)
def test_agrees_with_the_gguf_package_on_random_files(
    tmp_path: Path, metadata: dict[str, Any], types: list[GgmlType], alignment: int | None, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tensors = {}
    for index, type in enumerate(types):
        block, nbytes = oracle.GGML_QUANT_SIZES[type]
        shape = random.integers(1, 4, random.integers(0, 4)).tolist()
        row = nbytes * random.integers(1, 3) if block > 1 else nbytes * random.integers(1, 50)
        tensors[f"tensor {index}"] = (random.integers(0, 256, (*shape, row), np.uint8), oracle.GGMLQuantizationType(type))
    if alignment is not None:
        metadata = {**metadata, "general.alignment": alignment}
    path = tmp_path / "random.gguf"
    path.unlink(missing_ok=True)
    write_gguf(path, "random", metadata, tensors)
    assert_agrees_with_oracle(path)


def test_empty_and_nested_arrays(tmp_path: Path) -> None:
    strings = u32(8) + u64(2) + text("a") + text("é")
    nested = u32(9) + u64(2) + (u32(9) + u64(1) + strings) + (u32(4) + u64(3) + u32(1) + u32(2) + u32(3))
    file = open_bytes(tmp_path, gguf([entry("n", 9, nested), entry("s", 9, u32(8) + u64(0)), entry("b", 9, u32(7) + u64(0))], alignment=1))
    outer = file.metadata["n"]
    assert isinstance(outer, list)
    assert outer[0] == [["a", "é"]]
    assert outer[1].tolist() == [1, 2, 3]
    assert file.metadata["s"] == []
    assert isinstance(empty := file.metadata["b"], np.ndarray)
    assert empty.dtype == bool
    assert "missing" not in file.metadata
    assert len(file.metadata) == 3


def test_version_2_reads_like_3(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, gguf([entry("k", 7, b"\x02")], [tensor("t", [3, 2])], bytes(range(24)), version=2))
    assert file.version == 2
    assert file.metadata["k"] is True
    assert file.tensors["t"].shape == (2, 3)
    assert file.tensors["t"].data.tolist() == list(range(24))
    assert not file.tensors["t"].data.flags.writeable


# files that lie

LONG = u64(1 << 62)
BAD_FILES = {
    "empty": (b"", "empty"),
    "magic": (b"GGUX" + bytes(100), "not a GGUF file: it starts with b'GGUX'"),
    "short magic": (b"GG", "not a GGUF file"),
    "old format": (b"tjgg" + bytes(100), "before GGUF"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
    "only magic": (b"GGUF", "ends at byte 4, within the version"),
    "version 1": (gguf(version=1), "GGUF v1"),
    "version 0": (gguf(version=0), "version 0 is unknown"),
    "version 4": (gguf(version=4), "version 4 is unknown"),
    "big endian": (b"GGUF\0\0\0\x03" + bytes(16), "big-endian GGUF v3"),
    "tensor count": (gguf(tensor_count=1 << 60), "tensor_count is 1152921504606846976"),
    "key count": (gguf(entry_count=(1 << 64) - 1), "kv_count is 18446744073709551615"),
    "one key too many": (gguf([entry("a", 0, b"\1")], entry_count=2, data=bytes(64)), "key 1 is empty"),
    "one tensor too many": (gguf([], [tensor("a", [1])], tensor_count=2, data=bytes(64)), "tensor 1 has no name"),
    "key length": (gguf([LONG + b"a"], data=bytes(99)), "metadata key 0 has a length of 4611686018427387904"),
    "key over the limit": (gguf([entry("k" * 65536, 0, b"\1")]), "limit of 65535"),
    "key not UTF-8": (gguf([entry(b"\xff\xfe", 0, b"\1")], data=bytes(32)), "metadata key 0 at byte 32 is not valid UTF-8"),
    "duplicate key": (gguf([entry("k", 0, b"\1")] * 2, data=bytes(32)), "duplicate of 'k'"),
    "value type": (gguf([entry("k", 13, b"\1")], data=bytes(32)), "'k' has the unknown type 13"),
    "value cut off": (gguf([entry("key", 12, b"\1")], alignment=1), "within the value of 'key'"),
    "value length": (gguf([entry("k", 8, LONG)], data=bytes(32)), "the value of 'k' has a length of"),
    "value not UTF-8": (gguf([entry("k", 8, text(b"\xc3"))], data=bytes(32)), "the value of 'k' at byte 45 is not valid UTF-8"),
    "array length": (gguf([entry("k", 9, u32(4) + LONG)], data=bytes(99)), "the length of the array 'k' is 4611686018427387904"),
    "array length times size": (gguf([entry("k", 9, u32(10) + u64((1 << 61) + 1))], data=bytes(99)), "length of the array 'k'"),
    "array element type": (gguf([entry("k", 9, u32(99) + u64(0))], data=bytes(99)), "unknown element type 99"),
    "strings in array": (gguf([entry("k", 9, u32(8) + u64(2) + text("a") + LONG)], data=bytes(99)), "strings of the array 'k' run beyond"),
    "nesting": (gguf([entry("k", 9, (u32(9) + u64(1)) * 5)], data=bytes(99)), "more than 4 deep"),
    "nested length": (gguf([entry("k", 9, u32(9) + LONG)], data=bytes(99)), "length of the array 'k'"),
    "alignment": (gguf([entry("general.alignment", 4, u32(48))]), "general.alignment is 48"),
    "alignment 0": (gguf([entry("general.alignment", 4, u32(0))]), "general.alignment is 0"),
    "alignment 1": (gguf([entry("general.alignment", 4, u32(1))]), "general.alignment is 1"),
    "alignment of text": (gguf([entry("general.alignment", 8, text("32"))]), "general.alignment is '32'"),
    "alignment of an array": (gguf([entry("general.alignment", 9, u32(4) + u64(1) + u32(32))]), "general.alignment is an ndarray"),
    "alignment past the end": (gguf([entry("general.alignment", 4, u32(1 << 31))], [tensor("t", [1])], bytes(64)), "has 0"),
    "no dimensions": (gguf([], [tensor("t", [])], bytes(64)), "'t' has 0 dimensions"),
    "5 dimensions": (gguf([], [tensor("t", [1] * 5)], bytes(64)), "'t' has 5 dimensions"),
    "many dimensions": (gguf([], [tensor("t", [1], dims=(1 << 32) - 1)], bytes(64)), "'t' has 4294967295 dimensions"),
    "dimension 0": (gguf([], [tensor("t", [4, 0])], bytes(64)), r"impossible shape \(0, 4\)"),
    "huge dimension": (gguf([], [tensor("t", [(1 << 64) - 1])], bytes(64)), "impossible shape"),
    "product overflows to 0": (gguf([], [tensor("t", [1 << 32, 1 << 32])], bytes(64)), "impossible shape"),
    "product overflows to 16": (gguf([], [tensor("t", [16, (1 << 60) + 1])], bytes(64)), "impossible shape"),
    "size overflows": (gguf([], [tensor("t", [1 << 62])], bytes(64)), "of which the file has 64"),
    "tensor type": (gguf([], [tensor("t", [32], type=4)], bytes(64)), "'t' has the unknown type 4. Known types: F32"),
    "half a block": (gguf([], [tensor("t", [48], type=2)], bytes(64)), "rows of 48 elements, not a multiple of Q4_0's blocks of 32"),
    "unaligned offset": (gguf([], [tensor("t", [1], offset=8)], bytes(64)), "offset 8, not a multiple of the alignment 32"),
    "offset": (gguf([], [tensor("t", [1], offset=64)], bytes(64)), "takes bytes 64 to 68"),
    "huge offset": (gguf([], [tensor("t", [1], offset=(1 << 64) - 32)], bytes(64)), "takes bytes 18446744073709551584"),
    "truncated data": (gguf([], [tensor("t", [17])], bytes(64)), "takes bytes 0 to 68"),
    "duplicate tensor": (gguf([], [tensor("t", [1]), tensor("t", [1], offset=32)], bytes(64)), "tensor 1 is a duplicate of 't'"),
    "overlap": (gguf([], [tensor("b", [8], offset=32), tensor("a", [9])], bytes(64)), "'b' at offset 32 overlaps tensor 'a'"),
    "same place": (gguf([], [tensor("a", [8]), tensor("b", [8])], bytes(64)), "'b' at offset 0 overlaps tensor 'a'"),
    "gap at the start": (gguf([], [tensor("a", [8], offset=32)], bytes(64)), "offset 32, but the start of the tensor data ends at 0"),
    "gap": (gguf([], [tensor("a", [8]), tensor("b", [8], offset=64)], bytes(96)), "offset 64, but tensor 'a' ends at 32"),
    "tensor name not UTF-8": (gguf([], [text(b"\xff") + bytes(99)]), "the name of tensor 0 at byte 32 is not valid UTF-8"),
}


@pytest.mark.parametrize(("data", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_says_what_is_wrong(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        open_bytes(tmp_path, data)
    assert str(caught.value).startswith(str(tmp_path / "file.gguf"))


def test_array_that_is_not_utf8_is_an_error_when_read(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, gguf([entry("k", 9, u32(8) + u64(3) + text("a") + text(b"b\xff") + text(b"\xff"))]))
    with pytest.raises(ModelLoadError, match="element 1 of the array 'k' is not valid UTF-8"):
        file.metadata["k"]


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file"):
        GgufFile.open(tmp_path / "missing.gguf")
    with pytest.raises(ModelLoadError, match="not a regular file"):
        GgufFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelLoadError, match="not a regular file"):
        GgufFile.open(tmp_path / "pipe")


@pytest.mark.parametrize(
    "data",
    [
        gguf([entry("k", 9, u32(8) + u64((1 << 24) + 1))]),
        gguf([entry("k", 9, u32(9) + u64((1 << 24) + 1))]),
        gguf([entry("k", 8, u64(1 << 31))]),
        gguf(tensor_count=1 << 26),
        gguf(entry_count=1 << 26),
        gguf([], [tensor("t", [1], offset=0)], entry_count=0, tensor_count=1 << 26),
    ],
)
def test_a_vast_empty_file_costs_neither_time_nor_memory(tmp_path: Path, data: bytes) -> None:
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(ModelLoadError):
        open_bytes(tmp_path, data, size=1 << 36)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert time.perf_counter() - start < 5


# mutations

EDGES = [0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 31, 32, 33, 127, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
EDGES += [2**40, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1]
mutation = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("field"), st.floats(0, 1, exclude_max=True), st.sampled_from(EDGES)),
    st.tuples(st.just("nudge"), st.floats(0, 1, exclude_max=True), st.integers(-40, 40)),
    st.tuples(st.just("copy"), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32)),
)
mutations = st.lists(mutation, max_size=3)
truncation = st.none() | st.floats(0, 1, exclude_max=True)


def mutate(header: Header, changes: list[tuple[str, float, int]]) -> bytearray:
    data = bytearray(header.bytes)
    numbers = [field for field in header.fields if field.kind not in ("magic", "key", "name", "text")]
    for kind, where, value in changes:
        if kind == "flip":
            data[int(where * len(data))] ^= value
            continue
        field = numbers[int(where * len(numbers))]
        span = slice(field.start, field.start + field.size)
        if kind == "copy":  # what another field of the same size says
            alike = [other for other in numbers if other.size == field.size]
            other = alike[value % len(alike)]
            data[span] = header.bytes[other.start : other.start + other.size]
        elif field.size <= 8:
            old = int.from_bytes(data[span], "little") if kind == "nudge" else 0
            data[span] = ((old + value) % 256**field.size).to_bytes(field.size, "little")
    return data


def read_all(folder: Path, data: bytes, size: int) -> str:
    """Read all there is in a file. The only exception allowed is ModelLoadError, whose message is returned."""
    start = time.perf_counter()
    try:
        file = open_bytes(folder, data, size)
        for key in file.metadata:
            file.metadata[key]
        for found in file.tensors.values():
            assert found.data.size <= size
        GgufLoader(file.path).config_and_weights()
        return ""
    except ModelLoadError as error:
        return str(error)
    finally:
        assert time.perf_counter() - start < 10


@pytest.fixture(scope="module")
def small_header(smollm2_path: Path) -> Header:
    """The real header, its vocabulary cut short."""
    header = Header(smollm2_path.read_bytes()[: 1 << 22], longest_array=20)
    for field in header.fields:  # and the embedding with it, so that all other tensors move up
        span = slice(field.start, field.start + field.size)
        value = int.from_bytes(header.bytes[span], "little")
        if field.kind == "dimension" and value == 49152:
            header.bytes[span] = u64(20)
        elif field.kind == "offset" and value:
            header.bytes[span] = u64(value - 49152 // 32 * 34 * 576 + -(-20 * 576 // 32 * 34 // 32) * 32)
    return header


@pytest.fixture(scope="module")
def whole_header(smollm2_path: Path) -> Header:
    return Header(smollm2_path.read_bytes()[: 1 << 22])


MUTATING = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def test_headers_are_whole_without_mutation(tmp_path: Path, small_header: Header, whole_header: Header, smollm2_path: Path) -> None:
    for header in (small_header, whole_header):
        assert read_all(tmp_path, bytes(header.bytes), smollm2_path.stat().st_size) == ""


@settings(MUTATING, max_examples=2000)
@given(changes=mutations, cut=truncation)
def test_mutated_headers(
    tmp_path: Path, small_header: Header, smollm2_path: Path, changes: list[tuple[str, float, int]], cut: float | None
) -> None:
    data = mutate(small_header, changes)
    size = smollm2_path.stat().st_size if cut is None else int(cut * len(data))
    message = read_all(tmp_path, data[:size], size)
    assert not message or message.startswith(str(tmp_path))


@settings(MUTATING, max_examples=300)
@given(changes=mutations, cut=truncation)
def test_mutated_whole_headers(
    tmp_path: Path, whole_header: Header, smollm2_path: Path, changes: list[tuple[str, float, int]], cut: float | None
) -> None:
    data = mutate(whole_header, changes)
    size = smollm2_path.stat().st_size if cut is None else int(cut * len(data))
    message = read_all(tmp_path, data[:size], size)
    assert not message or message.startswith(str(tmp_path))


def test_edge_values_in_the_head_and_in_tensor_infos(tmp_path: Path, small_header: Header, smollm2_path: Path) -> None:
    size = smollm2_path.stat().st_size
    numbers = [field for field in small_header.fields if field.kind in ("count", "dimension", "type", "offset", "length")]
    for field in (*numbers[:12], *numbers[-17:-5]):  # of the very last tensor a wrong type could not be told
        for value in EDGES:
            data = bytearray(small_header.bytes)
            old = data[field.start : field.start + field.size]
            data[field.start : field.start + field.size] = new = (value % 256**field.size).to_bytes(field.size, "little")
            assert read_all(tmp_path, data, size) or new == old
