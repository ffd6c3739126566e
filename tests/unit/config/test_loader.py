# SPDX-License-Identifier: MIT
"""The configuration: what is read, and how every fault is told with its place."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdd import data
from nbdd.config.definition import Attach, Definition, Desktop
from nbdd.config.loader import (
    MAX_PROBLEMS,
    Configuration,
    check,
    load,
)
from nbdd.config.options import definition_from_options, options_with
from nbdd.config.source import MAX_BYTES
from nbdd.config.values import MAX_DEPTH
from nbdd.errors import InvalidArgs, InvalidConfig, InvalidURI, NbddError, TLSFailed
from nbdd.uri import URI

ROOT = Path(__file__).parents[3]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write nbdd.yaml, and files of devices.d by their names; give the directory."""

    def _write(main: str | bytes | None = None, **devices: str | bytes) -> Path:
        named = {f"devices.d/{name}.yaml": text for name, text in devices.items()}
        if main is not None:
            named["nbdd.yaml"] = main
        for name, text in named.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path

    return _write


def problems(directory: Path) -> list[str]:
    """What is wrong in `directory`, with the places relative to it."""
    with pytest.raises(InvalidConfig) as caught:
        load(directory)
    for problem in caught.value.problems:
        assert problem.isprintable(), problem
        assert problem.endswith((".", "?")), problem
    return [problem.replace(f"{directory}/", "") for problem in caught.value.problems]


def device(**settings: str) -> str:
    """A file with the device 'a', its settings from line 3, the URI in front."""
    lines = {"uri": "nbd://h/x"} | {key.replace("_", "-"): value for key, value in settings.items()}
    return "devices:\n  a:\n" + "".join(f"    {key}: {value}\n" for key, value in lines.items())


# ---- what is read


def test_every_key_arrives_in_the_definition(write: Write) -> None:
    configuration = load(
        write(
            """\
devices:
  backup:
    uri: [nbd://a.example/x, "nbd+unix:///y?socket=/run/s"]
    attach: boot
    device: /dev/nbd3
    read-only: true
    connections: 16
    timeout: 30
    dead-timeout: 0
    block-size: 4096
    desktop: {name: Eve's photos (2026), icon: folder-pictures, user-mountable: false}
"""
        )
    )
    assert dict(configuration.devices) == {
        "backup": Definition(
            name="backup",
            uri=(URI.parse("nbd://a.example/x"), URI.parse("nbd+unix:///y?socket=/run/s")),
            attach=Attach.BOOT,
            device=3,
            read_only=True,
            connections=16,
            timeout=30,
            dead_timeout=0,
            block_size=4096,
            desktop=Desktop("Eve's photos (2026)", "folder-pictures", user_mountable=False),
        )
    }


def test_an_empty_desktop_is_a_desktop_and_none_is_none(write: Write) -> None:
    devices = load(write("devices:\n  a: {uri: nbd://h/x, desktop: {}}\n  b: {uri: nbd://h/y}\n")).devices
    assert devices["a"].desktop == Desktop()
    assert devices["b"].desktop is None


def test_a_uri_alone_makes_a_device(write: Write) -> None:
    configuration = load(write(device(device="auto", block_size="auto")))
    assert configuration.devices["a"] == Definition(name="a", uri=(URI.parse("nbd://h/x"),))


def test_defaults_hold_for_every_file_and_yield_to_the_device(write: Write) -> None:
    directory = write(
        "defaults: {timeout: 7, dead-timeout: 8, connections: 2, read-only: on, attach: boot, block-size: 512}\n"
        "devices: {a: {uri: nbd://h/a, timeout: 0}}\n",
        more="devices: {b: {uri: nbd://h/b, read-only: off, attach: manual, block-size: auto}}\n",
    )
    configuration = load(directory)
    a, b = configuration.devices["a"], configuration.devices["b"]
    assert (a.timeout, a.dead_timeout, a.connections, a.read_only, a.attach, a.block_size) == (
        0, 8, 2, True, Attach.BOOT, 512,
    )  # fmt: skip
    assert (b.timeout, b.dead_timeout, b.connections, b.read_only, b.attach, b.block_size) == (
        7, 8, 2, False, Attach.MANUAL, None,
    )  # fmt: skip
    assert configuration.defaults["timeout"] == 7


def test_files_are_read_in_name_order_and_devices_keep_theirs(write: Write) -> None:
    one = "devices: {%s: {uri: nbd://h/x}}"
    directory = write("devices: {z: {uri: nbd://h/x}, a: {uri: nbd://h/x}}", b=one % "y", a=one % "x", B=one % "w")
    (directory / "devices.d" / ".hidden.yaml").write_text("[")
    (directory / "devices.d" / "backup.yaml~").write_text("[")
    (directory / "devices.d" / "backup.yaml.dpkg-old").write_text("[")
    configuration = load(directory)
    assert list(configuration.devices) == ["z", "a", "w", "x", "y"]
    assert [path.name for path in configuration.files] == ["nbdd.yaml", "B.yaml", "a.yaml", "b.yaml"]


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing\n", "---\n", "devices:\n", "defaults:\ndevices: {}\n", "\ufeff", "~"]
)
def test_a_file_with_nothing_in_it_is_an_empty_configuration(write: Write, text: str) -> None:
    configuration = load(write(text, more=text.replace("defaults:\n", "")))
    assert not configuration.devices
    assert not configuration.defaults


def test_a_directory_that_is_missing_is_empty_for_the_daemon_and_an_error_for_a_check(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == Configuration()
    with pytest.raises(InvalidConfig, match=r"none: the directory can't be read: no such file or directory\."):
        load(tmp_path / "none", must_exist=True)


def test_names_are_taken_as_they_are_written_whatever_yaml_makes_of_them(write: Write) -> None:
    names = ["on", "7", "1:30", "010", "null", "2001-01-01", "1.5", "true"]
    configuration = load(write("devices:\n" + "".join(f"  {name}: {{uri: nbd://h/x}}\n" for name in names)))
    assert list(configuration.devices) == names


def test_anchors_and_merge_keys_share_settings(write: Write) -> None:
    configuration = load(
        write(
            """\
devices:
  a: &base {uri: nbd://h/a, timeout: 5, connections: 2}
  b: {<<: *base, uri: nbd://h/b}
  c: {uri: nbd://h/c, <<: [{timeout: 9}, *base]}
"""
        )
    )
    found = configuration.devices
    assert [(str(item.uri[0]), item.timeout, item.connections) for item in found.values()] == [
        ("nbd://h/a", 5, 2),
        ("nbd://h/b", 5, 2),
        ("nbd://h/c", 9, 2),
    ]


def test_a_whole_number_with_a_point_is_a_whole_number_as_in_editors(write: Write) -> None:
    timeout = load(write(device(timeout="30.0"))).devices["a"].timeout
    assert (timeout, type(timeout)) == (30, int)


def test_loading_twice_gives_equal_configurations(write: Write) -> None:
    directory = write(device(timeout="3"), more="devices: {b: {uri: nbd://h/b}}")
    assert load(directory) == load(directory)


def test_ten_thousand_devices_load_in_seconds(write: Write, record_property: Callable[[str, object], None]) -> None:
    block = "  d{0}:\n    uri: nbd://h{0}.example/e\n    attach: boot\n    timeout: 30\n    block-size: 4096\n"
    directory = write("devices:\n" + "".join(block.format(number) for number in range(10_000)))
    begin = time.monotonic()
    configuration = load(directory)
    took = time.monotonic() - begin
    record_property("seconds", took)
    print(f"10,000 devices: {took:.2f} s")
    assert len(configuration.devices) == 10_000
    assert took < 20  # about 1 on a desk, and this may be emulated


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,62}", fullmatch=True),
        st.fixed_dictionaries(
            {"uri": st.sampled_from(["nbd://h/x", ["nbd://[::1]:5/", "nbd+unix:///?socket=/s"]])},
            optional={
                "attach": st.sampled_from(["boot", "manual"]),
                "read-only": st.booleans(),
                "connections": st.integers(1, 16),
                "timeout": st.integers(0, 2_000_000),
                "dead-timeout": st.integers(0, 2_000_000),
                "block-size": st.sampled_from(["auto", 512, 4096, 65536]),
            },
        ),
        max_size=5,
    ),
    st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_what_another_yaml_writer_writes_is_read_as_it_was_meant(
    tmp_path: Path, devices: dict[str, dict[str, Any]], flow: bool
) -> None:
    (tmp_path / "nbdd.yaml").write_text(yaml.safe_dump({"devices": devices}, default_flow_style=flow, sort_keys=False))
    configuration = load(tmp_path)
    assert list(configuration.devices) == list(devices)
    for name, wanted in devices.items():
        options = {key: value for key, value in wanted.items() if key != "attach"}
        attach = Attach(wanted.get("attach", "manual"))
        assert configuration.devices[name] == replace(definition_from_options(name, options), attach=attach)


# ---- what is wrong


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"timout": "3"}, "4:5: device 'a': key 'timout': is not known; did you mean timeout?"),
        ({"READ_ONLY": "yes"}, "4:5: device 'a': key 'READ-ONLY': is not known; did you mean read-only?"),
        ({"colour": "red"}, "4:5: device 'a': key 'colour': is not known; known are uri, attach, "),
        ({"timeout": "soon"}, ("4:14: device 'a': key 'timeout': must be a whole number of seconds from 0 to 2000000, "
                              "but 'soon' is text.")),
        ({"timeout": "'30'"}, "but '30' is text; leave the quotes out."),
        ({"timeout": "-1"}, "from 0 to 2000000, but it is -1."),
        ({"timeout": "2000001"}, "from 0 to 2000000, but it is 2000001."),
        ({"timeout": "9" * 5000}, "from 0 to 2000000, but it is 9999999"),
        ({"timeout": "1.5"}, "from 0 to 2000000, but it is 1.5."),
        ({"timeout": ".inf"}, "from 0 to 2000000, but it is .inf."),
        ({"timeout": ".NaN"}, "from 0 to 2000000, but it is .NaN."),
        ({"timeout": "on"}, "from 0 to 2000000, but 'on' means true in YAML."),
        ({"timeout": "true"}, "from 0 to 2000000, but it is true."),
        ({"timeout": ""}, "from 0 to 2000000, but it has no value."),
        ({"timeout": "[3]"}, "from 0 to 2000000, but it is a list."),
        ({"timeout": "{s: 3}"}, "from 0 to 2000000, but it is a mapping."),
        ({"timeout": "1:30"}, ("4:14: device 'a': key 'timeout': '1:30' is not taken, since YAML reads digits with "
                              "colons between them as a number in base 60; write a plain decimal number")),
        ({"timeout": "1:30.5"}, "in base 60"),
        ({"timeout": "010"}, "'010' is not taken, since YAML reads a number that begins with 0 in base 8"),
        ({"timeout": "0x10"}, "'0x10' is not taken, since YAML reads it in another base than ten"),
        ({"timeout": "0b1"}, "another base than ten"),
        ({"timeout": "1_000"}, "'1_000' is not taken, since YAML reads digits with underscores"),
        ({"timeout": "!!int soon"}, "'soon' is not a number."),
        ({"timeout": "!!bool soon"}, "the tag 'tag:yaml.org,2002:bool' means nothing to nbdd"),
        ({"timeout": "!seconds 3"}, "the tag '!seconds' means nothing to nbdd; leave it out."),
        ({"timeout": "!!python/object/apply:os.getpid []"}, "means nothing to nbdd; leave it out."),
        ({"dead_timeout": "x"}, "key 'dead-timeout': must be a whole number of seconds from 0 to 2000000, but 'x'"),
        ({"connections": "0"}, "must be a whole number of connections from 1 to 16, but it is 0."),
        ({"connections": "17"}, "must be a whole number of connections from 1 to 16, but it is 17."),
        ({"read_only": "'yes'"}, "key 'read-only': must be true or false, but 'yes' is text; leave the quotes out."),
        ({"read_only": "maybe"}, "must be true or false, but 'maybe' is text."),
        ({"read_only": "1"}, "must be true or false, but 1 is a number."),
        ({"attach": "on"}, "key 'attach': must be boot or manual, but 'on' means true in YAML."),
        ({"attach": "later"}, "must be boot or manual, but it is 'later'."),
        ({"device": "3"}, "key 'device': must be auto or a device such as /dev/nbd3, but 3 is a number."),
        ({"device": "/dev/sda"}, "must be auto or a device such as /dev/nbd3, but it is '/dev/sda'."),
        ({"device": "/dev/nbd3p1"}, "must be auto or a device such as /dev/nbd3, but it is '/dev/nbd3p1'."),
        ({"device": "/dev/nbd03"}, "must be auto or a device"),
        ({"device": '"/dev/nbd3\\n"'}, "must be auto or a device"),
        ({"block_size": "1000"}, "must be auto or a power of two from 512 to 65536, but it is 1000."),
        ({"block_size": "256"}, "must be auto or a power of two"),
        ({"block_size": "131072"}, "must be auto or a power of two"),
        ({"block_size": "'512'"}, "but '512' is text; leave the quotes out."),
        ({"block_size": "on"}, "must be auto or a power of two from 512 to 65536, but 'on' means true"),
        ({"uri": "7"}, ("3:10: device 'a': key 'uri': must be an NBD URI such as nbd://server.example/export, "
                       "or a list of them, but 7 is a number.")),
        ({"uri": "[]"}, "3:10: device 'a': key 'uri': must be an NBD URI"),
        ({"uri": "[nbd://h/x, 10.5]"}, ("3:22: device 'a': key 'uri': must be an NBD URI such as "
                                       "nbd://server.example/export, but 10.5 is a number.")),
        ({"uri": ""}, ("key 'uri': must be an NBD URI such as nbd://server.example/export, or a list of them, "
                      "but it has no value.")),
        ({"uri": "http://h/x"}, "3:10: device 'a': key 'uri': 'http://h/x' is not a URI that nbdd can use: the scheme"),
        ({"uri": "nbd://h:99999/x"}, "the port must be a number from 1 to 65535, not '99999'."),
        ({"uri": "nbd:///x"}, "the host is missing"),
        ({"uri": "nbd://h/%zz"}, "is not followed by two hexadecimal digits"),
        ({"uri": "[nbd://h/x, 'nbd://h:no/']"}, "3:22: device 'a': key 'uri': 'nbd://h:no/' is not a URI"),
        ({"uri": "nbds://h/x"}, "3:10: device 'a': key 'uri': TLS is not supported by this version of nbdd"),
        ({"uri": "nbds+unix:///x?socket=/s"}, "never connects in the clear where encryption was asked for"),
        ({"desktop": ""}, "key 'desktop': must be a mapping such as {name: Photos}, or {}, but it has no value."),
        ({"desktop": "yes"}, "key 'desktop': must be a mapping such as {name: Photos}, or {}, but 'yes' means true"),
        ({"desktop": "{name: 3}"}, "4:21: device 'a': key 'desktop.name': must be a text of 1 to 64 characters"),
        ({"desktop": "{name: ''}"}, "key 'desktop.name': must be a text of 1 to 64 characters"),
        ({"desktop": "{nam: x}"}, "4:15: device 'a': key 'desktop.nam': is not known; did you mean name?"),
        ({"desktop": "{timeout: 3}"}, "key 'desktop.timeout': is not known; known are name, icon, user-mountable."),
        ({"desktop": "{icon: a/b}"}, "key 'desktop.icon': must be the name of an icon such as drive-harddisk, of"),
        ({"desktop": "{user-mountable: 1}"}, "key 'desktop.user-mountable': must be true or false, but 1 is a number."),
        ({"tls": "{certificates: /etc/pki}"}, "4:5: device 'a': key 'tls': TLS is not supported by this version"),
        ({"tls": "off"}, "4:5: device 'a': key 'tls': TLS is not supported"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_told_once_with_its_place_and_what_was_expected(
    write: Write, settings: dict[str, str], expected: str
) -> None:
    found = problems(write(device(**settings)))
    assert len(found) == 1
    assert expected in found[0]
    assert found[0].startswith("nbdd.yaml:")
    assert ": device 'a': key " in found[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "nbdd.yaml:1:1: the file must be a mapping with 'devices' and perhaps 'defaults', but it is a list."),
        ("nbd://h/x\n", ("nbdd.yaml:1:1: the file must be a mapping with 'devices' and perhaps 'defaults', "
                        "but 'nbd://h/x' is text.")),
        ("device: {}\n", "nbdd.yaml:1:1: key 'device': is not known; did you mean devices?"),
        ("backup: {uri: nbd://h/x}\n", "nbdd.yaml:1:1: key 'backup': is not known here; devices go below"),
        ("devices: [a]\n", "nbdd.yaml:1:10: key 'devices': must be a mapping from names to devices, but it is a list."),
        ("devices:\n  a:\n", "nbdd.yaml:2:5: device 'a': must be a mapping with a 'uri' at least, but it has no"),
        ("devices:\n  a: nbd://h/x\n", "nbdd.yaml:2:6: device 'a': must be a mapping with a 'uri' at least, but 'nbd"),
        ("devices:\n  a: {}\n", "nbdd.yaml:2:3: device 'a': key 'uri': is missing; write for example nbd://"),
        ("defaults: {uri: nbd://h/x}\n", "nbdd.yaml:1:12: defaults: key 'uri': can't have a default; give it to each"),
        ("defaults: {tls: {}}\n", "nbdd.yaml:1:12: defaults: key 'tls': TLS is not supported"),
        ("defaults: {timeout: x}\n", "nbdd.yaml:1:21: defaults: key 'timeout': must be a whole number"),
        ("defaults: 3\n", "nbdd.yaml:1:11: key 'defaults': must be a mapping from settings to values, but 3 is a"),
        ("devices:\n\ta: {}\n", "nbdd.yaml:2:1: the line is indented with a tab; use spaces."),
        ("devices:\n  a:\n  \turi: x\n", "nbdd.yaml:3:3: the line is indented with a tab; use spaces."),
        ("devices:\n  a:\n    uri: x\n\tb: y\n", "nbdd.yaml:4:1: the line is indented with a tab; use spaces."),
        ("a: 1\n---\nb: 2\n", "nbdd.yaml:2:1: a second YAML document begins here ('---'); one file holds one."),
        ("a: 1\n...\nb: 2\n", "nbdd.yaml:3:1: the file can't be read as YAML: something follows the end"),
        ("devices: {a: b: c}\n", "nbdd.yaml:1:15: the file can't be read as YAML: "),
        ("devices:\n  a: b: c\n", "nbdd.yaml:2:7: the file can't be read as YAML: a ': ' is out of place here"),
        ("devices:\n  a: {uri: x\n", "nbdd.yaml:2:6: the file can't be read as YAML: what begins here is never"),
        ("devices: 'x\n\n", "nbdd.yaml:1:10: the file can't be read as YAML: what begins here is never closed."),
        ("devices:\n  a: @x\n", "nbdd.yaml:2:6: the file can't be read as YAML: text that begins with this character"),
        ("devices:\n    a: {}\n  b: {}\n", "nbdd.yaml:3:3: the file can't be read as YAML: the indentation fits no"),
        ("devices: *all\n", "nbdd.yaml:1:10: key 'devices': '*all' refers to nothing; '&all' must come before it."),
        ("devices: &all [*all]\n", "nbdd.yaml:1:16: key 'devices': '*all' stands inside of what it refers to."),
        ("devices: !!omap []\n", "nbdd.yaml:1:10: key 'devices': the tag 'tag:yaml.org,2002:omap' means nothing"),
        ("devices:\n  [a]: {uri: x}\n", "nbdd.yaml:2:3: key 'devices': a key must be plain text."),
        ("devices:\n  a: {uri: nbd://h/x, <<: 3}\n", "nbdd.yaml:2:27: device 'a': key '<<': must be a mapping, or a"),
        ("devices:\n  a: {uri: nbd://h/x, <<: {}, <<: {}}\n", "nbdd.yaml:2:31: device 'a': key '<<': is given twice"),
        ("\0", "nbdd.yaml:1:1: the NUL character must not stand in a YAML file."),
        ("a: 1\nb: \x07\n", "nbdd.yaml:2:4: the control character '\\x07' must not stand in a YAML file."),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_once_with_line_and_column(write: Write, text: str, expected: str) -> None:
    found = problems(write(text))
    assert [line for line in found if not line.startswith(expected)] == []
    assert len(found) == 1


@pytest.mark.parametrize(
    "name", ["a b", "a/b", "bücher", "x" * 255, "x" * 64, ".a", "-a", '"a\\n"', '""', "?", '"\\u202e"', "~"]
)
def test_a_name_that_can_not_name_a_device_is_told_at_its_place(write: Write, name: str) -> None:
    (found,) = problems(write(f"devices:\n  {name}: {{uri: nbd://h/x}}\n"))
    assert found.startswith("nbdd.yaml:2:3: device ")
    assert "can't name a device: use 1 to 63 letters" in found


def test_a_key_that_stands_twice_is_told_with_both_lines(write: Write) -> None:
    (found,) = problems(write("devices:\n  a:\n    uri: nbd://h/x\n    timeout: 1\n    timeout: 2\n"))
    assert found == "nbdd.yaml:5:5: device 'a': key 'timeout': is given twice, first in line 4; remove one."


def test_a_device_that_stands_twice_in_a_file_is_told_with_both_lines(write: Write) -> None:
    (found,) = problems(write("devices:\n  a: {uri: nbd://h/x}\n  a: {uri: nbd://h/y}\n"))
    assert found == "nbdd.yaml:3:3: device 'a': is given twice, first in line 2; remove one."


def test_a_device_that_two_files_define_is_told_with_both_places(write: Write) -> None:
    one = "devices:\n  a: {uri: nbd://h/x}\n"
    directory = write(one, more="\n" + one)
    (found,) = problems(directory)
    assert found == (
        "devices.d/more.yaml:3:3: device 'a': is already defined at nbdd.yaml:2:3; a name stands for one device."
    )


def test_two_devices_can_not_have_the_same_node(write: Write) -> None:
    directory = write(
        "devices:\n  a: {uri: nbd://h/x, device: /dev/nbd3}\n", more="devices: {b: {uri: nbd://h/y, device: /dev/nbd3}}"
    )
    (found,) = problems(directory)
    assert found == (
        "devices.d/more.yaml:1:39: device 'b': key 'device': /dev/nbd3 is already given to the device 'a'; "
        "choose another, or auto."
    )


def test_defaults_of_another_file_are_refused_as_nobody_could_tell_where_they_hold(write: Write) -> None:
    (found,) = problems(write(more="defaults: {timeout: 3}\n"))
    assert found == "devices.d/more.yaml:1:1: key 'defaults': belongs in nbdd.yaml, where it holds for all files."


def test_every_problem_of_every_file_is_told_in_the_order_of_the_lines(write: Write) -> None:
    directory = write(
        "defaults: {timeout: x}\ndevices:\n  a b: {uri: 'nbd://h:0/', timout: 1, device: /dev/nbd1}\n  c:\n",
        one="devices: [",
        two="devices:\n  a:\n    uri: nbds://h/x\n    device: /dev/nbd1\n    connections: 99\n  a: {}\n",
    )
    found = problems(directory)
    assert [line.split(": ")[0] for line in found] == [
        "nbdd.yaml:1:21",
        "nbdd.yaml:3:3",
        "nbdd.yaml:3:14",
        "nbdd.yaml:3:28",
        "nbdd.yaml:4:5",
        "devices.d/one.yaml:1:10",
        "devices.d/two.yaml:3:10",
        "devices.d/two.yaml:4:13",
        "devices.d/two.yaml:5:18",
        "devices.d/two.yaml:6:3",
    ]


def test_the_place_of_a_value_from_an_alias_or_a_merge_is_where_a_person_can_mend_it(write: Write) -> None:
    found = problems(write("devices:\n  a: &a\n    uri: nbd://h/x\n    timeout: x\n  b:\n    <<: *a\n  c: *a\n"))
    assert [line.split(": key")[0] for line in found] == [
        "nbdd.yaml:4:14: device 'a'",
        "nbdd.yaml:4:14: device 'b'",
        "nbdd.yaml:4:14: device 'c'",
    ]


def test_a_key_that_is_no_text_is_told_once_whatever_is_in_it(write: Write) -> None:
    (found,) = problems(write("devices:\n  ? {a: 010}\n  : {b: [!x 010]}\n"))
    assert found == "nbdd.yaml:2:5: key 'devices': a key must be plain text."


def test_a_byte_order_mark_takes_no_column(write: Write) -> None:
    (found,) = problems(write("\ufeffdevices: 3\n"))
    assert found.startswith("nbdd.yaml:1:10: key 'devices': ")


@pytest.mark.parametrize("name", ["nbdd.yml", "devices.d/a.yml"])
def test_a_file_with_the_wrong_ending_is_not_passed_over_in_silence(tmp_path: Path, name: str) -> None:
    (tmp_path / "devices.d").mkdir()
    (tmp_path / name).write_text(device())
    assert problems(tmp_path) == [f"{name}: the name must end in .yaml; rename the file."]


# ---- files that can't be read


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "nbdd.yaml").symlink_to("gone.yaml")
    (found,) = problems(tmp_path)
    assert found == "nbdd.yaml: can't be read: it is a symbolic link to 'gone.yaml', which does not exist."


def test_a_link_to_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "nbdd.yaml").symlink_to("nbdd.yaml")
    assert problems(tmp_path) == ["nbdd.yaml: can't be read: too many levels of symbolic links."]


def test_a_directory_a_pipe_and_a_device_in_place_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "nbdd.yaml").mkdir()
    (tmp_path / "devices.d").mkdir()
    os.mkfifo(tmp_path / "devices.d" / "pipe.yaml")
    (tmp_path / "devices.d" / "zero.yaml").symlink_to("/dev/zero")
    kind = "it is a device, a pipe or a socket, not a regular file."
    assert problems(tmp_path) == [
        "nbdd.yaml: can't be read: it is a directory, not a regular file.",
        f"devices.d/pipe.yaml: can't be read: {kind}",
        f"devices.d/zero.yaml: can't be read: {kind}",
    ]


def test_a_file_without_permission_is_told(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(device())

    def refuse(path: Path, _: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    # Tests may run as root, whom no file refuses.
    monkeypatch.setattr("nbdd.config.source.os.open", refuse)
    assert problems(directory) == ["nbdd.yaml: can't be read: permission denied."]


def test_a_file_in_place_of_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "devices.d").write_text("")
    assert problems(tmp_path) == ["devices.d: the directory can't be read: not a directory."]


@pytest.mark.parametrize(
    ("content", "place"),
    [(b"devices: {}\n# \xff\n", "2:3"), (b"\xff\xfed\0", "1:1"), ("é: é\n# ".encode() + b"\xe9", "2:3")],
)
def test_a_file_that_is_not_utf_8_is_told_with_the_place_of_the_byte(write: Write, content: bytes, place: str) -> None:
    (found,) = problems(write(content))
    assert found.startswith(f"nbdd.yaml:{place}: the byte 0x")
    assert found.endswith("is not UTF-8; save the file as UTF-8.")


def test_a_path_of_any_bytes_is_told_in_printable_characters(tmp_path: Path) -> None:
    directory = tmp_path / "devices.d"
    directory.mkdir()
    (directory / os.fsdecode(b"a\xff\n.yaml")).write_text("[")
    (found,) = problems(tmp_path)
    assert r"a\xff\n.yaml:1:1: " in found


def test_reading_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "nbdd.yaml").mkdir()
    (tmp_path / "devices.d").mkdir()
    (tmp_path / "devices.d" / "a.yaml").write_text("[")
    problems(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    problems(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- bounds


def test_a_file_that_is_too_large_is_refused_unread(write: Write) -> None:
    (found,) = problems(write(b"#" * (MAX_BYTES + 1)))
    assert found == "nbdd.yaml: is larger than 16 MiB; divide it into several files."


@pytest.mark.parametrize("text", ["[" * 100_000, "- " * 50_000 + "x", "{a: " * 50_000, "? " * 50_000])
def test_nesting_without_end_is_an_error_and_not_the_end_of_the_process(write: Write, text: str) -> None:
    found = problems(write(text))[-1]
    assert f"nested more than {MAX_DEPTH} deep" in found


def test_a_few_lines_of_aliases_can_not_become_a_billion_values(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)]
    (found,) = problems(write("\n".join(lines)))
    assert "the file holds more than 500000 values, aliases counted as what they stand for." in found


def test_a_few_lines_of_merges_can_not_either(write: Write) -> None:
    lines = ["a0: &a0 {b: 1, c: 2, d: 3}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 40)]
    (found,) = problems(write("\n".join(lines)))
    assert "more than 500000 values" in found


def test_more_problems_than_anybody_reads_are_cut_with_a_word_about_it(write: Write) -> None:
    found = problems(write("devices:\n" + "".join(f"  d{number}: x\n" for number in range(MAX_PROBLEMS + 500))))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[0].startswith("nbdd.yaml:2:")
    assert found[-2].startswith(f"nbdd.yaml:{MAX_PROBLEMS + 1}:")
    assert found[-1] == f"nbdd.yaml: there are more problems; these are the first {MAX_PROBLEMS}."


_TEXT = st.text(st.sampled_from(list("abdeiostuvcr:-[]{}&*<!|>'\"%@#?,~ \n\t0123/=.\\é\x85\u2028\ufeff")), max_size=60)
_LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "devices:",
                "defaults:",
                "  a:",
                "  a: &x",
                "    uri: nbd://h/x",
                "    <<: *x",
                "    timeout: 3",
                "  b: *x",
                "---",
                "...",
                "    - nbd://h/y",
                "    uri:",
                "  ? [a]",
                "    tls: {}",
                "    device: /dev/nbd3",
                "\t",
            ]
        ),
        _TEXT,
    ),
    max_size=12,
).map("\n".join)


@given(st.one_of(st.binary(max_size=80), _TEXT.map(str.encode), _LINES.map(str.encode)))
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_a_file_holds_the_answer_is_a_configuration_or_problems_with_places(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "nbdd.yaml").write_bytes(content)
    try:
        load(tmp_path)
    except InvalidConfig as error:
        for problem in error.problems:
            assert re.match(re.escape(f"{tmp_path}/nbdd.yaml:") + r"[1-9][0-9]*:[1-9][0-9]*: \S", problem), problem
            assert problem.isprintable()


# ---- nbdd --check


def test_a_check_of_a_good_directory_says_so_and_returns_0(write: Write) -> None:
    out = io.StringIO()
    directory = write(device(), more="devices: {b: {uri: nbd://h/x}}")
    assert check(directory, out) == 0
    assert out.getvalue() == f"{directory}: 2 devices in 2 files, all well.\n"


def test_a_check_of_a_bad_directory_prints_every_problem_and_returns_1(write: Write) -> None:
    out = io.StringIO()
    assert check(write("devices: {a: 3, b: 4}"), out) == 1
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[-1] == "2 problems."


def test_a_check_of_a_directory_that_is_not_there_returns_1(tmp_path: Path) -> None:
    out = io.StringIO()
    assert check(tmp_path / "none", out) == 1
    assert "none: the directory can't be read" in out.getvalue()


# ---- options of a call


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


def test_defaults_stand_in_for_options_that_are_not_given_but_nothing_attaches_at_boot(write: Write) -> None:
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
def test_a_wrong_option_is_an_error_with_a_name_and_a_sentence(
    options: dict[str, object], error: type[NbddError], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        definition_from_options("a", options)
    assert sentence in str(caught.value)
    assert type(caught.value) is error
    assert str(caught.value).isprintable()


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(InvalidArgs, match=r"(?s)timeout.*connections|connections.*timeout"):
        definition_from_options("a", {"uri": "nbd://h/x", "timeout": "x", "connections": 0})


def test_a_wrong_name_is_refused_before_anything_else() -> None:
    with pytest.raises(InvalidArgs, match="can't name a device"):
        definition_from_options("a/b", {"uri": "nope"})


def test_options_of_an_attach_change_what_they_name_and_nothing_else() -> None:
    definition = Definition(name="a", uri=(URI.parse("nbd://h/x"),), attach=Attach.BOOT, timeout=5, device=3)
    changed = options_with(definition, {"read-only": True, "timeout": 0, "device": "auto", "block-size": "auto"})
    assert changed.to_wire() == definition.to_wire() | {"read-only": True, "timeout": 0, "device": None}
    assert options_with(definition, {}) == definition


@pytest.mark.parametrize(
    "options", [{"uri": "nbd://h/y"}, {"attach": "boot"}, {"desktop": {}}, {"name": "b"}, {"timeout": -1}, {"x": 1}]
)
def test_options_of_an_attach_that_can_not_be_are_refused(options: dict[str, object]) -> None:
    definition = Definition(name="a", uri=(URI.parse("nbd://h/x"),))
    with pytest.raises(InvalidArgs, match="Option"):
        options_with(definition, options)


def test_encryption_asked_for_in_the_options_of_an_attach_is_refused_by_name() -> None:
    with pytest.raises(TLSFailed):
        options_with(Definition(name="a", uri=(URI.parse("nbd://h/x"),)), {"tls": {}})


# ---- what is shipped


def test_the_shipped_default_is_valid_and_attaches_nothing(write: Write) -> None:
    configuration = load(write((ROOT / "config" / "nbdd.yaml").read_bytes()))
    assert configuration.devices == {}
    assert configuration.defaults == {}


def test_the_shipped_default_is_valid_with_every_comment_undone(write: Write) -> None:
    text = (ROOT / "config" / "nbdd.yaml").read_text()
    _, begin, settings = text.partition("#defaults:")
    configuration = load(write(re.sub(r"(?m)^#", "", begin + settings)))
    assert list(configuration.devices) == ["backup", "media", "scratch"]
    assert configuration.devices["backup"].attach is Attach.BOOT
    assert set(configuration.defaults) >= {"timeout", "dead-timeout"}


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_each_example_is_valid_where_it_is_meant_to_go(tmp_path: Path, path: Path) -> None:
    (tmp_path / "devices.d").mkdir()
    (tmp_path / "devices.d" / path.name).write_bytes(path.read_bytes())
    assert load(tmp_path).devices


def _rules() -> dict[str, Any]:
    rules: dict[str, Any] = json.loads(data.read("nbdd.schema.json"))
    return rules


def test_the_schema_is_one_itself() -> None:
    jsonschema.Draft7Validator.check_schema(_rules())


def test_the_schema_tells_editors_every_key_with_its_unit_and_true_default() -> None:
    rules = _rules()
    defaults = {field.name.replace("_", "-"): field.default for field in fields(Definition)}
    for key, reference in rules["definitions"]["device"]["properties"].items():
        rule = rules["definitions"][reference["$ref"].rpartition("/")[2]]
        assert rule["description"].endswith(".")
        assert rule["errorMessage"].startswith("must be ")
        if "default" in rule:
            assert defaults[key] == (None if rule["default"] == "auto" else rule["default"])
        else:
            assert defaults[key] in (MISSING, None)
        for bound in ("minimum", "maximum"):
            if bound in rule:
                assert str(rule[bound]) in re.findall(r"\d+", rule["errorMessage"])
                assert str(rule[bound]) in re.findall(r"\d+", rule["description"])


def test_a_shipped_file_that_is_unknown_is_an_error_with_a_sentence() -> None:
    with pytest.raises(NbddError, match=r"is no file that nbdd ships"):
        data.read("../../etc/passwd")


def test_reading_the_shipped_files_needs_no_jsonschema_and_importing_config_does_not_load_it() -> None:
    read = "nbdd.data.read('nbdd.schema.json')"
    script = f"import sys, nbdd.config.loader, nbdd.data; {read}; sys.exit('jsonschema' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_a_file_is_read_alike_where_pyyaml_came_without_libyaml(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(device(timeout="3"), more="devices:\n  b: &b {uri: nbd://h/x}\n  c: {<<: *b, timeout: 010}\n")
    with_libyaml = problems(directory)
    monkeypatch.setattr("nbdd.config.values._LOADER", yaml.SafeLoader)
    assert problems(directory) == with_libyaml
