# SPDX-License-Identifier: MIT
"""What the tree promises a reader: rooms at first sight, small modules, one place that knows the kernel's nodes.

Who may import whom is in pyproject.toml, as import-linter's contracts; `make check` runs both.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[3]
PACKAGE = TREE / "nbdd"
MAX_ENTRIES = 22
MAX_MODULE_LINES = 450
MAX_CLASS_LINES = 350

MODULES = sorted(path.relative_to(TREE).as_posix() for path in PACKAGE.rglob("*.py"))


def parsed(module: str) -> ast.Module:
    return ast.parse((TREE / module).read_text(encoding="utf-8"))


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each string that the program works with: no docstrings, and no help for people."""
    documentation = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    documentation |= {
        id(keyword.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in ("help", "description")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_package_shows_its_rooms_at_first_sight() -> None:
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= MAX_ENTRIES, sorted(entries)


@pytest.mark.parametrize("module", MODULES)
def test_module_and_its_classes_are_small_enough_to_read_at_once(module: str) -> None:
    lines = len((TREE / module).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_MODULE_LINES, "look for the second noun in it"
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_CLASS_LINES, node.name


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("nbdd/kernel/")])
def test_only_kernel_names_device_nodes(module: str) -> None:
    found = [line for line, text in strings(parsed(module)) if "/dev/nbd" in text]
    assert found == [], "ask nbdd.kernel for the path"


def test_every_package_says_what_it_is() -> None:
    for file in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file
