"""What a docstring says of a function and of each parameter, in the styles of NumPy, Google and Sphinx."""

from __future__ import annotations

import inspect
import re

_SECTION = re.compile(r"(?:(?P<google>[A-Z][A-Za-z ]+):|(?P<numpy>[A-Z][A-Za-z ]+)\n-{3,})[ \t]*$", re.MULTILINE)
_SPHINX = re.compile(r"^:(?P<field>\w+)(?:[ \t]+(?P<name>[^:\n]+))?:[ \t]*(?P<text>.*(?:\n[ \t]+.*|\n(?=\n[ \t]))*)", re.MULTILINE)
_PARAMETERS = {"Args", "Arguments", "Parameters", "Other Parameters", "Params", "Keyword Args", "Keyword Arguments"}
_OTHERS = {
    "Returns",
    "Return",
    "Raises",
    "Yields",
    "Yield",
    "Examples",
    "Example",
    "Notes",
    "Note",
    "References",
    "See Also",
    "Warnings",
    "Attributes",
}


def read_docstring(docstring: str | None) -> tuple[str, dict[str, str]]:
    """The description of a function, and that of each parameter that is described."""
    text = inspect.cleandoc(docstring or "")
    parameters = {}
    for field in _SPHINX.finditer(text):
        if field["field"] in ("param", "parameter", "arg", "argument", "key", "keyword") and field["name"]:
            parameters[field["name"].split()[-1].lstrip("*")] = _flat(field["text"])
    first = _SPHINX.search(text)
    if first:
        text = text[: first.start()]
    sections = [match for match in _SECTION.finditer(text) if _title(match) in _PARAMETERS | _OTHERS]
    for section, end in zip(sections, [*(following.start() for following in sections[1:]), len(text)], strict=False):
        if _title(section) in _PARAMETERS:
            body = text[section.end() : end]
            parameters |= _numpy(body) if section["numpy"] else _google(body)
    description = text[: sections[0].start()] if sections else text
    return description.strip(), parameters


def _title(match: re.Match[str]) -> str:
    return (match["google"] or match["numpy"]).strip()


def _numpy(body: str) -> dict[str, str]:
    """``name : type`` in the first column, the description indented below; several names may share one."""
    found = {}
    for entry in re.finditer(
        r"^(?P<names>\*{0,2}\w+(?:, *\*{0,2}\w+)*)[ \t]*(?::.*)?(?P<text>(?:\n(?:[ \t]+.*|[ \t]*(?=\n)))*)", body, re.MULTILINE
    ):
        for name in entry["names"].split(","):
            found[name.strip().lstrip("*")] = _flat(entry["text"])
    return found


def _google(body: str) -> dict[str, str]:
    """``name (type): description``, each at the same indentation, with what is indented more below."""
    first = re.search(r"^([ \t]+)\S", body, re.MULTILINE)
    if not first:
        return {}
    indent = re.escape(first[1])
    entry = re.compile(
        rf"^{indent}(?P<name>\*{{0,2}}\w+)[ \t]*(?:\(.*?\))?:[ \t]*(?P<text>.*(?:\n{indent}[ \t]+.*|\n[ \t]*(?=\n))*)", re.MULTILINE
    )
    return {match["name"].lstrip("*"): _flat(match["text"]) for match in entry.finditer(body)}


def _flat(text: str) -> str:
    return " ".join(text.split())
