# SPDX-License-Identifier: MIT
"""Definitions: what can name a device, and what crosses to the worker and back."""

from __future__ import annotations

import json
import re

import pytest

from nbdd.config.definition import NAME_PATTERN, Attach, Definition, Desktop, check_name
from nbdd.errors import InvalidArgs, InvalidURI
from nbdd.uri import URI


@pytest.mark.parametrize(
    "name", ["a", "7", "backup", "A.b_c-d:e", "on", "1:30", "x" * 63, "part1", "a-part", "p-part1b"]
)
def test_name_of_the_allowed_characters_is_taken_as_it_is(name: str) -> None:
    assert check_name(name) == name
    assert re.search(NAME_PATTERN, name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a b",
        "a/b",
        "/dev/nbd0",
        "..",
        ".",
        ".hidden",
        "-rf",
        "_x",
        ":x",
        "bücher",
        "a\n",
        "\na",
        "a\x00b",
        "a\tb",
        "x" * 64,
        "x" * 255,
        "é" * 127,
        "a%b",
        "photos-part1",
        "a-part10",
        "a@b",
        "\N{FULLWIDTH DIGIT ONE}",
        "\N{ARABIC-INDIC DIGIT ONE}a",
    ],
)
def test_name_of_other_characters_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(InvalidArgs, match="1 to 63 letters, digits") as caught:
        check_name(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_definition_survives_the_way_to_the_worker_and_back() -> None:
    definition = Definition(
        name="backup",
        uri=(URI.parse("nbd://a.example/x"), URI.parse("nbd+unix:///y%20z?socket=/run/a.sock")),
        attach=Attach.BOOT,
        device=3,
        read_only=True,
        connections=4,
        timeout=30,
        dead_timeout=0,
        block_size=4096,
        desktop=Desktop("Photos", "folder-pictures", user_mountable=False),
    )
    assert Definition.from_wire(json.loads(json.dumps(definition.to_wire()))) == definition


def test_definition_of_defaults_survives_the_way_to_the_worker_and_back() -> None:
    definition = Definition(name="a", uri=(URI.parse("nbd://h/"),))
    assert Definition.from_wire(json.loads(json.dumps(definition.to_wire()))) == definition


def test_definition_from_an_earlier_version_has_defaults_for_newer_keys() -> None:
    wire = Definition(name="a", uri=(URI.parse("nbd://h/"),)).to_wire()
    del wire["desktop"], wire["network-timeout"]
    assert Definition.from_wire(wire) == Definition(name="a", uri=(URI.parse("nbd://h/"),))


def test_definition_with_a_bad_uri_on_the_wire_raises_invalid_uri() -> None:
    wire = Definition(name="a", uri=(URI.parse("nbd://h/"),)).to_wire()
    with pytest.raises(InvalidURI):
        Definition.from_wire(wire | {"uri": ["http://h/"]})


def test_definition_with_another_timeout_is_otherwise_the_same() -> None:
    definition = Definition(name="a", uri=(URI.parse("nbd://h/"),), connections=2)
    changed = definition.with_timeout(90)
    assert changed.to_wire() == definition.to_wire() | {"timeout": 90}
    assert definition.timeout == 0
