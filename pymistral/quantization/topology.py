"""Topologies: a type of quantisation for each layer, by number, by range, or by the name of a weight."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ModelLoadError
from .isq import IsqType

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_LAYERS = 1 << 16
_MAX_BYTES = 1 << 20  # of a file
_NUMBERS = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


@dataclass(frozen=True)
class LayerTopology:
    """What becomes of a layer.

    Parameters
    ----------
    isq
        The type that its matrices are quantised to: an `IsqType`, its plain value, or a number of bits. None: as for the whole model.
    device
        Where it is computed: None or ``"cpu"``.

    Raises
    ------
    ModelLoadError
        The type or the device is not supported.
    """

    isq: IsqType | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.isq is not None:
            object.__setattr__(self, "isq", IsqType.of(self.isq))
        if self.device not in (None, "cpu"):
            raise ModelLoadError(f"device {self.device!r:.80} is not supported in a topology: 'cpu' is")


class Topology:
    """Types of quantisation by layer.

    A selector is a layer (``12``), a range of layers whose end is not part of it (``0-16``), or a regular expression between slashes,
    which is searched for in the full name of a weight (``/lm_head\\./``, ``/layers\\.\\d+\\.self_attn\\./``). Regular expressions go
    before layers, and of several that match the last one counts. Of overlapping ranges the one that ends later counts, and of those
    that end alike the last one; `with_range`, called step by step, simply replaces what was there.

    Examples
    --------
    >>> topology = Topology().with_range(range(0, 8), LayerTopology(isq="q6k"))
    >>> topology = Topology.from_str("0-8: {isq: Q6K}\\n/lm_head/: {isq: Q8_0}")
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerTopology] = {}
        self.patterns: list[tuple[re.Pattern[str], LayerTopology]] = []

    @classmethod
    def empty(cls) -> Self:
        """A topology that says nothing yet."""
        return cls()

    def with_range(self, layers: range | slice | tuple[int, int], layer: LayerTopology) -> Self:
        """Let these layers (``range(0, 8)``, or ``(0, 8)``, which means the same) be so, whatever was said about them before."""
        start, stop = (layers.start, layers.stop) if isinstance(layers, range | slice) else layers
        step = getattr(layers, "step", None)
        if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= _MAX_LAYERS or step not in (None, 1):
            raise ModelLoadError(f"a topology's range of layers is {layers!r}: it must hold one layer or more, from 0 on")
        self.layers |= dict.fromkeys(range(start, stop), layer)
        return self

    def with_pattern(self, pattern: str, layer: LayerTopology) -> Self:
        """Let weights be so in whose full name the regular expression is found; it goes before all that were added earlier."""
        try:
            self.patterns.append((re.compile(pattern), layer))
        except re.error as error:
            raise ModelLoadError(f"{pattern!r:.80} is not a regular expression: {error}") from error
        return self

    @classmethod
    def from_str(cls, text: str) -> Self:
        """Read YAML.

        Raises
        ------
        ModelLoadError
            It is not YAML, or a selector or its settings cannot be; the message gives the line and the key.
        """
        return cls()._read(text, "topology")

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file of YAML, as `from_str`."""
        path = Path(path).expanduser()
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ModelLoadError(f"{path}: a topology of more than {_MAX_BYTES} bytes")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{path}: cannot read the topology: {error}") from error
        return cls()._read(text, str(path))

    def match(self, name: str, layer: int | None) -> LayerTopology | None:
        """What is said about the weight of this full name in this layer."""
        for pattern, topology in reversed(self.patterns):
            if pattern.search(name):
                return topology
        return None if layer is None else self.layers.get(layer)

    def check(self, layers: int) -> None:
        """Raises ModelLoadError if a layer is named that a model of so many does not have."""
        if self.layers and max(self.layers) >= layers:
            raise ModelLoadError(f"the topology names layer {max(self.layers)}, but the model has the layers 0 to {layers - 1}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Topology) and (self.layers, self.patterns) == (other.layers, other.patterns)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Topology(layers={self.layers!r}, patterns={[(pattern.pattern, layer) for pattern, layer in self.patterns]!r})"

    # ---- YAML -------------------------------------------------------------------------------------------------------

    def _read(self, text: str, source: str) -> Self:
        import yaml

        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise ModelLoadError(f"{source}: not valid YAML: {' '.join(str(error).split())[:300]}") from error
        if root is None:
            return self
        if not isinstance(root, yaml.MappingNode):
            raise ModelLoadError(f"{source}, line {_line(root)}: a topology is a mapping of selectors, as in '0-16: {{isq: Q4K}}'")
        ranges: list[tuple[range, LayerTopology]] = []
        seen: set[Hashable] = set()
        for key, value in root.value:
            where = f"{source}, line {_line(key)}"
            selector = _scalar(key, where, "a selector")
            if selector in seen:
                raise ModelLoadError(f"{where}: {selector!r:.80} is there twice")
            seen.add(selector)
            where = f"{where}, {selector!r:.80}"
            layer = _layer(value, source, where)
            if len(selector) > 1 and selector[0] == selector[-1] == "/":
                try:
                    self.with_pattern(selector[1:-1], layer)
                except ModelLoadError as error:
                    raise ModelLoadError(f"{where}: {error}") from error
            else:
                ranges.append((_range(selector, where), layer))
        for layers, layer in sorted(ranges, key=lambda entry: entry[0].stop):  # stable: of equal ends the last one stays last
            self.with_range(layers, layer)
        return self


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _scalar(node: Any, where: str, what: str) -> str:
    """The text of a node as it was written, whatever YAML would make of it."""
    if not isinstance(node.value, str):
        raise ModelLoadError(f"{where}: {what} must be plain text")
    return node.value


def _range(selector: str, where: str) -> range:
    def fail(problem: str) -> NoReturn:
        raise ModelLoadError(f"{where}: {problem}. A selector is a layer (12), a range (0-16) or a regular expression between slashes.")

    match = _NUMBERS.fullmatch(selector)
    if match is None:
        fail("not a selector")
    if max(len(number) for number in match.groups(default="0")) > 6:
        fail("no model has so many layers")
    start = int(match[1])
    stop = start + 1 if match[2] is None else int(match[2])
    if stop <= start:
        fail("the end of a range is not part of it, and must be greater than its start")
    if stop > _MAX_LAYERS:
        fail("no model has so many layers")
    return range(start, stop)


def _layer(node: Any, source: str, where: str) -> LayerTopology:
    import yaml

    if not isinstance(node, yaml.MappingNode):
        raise ModelLoadError(f"{where}: expected settings, as in 'isq: Q4K'")
    settings: dict[str, str | None] = {}
    for key, value in node.value:
        at = f"{source}, line {_line(key)}"
        name = _scalar(key, at, "a setting's name")
        if name not in ("isq", "device"):
            raise ModelLoadError(f"{at}, {name!r:.80}: not a setting of a layer; these are: isq, device")
        if name in settings:
            raise ModelLoadError(f"{at}: {name!r} is there twice")
        settings[name] = None if value.tag == "tag:yaml.org,2002:null" else _scalar(value, at, name)
    try:
        return LayerTopology(**settings)  # type: ignore[arg-type]
    except ModelLoadError as error:
        raise ModelLoadError(f"{where}: {error}") from error
