"""What the pages say of the repository is there: files, modules, names, variables, and options of commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
SOURCES = [path for folder in ("pymistral", "kernels", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.*")]
FOLDERS = (ROOT, ROOT / "pymistral", ROOT / "docs", ROOT / "benchmarks")  # that a page's paths may begin in
# PTX, and what other projects call their own
STRANGERS = {
    *("bulk", "dp4a", "ex2", "lop3", "prmt"),
    *("accelerate", "activation_scale", "flash_attn", "input_scale", "type_k", "type_v"),
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def words(*suffixes: str) -> set[str]:
    return {word for path in SOURCES if path.suffix in suffixes for word in re.findall(r"\w+", path.read_text())}


@pytest.fixture(scope="module")
def known() -> set[str]:
    return words(".py", ".cu", ".cuh", ".h") | STRANGERS


def quoted(page: Path) -> list[str]:
    """What the page's text, outside of its blocks, has in backticks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pages
def test_files_are_there(page: Path) -> None:
    names = {path.name for path in SOURCES}
    paths = set(re.findall(r"[\w./-]*\w\.(?:py|md|cuh|cu|h)\b", page.read_text()))
    folders = {path for path in quoted(page) if re.fullmatch(r"[\w-]+(/[\w-]+)*/", path)}
    beside = (page.parent, *FOLDERS)
    missing = [path for path in sorted(paths | folders) if path not in names and not any((folder / path).exists() for folder in beside)]
    assert missing == []


@pages
def test_names_are_there(page: Path, known: set[str]) -> None:
    """A name in backticks, with arguments or without: each of its parts occurs in some source."""
    names = [match[1] for text in quoted(page) if (match := re.fullmatch(r"@?([A-Za-z_][\w.]*)(\(.*\)|=.*)?", text))]
    names = [name for name in names if not re.search(r"\.(py|md|cu|cuh|h|json)$", name)]
    assert [name for name in names if not known.issuperset(filter(None, name.split(".")))] == []


def commands(page: Path) -> Iterator[str]:
    """Commands of the page, without what is piped into them or said behind them."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in [*"".join(blocks).replace("\\\n", " ").splitlines(), *quoted(page)]:
        yield from re.split(r"\s#|\s[|]\s|&&", line)


@pages
def test_commands_and_their_options_are_there(page: Path) -> None:
    for command in commands(page):
        if match := re.search(r"python -m benchmarks\.(\w+)(.*)", command):
            files = [ROOT / "benchmarks" / f"{match[1]}.py", ROOT / "benchmarks" / "report.py"]
        elif match := re.search(r"(?:^|[\s(])pymistral (\w+)(.*)", command):
            files = [ROOT / "pymistral" / "cli" / f"{match[1]}.py", ROOT / "pymistral" / "cli" / "options.py"]
        else:
            continue
        source = "".join(path.read_text() for path in files)
        assert [option for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", match[2]) if f'"{option}"' not in source] == [], command


@pages
def test_variables_are_there(page: Path, known: set[str]) -> None:
    assert set(re.findall(r"PYMISTRAL_[A-Z_]+", page.read_text())) - known == set()
