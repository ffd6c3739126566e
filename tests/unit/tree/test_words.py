# SPDX-License-Identifier: MIT
"""The words of the code and of its documents: plain ones, and one for one thing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[3]
MOST_LINES_THAT_TELL = 20


def lines(*places: str, suffixes: tuple[str, ...] = (".py", ".md", ".in")) -> Iterator[tuple[str, str]]:
    """Every line of the files in those places, with "file:number"."""
    for place in places:
        root = TREE / place
        for path in [root] if root.is_file() else sorted(each for each in root.rglob("*") if each.suffix in suffixes):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                yield f"{path.relative_to(TREE)}:{number}", line


def those_with(pattern: str, *places: str) -> list[str]:
    found = re.compile(pattern, re.IGNORECASE)
    return [f"{place}: {line.strip()}" for place, line in lines(*places) if found.search(line)]


@pytest.mark.parametrize("word", ["errand", "refuser", "hasten", "manned", "anew"])
def test_words_that_nobody_greps_for_are_not_used(word: str) -> None:
    assert those_with(rf"\b{word}\b", "nbdd", "docs", "man", "README.md", "CONTRIBUTING.md", "CHANGELOG.md") == []


def test_words_for_log_send_report_and_return_are_these() -> None:
    found = those_with(r"\b(tell|tells|told)\b", "nbdd")
    assert len(found) <= MOST_LINES_THAT_TELL, "\n".join(found)


def test_words_are_searched_for_in_files_that_there_are() -> None:
    assert len(those_with(r"\bconnections?\b", "nbdd", "README.md")) > 100
