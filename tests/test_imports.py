"""The floors of the house: an import goes down, never up, nor sideways in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {"kernels", "responses", "errors", "threads", "garbage", "public_http"},
    {"nn", "requests", "quantization"},
    {"engine", "models", "loading", "tool_calls"},
    {"chat_stream", "model", "model_group", "answer", "tool_rounds"},
    {"builders", "agents", "blocking"},
    {"cli", "__main__"},
]
FLOOR_OF = {unit: number for number, units in enumerate(FLOORS, 1) for unit in units}
STRANGERS = {("engine", "models"), ("models", "engine"), ("loading", "engine"), ("quantization", "engine")}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module with its dotted name; the public names in pymistral/__init__.py stand above all floors."""
    for folder, package in ((ROOT / "pymistral", "pymistral"), (ROOT / "kernels", "pymistral.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            if parts != ["pymistral", "__init__"]:
                yield ".".join(parts), path


def imported(module: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The absolute names that a module imports, wherever in it, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            if base == "pymistral":
                yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield base, node.lineno


def edges() -> list[tuple[str, str, str]]:
    """(importing unit, imported unit, where) for every import inside pymistral."""
    found = []
    for module, path in modules():
        unit = module.split(".")[1]
        for name, line in imported(module, ast.parse(path.read_text())):
            if name.startswith("pymistral.") and name.split(".")[1] != unit:
                found.append((unit, name.split(".")[1], f"{path.relative_to(ROOT)}:{line}"))
    return found


def test_every_module_has_a_floor() -> None:
    assert {module.split(".")[1] for module, _ in modules()} <= FLOOR_OF.keys()


def test_imports_go_down() -> None:
    up = [f"{where}: {unit} imports {other}" for unit, other, where in edges() if FLOOR_OF.get(other, 99) > FLOOR_OF[unit]]
    assert not up, "\n".join(up)


def test_some_do_not_know_each_other() -> None:
    met = [f"{where}: {unit} imports {other}" for unit, other, where in edges() if (unit, other) in STRANGERS]
    assert not met, "\n".join(met)


def test_kernels_import_nothing_of_pymistral() -> None:
    assert not [where for unit, _, where in edges() if unit == "kernels"]


def test_no_circle_on_a_floor() -> None:
    # What only type checkers import makes no circle at run time: errors names a response, which needs no error.
    sideways = {(unit, other) for unit, other, _ in edges() if FLOOR_OF.get(other) == FLOOR_OF[unit]}
    assert not {pair for pair in sideways if pair[::-1] in sideways}


@pytest.mark.parametrize("forbidden", ["torch", "transformers"])
def test_never_imported(forbidden: str) -> None:
    assert not [
        module for module, path in modules() for name, _ in imported(module, ast.parse(path.read_text())) if name.split(".")[0] == forbidden
    ]
