"""Every text in the source that a user may see: string literals, with a mark in place of what is filled in."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import opd

PACKAGES = tuple(Path(opd.__file__).parents[1] / name for name in ("opd", "opd_plan", "opd_theory"))
FILLED = "\0"


@functools.cache
def messages() -> tuple[tuple[str, str], ...]:
    """(place, text) of each string literal but docstrings; `FILLED` stands for each value."""
    found = []
    for path in (p for package in PACKAGES for p in sorted(package.rglob("*.py"))):
        for line, text in _texts(ast.parse(path.read_text(encoding="utf-8"))):
            found.append((f"{path.parent.name}/{path.name}:{line}", text))
    return tuple(found)


def _texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(node.value)  # a docstring
        if isinstance(node, ast.JoinedStr):
            inside.update(node.values)
            inside.update(part.format_spec for part in node.values if isinstance(part, ast.FormattedValue))
            yield node.lineno, "".join(p.value if isinstance(p, ast.Constant) else FILLED for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.lineno, node.value
