"""The public names, and what goes with being public."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

import pymistral

HEAVY = ("numba", "llvmlite", "numpy", "tokenizers", "jinja2", "pydantic", "huggingface_hub", "asyncio", "rich", "llguidance")


def names_for_type_checkers() -> set[str]:
    tree = ast.parse(Path(inspect.getfile(pymistral)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_the_lists_of_names_agree() -> None:
    assert pymistral.__all__ == sorted(pymistral.__all__)
    assert set(pymistral.__all__) == names_for_type_checkers()
    assert set(pymistral.__all__) <= set(dir(pymistral))


@pytest.mark.parametrize("name", pymistral.__all__)
def test_each_name_can_be_imported_and_is_documented(name: str) -> None:
    value = getattr(pymistral, name)
    if inspect.isclass(value):
        assert (value.__doc__ or "").strip(), name
        for method_name, method in vars(value).items():
            if not method_name.startswith("_") and (
                inspect.isfunction(method) or isinstance(method, property | classmethod | staticmethod)
            ):
                assert inspect.getdoc(method), f"{name}.{method_name} has no docstring"


@pytest.mark.parametrize("name", [name for module in (pymistral.blocking, pymistral.errors) for name in vars(module)])
def test_the_modules_are_documented(name: str) -> None:
    module = pymistral.blocking if hasattr(pymistral.blocking, name) else pymistral.errors
    value = getattr(module, name)
    if inspect.isclass(value) and value.__module__ == module.__name__:
        assert inspect.getdoc(value), name
        assert [key for key, method in vars(value).items() if key[0] != "_" and callable(method) and not inspect.getdoc(method)] == []


ENUMS = [value for value in map(pymistral.__getattr__, pymistral.__all__) if inspect.isclass(value) and issubclass(value, Enum)]


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.__name__)
def test_an_enum_takes_its_plain_value(enum: type[Enum]) -> None:
    for member in enum:
        plain = [member.value.lower(), member.value.upper()] if isinstance(member.value, str) else [member.value]
        assert all(enum(value) is member for value in plain)
    with pytest.raises(pymistral.errors.PymistralError, match="nonsense"):
        enum("nonsense")


@pytest.mark.parametrize(("theirs", "ours"), [(pymistral.Agent, pymistral.blocking.BlockingAgent)])
def test_blocking_twins(theirs: type, ours: type) -> None:
    def public(cls: type) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_")}

    assert public(ours) == public(theirs) | {"from_builder", "inner"}
    for name in public(theirs):
        method, twin = inspect.getattr_static(theirs, name), inspect.getattr_static(ours, name)
        assert isinstance(method, property) or inspect.signature(method).parameters == inspect.signature(twin).parameters
        assert not inspect.iscoroutinefunction(twin)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = pymistral.nonsense
    with pytest.raises(ImportError):
        exec("from pymistral import nonsense")


def test_version() -> None:
    assert pymistral.__version__.count(".") >= 2


def test_importing_it_imports_nothing_heavy() -> None:
    code = f"import sys, pymistral; print(*[name for name in {HEAVY} if name in sys.modules])"
    assert run(code) == ""


def test_requests_and_builders_need_no_numpy() -> None:
    code = (
        "import sys; from pymistral import RequestBuilder, SamplingParams, Tool; print('numpy' in sys.modules, 'pydantic' in sys.modules)"
    )
    assert run(code) == "False False"


def test_importing_it_is_quick() -> None:
    code = "import time; begin = time.perf_counter(); import pymistral; print(time.perf_counter() - begin)"
    assert min(float(run(code)) for _ in range(3)) < 0.05


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
