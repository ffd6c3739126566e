# SPDX-License-Identifier: MIT
"""Text for people: what does not print is escaped, and numbers read well."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdd.text import clause, duration, one_line, plural, printable, quoted, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 << 30, "10 GiB"),
     ((10 << 30) + 512, "10.0 GiB"), ((1 << 40) - 1, "1.0 TiB"), (1 << 63, "8 EiB"), ((1 << 64) - 1, "16.0 EiB")],
)  # fmt: skip
def test_size_is_in_binary_units(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (9000, "2 h 30 min"), (90000, "1 d 1 h")],
)
def test_duration_reads_well(seconds: int, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("plain ü", "plain ü"), ("a\nb\x1b[2J", "a\\nb\\x1b[2J"), ("\u202e", "\\u202e"), ("\udcff", "\\xff")],
)
def test_printable_escapes_what_does_not_print(text: str, escaped: str) -> None:
    assert printable(text) == escaped


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_quoted_is_printable_and_short(text: bytes | str) -> None:
    shown = quoted(text, 10)
    assert shown.isprintable()
    assert len(shown) <= 10 * len("\\U0010ffff") + len("'...'")


def test_quoted_marks_what_it_cuts() -> None:
    assert quoted("abc", 3) == "'abc'"
    assert quoted(b"abcd", 3) == "'abc...'"


@given(st.text())
def test_one_line_is_printable_and_within_its_limit(text: str) -> None:
    line = one_line(text, 5)
    assert line.isprintable()
    assert len(line) <= 5


def test_clause_is_an_error_within_a_sentence() -> None:
    assert clause(ValueError("It is\n away. Try again.")) == "It is away. Try again"


def test_plural_counts() -> None:
    assert [plural(number, "device") for number in (0, 1, 2)] == ["0 devices", "1 device", "2 devices"]
