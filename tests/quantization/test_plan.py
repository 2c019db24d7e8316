"""Names of types, topologies, and which weights become what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pymistral import IsqBits, IsqType, LayerTopology, ModelBuilder, Topology
from pymistral.errors import ModelLoadError
from pymistral.nn.cuda_weights import gpu_layout
from pymistral.quantization.isq import LAYOUTS
from pymistral.quantization.plan import apply_isq
from pymistral.quantization.types import GgmlType, Tensor, tensor_nbytes


def tensor(name: str, *shape: int, type: GgmlType = GgmlType.F16) -> Tensor:
    return Tensor(name, type, shape, np.zeros(tensor_nbytes(type, shape), np.uint8))


SHAPES: dict[str, tuple[int, ...]] = {
    "embed_tokens.weight": (64, 256),
    "norm.weight": (256,),
    "lm_head.weight": (64, 256),
    **{f"layers.{layer}.input_layernorm.weight": (256,) for layer in range(4)},
    **{f"layers.{layer}.self_attn.q_proj.weight": (32, 256) for layer in range(4)},
    **{f"layers.{layer}.mlp.gate.weight": (8, 256) for layer in range(4)},
    **{f"layers.{layer}.mlp.experts.up_proj.weight": (8, 32, 256) for layer in range(4)},
}


def plan(isq: IsqType | None, topology: Topology | None = None) -> dict[str, str | None]:
    weights = apply_isq({name: tensor(name, *shape) for name, shape in SHAPES.items()}, isq, topology)
    return {name: weight.isq for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("value", "type"),
    [
        ("q4k", IsqType.Q4K),
        ("Q4K", IsqType.Q4K),
        ("Q8_0", IsqType.Q8_0),
        ("fp8", IsqType.F8E4M3),
        ("F8E4M3", IsqType.F8E4M3),
        (IsqType.MXFP4, IsqType.MXFP4),
        (2, IsqType.Q2K),
        (IsqBits.THREE, IsqType.Q3K),
        ("8", IsqType.Q8_0),
    ],
)
def test_values(value: IsqType | IsqBits | str | int, type: IsqType) -> None:
    assert IsqType.of(value) is type
    assert ModelBuilder("m", isq=value).isq is type
    assert ModelBuilder("m").with_isq(value).isq is type


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_auto(bits: int) -> None:
    assert ModelBuilder("m").with_auto_isq(bits).isq is IsqBits(bits).type
    assert ModelBuilder("m").with_auto_isq(IsqBits(bits)).isq is IsqType.of(bits)


@pytest.mark.parametrize(
    ("value", "says"), [("q9", "'q9' is not known"), ("hqq4", "not supported on the CPU"), (7, "2, 3, 4, 5, 6 and 8"), (4.0, "not known")]
)
def test_wrong_values_say_what_is_right(value: object, says: str) -> None:
    with pytest.raises(ModelLoadError, match=says) as error:
        ModelBuilder("m", isq=value)  # type: ignore[arg-type]
    if not isinstance(value, int):
        assert "Q4K" in str(error.value)
        assert "MXFP4" in str(error.value)


def test_which_weights() -> None:
    found = plan(IsqType.Q4K)
    assert {found[name] for name in SHAPES if "q_proj" in name or "experts" in name} == {"q4_k"}
    assert found["embed_tokens.weight"] == found["lm_head.weight"] == "q6_k"
    assert {found[name] for name in SHAPES if "norm" in name or "mlp.gate." in name} == {None}
    assert set(plan(None).values()) == {None}


@pytest.mark.parametrize(
    ("isq", "head"), [("q2k", "q6_k"), ("q4_0", "q6_k"), ("q5k", "q8_0"), ("q8_0", "q8_0"), ("mxfp4", "mxfp4"), ("fp8", "f8e4m3")]
)
def test_the_head_becomes_better(isq: str, head: str) -> None:
    assert plan(IsqType.of(isq))["lm_head.weight"] == head


@pytest.mark.parametrize(
    ("isq", "fallback"), [("q2k", "q4_0"), ("q3k", "q4_0"), ("q4k", "q4_1"), ("q5k", "q5_1"), ("q6k", "q8_0"), ("mxfp4", "mxfp4")]
)
def test_rows_that_are_no_whole_blocks(isq: str, fallback: str) -> None:
    name = "layers.0.self_attn.o_proj.weight"
    assert apply_isq({name: tensor(name, 16, 288)}, IsqType.of(isq))[name].isq == fallback


def test_rows_that_nothing_fits(caplog: pytest.LogCaptureFixture) -> None:
    name = "layers.0.self_attn.o_proj.weight"
    assert apply_isq({name: tensor(name, 16, 40)}, IsqType.Q4K)[name].isq is None
    assert f"{name} stays as it is" in caplog.text


def test_what_has_the_type_already_is_left_alone() -> None:
    name = "layers.0.self_attn.o_proj.weight"
    assert apply_isq({name: tensor(name, 16, 256, type=GgmlType.Q4_K)}, IsqType.Q4K)[name].isq is None


def test_what_a_gpu_takes() -> None:
    name = "layers.0.self_attn.o_proj.weight"
    for isq, layout in LAYOUTS.items():
        weight = apply_isq({name: tensor(name, 16, 256)}, isq)[name]
        if isq == IsqType.F8E4M3:
            with pytest.raises(ModelLoadError, match=rf"'{name}': F8E4M3 is not supported on a GPU; these are: .*Q4_K"):
                gpu_layout(weight)
        else:
            assert gpu_layout(weight).name == layout


# ---- topologies -----------------------------------------------------------------------------------------------------


def test_ranges_and_single_layers() -> None:
    found = plan(IsqType.Q4K, Topology.from_str("0-2:\n  isq: Q8_0\n3:\n  isq: q2k\n"))
    types = [found[f"layers.{layer}.self_attn.q_proj.weight"] for layer in range(4)]
    assert types == ["q8_0", "q8_0", "q4_k", "q2_k"]
    assert found["lm_head.weight"] == "q6_k"


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("0-3: {isq: q4k}\n1-4: {isq: q6k}", ["q4_k", "q6_k", "q6_k", "q6_k"]),  # the one that ends later counts,
        ("1-4: {isq: q6k}\n0-3: {isq: q4k}", ["q4_k", "q6_k", "q6_k", "q6_k"]),  # wherever it stands
        ("0-4: {isq: q4k}\n2-4: {isq: q3k}", ["q4_k", "q4_k", "q3_k", "q3_k"]),  # of equal ends the last one
        ("2-4: {isq: q3k}\n0-4: {isq: q4k}", ["q4_k", "q4_k", "q4_k", "q4_k"]),
        ("0-4: {isq: q4k}\n/layers\\.2\\./: {isq: q8_0}", ["q4_k", "q4_k", "q8_0", "q4_k"]),  # names go before numbers
        ("/self_attn/: {isq: q5k}\n/layers\\.[01]\\./: {isq: 8}", ["q8_0", "q8_0", "q5_k", "q5_k"]),  # of names the last one
        ("/layers\\.0/: {}\n0-4: {isq: q4k}", [None, "q4_k", "q4_k", "q4_k"]),  # one that says nothing leaves the default
    ],
)
def test_precedence(text: str, types: list[str | None]) -> None:
    found = plan(None, Topology.from_str(text))
    assert [found[f"layers.{layer}.self_attn.q_proj.weight"] for layer in range(4)] == types


def test_names_are_those_of_the_checkpoint() -> None:
    found = plan(None, Topology().with_pattern(r"^model\.layers\.1\.self_attn\.q_proj\.weight$", LayerTopology(isq="q4_0")))
    assert [name for name, type in found.items() if type] == ["layers.1.self_attn.q_proj.weight"]
    found = plan(None, Topology().with_pattern(r"^lm_head\.|embed_tokens", LayerTopology(isq="q5_0")))
    assert [name for name, type in found.items() if type] == ["embed_tokens.weight", "lm_head.weight"]


def test_by_calls_and_by_yaml() -> None:
    by_calls = Topology.empty().with_range(range(2), LayerTopology(isq=IsqType.Q3K)).with_range((2, 3), LayerTopology("q8_0", "cpu"))
    assert by_calls == Topology.from_str("0-2: {isq: Q3K}\n2: {isq: Q8_0, device: cpu}")
    assert Topology.from_str("# nothing\n") == Topology.empty()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0-4: {isq: q4k", "not valid YAML: .*line 1"),
        ("- 1", "line 1: a topology is a mapping"),
        ("0-2: {isq: q4k}\n\n4-2: {isq: q4k}", "line 3, '4-2': the end of a range"),
        ("x: {isq: q4k}", "line 1, 'x': not a selector"),
        ("0-99999999999: {isq: q4k}", "no model has so many layers"),
        ("0: {isq: q9}", "line 1, '0': ISQ type 'q9' is not known"),
        ("0: {isq: afq4}", "line 1, '0': ISQ type 'afq4' is not supported"),
        ("0:\n  isq: q4k\n  bits: 3", "line 3, 'bits': not a setting"),
        ("0:\n  isq: [q4k]", "line 2: isq must be plain text"),
        ("0:\n  isq: q4k\n  isq: q5k", "line 3: 'isq' is there twice"),
        ("0: q4k", "line 1, '0': expected settings"),
        ("0: {isq: q4k}\n0: {isq: q5k}", "line 2: '0' is there twice"),
        ("/(/: {isq: q4k}", "line 1, '/\\(/': .*not a regular expression"),
        ("0: {device: 'cuda[0]'}", r"device 'cuda\[0\]' is not supported"),
    ],
)
def test_errors_name_file_line_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "topology.yml"
    path.write_text(text)
    with pytest.raises(ModelLoadError, match=says) as error:
        ModelBuilder("m").with_topology_from_path(path)
    assert str(error.value).startswith(str(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot read the topology"):
        ModelBuilder("m").with_topology_from_path(tmp_path / "none.yml")


def test_layers_that_are_not_there() -> None:
    with pytest.raises(ModelLoadError, match="names layer 4, but the model has the layers 0 to 3"):
        plan(IsqType.Q4K, Topology.from_str("3-5: {isq: q4k}"))


@pytest.mark.parametrize("layers", [(2, 2), (-1, 2), range(0, 4, 2), (0, 1 << 40)])
def test_wrong_ranges(layers: tuple[int, int]) -> None:
    with pytest.raises(ModelLoadError, match="range of layers"):
        Topology().with_range(layers, LayerTopology(isq="q4k"))
    with pytest.raises(ModelLoadError, match="must be a Topology"):
        ModelBuilder("m", topology="x.yml")  # type: ignore[arg-type]
