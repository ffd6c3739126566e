# SPDX-License-Identifier: MIT
"""Options of a call to definitions."""

from __future__ import annotations

import pytest
import yaml

from nbdd.config.definition import Attach, Definition
from nbdd.config.loader import load
from nbdd.config.options import definition_from_options, options_with
from nbdd.errors import InvalidArgs, InvalidURI, NbddError, TLSFailed
from nbdd.uri import URI
from tests.fakes.config import Write


def test_options_make_the_definition_that_yaml_would(write: Write) -> None:
    options: dict[str, object] = {
        "uri": ["nbd://h/x", "nbd://i/x"],
        "device": "/dev/nbd12",
        "read-only": True,
        "connections": 3,
        "timeout": 4,
        "dead-timeout": 5,
        "block-size": 1024,
        "desktop": {"name": "Photos"},
    }
    directory = write(yaml.safe_dump({"devices": {"a": options}}))
    assert definition_from_options("a", options) == load(directory).devices["a"]


def test_defaults_stand_in_for_missing_options_but_nothing_attaches_at_boot(write: Write) -> None:
    defaults = load(write("defaults: {timeout: 9, connections: 2, attach: boot}")).defaults
    definition = definition_from_options("a", {"uri": "nbd://h/x", "connections": 4}, defaults)
    assert (definition.timeout, definition.connections, definition.attach) == (9, 4, Attach.MANUAL)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({}, InvalidArgs, "Option 'uri' is missing"),
        ({"uri": 3}, InvalidArgs, ("Option 'uri' must be an NBD URI such as nbd://server.example/export, or a list of "
                                  "them, but 3 is a number.")),
        ({"uri": []}, InvalidArgs, "the list is empty"),
        ({"uri": ""}, InvalidURI, "it is empty"),
        ({"uri": "http://h"}, InvalidURI, "the scheme must be one of"),
        ({"uri": ["nbd://h/", "nbd://h:0/"]}, InvalidURI, "the port must be"),
        ({"uri": "nbds://h/x"}, TLSFailed, "never connects in the clear"),
        ({"uri": "nbd://h/x", "tls": {"certificates": "/x"}}, TLSFailed, "never connects in the clear"),
        ({"uri": "nbds://h/x", "timeout": "x"}, TLSFailed, "never connects in the clear"),
        ({"uri": "nbd://h/x", "timeout": "30"}, InvalidArgs, ("Option 'timeout' must be a whole number of seconds from "
                                                             "0 to 2000000, but '30' is text.")),
        ({"uri": "nbd://h/x", "timeout": 2**31}, InvalidArgs, "but it is 2147483648."),
        ({"uri": "nbd://h/x", "timeout": True}, InvalidArgs, "but it is true."),
        ({"uri": "nbd://h/x", "timeout": b"3"}, InvalidArgs, "but it is of type bytes."),
        ({"uri": "nbd://h/x", "connections": 0}, InvalidArgs, "from 1 to 16, but it is 0."),
        ({"uri": "nbd://h/x", "read-only": 1}, InvalidArgs, "must be true or false, but 1 is a number."),
        ({"uri": "nbd://h/x", "device": 3}, InvalidArgs, "must be auto or a device such as /dev/nbd3"),
        ({"uri": "nbd://h/x", "block-size": 777}, InvalidArgs, "must be auto or a power of two"),
        ({"uri": "nbd://h/x", "attach": "boot"}, InvalidArgs, "Option 'attach' can't be set here."),
        ({"uri": "nbd://h/x", "desktop": {"name": 3}}, InvalidArgs, "Option 'desktop.name' must be a text of 1 to 64"),
        ({"uri": "nbd://h/x", "desktop": {"uri": "x"}}, InvalidArgs, "Option 'desktop.uri' is not known; known are"),
        ({"uri": "nbd://h/x", "timout": 3}, InvalidArgs, "Option 'timout' is not known; did you mean timeout?"),
        ({"uri": "nbd://h/x", "x\ny" * 99: 3}, InvalidArgs, "Option 'x\\nyx\\ny"),
    ],
)  # fmt: skip
def test_wrong_option_raises_its_own_error_with_a_sentence(
    options: dict[str, object], error: type[NbddError], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        definition_from_options("a", options)
    assert sentence in str(caught.value)
    assert type(caught.value) is error
    assert str(caught.value).isprintable()


def test_wrong_options_are_named_all_at_once() -> None:
    with pytest.raises(InvalidArgs, match=r"(?s)timeout.*connections|connections.*timeout"):
        definition_from_options("a", {"uri": "nbd://h/x", "timeout": "x", "connections": 0})


def test_wrong_name_is_refused_before_anything_else() -> None:
    with pytest.raises(InvalidArgs, match="can't name a device"):
        definition_from_options("a/b", {"uri": "nope"})


def test_options_of_attach_change_what_they_name_and_nothing_else() -> None:
    definition = Definition(name="a", uri=(URI.parse("nbd://h/x"),), attach=Attach.BOOT, timeout=5, device=3)
    changed = options_with(definition, {"read-only": True, "timeout": 0, "device": "auto", "block-size": "auto"})
    assert changed.to_wire() == definition.to_wire() | {"read-only": True, "timeout": 0, "device": None}
    assert options_with(definition, {}) == definition


@pytest.mark.parametrize(
    "options", [{"uri": "nbd://h/y"}, {"attach": "boot"}, {"desktop": {}}, {"name": "b"}, {"timeout": -1}, {"x": 1}]
)
def test_options_of_attach_that_can_not_be_given_are_refused(options: dict[str, object]) -> None:
    definition = Definition(name="a", uri=(URI.parse("nbd://h/x"),))
    with pytest.raises(InvalidArgs, match="Option"):
        options_with(definition, options)


def test_options_of_attach_that_ask_for_encryption_raise_tls_failed() -> None:
    with pytest.raises(TLSFailed):
        options_with(Definition(name="a", uri=(URI.parse("nbd://h/x"),)), {"tls": {}})
