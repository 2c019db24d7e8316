"""The safetensors reader: what it reads, and what it refuses."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pymistral.errors import ModelLoadError
from pymistral.loading.safetensors import SafetensorsFile, read_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny import write_safetensors


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def write(path: Path, header: object, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_reads(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((), np.float16),
        "c": np.ones((0, 4), np.float32),
    }
    tensors["d"] = np.arange(4, dtype=np.uint16)
    write_safetensors(tmp_path / "m.safetensors", tensors, {"d": "BF16"})
    file = SafetensorsFile.open(tmp_path / "m.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", ()),
        "c": ("F32", (0, 4)),
        "d": ("BF16", (4,)),
    }
    np.testing.assert_array_equal(file.tensors["a"].data.view(np.float32), np.arange(6))
    assert read_weights(tmp_path).keys() == tensors.keys()


def test_metadata(tmp_path: Path) -> None:
    file = SafetensorsFile.open(write(tmp_path / "m.safetensors", {"__metadata__": {"format": "pt"}, "a": entry()}))
    assert file.metadata == {"format": "pt"}


BAD: dict[str, tuple[object, str]] = {
    "no JSON": (b"{", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "not valid JSON"),
    "no object": ([1], "not a JSON object"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "no entry": ({"a": 3}, "'a' is 3 in the header"),
    "more keys": ({"a": entry(more=1)}, "not an object of dtype, shape and data_offsets"),
    "dtype": ({"a": entry(dtype="F33")}, "unknown dtype 'F33'"),
    "dtype type": ({"a": entry(dtype=[1])}, "unknown dtype"),
    "shape": ({"a": entry(shape=[2, -3])}, "impossible shape"),
    "shape type": ({"a": entry(shape=[2, True])}, "impossible shape"),
    "overflow": ({"a": entry(shape=[1 << 32, 1 << 32])}, "impossible shape"),
    "dims": ({"a": entry(shape=[1] * 9)}, "impossible shape"),
    "offsets": ({"a": entry(offsets=[0, 25])}, r"data_offsets \[0, 25\]; the file has 24 bytes"),
    "backwards": ({"a": entry(offsets=[24, 0])}, "data_offsets"),
    "three": ({"a": entry(offsets=[0, 12, 24])}, "data_offsets"),
    "negative": ({"a": entry(offsets=[-1, 23])}, "data_offsets"),
    "size": ({"a": entry(shape=[2, 2])}, "takes 16 bytes, but its data_offsets hold 24"),
    "half a byte": ({"a": entry(dtype="F4", shape=[3], offsets=[0, 1])}, "takes 1.5 bytes"),
    "overlap": ({"a": entry(shape=[4], offsets=[0, 16]), "b": entry(shape=[3], offsets=[12, 24])}, "'b' at byte 12 overlaps tensor 'a'"),
    "gap": ({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(shape=[3], offsets=[12, 24])}, "leaves a gap behind tensor 'a'"),
    "rest": ({"a": entry(shape=[5], offsets=[0, 20])}, "24 bytes of data, but its tensors end at 20"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(tmp_path: Path, name: str) -> None:
    header, problem = BAD[name]
    with pytest.raises(ModelLoadError, match=problem) as error:
        SafetensorsFile.open(write(tmp_path / "m.safetensors", header))
    assert str(tmp_path / "m.safetensors") in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("length", [1 << 63, 100_000_001, 90])
def test_length_of_the_header(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelLoadError, match=f"header has a length of {length} bytes"):
        SafetensorsFile.open(write(tmp_path / "m.safetensors", {}, b"", length))


@pytest.mark.parametrize(("start", "what"), [(b"GGUF\3\0\0\0rest", "a GGUF file"), (b"PK\3\4rest of it", "zip"), (b"vers", "damaged")])
def test_other_files(tmp_path: Path, start: bytes, what: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(start)
    with pytest.raises(ModelLoadError, match=what):
        SafetensorsFile.open(tmp_path / "m.safetensors")


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="holds no safetensors"):
        read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="runs whatever code it holds"):
        read_weights(tmp_path)
    with pytest.raises(ModelLoadError, match="runs whatever code it holds"):
        SafetensorsFile.open(tmp_path / "pytorch_model.bin")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_one_clear_error(tmp_path: Path, data: st.DataObject) -> None:
    good = json.dumps({"a": entry(), "b": entry("BF16", [2], [24, 28])}).encode()
    content = bytearray(struct.pack("<Q", len(good)) + good + bytes(28))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    stop = data.draw(st.sampled_from([len(content), data.draw(st.integers(1, len(content)))]))
    (tmp_path / "m.safetensors").write_bytes(content[:stop])
    try:
        file = SafetensorsFile.open(tmp_path / "m.safetensors")
    except ModelLoadError:
        return
    for tensor in file.tensors.values():
        tensor.data.sum()


# shards


def shards(folder: Path, weight_map: object, *files: str) -> Path:
    for number, file in enumerate(files):
        write(folder / file, {f"t{number}": entry()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards(tmp_path: Path) -> None:
    tensors = read_weights(shards(tmp_path, {"t0": "a.safetensors", "t1": "b.safetensors"}, "a.safetensors", "b.safetensors"))
    assert [tensor.path.name for tensor in tensors.values()] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        (None, "no weight_map"),
        ([], "no weight_map"),
        ({"t0": "../a.safetensors"}, r"is said to be in '\.\./a.safetensors', no safetensors file of this folder"),
        ({"t0": "/a.safetensors"}, "no safetensors file of this folder"),
        ({"t0": "x\\a.safetensors"}, "no safetensors file of this folder"),
        ({"t0": "a.bin"}, "no safetensors file of this folder"),
        ({"t0": 3}, "no safetensors file of this folder"),
        ({"t0": "c.safetensors"}, "lists the file c.safetensors, which is not there"),
        ({"t1": "a.safetensors"}, "'t1' is said to be in a.safetensors, which does not hold it"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: object, problem: str) -> None:
    with pytest.raises(ModelLoadError, match=problem):
        read_weights(shards(tmp_path, weight_map, "a.safetensors"))


def test_a_corrupt_shard(tmp_path: Path) -> None:
    folder = shards(tmp_path, {"t0": "a.safetensors", "t1": "b.safetensors"}, "a.safetensors", "b.safetensors")
    content = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(content[:-1])
    with pytest.raises(ModelLoadError, match=r"b\.safetensors: .*data_offsets"):
        read_weights(folder)


def test_files_without_an_index(tmp_path: Path) -> None:
    write(tmp_path / "weights.safetensors", {"a": entry()})
    write(tmp_path / "consolidated.safetensors", {"a": entry()})
    assert read_weights(tmp_path)["a"].path.name == "weights.safetensors"
    write(tmp_path / "more.safetensors", {"b": entry()})
    with pytest.raises(ModelLoadError, match=r"holds 2 safetensors files but no model.safetensors.index.json"):
        read_weights(tmp_path)
